"""Runs of a bench: each is made once, goes on when it was killed, and is of the data and files that it names."""

import json
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest

from commands import run as genar
from genar import bench
from genar.data.simulate import TissueConfig, write_tissue
from genar.errors import InputError
from toy_bench import HEAD, RIDGE, bench_of, read, run_recipe, write_recipe

SMALL = TissueConfig(n_rows=5, n_cols=5, n_genes=80, counts_per_nucleus=20)
TINY = "width: 16, depth: 1, heads: 2, components: 4, max_epochs: 1, samples: 2, scales: [3, 12]"


def test_a_recipe_runs_once_and_writes_its_tables(bench_tissue, tmp_path):
    said, recipe, out = [], read(tmp_path), tmp_path / "out"
    options = {"features": tmp_path / "features", "say": said.append}
    planned = bench.plan_bench(recipe, bench_tissue, out, **options)
    assert (planned.n_runs, planned.n_done, len(planned.runs), planned.missing) == (8, 0, 8, [])
    assert not out.exists()
    assert len(said) == 1 + 2 + 2 + 4  # closed forms have no seeds
    result = bench.bench_run(recipe, bench_tissue, out, **options)
    assert list(result.table.index) == ["ridge!", "knn", "tiny"]
    table = pd.read_csv(out / "table.csv", index_col=0)
    for metric, rows in (("mse", table), ("pcc_200", table.drop("knn"))):  # knn is constant on so few spots
        assert (rows[f"{metric}_low"] <= rows[metric]).all()
        assert (rows[metric] <= rows[f"{metric}_high"]).all()
    difference = table.loc["tiny", "mse"] - table.loc["ridge!", "mse"]
    assert result.differences.loc["tiny minus ridge!", "mse"] == pytest.approx(difference, abs=1e-5)
    assert "| tiny minus ridge! |" in (out / "table.md").read_text()
    run = next((out / "runs").glob("genar-*")) / "A-2"
    facts = json.loads((run / "run.json").read_text())
    assert facts["seeds"]["training"] == 2
    assert set(facts["data"]) == {"A", "B"}  # C is not of the recipe
    assert facts["peak_rss_mib"] is None or 50 < facts["peak_rss_mib"] < 50_000
    by_section = pd.read_csv(out / "by_section.csv", index_col=[0, 1])
    told = [json.loads(p.read_text())["A"]["genar"] for p in run.parent.glob("A-*/metrics.json")]
    assert len(told) == 2
    for metric in ("mse", "pcc_10", "pcc_50", "pcc_200"):
        mean = np.mean([scores[metric] for scores in told])
        assert by_section.loc[("tiny", "A"), metric] == pytest.approx(mean, rel=1e-4)
    assert 0 < table.loc["tiny", "coverage_90"] <= 1
    assert table.loc["tiny", "seeds"] == "1 2"
    assert facts["checkpoint_sha256"] in table.loc["tiny", "checkpoint_sha256"]
    assert facts["panel_sha256"] in table.loc["tiny", "panel_sha256"]
    assert table.loc["tiny", "seconds_training"] >= 0
    said.clear()
    bench.bench_run(recipe, bench_tissue, out, **options)
    assert len(said) == 1
    assert "8 of them there already" in said[0]


def test_a_killed_bench_goes_on(bench_tissue, tmp_path, monkeypatch):
    recipe, options = read(tmp_path, **{"[1, 2]": "[1]"}), {"features": tmp_path / "features", "say": lambda line: None}
    whole = bench.bench_run(recipe, bench_tissue, tmp_path / "whole", **options)
    calls = []

    def killed(*arguments, **more):
        calls.append(arguments)
        if len(calls) == 5:  # the network's first run, trained and not yet scored
            raise KeyboardInterrupt
        return predict(*arguments, **more)

    from genar import runs

    predict = runs.predict_section
    with monkeypatch.context() as patch:
        patch.setattr(runs, "predict_section", killed)
        with pytest.raises(KeyboardInterrupt):
            bench.bench_run(recipe, bench_tissue, tmp_path / "out", **options)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("runs/*/*/run.json")}
    assert len(finished) == 4
    for path in finished:  # as if killed between their last file and their end
        (path.parent / "resume").mkdir()
        (path.parent / ".lock").touch()
    assert not (tmp_path / "out/table.csv").exists()
    said = []
    result = bench.bench_run(recipe, bench_tissue, tmp_path / "out", **{**options, "say": said.append})
    assert len(said) == 1 + 2
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name in ("resume", ".lock")]
    pd.testing.assert_frame_equal(result.table, whole.table)


def test_methods_that_differ_in_name_alone_share_their_runs(bench_tissue, tmp_path):
    again = '  - {name: "ridge!", model: ridge}\n  - {name: the same, model: ridge}\n'
    recipe = read(tmp_path, **{'  - {name: "ridge!", model: ridge}\n': again})
    plan = bench.plan_runs(recipe, bench_tissue, tmp_path / "out")
    assert len(plan.runs) == 10
    assert len(plan.waiting) == 8
    other = bench.plan_runs(
        read(tmp_path, **{"n_genes: 12": "n_genes: 11", "[3, 12]": "[3, 11]"}), bench_tissue, tmp_path / "out"
    )
    assert not set(other.waiting) & set(plan.waiting)  # another panel is another run


def test_what_is_missing_is_said_before_anything_runs(tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    write_tissue(tmp_path / "data" / "PRAD", ("MEND145", "MEND139"), config=SMALL)
    (tmp_path / "data" / "PRAD" / "wsis" / "MEND139.tif").unlink()
    (tmp_path / "r.yaml").write_text(
        "datasets: [prad]\nprotocol: paper\npanel: genes200_{dataset}.txt\nencoder: uni\nmethods:\n"
        "  - {name: one, model: ridge}\n  - {name: two, model: ridge, encoder: resnet18}\n"
        '  - {name: three, model: ridge, encoder: "import:conch"}\n'
    )
    words = ("bench", tmp_path / "r.yaml", "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert genar(monkeypatch, *words, "--dry-run") == 0
    told = capsys.readouterr().out
    for line in (
        "missing: prad: 21 of 23 sections (MEND140, MEND141, MEND142, …), looked in",
        "missing: weights of encoder uni, not in the hub's cache; ask for access at https://huggingface.co/MahmoodLab/UNI",
        "missing: weights of encoder resnet18, not in the hub's cache; `hf download timm/resnet18.tv_in1k`",
        "missing: features import:conch of 2 sections (MEND139, MEND145)",
        "missing: images of 1 sections (MEND139)",
    ):
        assert line in told
    assert genar(monkeypatch, *words, "--dry-run", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["status"] == "planned"
    assert (planned["n_runs"], planned["n_done"], len(planned["runs"])) == (3, 0, 3)
    assert [f"missing: {line}" in told for line in planned["missing"]] == [True] * 6
    assert told.count("images of") == 2  # of each encoder that would read them, and not for imported features
    assert genar(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "21 of 23 sections" in error
    assert "MahmoodLab/UNI" in error
    assert not (tmp_path / "out").exists()
    assert genar(monkeypatch, "bench", tmp_path / "r.yaml", "--out", tmp_path / "out") == 2
    assert "no --data given" in capsys.readouterr().err


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


def test_runs_on_other_data_are_refused(four, tmp_path):
    bench_of(four, tmp_path, "patient")
    other = tmp_path / "other"
    shutil.copytree(four, other)
    adata = anndata.read_h5ad(other / "st" / "A.h5ad")
    adata[::-1].copy().write_h5ad(other / "st" / "A.h5ad")
    with pytest.raises(InputError, match="made with another section A"):
        bench_of(other, tmp_path, "patient")


def test_a_fold_of_other_sections_is_another_run(four, tmp_path):
    bench_of(four, tmp_path, "kfold", "k: 2")
    one, said = bench_of(four, tmp_path, "kfold", "k: 4", old="patients: {A: Ann, B: Ann, C: Bea, D: Bea}\n", new="")
    assert "0 of them there already" in said[0]
    other, _ = bench_of(
        four, tmp_path, "kfold", "k: 4", old="patients: {A: Ann, B: Ann, C: Bea, D: Bea}\n", new="", out="fresh"
    )
    assert one.table.equals(other.table)
    bench_of(four, tmp_path, "patient", out="patients")
    _, said = bench_of(four, tmp_path, "patient", old="B: Ann, C: Bea", new="B: Bea, C: Ann", out="patients")
    assert "0 of them there already" in said[0]


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


def test_runs_keep_their_place_where_nothing_is_told(tmp_path):
    """The names are those of runs that were made before anything could be told."""
    recipe = bench.read_recipe(str(write_recipe(tmp_path)))

    def folder(recipe=recipe, **read):
        (name,) = {run.plan.out.parent.name for run in bench.plan_runs(recipe, None, tmp_path, read=read).runs}
        return name

    plain = folder()
    assert plain == "ridge-996f3388"
    assert folder(mpp=None, image=tmp_path, bin_um=56.0) == plain
    views = bench.read_recipe(str(write_recipe(tmp_path, **{"n_genes: 3": "n_genes: 3\nviews: 8"})))
    assert len({plain, folder(mpp=0.5), folder(bin_um=32.0), folder(views)}) == 4
