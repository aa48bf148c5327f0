"""Predictions of other programs are scored, shown and exported as they are, or refused."""

import json
from functools import partial

import anndata
import numpy as np
import pytest
from scipy import sparse

from commands import run, told
from genar.assess import evaluate_run
from genar.data import contract
from genar.export import write_export
from genar.prediction import write_prediction
from genar.report.index import write_report
from genar.report.page import page_html
from genar.report.subject import subjects
from homes import pair_of_one_gene


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


@pytest.fixture
def pair(ridge_home):
    return partial(pair_of_one_gene, ridge_home)


def test_fractional_predictions_are_shown_as_they_are_scored(pair):
    predicted, _ = pair("X")
    values = np.linspace(0.1, 0.45, predicted.n_obs, dtype=np.float32)[:, None]
    predicted = anndata.AnnData(values, predicted.obs, predicted.var, uns=predicted.uns, obsm=dict(predicted.obsm))
    np.testing.assert_allclose(contract.expected_log2(predicted, ["X"])[:, 0], np.log2(1 + values[:, 0]), rtol=1e-6)


def test_a_fractional_prediction_keeps_its_values_on_its_page(ridge_home, tmp_path):
    predicted = anndata.read_h5ad(ridge_home / "run/predictions/B.h5ad")
    values = np.random.default_rng(0).random(predicted.shape).astype(np.float32)
    bare = anndata.AnnData(values, predicted.obs, predicted.var, uns=predicted.uns, obsm=dict(predicted.obsm))
    bare.write_h5ad(tmp_path / "bare.h5ad")
    (subject,) = subjects(tmp_path / "bare.h5ad", f"{ridge_home / 'tissue'}:B")
    payload = json.loads(page_html(subject).split('id="payload">')[1].split("</script>")[0])
    assert payload["table"]["mean predicted"] == pytest.approx(values.mean(axis=0).tolist(), rel=1e-3)
    assert min(payload["matrices"]["counts"]["step"]) < 1e-4


def test_sparse_layers_are_scored_shown_and_exported(lite0, held_out, held_out_prediction, tmp_path):
    made = held_out_prediction.copy()
    for name in list(made.layers):
        made.layers[name] = sparse.csr_matrix(made.layers[name])
    whole, thin = (
        evaluate_run(p, held_out, tmp_path / "scores", resamples=0).scores["B"] for p in (held_out_prediction, made)
    )
    assert thin["prediction_mean"].summary == pytest.approx(whole["prediction_mean"].summary, nan_ok=True)
    file = write_prediction(made, tmp_path / "sparse.h5ad")
    write_report(str(file), tmp_path / "report.html", truth=str(lite0 / "tissue" / "st" / "B.h5ad"))
    for name in ("p.geojson", "p.tmap"):
        write_export(made, str(tmp_path / name))
        write_export(held_out_prediction, tmp_path / f"dense-{name}")
    assert (tmp_path / "p.geojson").read_bytes() == (tmp_path / "dense-p.geojson").read_bytes()
    assert (tmp_path / "p_tmap.csv").read_bytes() == (tmp_path / "dense-p_tmap.csv").read_bytes()
    pytest.importorskip("spatialdata", reason="spatialdata is not installed: its stores are not tried")
    write_export(made, str(tmp_path / "p.zarr"))
