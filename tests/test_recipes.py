"""The recipes that come with the package: each is read, planned and, as a toy, run on its whole path."""

import json
import re
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml

from genar import bench
from genar.bench import recipe as reading
from genar.bench.tables import escape
from genar.data.datasets import DATASETS
from genar.errors import InputError
from genar.genes import read_panel
from genar.models import model_class, model_names

NAMES = bench.recipe_names()
FOLDER = Path(reading.__file__).parent.parent / "recipes"


def facts(name):
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def absent_models(name):
    return sorted({m["model"] for m in facts(name).get("methods", ())} - set(model_names()))


@pytest.fixture
def every_model(monkeypatch):
    """Recipes can be read whether or not the models that they name are there: ridge stands in."""
    monkeypatch.setattr(reading, "model_class", lambda n: model_class(n if n in model_names() else "ridge"))


@pytest.fixture(scope="session")
def toy_out(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")  # of all recipes, so that a run they share is made once


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_read_and_planned(name, every_model, tmp_path):
    recipe = bench.read_recipe(f"recipes/{name}.yaml")
    plan = bench.plan_runs(recipe, None, tmp_path)
    assert len(plan.waiting) == len(plan.runs)  # nothing twice
    assert bool(plan.runs) == bool(recipe.methods)
    assert plan.missing()
    for run in plan.runs:
        assert set(run.plan.test) | set(run.plan.only) == set(run.cohort.sections)
        assert run.plan.only[-len(run.plan.test) :] == run.plan.test
        if recipe.protocol == "paper":
            assert run.plan.test == (DATASETS[run.cohort.name].held_out,)


@pytest.mark.parametrize("name", NAMES)
def test_every_row_of_the_papers_table_has_its_place(name, every_model):
    recipe = bench.read_recipe(name)
    for table in recipe.tables:
        for cohort in recipe.cohorts if table.paper else ():
            data = table.dataset or cohort.name
            theirs = {row for number, name, row in bench.paper_results() if (number, name) == (table.paper, data)}
            assert theirs
            assert theirs <= set(table.rows)


@pytest.mark.parametrize("name", [name for name in NAMES if absent_models(name)])
def test_a_recipe_of_models_that_are_not_there_says_so(name):
    with pytest.raises(
        InputError, match=rf"{name}.yaml: method .*: model '({'|'.join(absent_models(name))})' is not known"
    ):
        bench.read_recipe(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_runs_as_a_toy(name, toy_out):
    if absent := absent_models(name):
        pytest.skip(f"models not there yet: {', '.join(absent)}")
    recipe = bench.read_recipe(name)
    result = bench.bench_run(recipe, None, toy_out, toy=True, say=lambda line: None)
    assert all(path.exists() for path in result.outputs.values())
    assert len(result.table) == len(recipe.methods) * len(recipe.cohorts)
    for table in recipe.tables:
        assert table.rows
        assert result.outputs[table.name].parent in (toy_out, toy_out / f"{name}_toy")  # of the first, of all others
        check_latex(result.outputs[table.name].with_suffix(".tex").read_text())
    if recipe.methods:
        assert "simulated" in result.outputs["table"].read_text().splitlines()[0]
        assert result.table["mse"].between(0, 50).all()


def check_latex(text):
    """Balanced groups and environments, as many cells in each row, nothing special unescaped."""
    plain = re.sub(r"\\[\\{}_%&#$]", "", text)
    assert plain.count("{") == plain.count("}")
    depth = 0
    for letter in plain:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        assert depth >= 0
    begun, ended = (Counter(re.findall(rf"\\{word}{{(\w+)}}", text)) for word in ("begin", "end"))
    assert begun == ended
    assert {"table", "tabular"} <= set(begun)
    assert not re.search(r"(?<!\\)[_%#$^~]", text)
    n_columns = len(re.search(r"\\begin{tabular}{([lr]+)}", text)[1])
    rows = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len(rows) >= 2
    assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {n_columns}
    assert text.isascii() or not re.search("[–µ]", text)


def test_escapes():
    assert escape(r"a_b & 5% {x} \y") == r"a\_b \& 5\% \{x\} \textbackslash{}y"


MIXED = """
title: two_sets & a figure
paper: 1
datasets: [her2st, prad]
panel: genes200_{dataset}.txt
encoder: uni
protocol: paper
methods:
  - {name: GenAR, model: knn}
  - {name: STEM, model: ridge, encoder: resnet18}
  - {name: our_own, model: mean}
  - {name: greedy, model: genar, set: {decode: greedy}}
compare: [[GenAR, STEM]]
tables:
  scales: {paper: 6, dataset: prad, rows: {"(1, 20, 200)": STEM, our_own: our_own}}
figure:
  genes: {her2st: [ERBB2, GNAS], prad: [KLK3]}
  methods: [GenAR, STEM, greedy]
"""


def test_the_papers_values_stand_in_their_cells(toy_out, tmp_path):
    (tmp_path / "mixed.yaml").write_text(MIXED)
    recipe = bench.read_recipe(str(tmp_path / "mixed.yaml"))
    assert [cohort.paper for cohort in recipe.cohorts] == ["SPA148", "MEND145"]
    result = bench.bench_run(recipe, None, toy_out, toy=True, say=lambda line: None)
    home = result.outputs["table"].parent
    table = pd.read_csv(home / "table.csv", index_col=[0, 1])
    for data, method, values in (
        ("her2st", "GenAR", (0.842, 0.784, 0.663, 1.082, 0.745)),
        ("prad", "GenAR", (0.702, 0.650, 0.512, 1.191, 0.771)),
        ("her2st", "STEM", (0.831, 0.770, 0.625, 1.199, 0.787)),
    ):
        found = table.loc[(data, method), [f"{ours}_paper" for ours in bench.PAPER_METRICS.values()]]
        assert tuple(found) == values
    assert table.loc[("prad", "our_own")].filter(like="_paper").isna().all()
    scales = pd.read_csv(home / "scales.csv", index_col=[0, 1])
    assert scales.loc[("her2st", "(1, 20, 200)"), "pcc_200_paper"] == 0.534
    assert scales.loc[("her2st", "(1, 20, 200)"), "mse"] == table.loc[("her2st", "STEM"), "mse"]
    markdown = (home / "table.md").read_text()
    head = next(line for line in markdown.splitlines() if line.startswith("| data | method | PCC-10"))
    row = next(line for line in markdown.splitlines() if line.startswith("| prad | GenAR |"))
    cells = dict(zip(head.split("|"), row.split("|"), strict=True))
    assert cells[" PCC-10 (paper) "] == " 0.702 "
    assert cells[" MSE (paper) "] == " 1.191 "
    assert "table 1 of the paper" in markdown
    check_latex((home / "table.tex").read_text())
    check_latex((home / "scales.tex").read_text())
    assert r"our\_own" in (home / "table.tex").read_text()
    figures = [path for name, path in result.outputs.items() if name.startswith("figure ")]
    names = [f"figure_{cohort}_TOY1.{suffix}" for cohort in ("her2st", "prad") for suffix in ("png", "pdf")]
    assert [path.name for path in figures] == names
    assert [path.read_bytes()[:4] for path in figures] == [b"\x89PNG", b"%PDF"] * 2


def test_a_greedy_method_is_scored_on_its_counts(toy_out, tmp_path):
    (tmp_path / "mixed.yaml").write_text(MIXED)
    result = bench.bench_run(bench.read_recipe(str(tmp_path / "mixed.yaml")), None, toy_out, toy=True, say=str)
    runs = pd.read_csv(result.outputs["table"].with_name("runs.csv")).set_index(["data", "method"])
    run = toy_out / "runs" / runs.loc[("prad", "greedy"), "folder"]
    told = json.loads((run / "metrics.json").read_text())["TOY1"]
    assert told["genar"]["mse"] != told["genar_mean"]["mse"]
    assert result.table.loc[("prad", "greedy"), "mse"] == pytest.approx(told["genar"]["mse"], rel=1e-4)


def test_a_figures_gene_must_be_in_the_panel(tmp_path):
    (tmp_path / "mixed.yaml").write_text(MIXED.replace("KLK3", "ERBB9"))
    with pytest.raises(InputError, match="'ERBB9' is not in the panel"):
        bench.read_recipe(str(tmp_path / "mixed.yaml"))


def test_the_papers_lists_are_whole():
    sizes = {"her2st": 208, "kidney": 200, "mouse_brain": 217, "prad": 200, "ccrcc": 243}
    for name, size in sizes.items():
        printed, modelled = (read_panel(FOLDER / f"{kind}_{name}.txt").genes for kind in ("genes", "genes200"))
        assert (len(printed), modelled) == (size, printed[:200])
        groups = json.loads((FOLDER / f"groups_{name}.json").read_text())
        assert {gene for genes in groups.values() for gene in genes} <= set(modelled)
    assert set(sizes) == set(DATASETS) == {data for _, data, _ in bench.paper_results()}
    assert sum(map(len, bench.paper_results().values())) == 185


def test_groups_beside_the_papers(toy_out):
    result = bench.bench_run(bench.read_recipe("appendix_c"), None, toy_out, toy=True, say=lambda line: None)
    home = result.outputs["groups beside the paper's"].parent
    told = pd.read_csv(home / "groups.csv", index_col=0)
    assert list(told.index) == ["her2st", "kidney", "mouse_brain", "prad", "ccrcc"]
    assert told.loc["her2st", "paper_n_genes"] == 208
    assert told.loc["kidney", "paper_n_groups"] == 31
    listed = (home / "panel_prad.txt").read_text().split()
    groups = json.loads((home / "groups_prad.json").read_text())
    assert sorted(gene for genes in groups.values() for gene in genes) == listed[:25]
    assert told.loc["prad", "n_genes"] == len(listed)
