"""Predictions of other methods are shown as they are, or refused; no result stands beside another's; options that would
do nothing are refused."""

import json
import shutil

import anndata
import numpy as np
import pytest

from commands import run, told
from genar.data import contract
from genar.export import write_export
from genar.report.subject import subjects


@pytest.fixture
def predicted(home):
    return anndata.read_h5ad(home / "run" / "predictions" / "S2.h5ad")


def nan_place(adata):
    adata.obsm["spatial"][0, 0] = np.nan


def twin_gene(adata):
    names = list(adata.var_names)
    adata.var_names = [names[1], *names[1:]]


def twin_spot(adata):
    names = list(adata.obs_names)
    adata.obs_names = [names[1], *names[1:]]


def infinite(adata):
    adata.layers["mean"][0, 0] = np.inf


def negative(adata):
    adata.layers["mean"][0, 0] = -5


@pytest.mark.filterwarnings("ignore:.*names are not unique")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (nan_place, "obsm['spatial'] holds NaN or infinite places"),
        (twin_gene, "gene name"),
        (twin_spot, "spot name"),
        (infinite, "layers['mean'] holds NaN or infinite values"),
        (negative, "layers['mean'] holds values below 0"),
    ],
)
def test_what_cannot_be_shown_is_refused(predicted, tmp_path, monkeypatch, capsys, damage, words):
    damage(predicted)
    predicted.write_h5ad(tmp_path / "p.h5ad")
    assert run(monkeypatch, "report", tmp_path / "p.h5ad", "--out", tmp_path / "p.html") == 2
    assert words in told(capsys)
    for name in ("p.geojson", "p.tmap", "p.zarr"):
        if damage is not negative:  # values of other programs' own, which draw them
            assert run(monkeypatch, "export", tmp_path / "p.h5ad", "--out", tmp_path / name) == 2
            assert words in told(capsys)
            assert not (tmp_path / name).exists()


def test_fractional_counts_are_exported_as_they_are(predicted, tmp_path):
    first, gene = str(predicted.obs_names[0]), str(predicted.var_names[0])
    values = np.full(predicted.shape, 0.4)
    values[0, 0] = 1.5
    predicted.X = values
    for name in contract.layer_names(predicted):
        del predicted.layers[name]
    spots = json.loads(write_export(predicted, tmp_path / "p.geojson")["geojson"].read_text())["features"]
    assert [s["properties"]["measurements"][gene] for s in spots[:2]] == [1.5, 0.4]
    write_export(predicted, tmp_path / "p.tmap")
    table = (tmp_path / "p_tmap.csv").read_text().splitlines()
    at = table[0].split(",").index(f"gene {gene}")
    assert next(row.split(",")[at] for row in table if f",{first}," in f"{row},") == "1.5"


@pytest.mark.parametrize("named", [True, False])
def test_scores_of_a_page_are_of_the_truth_it_shows(home, tmp_path, named):
    made = tmp_path / "made"
    shutil.copytree(home, made)
    (before,) = subjects(made / "run")
    assert "ridge" in before.methods
    facts = json.loads((made / "run" / "run.json").read_text())
    facts["plan"]["sections"] = str(made / "tissue")
    (made / "run" / "run.json").write_text(json.dumps(facts))
    path = made / "tissue" / "st" / "S2.h5ad"
    other = anndata.read_h5ad(path)
    other.X = np.random.default_rng(0).poisson(5, other.shape).astype(np.float32)
    other.write_h5ad(path)
    (after,) = subjects(made / "run", f"{made / 'tissue'}:S2" if named else None)
    assert "the truth is not the one that the run scored: the scores are of the one shown here" in after.notes
    assert set(after.methods) == {"prediction", "prediction_mean"}
    assert after.methods["prediction_mean"]["pcc_200"][0] == pytest.approx(after.scores["pcc_200"])
    assert abs(after.scores["pcc_200"]) < 0.2


def test_nothing_of_an_earlier_scoring_stays(home, predicted, tmp_path, monkeypatch):
    truth, out = f"{home / 'tissue'}:S2", tmp_path / "scores"
    first = home / "run" / "predictions" / "S2.h5ad"
    assert run(monkeypatch, "evaluate", first, truth, "--out", out, "--resamples", 20) == 0
    assert (out / "intervals.csv").exists()
    assert (out / "zero_reliability.csv").exists()
    for name in contract.layer_names(predicted):
        del predicted.layers[name]
    predicted.X = np.random.default_rng(1).poisson(3, predicted.shape).astype(np.float32)
    predicted.write_h5ad(tmp_path / "other.h5ad")
    (out / "maps" / "S2_best_mine.png").write_bytes(b"a user's")
    assert run(monkeypatch, "evaluate", tmp_path / "other.h5ad", truth, "--out", out, "--resamples", 0) == 0
    assert not (out / "intervals.csv").exists()
    assert not (out / "intervals.json").exists()
    assert not (out / "zero_reliability.csv").exists()
    kinds = sorted(path.name.split("_")[1] for path in (out / "maps").glob("S2_*_*.png"))
    assert kinds == ["best", "best", "median", "worst"]  # and what is not GenAR's


def test_gene_sets_of_an_earlier_call_do_not_stay(home, tmp_path, monkeypatch, capsys):
    genes = json.loads((home / "run" / "panel.json").read_text())["genes"]
    (tmp_path / "sets.gmt").write_text("[acyl] kinase [/x]\tabout\t" + "\t".join(genes[:5]) + "\n")
    words = ("groups", home / "run", "--out", tmp_path / "g")
    assert run(monkeypatch, *words, "--gmt", tmp_path / "sets.gmt") == 0
    assert "[acyl] kinase [/x]" in told(capsys)  # no markup
    assert (tmp_path / "g" / "sets.csv").exists()
    assert run(monkeypatch, *words) == 0
    assert not (tmp_path / "g" / "sets.csv").exists()


def test_a_demo_that_was_stopped_at_its_page_gets_it(home, tmp_path, monkeypatch):
    shutil.copytree(home / "run", tmp_path / "demo" / "run")
    assert run(monkeypatch, "demo", "--out", tmp_path / "demo") == 0
    assert "<html" in (tmp_path / "demo" / "report.html").read_text()
    assert run(monkeypatch, "demo", "--out", tmp_path / "demo") == 2


def test_an_index_of_a_gene_that_none_has_writes_no_page(home, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    shutil.copytree(home / "run", tmp_path / "runs" / "one")
    assert run(monkeypatch, "report", tmp_path / "runs", "--gene", "NOPE", "--out", tmp_path / "i.html") == 2
    assert "--gene NOPE: no prediction of section S2 has it" in told(capsys)
    assert not list(tmp_path.glob("*.html"))


def test_overlays_of_sections_of_one_name_are_all_named(home, tmp_path, monkeypatch, capsys):
    shutil.copytree(home / "tissue", tmp_path / "again")
    assert run(monkeypatch, "check", home / "tissue", tmp_path / "again", "--out", tmp_path / "o", "--json") == 0
    outputs = json.loads(capsys.readouterr().out.splitlines()[-1])["outputs"]
    assert sorted(outputs) == ["overlay S1", "overlay S1_2", "overlay S2", "overlay S2_2"]
