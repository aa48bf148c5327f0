"""LazySlide's tiles, predicted by our checkpoints."""

from pathlib import Path
from zlib import crc32

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import genar
from genar.assess import read_prediction
from genar.data import contract
from genar.errors import InputError
from genar.genes import Panel
from genar.models import Spots, model_class
from genar.models.checkpoint import Checkpoint, save_checkpoint
from genar.prediction import decoding, predict_section
from toy_prediction import write_toy


@pytest.fixture(scope="module")
def prediction(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"))


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
