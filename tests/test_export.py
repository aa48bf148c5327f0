"""Predictions in the forms of QuPath, SpatialData, TissUUmaps and Vitessce, read back where their libraries are."""

import json

import anndata
import numpy as np
import pytest

from commands import run
from genar.assess import read_prediction
from genar.data import contract
from genar.errors import InputError
from genar.export import write_geojson
from toy_prediction import write_toy


@pytest.fixture(scope="module")
def prediction(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"))


def test_every_spot_is_a_detection_at_its_place(prediction, tmp_path):
    predicted = read_prediction(prediction)
    made = json.loads(write_geojson(predicted, tmp_path / "spots.geojson").read_text())
    assert made["type"] == "FeatureCollection"
    assert [f["properties"]["name"] for f in made["features"]] == list(predicted.obs_names)
    radius = float(predicted.uns["genar"][contract.SPOT_DIAMETER_UM]) / contract.mpp(predicted) / 2
    counts = contract.counts(predicted)
    for feature, xy, row in zip(made["features"], contract.coords_px(predicted), counts, strict=True):
        assert feature["properties"]["objectType"] == "detection"
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1]
        assert np.linalg.norm(np.array(ring) - xy, axis=1) == pytest.approx(np.full(len(ring), radius), abs=0.02)
        assert feature["geometry"]["isEllipse"]  # QuPath lays a circle into the bounds
        assert np.ptp(ring, axis=0) == pytest.approx([2 * radius] * 2, abs=0.02)
        measured = feature["properties"]["measurements"]
        assert [measured[gene] for gene in predicted.var_names] == row.tolist()


def test_only_the_genes_asked_for(prediction, tmp_path):
    predicted = read_prediction(prediction)
    gene = predicted.var_names[3]
    predicted.layers["mean"] = np.random.default_rng(0).random(predicted.shape)
    made = json.loads(write_geojson(predicted, tmp_path / "one.geojson", genes=[gene]).read_text())
    measured = [feature["properties"]["measurements"] for feature in made["features"]]
    assert all(set(one) == {gene, f"{gene} mean"} for one in measured)
    assert [one[f"{gene} mean"] for one in measured] == pytest.approx(predicted.layers["mean"][:, 3], abs=1e-4)


def test_missing_genes_and_positions_are_named(prediction, tmp_path):
    predicted = read_prediction(prediction)
    with pytest.raises(InputError, match="1 of 2 are not in the prediction \\(NOSUCH\\)"):
        write_geojson(predicted, tmp_path / "x.geojson", genes=["NOSUCH", predicted.var_names[0]])
    del predicted.obsm["spatial"]
    with pytest.raises(InputError, match="no positions"):
        write_geojson(predicted, tmp_path / "x.geojson")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_it_and_refuses_in_one_line(prediction, tmp_path, monkeypatch, capsys):
    words = ["export", prediction, "--out", tmp_path / "spots.geojson"]
    assert run(monkeypatch, *words, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n_spots"] == read_prediction(prediction).n_obs
    assert (tmp_path / "spots.geojson").exists()
    assert run(monkeypatch, *words, "--genes", "NOSUCH") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_prediction_that_is_left_in_its_file_is_exported(prediction, tmp_path):
    backed = anndata.read_h5ad(prediction, backed="r")
    whole = read_prediction(prediction)
    for genes in ((), list(whole.var_names[:2])):
        first = write_geojson(backed, tmp_path / "backed.geojson", genes=genes).read_bytes()
        assert first == write_geojson(whole, tmp_path / "whole.geojson", genes=genes).read_bytes()
