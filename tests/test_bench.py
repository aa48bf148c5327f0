""""""

import json

import numpy as np
import pandas as pd
import pytest

from commands import run as genar
from genar import bench
from genar.data.simulate import TissueConfig, write_tissue
from genar.errors import InputError
from toy_bench import RECIPE, read

SMALL = TissueConfig(n_rows=5, n_cols=5, n_genes=80, counts_per_nucleus=20)


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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("model: knn", "model: magic"), "method 'knn': model 'magic' is not known; expected one of"),
        (("[tiny, ridge!]", "[tiny, rigde]"), "rigde"),
        (("seeds:", "seedz:"), "seedz"),
        (("seeds: [1, 2]", "seeds: [1, 1]"), "seeds must be"),
        (("model: knn", "model: knn, held_out: [C]"), "'knn': held_out 'C' is not held out by the recipe"),
        (
            ("ridge}\n  - {name: knn, model: knn", "ridge, held_out: [A]}\n  - {name: knn, model: knn, held_out: [B]"),
            "no section is held out for each of ridge!, knn, tiny",
        ),
        (("width: 16", "widht: 16"), "widht"),
        (("width: 16", "width: 15"), "multiple of heads"),
        (("model: knn", "model: knn, colour: red"), "colour"),
        (("title: toy", "protocol: magic"), "protocol 'magic' is not known; expected one of section, paper"),
        (("title: toy", "protocol: paper"), "protocol paper needs data sets"),
        (("title: toy", "protocol: patient"), "patient of 2 of 2 sections is not known"),
        (("title: toy", "panel: nowhere.txt"), "nowhere.txt"),
        (("title: toy", "held_out: [Z]"), "Z"),
        (("title: toy", "encoder2: uni"), "encoder2"),
        (("model: knn", "model: knn, encoder: magic"), "magic"),
        (("title: toy", "figure: {genes: [X], methods: [nobody]}"), "nobody"),
        (("title: toy", "tables: {one: [nobody]}"), "nobody"),
        (("title: toy", "tables: {one: {rows: [knn], colour: red}}"), "colour"),
        (("title: toy", "datasets: [her2st]"), "both"),
        (("sections: [A, B]", "datasets: [magic]"), "magic"),
        (("sections: [A, B]", "sections: [A, Z]"), "1 of 2 sections .Z."),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(change, says, bench_tissue, tmp_path):
    def wrong():
        recipe = read(tmp_path, RECIPE.replace("encoder: genar.bench.toy:narrow_encoder\n", ""), **dict([change]))
        bench.bench_run(recipe, bench_tissue, tmp_path / "out", say=lambda line: None)

    with pytest.raises(InputError, match=says):
        wrong()
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="her2st_small"):
        bench.read_recipe("nowhere.yaml")


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


def test_weights_are_looked_for_without_the_network(tmp_path, monkeypatch):
    from huggingface_hub import constants

    from genar import encoders

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert encoders.weights_state("efficientnet_lite0") == "embedded"
    assert encoders.weights_state("genar.bench.toy:wide_encoder") == "embedded"
    assert encoders.weights_state("resnet18") == "offline"
    assert encoders.weights_state("timm/resnet18") == "offline"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert encoders.weights_state("resnet18") == "open"
    assert encoders.weights_state("uni") == "gated"
    assert encoders.hub_of("timm/resnet18").startswith("timm/resnet18")
    kept = tmp_path / "models--MahmoodLab--UNI"
    for file in ("refs/main", "snapshots/1/pytorch_model.bin"):
        (kept / file).parent.mkdir(parents=True)
        (kept / file).write_text("1")
    assert encoders.weights_state("uni") == "cached"
