"""Panel recipes beyond the paper's, lists of the user, groups and what they are enriched in."""

import gc
import shutil
import weakref
from contextlib import contextmanager

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from scipy import sparse
from scipy.spatial import cKDTree
from scipy.stats import fisher_exact

import genar
from counted_sections import make_section, random_section
from genar.data import ReadOptions, SectionRef, Sections, contract, find_sections, read_places, read_sections
from genar.errors import InputError
from genar.genes import (
    RECIPES,
    Panel,
    Scales,
    group_names,
    listed_panel,
    over_representation,
    read_aliases,
    select_panel,
    selection,
)
from genar.genes.selection import _Moments, _of_genes

pytestmark = pytest.mark.filterwarnings("ignore:`n_top_genes` > number of normalized:UserWarning")
GENES = [f"G{i:02d}" for i in range(40)]


@pytest.fixture(scope="module")
def sections():
    return [random_section(GENES, f"S{i}", 60 + 10 * i, seed=i) for i in range(3)]


def test_highest_mean_is_pandas_own_order(sections):
    counts = pd.concat([pd.DataFrame(s.X.toarray(), columns=s.var_names) for s in sections])
    expected = sorted(counts.mean().nlargest(7).index)
    assert list(select_panel(sections, n_genes=7, recipe="highest_mean").genes) == expected


def test_highest_mean_weighs_spots_and_not_sections():
    long = make_section([[4, 1]] * 9, "AB", "S1")
    short = make_section([[0, 30]], "AB", "S2")
    assert select_panel([long, short], n_genes=1, recipe="highest_mean").genes == ("B",)  # 3.9 against 3.6
    short = make_section([[0, 26]], "AB", "S2")
    assert select_panel([long, short], n_genes=1, recipe="highest_mean").genes == ("A",)


@pytest.mark.parametrize("recipe", ["highest_mean", "hvg", "moran"])
def test_ties_go_by_name_and_dropped_and_lone_genes_never_come(recipe):
    rng = np.random.default_rng(0)
    column = rng.poisson(5, (30, 1))
    noise = rng.poisson(3, (30, 3))
    genes = ["B", "C", "A", "MT-CO1", "X", "Y", "Z"]
    one = make_section(np.hstack([column] * 4 + [noise]), genes, "S1")
    two = make_section(np.hstack([column] * 4 + [noise[:, :2]]), genes[:6], "S2")
    for n in (1, 2, 3):
        chosen = select_panel([one, two], n_genes=n, recipe=recipe).genes
        assert not set(chosen) & {"MT-CO1", "Z"}
        tied = [gene for gene in chosen if gene in "ABC"]
        assert tied == list("ABC")[: len(tied)]  # of equals, the first by name


def test_hvg_takes_the_genes_that_scanpy_marks(sections):
    for n in (5, 12):
        joined = sections[0].copy()
        joined.X = joined.X.astype(np.float32)
        sc.pp.normalize_total(joined)
        sc.pp.log1p(joined)
        sc.pp.highly_variable_genes(joined, n_top_genes=n)
        expected = set(joined.var_names[joined.var["highly_variable"]])
        found = set(select_panel(sections[:1], n_genes=n, recipe="hvg").genes)
        assert len(found) == n
        assert found <= expected  # scanpy marks all that tie at its cut


def test_hvg_prefers_what_varies_in_every_section(sections):
    parts = []
    for section in sections:
        part = section.copy()
        sc.pp.normalize_total(part)
        sc.pp.log1p(part)
        parts.append(part)
    joined = anndata.concat(parts, label="section", keys=list("abc"))
    sc.pp.highly_variable_genes(joined, n_top_genes=10, batch_key="section")
    expected = set(joined.var_names[joined.var["highly_variable"]])
    found = set(select_panel(sections, n_genes=10, recipe="hvg").genes)
    assert len(found & expected) >= 8  # scanpy's rank counts sections at its own cut, ours at 2,000 genes


def spatial_section(seed=0):
    """A gene that rises over the tissue, one in two halves, noise, and one that does not vary at a spot's total."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(12.0), np.arange(12.0))
    x, y = x.ravel(), y.ravel()
    noise = rng.poisson(2000, (4, 144))  # so deep that the others do not move a spot's total
    counts = np.stack([rng.poisson(3 + 4 * x), rng.poisson(np.where(y > 5, 60, 5)), *noise], axis=1)
    section = make_section(counts, ["RISE", "HALF", "N1", "N2", "N3", "N4"], f"S{seed}")
    section.obsm["spatial"] = np.stack([x, y], axis=1) * 100
    return section


def morans_i(section, gene):
    """By the formula, over the six nearest spots."""
    part = section.copy()
    part.X = part.X.astype(np.float32)
    sc.pp.normalize_total(part)
    sc.pp.log1p(part)
    z = part[:, gene].X.toarray().ravel()
    z = z - z.mean()
    tree = cKDTree(part.obsm["spatial"])
    total = sum(z[i] * z[j] for i, row in enumerate(tree.query(part.obsm["spatial"], 7)[1]) for j in row[1:])
    return len(z) / (6 * len(z)) * total / (z**2).sum()


def test_moran_finds_the_genes_with_a_pattern():
    sections = [spatial_section(0), spatial_section(1)]
    assert select_panel(sections, n_genes=2, recipe="moran").genes == ("HALF", "RISE")
    by_hand = {g: np.mean([morans_i(s, g) for s in sections]) for g in ("RISE", "HALF", "N1")}
    assert by_hand["HALF"] > 0.5
    assert by_hand["RISE"] > 0.3
    assert abs(by_hand["N1"]) < 0.2


def test_genes_that_cannot_be_ranked_are_not_taken():
    section = make_section([[1, 0, 5], [2, 0, 1], [3, 0, 7], [1, 0, 2]], ["A", "ZERO", "B"])
    with pytest.raises(InputError, match="can rank 2 of those common"):
        select_panel([section], n_genes=3, recipe="moran")


# --- lists of the user


def test_a_list_is_kept_in_its_order_and_missing_genes_are_named(sections):
    panel = listed_panel(Panel(("G05", "G01"), "mine.txt"), sections)
    assert panel.genes == ("G05", "G01")
    assert panel.sections == ("S0", "S1", "S2")
    with pytest.raises(InputError, match=r"2 of 3 genes are not measured in the 3 sections \(X1, X2\)"):
        listed_panel(Panel(("G05", "X1", "X2"), "mine.txt"), sections)


def test_aliases_are_used_on_request_alone(sections, tmp_path):
    (tmp_path / "names.tsv").write_text("# old new\nOLD\tG07\nG05\tG06\n")
    aliases = read_aliases(tmp_path / "names.tsv")
    assert listed_panel(Panel(("G05", "OLD"), "mine.txt"), sections, aliases).genes == ("G05", "G07")
    with pytest.raises(InputError, match="OLD"):
        listed_panel(Panel(("G05", "OLD"), "mine.txt"), sections)
    with pytest.raises(InputError, match="more than once"):  # both name one gene
        listed_panel(Panel(("G07", "OLD"), "mine.txt"), sections, aliases)
    (tmp_path / "names.tsv").write_text("OLD\n")
    with pytest.raises(InputError, match="line 1: expected two names, found 1"):
        read_aliases(tmp_path / "names.tsv")


# --- groups


def test_groups_of_a_scale_and_of_the_clusters():
    scales = Scales((2, 0, 1, 3), (1, 2, 4), (0, 0, 0, 1))
    assert group_names(scales, "ABCD", 0) == [("C", "A", "B", "D")]
    assert group_names(scales, "ABCD", 1) == [("C", "A"), ("B", "D")]
    assert group_names(scales, "ABCD") == [("C", "A", "B"), ("D",)]
    with pytest.raises(InputError, match="expected 0 to 2"):
        group_names(scales, "ABCD", 3)
    with pytest.raises(InputError, match="name a scale"):
        group_names(Scales((0, 1), (1, 2)), "AB")


def test_over_representation_is_fishers_test_and_benjamini_hochbergs_correction():
    rng = np.random.default_rng(1)
    background = [f"G{i}" for i in range(60)]
    groups = [background[:20], background[20:45], background[45:]]
    sets = {f"set{i}": [*rng.choice(background, 12, replace=False), "ELSEWHERE"] for i in range(5)}
    sets["early"] = background[:9]
    sets["nowhere"] = ["ELSEWHERE"]
    table = over_representation(groups, sets, background)
    assert (table["n_shared"] > 0).all()
    assert table.iloc[0][["group", "set", "n_shared", "n_set"]].tolist() == [0, "early", 9, 9]
    assert table["p"].is_monotonic_increasing
    everything = []
    for group in groups:
        for name, members in sets.items():
            inside, both = set(members) & set(background), set(members) & set(group)
            if inside:
                a, b, c = len(both), len(inside) - len(both), len(group) - len(both)
                everything.append(fisher_exact([[a, b], [c, 60 - a - b - c]], alternative="greater").pvalue)
                row = table[(table["group"] == groups.index(group)) & (table["set"] == name)]
                assert len(row) == (a > 0)
                if a:
                    assert row["p"].item() == pytest.approx(everything[-1])
                    assert row["expected"].item() == pytest.approx(len(inside) * len(group) / 60)
    ordered = np.sort(everything)
    q = np.minimum.accumulate((ordered * len(ordered) / np.arange(1, len(ordered) + 1))[::-1])[::-1]
    np.testing.assert_allclose(table["q"].min(), q[0])
    for p, found in zip(table["p"], table["q"], strict=True):
        assert found == pytest.approx(min(1, q[np.searchsorted(ordered, p * (1 - 1e-9))]))


def test_sets_of_other_names_are_refused():
    with pytest.raises(InputError, match="same kind of name"):
        over_representation([["A"]], {"s": ["ENSG1"]}, ["A", "B"])


@pytest.fixture
def folder(sections, tmp_path):
    for section in sections:
        section.write_h5ad(tmp_path / f"{contract.name(section)}.h5ad")
    return tmp_path


@pytest.mark.parametrize("recipe", RECIPES)
def test_sections_that_are_read_again_select_the_same(folder, sections, recipe):
    of_files = Sections(find_sections(folder), ReadOptions(mpp=0.5), held=0)
    assert len(of_files) == 3
    assert select_panel(of_files, n_genes=9, recipe=recipe) == select_panel(sections, n_genes=9, recipe=recipe)


@pytest.fixture
def alive(monkeypatch):
    """How many sections' counts there are after each reading; Python does not look for what holds itself."""
    read, counts, numbers = SectionRef.read, [], []

    def watched(ref, *args, **kwargs):
        section = read(ref, *args, **kwargs)
        counts.append(weakref.ref(section.X))
        numbers.append(sum(x() is not None for x in counts))
        return section

    monkeypatch.setattr(SectionRef, "read", watched)
    gc.disable()
    yield numbers
    gc.enable()


@pytest.mark.parametrize("recipe", [one for one in RECIPES if one != "hvg"])
def test_selection_holds_one_section_at_a_time(folder, alive, recipe):
    select_panel(Sections(find_sections(folder), ReadOptions(mpp=0.5), held=0), n_genes=9, recipe=recipe)
    assert len(alive) == 6
    assert max(alive) <= 2  # the one that was dealt with goes when the next is there


def test_places_are_read_one_section_at_a_time(folder, sections, alive):
    read = read_places(folder, mpp=0.5)
    assert len(alive) == 3
    assert max(alive) <= 2
    for one, whole in zip(read, sections, strict=True):
        assert (contract.name(one), one.n_vars) == (contract.name(whole), 0)
        np.testing.assert_array_equal(contract.coords_px(one), contract.coords_px(whole))


def test_sections_are_held_as_far_as_they_fit(folder, sections):
    x = sections[0].X
    of_files = Sections(find_sections(folder), ReadOptions(mpp=0.5), held=x.data.nbytes + x.indices.nbytes + 1000)
    first = list(of_files)
    again = list(of_files)
    assert [one is other for one, other in zip(first, again, strict=True)] == [True, False, False]
    for one, other in zip(first, again, strict=True):
        assert contract.digest(one) == contract.digest(other)


def test_a_bar_is_told_of_every_section_in_both_rounds(sections):
    told = []

    @contextmanager
    def bar(label, total):
        yield lambda done, total: told.append((label, done, total))

    select_panel(sections, n_genes=9, bar=bar)
    assert told == [("selecting genes", done, 6) for done in range(1, 7)]


def test_entries_of_one_place_are_one_count(sections):
    """A csr matrix may hold a count in parts, which squared one by one would give another variance."""
    whole = sparse.csr_matrix(sections[0].X)
    indptr, indices = 2 * whole.indptr, np.repeat(whole.indices, 2)
    data = np.column_stack([np.floor(whole.data / 2), np.ceil(whole.data / 2)]).ravel()
    parts = sparse.csr_matrix((data, indices, indptr), shape=whole.shape)
    assert not parts.has_canonical_format
    in_parts = sections[0].copy()
    in_parts.X = parts
    moments = []
    for section in (sections[0], in_parts):
        moments.append(_Moments(section.n_vars))
        moments[-1].add(_of_genes(section, list(section.var_names)))
    np.testing.assert_allclose(moments[0].variance, moments[1].variance)
    assert in_parts.X.nnz == 2 * whole.nnz  # the user's matrix stays


@pytest.mark.parametrize(
    ("names", "hint"),
    [(lambda genes: [genes[0].lower(), "NOWHERE"], "perhaps {0}"), (lambda genes: ["ENSG00000141736"], "Ensembl ids")],
)
def test_missing_genes_are_named_with_what_they_may_be(sections, names, hint):
    genes = list(sections[0].var_names)
    panel = Panel(tuple(names(genes)), "list")
    for look in (lambda: listed_panel(panel, sections), lambda: contract.counts(sections[0], list(panel.genes))):
        with pytest.raises(InputError, match=hint.format(genes[0])):
            look()


def line_section(counts, name="A"):
    """A section of these counts [N, G] on a line of spots."""
    counts = np.asarray(counts)
    adata = anndata.AnnData(
        sparse.csr_matrix(counts, dtype=np.float32),
        obs=pd.DataFrame(index=[f"spot{i}" for i in range(len(counts))]),
        var=pd.DataFrame(index=[f"G{i}" for i in range(counts.shape[1])]),
    )
    adata.obsm[contract.SPATIAL] = np.stack([100.0 * np.arange(len(counts)), np.zeros(len(counts))], axis=1)
    adata.uns[contract.GENAR] = {contract.SECTION: name, contract.MPP: 0.5}
    return adata


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("counts", [np.full((60, 1), 4), np.full((60, 30), 4), np.zeros((60, 12))])
def test_genes_that_do_not_vary_are_no_traceback(recipe, counts):
    if recipe == "highest_mean" and counts.any():
        assert len(select_panel([line_section(counts)], n_genes=1, recipe=recipe).genes) == 1
    else:
        with pytest.raises(InputError, match=r"^panel: "):
            select_panel([line_section(counts)], n_genes=1, recipe=recipe)


def test_moments_are_those_of_all_spots():
    random = np.random.default_rng(0)
    parts = [random.poisson(random.gamma(1, 4, 40), (n, 40)) for n in (90, 7, 1)]
    moments = _Moments(40)
    for part in parts:
        moments.add(line_section(part))
    whole = np.concatenate(parts)
    np.testing.assert_allclose(moments.mean, whole.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, whole.var(axis=0, ddof=1), rtol=1e-9)


def test_counts_beside_logarithms_are_no_logarithms(recwarn):
    one = line_section(np.random.default_rng(0).poisson(3, (60, 30)))
    one.uns["log1p"] = {"base": None}
    select_panel([one], n_genes=10, recipe="clean")
    assert not [warning for warning in recwarn if "log" in str(warning.message)]


@pytest.mark.parametrize("recipe", ["hvg", "moran"])
def test_a_section_without_counts_chooses_no_gene(tissue, recipe):
    sections = read_sections(tissue)
    empty = sections[1].copy()
    empty.X = empty.X * 0
    empty.X.eliminate_zeros()
    assert (
        select_panel([sections[0], empty], n_genes=5, recipe=recipe).genes
        == select_panel([sections[0][:, sections[0].var_names], empty], n_genes=5, recipe=recipe).genes
    )
    with pytest.raises(InputError, match="can rank no gene"):
        select_panel([empty], n_genes=5, recipe=recipe)


def test_a_panel_is_selected_without_images(tissue, tmp_path):
    folder = shutil.copytree(tissue, tmp_path / "hest", ignore=shutil.ignore_patterns("wsis"))
    assert len(select_panel(read_sections(folder), n_genes=20).genes) == 20


@pytest.fixture(scope="module")
def simulated(tissue):
    return read_sections(tissue)


def test_the_panel_leaves_the_threads_alone(simulated, monkeypatch):
    """What numba does where scanpy calls it."""
    normalised = selection._normalised
    monkeypatch.setattr(selection, "_normalised", lambda section: torch.set_num_threads(2) or normalised(section))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        genar.select_panel([simulated[0]], recipe="moran", n_genes=5)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
