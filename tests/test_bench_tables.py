"""Tables and figures of a bench: what they average over, say of their methods, and overwrite."""

import json

import pandas as pd
import pytest

from commands import run
from genar import bench
from genar.data import contract, read_sections
from genar.errors import InputError
from genar.genes import select_panel
from toy_bench import HEAD, OF_HOME, RIDGE, bench_of, read, run_recipe


def test_a_dear_method_is_run_on_some_folds(bench_tissue, tmp_path):
    """A table averages over the sections that all its rows hold out, a difference over those of its pair."""
    some = {"{name: knn, model: knn}": "{name: knn, model: knn, held_out: [B]}", "[1, 2]": "[1]"}
    extra = "tables: {every: [ridge!, tiny]}\ncompare:\n  - [knn, ridge!]\n"
    recipe = read(tmp_path, **some, **{"compare:\n": extra})
    result = bench.bench_run(recipe, bench_tissue, tmp_path / "out", features=tmp_path / "features", say=str)
    by_section = pd.read_csv(tmp_path / "out/by_section.csv", index_col=[0, 1])["mse"]
    every = pd.read_csv(tmp_path / "out/every.csv", index_col=0)["mse"]
    whole = {(name, section) for name in ("ridge!", "tiny") for section in "AB"}
    assert set(by_section.index) == {("knn", "B"), *whole}
    for name in ("ridge!", "tiny"):
        assert result.table.loc[name, "mse"] == pytest.approx(by_section[name, "B"], rel=1e-4)
        assert every[name] == pytest.approx(by_section[name].mean(), rel=1e-4)
    gain = result.differences["mse"]
    assert gain["knn minus ridge!"] == pytest.approx(by_section["knn", "B"] - by_section["ridge!", "B"], abs=1e-5)
    assert gain["tiny minus ridge!"] == pytest.approx((by_section["tiny"] - by_section["ridge!"]).mean(), abs=1e-5)
    assert "B held out." in (tmp_path / "out/table.md").read_text()
    assert "each section held out in turn" in (tmp_path / "out/every.md").read_text()


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


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
    assert "Across patients (patients are drawn, and sections of each: what holds for a new patient)" in told
    assert "from 2 patients they are too narrow" in told
    assert told.count("| seen minus ridge |") == 2


def test_one_section_has_none_across_sections(bench_tissue, features, tmp_path):
    result = run_recipe(read(tmp_path, HEAD + RIDGE), bench_tissue, tmp_path / "out", features)
    assert not result.table.filter(like="across").size
    assert "Across" not in (tmp_path / "out/table.md").read_text()


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


def test_tables_tell_what_a_reader_must_know(four, tmp_path):
    bench_of(four, tmp_path, "section", "held_out: [A]")
    assert "Ann has sections in training and held out" in (tmp_path / "out" / "table.md").read_text()
    panel = select_panel([s for s in read_sections(four) if contract.name(s) in "AB"], n_genes=10)
    panel.write(tmp_path / "panel.json")
    whole = {"old": "n_genes: 10\n", "new": f"panel: {tmp_path / 'panel.json'}\n"}
    bench_of(four, tmp_path, "patient", "held_out: [Ann]", out="known", **whole)
    told = (tmp_path / "known" / "table.md").read_text()
    assert "selected with A, B among its sections" in told
    assert "the patients of Ann held out" in told
    assert json.dumps("knows the answers")[1:-1] in told


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


def test_a_toy_leaves_measured_tables(home, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(OF_HOME)
    words = ("bench", tmp_path / "mine.yaml", "--out", tmp_path / "out")
    assert run(monkeypatch, *words, "--data", home / "tissue", "--features", home / "store") == 0
    before = (tmp_path / "out" / "table.md").read_bytes()
    assert run(monkeypatch, *words, "--toy") == 0
    assert (tmp_path / "out" / "table.md").read_bytes() == before
    assert "(toy: simulated tissue" in (tmp_path / "out" / "mine_toy" / "table.md").read_text()


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
