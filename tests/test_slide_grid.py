"""The grid of a bare slide: square, or hexagonal as Visium's where the model was trained on such an array."""

import anndata
import numpy as np
import pytest
from scipy.spatial import KDTree

import genar
from commands import run
from genar.data import contract, read_section
from genar.data.reading import looks_like_visium
from genar.errors import InputError


def pitches_um(section):
    """Distance to the nearest neighbour, um, and how many lie at it."""
    xy = contract.coords_um(section)
    near = KDTree(xy).query(xy, k=2)[0][:, 1]
    around = KDTree(xy).query_ball_point(xy, 1.05 * np.median(near))
    return near, np.array([len(one) - 1 for one in around])


def test_a_hexagonal_grid_has_visiums_array_and_pitch(tissue):
    spots = genar.place_spots(tissue / "wsis" / "SIM1.tif", spacing_um=60, hexagonal=True, mpp=2.0)
    near, around = pitches_um(spots)
    np.testing.assert_allclose(near, 60, rtol=1e-6)
    assert around.max() == 6
    assert looks_like_visium(spots)
    square = genar.place_spots(tissue / "wsis" / "SIM1.tif", spacing_um=60, mpp=2.0)
    assert pitches_um(square)[1].max() == 4
    assert not looks_like_visium(square)
    # as many to an area as the closer packing says
    assert spots.n_obs / square.n_obs == pytest.approx(2 / np.sqrt(3), rel=0.1)


def test_the_array_is_told_of_slides_alone(tissue):
    with pytest.raises(InputError, match=r"--hexagonal is for format slide.*leave it out"):
        read_section(f"{tissue}:SIM1", hexagonal=True)
    assert looks_like_visium(read_section(tissue / "wsis" / "SIM1.tif", mpp=2.0, spacing_um=60, hexagonal=True))


@pytest.fixture(scope="module")
def hexagonal(tissue, tmp_path_factory):
    """The sections with their spots moved onto a hexagonal array."""
    folder = tmp_path_factory.mktemp("hexagonal")
    for section in genar.read_sections(tissue):
        mpp, n = contract.mpp(section), section.n_obs
        width = int(np.sqrt(n))
        row, i = np.divmod(np.arange(n), width)
        xy_um = np.column_stack([100 * i + 50 * (row % 2), 100 * row * np.sqrt(3) / 2]) + 60
        section.obsm["spatial"] = xy_um / mpp
        section.uns["genar"]["pitch_um"] = 100.0
        section.write_h5ad(folder / f"{contract.name(section)}.h5ad")
    return folder


def test_a_slide_is_laid_out_as_the_training_was(tissue, hexagonal, tmp_path, monkeypatch, capsys):
    tiny = ("--model", "ridge", "--n-genes", 20, "--views", 1, "--encoder", "genar.bench.toy:narrow_encoder")
    store = ("--features", tmp_path / "store")
    images = ("--image", tissue / "wsis")
    assert run(monkeypatch, "train", hexagonal, *images, *tiny, *store, "--out", tmp_path / "run") == 0
    slide = (tissue / "wsis" / "SIM2.tif", "--mpp", 2, "--model", tmp_path / "run", *store)
    slide = (*slide, "--encoder", "genar.bench.toy:narrow_encoder")
    assert run(monkeypatch, "predict", *slide, "--out", tmp_path / "hex.h5ad") == 0
    assert "100 um apart on a hexagonal grid" in capsys.readouterr().out
    assert pitches_um(anndata.read_h5ad(tmp_path / "hex.h5ad"))[1].max() == 6
    assert run(monkeypatch, "predict", *slide, "--square", "--out", tmp_path / "square.h5ad") == 0
    assert "100 um apart on a square grid" in capsys.readouterr().out
    assert pitches_um(anndata.read_h5ad(tmp_path / "square.h5ad"))[1].max() == 4
