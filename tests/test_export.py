"""Predictions in the forms of QuPath, SpatialData, TissUUmaps and Vitessce, read back where their libraries are."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch

from commands import run
from genar.assess import read_prediction
from genar.data import contract, read_section, read_sections
from genar.errors import InputError
from genar.export import format_of, write_export, write_geojson
from genar.genes import Panel
from genar.models import Spots, model_class
from genar.models.checkpoint import Checkpoint, save_checkpoint
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


@pytest.fixture(scope="module")
def store(prediction, tmp_path_factory):
    pytest.importorskip("spatialdata", reason="spatialdata is not installed: its stores are not tried")
    path = tmp_path_factory.mktemp("store") / "SIM2.zarr"
    return write_export(read_prediction(prediction), path)["spatialdata"]


def test_a_spatialdata_store_holds_image_spots_and_table(store, prediction):
    import spatialdata
    from spatialdata.transformations import get_transformation

    predicted, found = read_prediction(prediction), spatialdata.read_zarr(store)
    table = found["table"]
    np.testing.assert_array_equal(table.X.toarray(), predicted.X.toarray())
    assert list(table.obs_names) == list(predicted.obs_names)
    spots = found["spots"]
    np.testing.assert_allclose(np.stack([spots.geometry.x, spots.geometry.y], axis=1), contract.coords_px(predicted))
    assert np.allclose(spots["radius"], contract.spot_diameter_px(predicted) / 2)
    element, joined = spatialdata.match_table_to_element(found, element_name="spots", table_name="table"), table
    assert len(element) if not hasattr(element, "n_obs") else element.n_obs == joined.n_obs
    to_px = get_transformation(found["he"], "global").to_affine_matrix(("x", "y"), ("x", "y"))
    width_px = found["he"]["scale0"]["image"].sizes["x"] * to_px[0, 0]
    xy = contract.coords_px(predicted)
    assert xy[:, 0].max() < width_px < 2 * xy[:, 0].max()
    to_um = get_transformation(spots, "um").to_affine_matrix(("x", "y"), ("x", "y"))
    assert to_um[0, 0] == pytest.approx(contract.mpp(predicted))


def test_a_store_of_predictions_is_no_measured_section(store):
    with pytest.raises(InputError, match="holds predicted counts, no measured ones"):
        read_section(store, mpp=2.0)


def test_our_own_reader_takes_a_store_of_counts(prediction, tmp_path):
    pytest.importorskip("spatialdata", reason="spatialdata is not installed: its stores are not tried")
    measured = read_prediction(prediction)
    del measured.uns["genar"]["prediction"]
    section = read_section(write_export(measured, str(tmp_path / "S.zarr"))["spatialdata"], mpp=contract.mpp(measured))
    np.testing.assert_array_equal(contract.counts(section), contract.counts(measured))


def test_a_tissuumaps_project_names_files_that_are_there(prediction, tmp_path, monkeypatch):
    assert run(monkeypatch, "export", prediction, "--out", tmp_path / "spots.tmap") == 0
    predicted = read_prediction(prediction)
    project = json.loads((tmp_path / "spots.tmap").read_text())
    (markers,) = project["markerFiles"]
    table = pd.read_csv(tmp_path / markers["path"])
    assert len(table) == predicted.n_obs
    for option in markers["dropdownOptions"]:
        assert option["expectedHeader.cb_col"] in table.columns
    assert [option["name"] for option in markers["dropdownOptions"]] == list(predicted.var_names)
    gene = predicted.var_names[1]
    expected = np.expm1(predicted[:, gene].layers["log1p_mean"][:, 0])  # ridge has no other
    np.testing.assert_allclose(table[f"gene {gene}"], expected, rtol=1e-3, atol=1e-3)
    (layer,) = project["layers"]
    image = tifffile.imread(tmp_path / layer["tileSource"].removesuffix(".dzi"))
    assert 0 < table["x"].max() < image.shape[1]
    assert 0 < table["y"].max() < image.shape[0]
    shrink = table["x"].max() / contract.coords_px(predicted)[:, 0].max()
    assert {setting["function"]: setting["value"] for setting in project["settings"]} == {
        "_useAbsoluteMarkerSize": {markers["uid"]: True}
    }
    diameter = float(markers["expectedHeader"]["scale_factor"])  # px of the image
    assert 0.8 < diameter / (shrink * contract.spot_diameter_px(predicted)) < 0.9
    assert project["mpp"] * shrink == pytest.approx(contract.mpp(predicted), rel=1e-2)


def test_a_vitessce_configuration_names_what_the_store_holds(prediction, tmp_path, monkeypatch):
    pytest.importorskip("vitessce", reason="vitessce is not installed: its configuration is not tried")
    assert run(monkeypatch, "export", prediction, "--out", tmp_path / "view", "--format", "vitessce") == 0
    from vitessce import VitessceConfig

    facts = json.loads((tmp_path / "view" / "vitessce.json").read_text())
    assert VitessceConfig.from_dict(facts).to_dict() == facts  # it knows every part
    (file,) = facts["datasets"][0]["files"]
    store = tmp_path / "view" / file["url"].rpartition("/")[2]
    options = file["options"]
    for part in (options["image"], options["obsSpots"], options["obsFeatureMatrix"]):
        assert (store / part["path"]).exists(), part
    assert list(facts["coordinationSpace"]["photometricInterpretation"].values()) == ["RGB"]


@pytest.mark.parametrize(
    ("name", "asked", "says"),
    [("a.txt", None, "was not given"), ("a.zarr", "pdf", "--format pdf"), ("a", "tissuumaps", ".tmap")],
)
def test_an_unknown_format_is_refused(name, asked, says, prediction, tmp_path, monkeypatch, capsys):
    words = ["export", prediction, "--out", tmp_path / name, *(["--format", asked] if asked else [])]
    assert run(monkeypatch, *words) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_without_the_slide_there_is_no_image(prediction, tmp_path):
    pytest.importorskip("spatialdata", reason="spatialdata is not installed: its stores are not tried")
    predicted = read_prediction(prediction)
    predicted.uns[contract.GENAR][contract.SLIDE] = ""
    del predicted.uns["spatial"]
    write_export(predicted, tmp_path / "bare.zarr")
    write_export(predicted, tmp_path / "bare.tmap")
    assert json.loads((tmp_path / "bare.tmap").read_text())["layers"] == []
    assert not (tmp_path / "bare.zarr" / "images" / "he").exists()
    assert format_of(tmp_path / "bare.zarr") == "spatialdata"


def test_predict_writes_spatialdata_at_once(tissue, feature_store, tmp_path, monkeypatch):
    """And refuses a format that it does not know before it predicts."""
    pytest.importorskip("spatialdata", reason="spatialdata is not installed: its stores are not tried")
    import spatialdata

    from genar.encoders import load_encoder
    from genar.features import embed, read_features, recipe_of

    section, encoder = read_sections(tissue)[0], load_encoder("efficientnet_lite0")
    recipe = recipe_of(encoder, views=1)
    features = torch.from_numpy(read_features(embed(section, encoder, recipe, feature_store), section))
    xy = torch.rand(section.n_obs, 2)
    genes = Panel(tuple(section.var_names[:5]), "named")
    counts = torch.from_numpy(contract.counts(section, list(genes.genes))).long()
    spots = Spots(features, xy, xy, torch.arange(len(xy)), torch.zeros(len(xy), dtype=torch.long), counts)
    model = model_class("ridge").create(features.shape[2], spots, "", {})
    model.prepare(spots)
    facts = {**vars(recipe), "widths_um": [], "context_spots": []}
    save_checkpoint(tmp_path / "model", Checkpoint("ridge", model, genes, facts))
    words = ["predict", f"{tissue}:SIM1", "--model", tmp_path / "model", "--out"]
    assert run(monkeypatch, *words, tmp_path / "pred.zarr") == 0
    assert spatialdata.read_zarr(tmp_path / "pred.zarr")["table"].shape == (section.n_obs, 5)
    assert run(monkeypatch, *words, tmp_path / "pred.h5ad") == 0
    assert read_prediction(tmp_path / "pred.h5ad").shape == (section.n_obs, 5)
    assert run(monkeypatch, *words, tmp_path / "pred.csv") == 2


def deep(section):
    section.obsm["spatial"] = np.c_[section.obsm["spatial"], np.zeros(section.n_obs)]


def empty(section):
    section.X = None


def nan_mean(predicted):
    predicted.layers["mean"][0, 0] = np.nan


def slashed_column(predicted):
    predicted.var["a/b"] = 1


def slashed_layer(predicted):
    predicted.layers["x/y"] = predicted.layers["mean"]


@pytest.mark.parametrize(
    ("spoil", "name", "says"),
    [
        (nan_mean, "p.geojson", r"layers\['mean'\] holds NaN"),
        (deep, "p.geojson", r"must be spot centres \[N, 2\]"),
        (slashed_column, "p.zarr", "SpatialData refuses a column or layer.*a/b"),
        (slashed_layer, "p.zarr", "SpatialData refuses a column or layer.*x/y"),
        (empty, "p.geojson", "no X"),
    ],
)
def test_what_a_format_cannot_hold_is_told(spoil, name, says, held_out_prediction, tmp_path):
    if name.endswith(".zarr"):
        pytest.importorskip("spatialdata", reason="spatialdata is not installed: its stores are not tried")
    spoil(held_out_prediction)
    with pytest.raises(InputError, match=says):
        write_export(held_out_prediction, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_expectations_go_out_where_they_are_of_logs_alone(tissue_sections, tmp_path):
    """As those of ridge and of most published methods: X holds them rounded."""
    section = tissue_sections[0]
    expected = np.linspace(0.1, 4, section.n_obs * 3).reshape(-1, 3)
    predicted = section[:, :3].copy()
    predicted.X = np.rint(expected).astype(np.int32)
    predicted.layers["log1p_mean"] = np.log1p(expected).astype(np.float32)
    predicted.uns["genar"] = {**section.uns["genar"], "prediction": {"model": "ridge"}}
    spots = json.loads(write_geojson(predicted, tmp_path / "s.geojson").read_text())["features"]
    gene = predicted.var_names[0]
    found = [spot["properties"]["measurements"][f"{gene} mean"] for spot in spots]
    np.testing.assert_allclose(found, expected[:, 0], atol=1e-4)
