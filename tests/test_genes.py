"""Panels from files, the two recipes of the paper and its successor, and the scales that genes are pooled to."""

import json

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counted_sections import make_section, random_section
from genar.data import contract, read_section
from genar.errors import InputError
from genar.genes import (
    PAPER_N_TOP,
    Panel,
    Scales,
    default_sizes,
    fit_scales,
    order_by_sets,
    read_aliases,
    read_gene_sets,
    read_panel,
    select_panel,
)

pytestmark = pytest.mark.filterwarnings("ignore:`n_top_genes` > number of normalized:UserWarning")  # few genes
BOM = "﻿"


# --- Panel


def test_panel_survives_the_disk(tmp_path):
    panel = Panel(("B", "A", "HLA-A"), "clean", ("S1", "S2"), 17)
    panel.write(tmp_path / "panel.json")
    assert read_panel(tmp_path / "panel.json") == panel
    assert json.loads((tmp_path / "panel.json").read_text())["sha256"] == panel.sha256


def test_hash_sees_the_names_and_their_order():
    hashes = {Panel(genes, "x").sha256 for genes in (("A", "B"), ("B", "A"), ("AB",), ("A", "B", "C"))}
    assert len(hashes) == 4
    assert Panel(("A", "B"), "x").sha256 == Panel(("A", "B"), "y", ("S1",), 3).sha256


def test_panel_from_text(tmp_path):
    (tmp_path / "mine.txt").write_text("# my genes\nVIM\n\n  KRT5  # basal\nACTB\n")
    assert read_panel(tmp_path / "mine.txt") == Panel(("VIM", "KRT5", "ACTB"), "mine.txt")


def test_panel_from_a_bare_json_list(tmp_path):
    (tmp_path / "mine.json").write_text('["VIM", "KRT5"]')
    assert read_panel(tmp_path / "mine.json") == Panel(("VIM", "KRT5"), "mine")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.json", '{"genes": ["A", "C"], "recipe": "x", "sha256": "00"}', "sha256; it was altered"),
        ("p.json", '{"genes": ["A", "A"], "recipe": "x"}', "'A' more than once"),
        ("p.json", '{"genes": [], "recipe": "x"}', "at least one gene"),
        ("p.json", '{"recipe": "x"}', "not a panel.*genes"),
        ("p.json", '{"genes": ["A"]}', "not a panel.*recipe"),
        ("p.json", '{"genes": ["A"', "p.json"),
        ("p.json", '{"genes": 3, "recipe": "x"}', "not a panel"),
        ("p.json", '{"genes": [1, 2], "recipe": "x"}', "not a panel"),
        ("p.json", '{"genes": "KRT5", "recipe": "x"}', "not a panel"),
        ("p.txt", "A\nB\nA\n", "'A' more than once"),
        ("p.txt", "# nothing\n\n", "at least one gene"),
        ("p.txt", b"\xff\xfe\x00", "not a readable panel"),
        ("p.txt", None, "no such file; expected a panel"),
    ],
)
def test_what_is_no_panel_is_refused_naming_the_file(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=says) as caught:
        read_panel(path)
    assert str(path) in str(caught.value)


def expected_table(sections):
    """Candidates in alphabetical order with their ranks (1 is the largest) over all spots."""
    common = sorted(set.intersection(*(set(section.var_names) for section in sections)))
    variable = set()
    for section in sections:
        data = section[:, common].copy()
        sc.pp.filter_cells(data, min_counts=1)
        sc.pp.filter_genes(data, min_counts=1)
        sc.pp.normalize_total(data)
        sc.pp.log1p(data)
        sc.pp.highly_variable_genes(data, n_top_genes=min(2000, data.n_vars))
        variable |= set(data.var_names[data.var["highly_variable"]])
    genes = [gene for gene in common if gene in variable and not gene.startswith(("MT", "mt", "RPS", "RPL"))]
    counts = pd.concat([pd.DataFrame(contract.counts(section, genes), columns=genes) for section in sections])
    ranks = {"mean": counts.mean(), "std": counts.std(ddof=1)}
    return pd.DataFrame({key: values.rank(ascending=False, method="first") for key, values in ranks.items()})


@pytest.fixture(scope="module")
def sections():
    genes = [f"G{i:03d}" for i in range(80)]
    return [random_section(genes, "S1", seed=1), random_section([*genes[10:], "EXTRA"], "S2", seed=2)]


@pytest.mark.parametrize("n_top", [20, 45, 500])
def test_paper_recipe_intersects_both_tops(sections, n_top):
    table = expected_table(sections)
    expected = tuple(table.index[(table["mean"] <= n_top) & (table["std"] <= n_top)])
    panel = select_panel(sections, n_genes=None, recipe="paper", n_top=n_top)
    assert panel == Panel(expected, "paper", ("S1", "S2"), n_top)
    assert select_panel(sections, n_genes=5, recipe="paper", n_top=n_top).genes == expected[:5]


@pytest.mark.parametrize("n_genes", [1, 10, 33, 70])
def test_clean_recipe_takes_the_least_cut_and_the_highest_means(sections, n_genes):
    table = expected_table(sections)
    n_top = next(n for n in range(1, 100) if ((table["mean"] <= n) & (table["std"] <= n)).sum() >= n_genes)
    inside = table[(table["mean"] <= n_top) & (table["std"] <= n_top)]
    expected = tuple(sorted(inside["mean"].nsmallest(n_genes).index))
    assert select_panel(sections, n_genes=n_genes) == Panel(expected, "clean", ("S1", "S2"), n_top)


def test_hand_made_ranks():
    # mean 9, 6, 5, 1 for A, B, C, D; standard deviation highest for C, then A, then D, then B
    counts = {"A": [6, 12, 6, 12], "B": [6, 6, 6, 6], "C": [0, 10, 0, 10], "D": [0, 2, 0, 2]}
    section = make_section(np.transpose(list(counts.values())), counts)
    assert select_panel([section], n_genes=None, recipe="paper", n_top=2).genes == ("A",)
    assert select_panel([section], n_genes=None, recipe="paper", n_top=3).genes == ("A", "C")
    assert select_panel([section], n_genes=2) == Panel(("A", "C"), "clean", ("S1",), 3)


def test_surplus_is_cut_by_mean_and_not_by_alphabet():
    # Within the top 3 of both lie A, B, C, all at once, as the last of each ranking holds the first of the other
    counts = {"A": [1, 1, 1, 31], "B": [9, 9, 9, 11], "C": [3, 3, 3, 27], "Z": [0, 0, 0, 1]}
    section = make_section(np.transpose(list(counts.values())), counts)  # means 8.5, 9.5, 9, .25; spread A C B Z
    assert select_panel([section], n_genes=2) == Panel(("B", "C"), "clean", ("S1",), 3)


@pytest.mark.parametrize("n_genes", [1, 3, 9, 20, 31])
def test_ties_keep_the_order_of_the_names(n_genes):
    single = random_section([f"G{i:02d}" for i in range(40)], seed=5)
    names = [f"{gene}{twin}" for gene in single.var_names for twin in "ba"]
    twins = make_section(np.repeat(contract.counts(single), 2, axis=1), names)
    chosen = select_panel([twins], n_genes=n_genes).genes
    table = expected_table([twins])
    assert chosen == select_panel([twins[:, ::-1].copy()], n_genes=n_genes).genes
    assert [gene for gene in chosen if gene.endswith("b") and gene[:-1] + "a" not in chosen] == []
    assert set(chosen) <= set(table.index)


def test_prefixes_are_dropped_case_sensitively():
    dropped = ["MT-CO1", "mt-Co1", "RPS3", "RPL5", "MTA1", "RPLP0", "mtor"]  # as the recipe says, MTA1 goes as well
    kept = ["Rps3", "Mt1", "Rpl5", "AMT", "ARPS", "VIM"]
    panel = select_panel([random_section(dropped + kept)], n_genes=None)
    assert panel.genes == tuple(sorted(kept))


@pytest.mark.parametrize("recipe", ["clean", "paper"])
def test_more_genes_than_there_are(sections, recipe):
    with pytest.raises(InputError, match="200 genes asked for, only 70 are variable and common to the 2 sections"):
        select_panel(sections, n_genes=200, recipe=recipe)


def test_paper_recipe_with_too_low_a_cut(sections):
    with pytest.raises(InputError, match=r"--n-top 10 leaves \d of 50"):
        select_panel(sections, n_genes=50, recipe="paper", n_top=10)


@pytest.mark.parametrize("n_genes", [0, -3])
@pytest.mark.parametrize("recipe", ["clean", "paper"])
def test_a_panel_of_no_genes_is_refused(sections, recipe, n_genes):
    with pytest.raises(InputError, match="at least one gene"):
        select_panel(sections, n_genes=n_genes, recipe=recipe)


def test_what_cannot_be_selected_from_is_refused(sections):
    with pytest.raises(InputError, match="recipe 'best' is not known; expected one of clean, paper"):
        select_panel(sections, recipe="best")
    with pytest.raises(InputError, match="no gene in common"):
        select_panel([sections[0], random_section(["ENSG1", "ENSG2"], "S3")])
    with pytest.raises(InputError, match="no variable gene is left"):
        select_panel([random_section(["MT-CO1", "RPS3", "RPL5"])])
    with pytest.raises(InputError, match="no section"):
        select_panel([])


def test_highly_variable_genes_are_scanpys():
    genes = [f"G{i:04d}" for i in range(2300)]
    section = random_section(genes, n_spots=40, seed=4)
    expected = expected_table([section])
    assert 1900 < len(expected) < 2100  # 2000 were asked for, so some are left out
    assert select_panel([section], n_genes=None).genes == tuple(expected.index)


def test_spots_without_counts_are_taken_and_sections_left_as_they_were(sections):
    empty = sections[0].copy()
    empty.X = empty.X.multiply(np.arange(empty.n_obs)[:, None] != 3).tocsr()
    before = contract.counts(empty).copy()
    assert len(select_panel([empty], n_genes=20).genes) == 20
    np.testing.assert_array_equal(contract.counts(empty), before)
    assert "highly_variable" not in empty.var


def test_clean_panel_knows_nothing_of_a_section_it_was_not_given(tissue_sections):
    training, held_out = tissue_sections
    before = select_panel([training], n_genes=30)
    assert before.sections == ("SIM1",)
    held_out.X = held_out.X * 0
    assert select_panel([training], n_genes=30) == before
    assert select_panel(tissue_sections, n_genes=30) != before


@pytest.mark.real
def test_paper_recipe_on_a_real_section(shared):
    section = read_section(f"{shared / 'data' / 'her2st'}:SPA141")
    table = expected_table([section])
    expected = table.index[(table["mean"] <= PAPER_N_TOP) & (table["std"] <= PAPER_N_TOP)]
    panel = select_panel([section], n_genes=None, recipe="paper")
    assert panel.genes == tuple(expected)
    assert panel.n_top == PAPER_N_TOP


def make_scales(n_genes, sizes=None, seed=0):
    order = np.random.default_rng(seed).permutation(n_genes)
    return Scales(tuple(order.tolist()), default_sizes(n_genes) if sizes is None else sizes)


@pytest.mark.parametrize("n_genes", [1, 2, 7, 50, 200, 203])
def test_pooling_conserves_totals(n_genes):
    scales = make_scales(n_genes)
    counts = np.random.default_rng(1).poisson(20, (5, n_genes))
    for k in range(scales.n_scales):
        pooled = scales.pool(counts, k)
        assert pooled.shape == (5, scales.sizes[k])
        np.testing.assert_allclose((pooled * np.diff(scales.edges(k))).sum(axis=1), counts.sum(axis=1), rtol=1e-12)
    np.testing.assert_array_equal(scales.pool(counts, scales.n_scales - 1)[:, scales.inverse], counts)


@given(sizes=st.sets(st.integers(1, 300), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_every_gene_has_one_group_and_every_group_one_parent(sizes):
    sizes = tuple(sorted(sizes))
    scales = make_scales(sizes[-1], sizes)
    for k, size in enumerate(sizes):
        edges = scales.edges(k)
        assert (edges[0], edges[-1], len(edges)) == (0, scales.n_genes, size + 1)
        assert (np.diff(edges) >= 1).all()
        if k:
            parent = scales.parent(k)
            assert len(parent) == size
            assert set(parent) == set(range(sizes[k - 1]))  # no group of the coarser scale is without a child
            assert (np.diff(parent) >= 0).all()


@pytest.mark.parametrize("n_genes", [12, 50, 200])
def test_a_parent_holds_the_genes_of_its_children_where_sizes_divide(n_genes):
    sizes = tuple(size for size in default_sizes(n_genes) if n_genes % size == 0)
    chain = [sizes[-1]]
    for size in reversed(sizes[:-1]):
        if chain[0] % size == 0:
            chain.insert(0, size)
    scales = make_scales(n_genes, tuple(chain))
    for k in range(1, scales.n_scales):
        parent_of_gene = np.repeat(np.arange(scales.sizes[k - 1]), np.diff(scales.edges(k - 1)))
        np.testing.assert_array_equal(np.repeat(scales.parent(k), np.diff(scales.edges(k))), parent_of_gene)


def test_parents_of_100_groups_among_40():
    scales = make_scales(200)
    assert scales.sizes == (1, 4, 8, 40, 100, 200)
    assert scales.parent(4).tolist() == [t * 40 // 100 for t in range(100)]
    assert scales.parent(4)[:6].tolist() == [0, 0, 0, 1, 1, 2]
    assert scales.parent(5).tolist() == [t // 2 for t in range(200)]
    with pytest.raises(InputError, match="no coarser scale"):
        scales.parent(0)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 10, 40, 100, 200])
def test_pooling_is_adaptive_average_pooling_where_the_size_divides(size):
    scales = make_scales(200, tuple(sorted({size, 200})))
    counts = np.random.default_rng(2).poisson(20, (3, 200))
    ordered = torch.from_numpy(counts[:, list(scales.order)]).double()
    expected = torch.nn.functional.adaptive_avg_pool1d(ordered, size).numpy()
    np.testing.assert_allclose(scales.pool(counts, 0), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("order", "sizes"),
    [
        ((0, 1, 2), ()),
        ((0, 1, 2), (0, 3)),
        ((0, 1, 2), (1, 1, 3)),
        ((0, 1, 2), (2, 1, 3)),
        ((0, 1, 2), (1, 2)),
        ((0, 1, 2), (1, 4)),
        ((0, 1, 1), (1, 3)),
        ((1, 2, 3), (1, 3)),
        ((), ()),
    ],
)
def test_invalid_scales_are_refused(order, sizes):
    with pytest.raises(InputError, match="scales:"):
        Scales(order, sizes)


@pytest.mark.parametrize("n_genes", [*range(1, 31), 50, 200, 203, 5000])
def test_default_sizes_are_valid(n_genes):
    sizes = default_sizes(n_genes)
    assert Scales(tuple(range(n_genes)), sizes).sizes == sizes
    assert sizes[0] == 1


def test_scales_survive_a_dict():
    scales = fit_scales(np.random.default_rng(0).poisson(5, (30, 40)))
    assert Scales.from_dict(json.loads(json.dumps(scales.to_dict()))) == scales


@pytest.mark.parametrize("n_genes", [1, 2, 3, 11, 60, 203])
def test_order_is_a_permutation_and_repeats(n_genes):
    counts = np.random.default_rng(n_genes).poisson(5, (25, n_genes))
    scales = fit_scales(counts)
    assert sorted(scales.order) == list(range(n_genes))
    assert len(scales.clusters) == n_genes
    assert (np.diff(scales.clusters) >= 0).all()
    assert fit_scales(counts) == scales


def test_genes_that_rise_together_lie_together():
    rng = np.random.default_rng(0)
    programs = rng.gamma(1, 10, (200, 4))
    membership = rng.permutation(np.repeat(np.arange(4), 9))
    scales = fit_scales(rng.poisson(programs[:, membership]))
    found = membership[list(scales.order)].reshape(4, 9)
    assert (found == found[:, :1]).all()
    assert len(set(scales.clusters)) == 4  # clusters of 10 genes or fewer are not divided again
    assert all(list(block) == sorted(block) for block in np.reshape(scales.order, (4, 9)))


def test_a_constant_gene_and_constant_counts_are_ordered_too():
    counts = np.random.default_rng(0).poisson(5, (20, 30))
    counts[:, 7] = 3
    assert sorted(fit_scales(counts).order) == list(range(30))
    assert fit_scales(np.full((20, 30), 4)).order == tuple(range(30))


def test_depth_of_a_gene_does_not_change_its_place():
    counts = np.random.default_rng(0).poisson(5, (40, 30))
    scaled = counts * np.random.default_rng(1).integers(1, 9, 30)
    assert fit_scales(scaled).order == fit_scales(counts).order


@pytest.mark.real
def test_pooled_targets_are_those_of_the_released_code(shared):
    with np.load(shared / "golden" / "genar_losses.npz") as golden:
        scales = Scales(tuple(range(200)), (1, 4, 8, 40, 100, 200))
        for k in range(5):
            np.testing.assert_allclose(scales.pool(golden["counts"], k), golden[f"pooled_{k}"], rtol=1e-6)


# -- other orders ---------------------------------------------------------------------------------------------------


def test_random_order_is_one_and_repeats():
    counts = np.ones((3, 30))
    first, again = (fit_scales(counts, order="random") for _ in range(2))
    assert first == again
    assert first.order != tuple(range(30))


def test_gene_sets_order_the_panel(tmp_path):
    (tmp_path / "sets.gmt").write_text("immune\tsome words\tCD3\tCD4\n\nother\tx\tKRT8\tCD3\tNOTHERE\n")
    sets = read_gene_sets(tmp_path / "sets.gmt")
    assert sets == {"immune": ("CD3", "CD4"), "other": ("KRT8", "CD3", "NOTHERE")}
    order = order_by_sets(["ACTB", "KRT8", "CD4", "CD3"], sets)
    assert order == (3, 2, 1, 0)  # in no set: last
    assert fit_scales(np.ones((2, 4)), (2, 4), order=order).order == order
    with pytest.raises(InputError, match="none of the panel's 1 genes"):
        order_by_sets(["XIST"], sets)


@pytest.mark.parametrize("text", ["", "name only", "a\tb\tG1\na\tb\tG2", "a\tb\t \t"])
def test_what_is_no_gmt_file_is_refused(text, tmp_path):
    (tmp_path / "sets.gmt").write_text(text)
    with pytest.raises(InputError, match=r"sets\.gmt"):
        read_gene_sets(tmp_path / "sets.gmt")


def test_lists_from_windows_begin_with_their_first_gene(tmp_path):
    for name, text in (("p.txt", "EPCAM\nGNAS\n"), ("p.json", '{"genes": ["EPCAM", "GNAS"], "recipe": "own"}')):
        (tmp_path / name).write_text(BOM + text, encoding="utf-8")
        assert read_panel(tmp_path / name).genes == ("EPCAM", "GNAS")
    (tmp_path / "other.txt").write_text(f"{BOM}HER2 ERBB2\n", encoding="utf-8")
    assert read_aliases(tmp_path / "other.txt") == {"HER2": "ERBB2"}
    (tmp_path / "sets.gmt").write_text(f"{BOM}one\tof mine\tEPCAM\tGNAS\n", encoding="utf-8")
    assert read_gene_sets(tmp_path / "sets.gmt") == {"one": ("EPCAM", "GNAS")}
