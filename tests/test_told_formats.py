"""Commands on formats that must be told more: an image (Space Ranger), the width of spots (Visium HD), the pixel size
(SpatialData)."""

import numpy as np
import pytest
import tifffile

from commands import run
from test_formats import write_visium

RIDGE = ("--model", "ridge", "--panel", "highest_mean", "--n-genes", "3", "--views", "1")
NARROW = ("--encoder", "genar.bench.toy:narrow_encoder")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def visium(tmp_path):
    """Two Space Ranger outputs, and their images apart."""
    for section in ("P1", "P2"):
        write_visium(tmp_path / "visium" / section / "outs")
        write_image(tmp_path / "images" / f"{section}.tif")
    return tmp_path / "visium"


def write_image(path, size_px=(2000, 1800)):
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (size_px[1], size_px[0], 3), dtype=np.uint8)
    tifffile.imwrite(path, pixels, photometric="rgb")


# --- train


def test_train_asks_for_the_image_before_it_selects_a_panel(visium, monkeypatch, capsys):
    words = ("train", visium, "--test", "P2", "--out", "run", *RIDGE, *NARROW)
    assert run(monkeypatch, *words) == 2
    told = capsys.readouterr()
    assert "selecting" not in told.out
    assert "section P1: no slide image for its features; pass --image FILE, or --image FOLDER that holds P1.tif" in (
        told.err
    )
    assert "wsis" not in told.err
    assert run(monkeypatch, *words, "--image", "images") == 0


def test_imported_features_need_no_image(visium, tmp_path, monkeypatch, capsys):
    (tmp_path / "made").mkdir()
    for section in ("P1", "P2"):
        np.save(tmp_path / "made" / f"{section}.npy", np.random.default_rng(0).normal(size=(30, 5)).astype("f4"))
    words = ("train", visium, "--test", "P2", "--out", "run", *RIDGE, "--features", "store", "--encoder", "import:mine")
    assert run(monkeypatch, *words) == 2
    told = capsys.readouterr()
    assert "selecting" not in told.out
    assert "those of section P1 are not in the store" in told.err
    assert run(monkeypatch, "features", visium, "--import", "made", "--encoder", "mine", "--out", "store") == 0
    assert run(monkeypatch, *words) == 0
