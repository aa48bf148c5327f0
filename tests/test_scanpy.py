"""Predictions in scanpy and squidpy, drawn over their pictures."""

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from genar.assess import read_prediction
from genar.data import contract, read_section, read_sections
from genar.genes import Panel
from genar.models import Spots, model_class
from genar.models.checkpoint import Checkpoint
from genar.prediction import predict_section, write_prediction
from section_files import write_visium
from toy_prediction import write_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"))


def test_squidpy_takes_a_prediction_as_it_is(toy, monkeypatch):
    squidpy = pytest.importorskip("squidpy", reason="squidpy is not installed: it is not tried")
    import matplotlib

    matplotlib.use("Agg")
    predicted = read_prediction(toy)
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


@pytest.fixture(scope="module")
def sections(tissue):
    return read_sections(tissue)


def test_scanpy_finds_the_image_and_the_array(prediction, sections, tissue):
    import matplotlib
    import scanpy as sc

    matplotlib.use("Agg")
    assert {"array_row", "array_col"} <= set(prediction.obs) or "array_row" not in sections[1].obs
    adata = sections[1].copy()
    (library,) = adata.uns["spatial"].values()
    assert library["images"]
    shown = prediction.copy()
    sc.pl.spatial(shown, color=shown.var_names[0], show=False)
