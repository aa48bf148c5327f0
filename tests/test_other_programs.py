"""Predictions in the forms of other programs, read back with their own libraries where they are installed."""

import json
from pathlib import Path
from zlib import crc32

import anndata
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image

import genar
from commands import run
from genar.assess import read_prediction
from genar.data import contract, read_section, read_sections
from genar.errors import InputError
from genar.export import format_of, write_export
from genar.genes import Panel
from genar.models import Spots, model_class
from genar.models.checkpoint import Checkpoint, save_checkpoint
from genar.prediction import decoding, predict_section, write_prediction
from section_files import write_visium
from toy_prediction import write_toy


@pytest.fixture(scope="module")
def prediction(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"))


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


def test_squidpy_takes_a_prediction_as_it_is(prediction, monkeypatch):
    squidpy = pytest.importorskip("squidpy", reason="squidpy is not installed: it is not tried")
    import matplotlib

    matplotlib.use("Agg")
    predicted = read_prediction(prediction)
    squidpy.gr.spatial_neighbors(predicted, coord_type="generic", n_neighs=6)
    squidpy.gr.spatial_autocorr(predicted, mode="moran", genes=list(predicted.var_names[:5]), n_jobs=1)
    assert predicted.uns["moranI"]["I"].notna().any()
    assert "hires" in next(iter(predicted.uns["spatial"].values()))["images"]
    squidpy.pl.spatial_scatter(predicted, color=predicted.var_names[0])  # it looks for that one by itself


@pytest.fixture
def plots():
    """The plots of scanpy and, where it is installed, squidpy, of a prediction as it is."""
    import matplotlib
    import scanpy

    matplotlib.use("Agg")

    def drawn(predicted):
        scanpy.pl.spatial(predicted, color=predicted.var_names[0], show=False)
        squidpy = pytest.importorskip("squidpy", reason="squidpy is not installed: it is not tried")
        squidpy.pl.spatial_scatter(predicted, color=predicted.var_names[0])

    return drawn


def predict_ones(section, path):
    """A prediction of the section, read back from its file."""
    xy, features = torch.rand(20, 2), torch.rand(20, 1, 4)
    of_spots = torch.arange(20), torch.zeros(20, dtype=torch.long)
    spots = Spots(features, xy, xy, *of_spots, torch.ones(20, 2, dtype=torch.long))
    model = model_class("ridge").create(4, spots, "", {})
    model.prepare(spots)
    checkpoint = Checkpoint("ridge", model.eval(), Panel(("A", "B"), "named"), {})
    write_prediction(predict_section(checkpoint, section, np.ones((section.n_obs, 1, 4), "f4")), path)
    return read_prediction(path)


@pytest.mark.parametrize("there", [("hires", "lowres"), ("hires",), ("lowres",), ()])
def test_a_prediction_of_space_ranger_is_drawn_over_its_picture(there, tmp_path, plots):
    """Over a thumbnail of the slide where the outs folder holds none."""
    outs = tmp_path / "P1" / "outs"
    write_visium(outs)
    (outs / "spatial" / "tissue_hires_image.png").unlink()
    shapes = {"hires": (90, 100, 3), "lowres": (27, 30, 3)}
    for seed, kind in enumerate(there):
        pixels = np.random.default_rng(seed).integers(0, 255, shapes[kind], dtype=np.uint8)
        Image.fromarray(pixels).save(outs / "spatial" / f"tissue_{kind}_image.png")
    slide = tmp_path / "P1.tif"
    tifffile.imwrite(slide, np.full((1800, 2000, 3), 200, np.uint8), photometric="rgb")
    predicted = predict_ones(read_section(outs, image=slide), tmp_path / "pred.h5ad")
    ((name, library),) = predicted.uns["spatial"].items()
    assert name == "P1"
    assert set(library["images"]) == {"hires", *there}
    for kind in there:
        with Image.open(outs / "spatial" / f"tissue_{kind}_image.png") as image:
            np.testing.assert_array_equal(library["images"][kind], np.asarray(image))
    hires, scale = library["images"]["hires"], library["scalefactors"]["tissue_hires_scalef"]
    assert hires.dtype == np.uint8
    np.testing.assert_allclose(np.array(hires.shape[:2]) / scale, (1800, 2000), rtol=0.02)
    plots(predicted)


def test_a_prediction_of_a_bare_slide_is_drawn_over_its_picture(tissue, tmp_path, plots):
    predicted = predict_ones(read_section(tissue / "wsis" / "SIM1.tif"), tmp_path / "pred.h5ad")
    (library,) = predicted.uns["spatial"].values()
    assert set(library["images"]) == {"hires"}  # once in the file
    plots(predicted)


def test_a_prediction_whose_section_carries_no_picture_gets_one_of_its_slide(tissue, tmp_path, plots):
    section = read_sections(tissue)[0]
    del section.uns["spatial"]
    plots(predict_ones(section, tmp_path / "pred.h5ad"))
    section.uns[contract.GENAR][contract.SLIDE] = str(tmp_path / "damaged.png")
    (tmp_path / "damaged.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="no picture to plot over: .*damaged.png"):
        assert "spatial" not in predict_ones(section, tmp_path / "pred.h5ad").uns


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


def test_lazyslide_predicts_with_a_registered_checkpoint(prediction, tmp_path):
    """A slide tiled by LazySlide, features in its table, our model by name: counts in another table."""
    lazyslide = pytest.importorskip("lazyslide", reason="lazyslide is not installed: the adapter is not tried")
    from wsidata import open_wsi
    from wsidata.io import add_features

    from genar.lazyslide import register_model

    slide = contract.slide_path(read_prediction(prediction))
    random = torch.Generator().manual_seed(0)
    features = torch.randn(60, 1, 8, generator=random)
    counts = torch.poisson(features[:, 0, :4].exp() * 3).long()
    xy = torch.rand(60, 2)
    spots = Spots(features, xy, xy, torch.arange(60), torch.zeros(60, dtype=torch.long), counts)
    model = model_class("ridge").create(8, spots, "", {})
    model.prepare(spots)
    facts = {"encoder": "efficientnet_lite0", "views": 1, "patch": "hest"}
    save_checkpoint(tmp_path / "model", Checkpoint("ridge", model.eval(), Panel(tuple("ABCD"), "named"), facts))
    register_model(tmp_path / "model", "genar-test")
    wsi = open_wsi(str(slide), store=str(tmp_path / "wsi.zarr"))
    lazyslide.pp.find_tissues(wsi)
    lazyslide.pp.tile_tissues(wsi, 64, mpp=wsi.properties.mpp or None)
    n_tiles = len(wsi.shapes["tiles"])
    assert n_tiles > 3
    given = torch.randn(n_tiles, 8, generator=random)
    add_features(wsi, key="ours_tiles", tile_key="tiles", features=given.numpy())
    lazyslide.tl.feature_prediction(wsi, "genar-test", feature_key="ours", batch_size=5, key_added="counts", pbar=False)
    table = wsi.tables["counts"]
    assert list(table.var_names) == list("ABCD")
    from genar.models import Batch, Decoding

    batch = Batch(given, torch.zeros(n_tiles, 2), torch.zeros(n_tiles, 2), torch.arange(n_tiles))
    expected = model.predict(batch, Decoding("mean", layers=("log1p_mean",))).layers["log1p_mean"].expm1().numpy()
    np.testing.assert_allclose(np.asarray(table.X), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="mean or counts"):
        register_model(tmp_path / "model", values="magic")


def test_lazyslide_gives_the_expectation_that_predict_gives():
    """Over all trajectories, not the one that X follows; a tile's draws are those of a spot of the same id."""
    pytest.importorskip("lazyslide", reason="lazyslide is not installed: the adapter is not tried")
    from genar import lazyslide

    model = Path(__file__).parent / "data" / "checkpoint_format1"
    checkpoint = genar.load_checkpoint(model)
    features = np.random.default_rng(1).normal(size=(30, 8)).astype("f4")
    corners = np.random.default_rng(2).integers(0, 5000, (30, 2))
    section = anndata.AnnData(obs=pd.DataFrame(index=[f"{x}x{y}" for x, y in corners]))
    section.obsm["spatial"] = corners.astype(float)
    section.uns["genar"] = {"section": "S", "mpp": 1.0}
    how = {"samples": 16, "layers": ("mean", "log1p_mean")}
    expected = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("genar.training.zlib.crc32", lambda text: crc32(text.removeprefix(b"S/")))
        for decode in ("greedy", "mean"):
            made = predict_section(
                checkpoint, section, features[:, None], decoding(checkpoint.model, {**how, "decode": decode})
            )
            expected[decode] = made.layers["mean"]
    found = lazyslide.register_model(model, "genar-mean", mpp=1.0)().predict(features, corners)
    np.testing.assert_allclose(np.stack(list(found.values()), axis=1), expected["greedy"], rtol=1e-5)
    np.testing.assert_allclose(expected["mean"], expected["greedy"], rtol=1e-5)
    one = lazyslide.register_model(model, "genar-one", mpp=1.0, samples=1)().predict(features, corners)
    gene = checkpoint.panel.genes[-1]
    assert not np.allclose(one[gene], found[gene], rtol=1e-2)


def _to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def test_lazyslide_gives_a_model_of_several_widths_and_neighbours_what_it_was_trained_on(prediction, tmp_path):
    """Tiles of two widths around the same centres, both embedded by LazySlide, and the means of the nearest tiles."""
    lazyslide = pytest.importorskip("lazyslide", reason="lazyslide is not installed: the adapter is not tried")
    from wsidata import open_wsi

    from genar.lazyslide import join_features, register_model, widen_tiles

    class Colours(torch.nn.Module):
        """Means over a grid of 2 x 2, 12 numbers a tile."""

        def forward(self, x):
            return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)

    predicted = read_prediction(prediction)
    wsi = open_wsi(str(contract.slide_path(predicted)), store=str(tmp_path / "wsi.zarr"))
    wsi.set_mpp(contract.mpp(predicted))
    lazyslide.pp.find_tissues(wsi)
    lazyslide.pp.tile_tissues(wsi, 56, mpp=2.0)
    with pytest.raises(InputError, match=r"finer than the slide.s 2 um"):
        widen_tiles(wsi, 309)
    assert widen_tiles(wsi, 309, tile_px=112) == "tiles_309um"
    narrow, wide = wsi.shapes["tiles"], wsi.shapes["tiles_309um"]
    assert np.abs(narrow.centroid.x - wide.centroid.x).max() <= 1.5
    assert (wide.bounds.maxx - wide.bounds.minx).mean() * contract.mpp(predicted) == pytest.approx(309, rel=0.01)
    for tiles in ("tiles", "tiles_309um"):
        lazyslide.tl.feature_extraction(
            wsi, Colours(), model_name="colours", tile_key=tiles, transform=_to_tensor, pbar=False, device="cpu"
        )
    with pytest.raises(InputError, match="no table 'other'"):
        join_features(wsi, ["other"])
    assert join_features(wsi, ["colours_tiles", "colours_tiles_309um"]) == "genar_tiles"

    n_tiles, generator = len(narrow), torch.Generator().manual_seed(0)
    given = torch.from_numpy(np.asarray(wsi.tables["genar_tiles"].X, dtype=np.float32))
    assert given.shape == (n_tiles, 24)
    assert 0 < given.std(dim=0).min() < given.std(dim=0).max() < 1
    centres = np.stack([narrow.bounds.minx, narrow.bounds.miny], axis=1)
    apart = np.linalg.norm(centres[:, None] - centres[None], axis=2) + np.diag(np.full(n_tiles, np.inf))
    near = np.argsort(apart, axis=1, kind="stable")[:, :8]
    around = given[:, 12:][near].mean(dim=1)
    x = torch.cat([given, around], dim=1)[:, None]
    counts = torch.poisson((x[:, 0, :4] * 5).exp() * 3, generator=generator).long()
    xy = torch.zeros(n_tiles, 2)
    spots = Spots(x, xy, xy, torch.arange(n_tiles), torch.zeros(n_tiles, dtype=torch.long), counts)
    model = model_class("ridge").create(36, spots, "", {})
    model.prepare(spots)
    facts = {"encoder": "colours", "views": 1, "patch": "hest", "widths_um": [112.0, 309.0], "context_spots": [8]}
    save_checkpoint(tmp_path / "model", Checkpoint("ridge", model.eval(), Panel(tuple("ABCD"), "named"), facts))
    register_model(tmp_path / "model", "genar-wide")
    lazyslide.tl.feature_prediction(wsi, "genar-wide", feature_key="genar", key_added="counts", pbar=False)
    from genar.models import Batch, Decoding

    batch = Batch(x[:, 0], xy, xy, torch.arange(n_tiles))
    expected = model.predict(batch, Decoding("mean", layers=("log1p_mean",))).layers["log1p_mean"].expm1().numpy()
    far = apart[np.arange(n_tiles), near[:, -1]] < np.sort(apart, axis=1)[:, 8]  # where the eight nearest are no tie
    assert far.any()
    np.testing.assert_allclose(np.asarray(wsi.tables["counts"].X)[far], expected[far], rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"the model takes \[tiles, 24\], of patches 112 and 309 um wide side by side"):
        lazyslide.tl.feature_prediction(wsi, "genar-wide", feature_key="colours", key_added="x", pbar=False)


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
