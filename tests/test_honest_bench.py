"""A bench is of the data, files and recipe that it names, and says what its methods saw."""

import shutil

import anndata
import pandas as pd
import pytest

from genar import bench
from genar.errors import InputError
from toy_bench import HEAD, RIDGE, read, run_recipe

TINY = "width: 16, depth: 1, heads: 2, components: 4, max_epochs: 1, samples: 2, scales: [3, 12]"


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.mark.parametrize("section", ["A", "B"])
def test_runs_made_with_other_sections_are_refused_before_anything_runs(section, bench_tissue, features, tmp_path):
    """Held out or trained on: the runs that are there would stand beside runs of other data."""
    data = shutil.copytree(bench_tissue, tmp_path / "data")
    run_recipe(read(tmp_path, HEAD + RIDGE), data, tmp_path / "out", features)
    edited = anndata.read_h5ad(data / "st" / f"{section}.h5ad")
    edited.X = edited.X * 2
    edited.write_h5ad(data / "st" / f"{section}.h5ad")
    said = []
    with pytest.raises(InputError, match=f"made with another section {section} than the data hold now"):
        run_recipe(
            read(tmp_path, HEAD + RIDGE + "  - {name: mean, model: mean}\n"), data, tmp_path / "out", features, said
        )
    assert len(said) == 1  # what was planned, and no run
    run_recipe(read(tmp_path, HEAD + RIDGE), bench_tissue, tmp_path / "out", features)


def test_an_edited_file_of_gene_sets_is_another_run(bench_tissue, features, tmp_path):
    recipe_text = f"{HEAD}  - {{name: sets, model: genar, set: {{order: {tmp_path / 'sets.gmt'}, {TINY}}}}}\n"
    genes = list(anndata.read_h5ad(bench_tissue / "st" / "A.h5ad").var_names)
    (tmp_path / "sets.gmt").write_text("\t".join(["one", "-", *genes]) + "\n")
    first = read(tmp_path, recipe_text)
    run_recipe(first, bench_tissue, tmp_path / "out", features)
    assert not bench.plan_runs(first, bench_tissue, tmp_path / "out").waiting
    (tmp_path / "sets.gmt").write_text("\t".join(["one", "-", *genes[::-1]]) + "\n")
    assert len(bench.plan_runs(first, bench_tissue, tmp_path / "out").waiting) == 1
    (tmp_path / "sets.gmt").unlink()
    with pytest.raises(InputError, match=r"method 'sets': .*sets.gmt: no such file"):
        read(tmp_path, recipe_text)


def test_folders_of_runs_without_gene_sets_keep_their_names(tmp_path):
    plan = bench.plan_runs(bench.read_recipe("table3"), None, tmp_path)
    assert plan.runs[0].plan.out.parent.name == "genar-f63c12ab"
    assert plan.runs[4].plan.out.parent.name == "genar-b5321264"


@pytest.fixture(scope="module")
def made(bench_tissue, features, tmp_path_factory):
    """Two methods with each of two sections held out."""
    out = tmp_path_factory.mktemp("bench")
    seen = "  - {name: seen, model: ridge, set: {widths_um: [112, 309], context_spots: [6]}}\n"
    others = f"{seen}  - {{name: mean, model: mean}}\ncompare: [[seen, ridge], [mean, ridge]]\n"
    text = HEAD.replace("held_out: [A]\n", "") + RIDGE + others
    return run_recipe(read(out, text), bench_tissue, out / "out", features), out


def test_tables_say_what_each_method_saw(made):
    _, out = made
    runs = pd.read_csv(out / "out/runs.csv").set_index("method")["inputs"]
    assert set(runs["ridge"]) == {"112 um"}
    assert set(runs["seen"]) == {"112 + 309 um, mean of 6 spots"}
    assert "| seen | 112 + 309 um, mean of 6 spots |" in (out / "out/table.md").read_text()
    assert pd.read_csv(out / "out/table.csv", index_col=0).loc["seen", "inputs"] == "112 + 309 um, mean of 6 spots"


def test_tables_have_intervals_across_sections(made):
    _, out = made
    for name, row in (("table", "seen"), ("differences", "seen minus ridge")):
        values = pd.read_csv(out / f"out/{name}.csv", index_col=0).loc[row]
        for metric in ("mse", "pcc_fixed"):
            assert values[f"{metric}_across_low"] < values[metric] < values[f"{metric}_across_high"]
    told = (out / "out/table.md").read_text()
    assert "Across sections" in told
    assert "from 2 sections they are too narrow" in told
    assert told.count("| seen minus ridge |") == 2


def test_one_section_has_none_across_sections(bench_tissue, features, tmp_path):
    result = run_recipe(read(tmp_path, HEAD + RIDGE), bench_tissue, tmp_path / "out", features)
    assert not result.table.filter(like="across").size
    assert "Across sections" not in (tmp_path / "out/table.md").read_text()


def test_tables_count_the_undefined_genes(made):
    """The training mean is constant: no gene of it has a PCC."""
    result, out = made
    assert result.table.loc["mean", "n_undefined"] == 12
    assert result.table.loc["ridge", "n_undefined"] < 12
    lines = (out / "out/table.md").read_text().splitlines()
    head, row = (next(line for line in lines if line.startswith(start)).split("|") for start in ("| method", "| mean"))
    assert row[head.index(" n undef. ")] == " 12 "
    assert row[head.index(" PCC fixed ")] == " 0.000 "  # by definition: no interval
    assert pd.read_csv(out / "out/by_section.csv", index_col=[0, 1]).loc[("mean", "A"), "n_undefined"] == 12


def test_two_recipes_in_one_folder_keep_their_tables(bench_tissue, features, tmp_path):
    out, compared = tmp_path / "out", "  - {name: mean, model: mean}\ncompare: [[ridge, mean]]\n"
    run_recipe(read(tmp_path, HEAD + RIDGE + compared, "first"), bench_tissue, out, features)
    first = {path.name: path.read_bytes() for path in out.glob("*.*")}
    assert "differences.csv" in first
    said = []
    result = run_recipe(read(tmp_path, HEAD + RIDGE, "second"), bench_tissue, out, features, said)
    assert result.outputs["table"] == out / "second" / "table.md"
    assert result.outputs["runs"] == out / "runs"
    assert said[0].endswith("1 runs, 1 of them there already")
    assert said[1:] == [f"{out} holds the tables of another recipe: those of second go to {out / 'second'}"]
    assert {path.name: path.read_bytes() for path in out.glob("*.*")} == first
    (out / "notes.csv").touch()
    run_recipe(read(tmp_path, HEAD + RIDGE, "first"), bench_tissue, out, features)  # compares nothing any more
    assert not (out / "differences.csv").exists()
    assert (out / "notes.csv").exists()
    assert (out / "table.md").exists()


def test_tables_of_an_older_bench_are_known_by_their_head(bench_tissue, features, tmp_path):
    out, recipe = tmp_path / "out", read(tmp_path, HEAD + RIDGE)
    run_recipe(recipe, bench_tissue, out, features)
    (out / "tables.json").unlink()
    assert run_recipe(recipe, bench_tissue, out, features).outputs["table"] == out / "table.md"
    (out / "tables.json").unlink()
    other = read(tmp_path, HEAD.replace("title: toy", "title: other") + RIDGE, "other")
    assert run_recipe(other, bench_tissue, out, features).outputs["table"] == out / "other" / "table.md"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            "figure: {genes: [X], section: B}",
            "section 'B' is not held out for each of ridge, knn, .*for all of them: A",
        ),
        ("figure: {genes: []}", "figure needs a method and a gene"),
        ("figure: {genes: {'': X}, section: Z}", "section 'Z' is none of the recipe's"),
        ("  - {name: late, model: genar, set: {scales: [3, 20]}}", "method 'late': .*20"),
    ],
)
def test_what_cannot_be_drawn_or_fit_is_refused_before_anything_runs(change, says, bench_tissue, features, tmp_path):
    text = f"{HEAD}{RIDGE}  - {{name: knn, model: knn}}\n{change}\n"
    with pytest.raises(InputError, match=says):
        run_recipe(read(tmp_path, text), bench_tissue, tmp_path / "out", features)
    assert not (tmp_path / "out").exists()


def test_a_figure_of_methods_with_other_folds_is_of_one_that_they_share(bench_tissue, features, tmp_path):
    every = HEAD.replace("held_out: [A]\n", "") + RIDGE + "  - {name: knn, model: knn, held_out: [B]}\n"
    genes = "figure: {genes: [ACTB]}\n"
    plan = bench.plan_runs(read(tmp_path, every + genes), bench_tissue, tmp_path / "out")
    assert bench.figure_section(plan.recipe, plan.recipe.cohorts[0], plan.runs) == "B"
    with pytest.raises(InputError, match="section 'A' is not held out for each of ridge, knn"):
        bench.plan_runs(read(tmp_path, every + genes.replace("]}", "], section: A}")), bench_tissue, tmp_path / "out")


def test_a_figures_gene_outside_of_the_selected_panel_is_told_after_the_tables(bench_tissue, features, tmp_path):
    recipe = read(tmp_path, HEAD + RIDGE + "figure: {genes: [NOWHERE]}\n")
    with pytest.raises(InputError, match=r"gene 'NOWHERE' is not among the 12 that panel clean selected.*panel.json"):
        run_recipe(recipe, bench_tissue, tmp_path / "out", features)
    assert (tmp_path / "out/table.md").exists()
    assert (tmp_path / "out/tables.json").exists()
