"""Recipes of features: which patches they show, which store they name."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from anndata import AnnData

from genar.data import contract, read_section, read_sections
from genar.encoders import load_encoder
from genar.errors import InputError
from genar.features import FeatureRecipe, Inputs, recipe_of, store_path
from genar.features.recipe import _fingerprint
from section_files import write_spatialdata
from slides import noise


@pytest.mark.parametrize(
    ("change", "says"),
    [({"patch": "square"}, "hest, genar, stem"), ({"views": 4}, "1 or 8"), ({"width_um": 0}, "positive")],
)
def test_bad_recipes_are_refused(change, says):
    with pytest.raises(InputError, match=says):
        FeatureRecipe("tiny", "0", **change)


def read_spots(tissue):
    return read_section(f"{tissue}:SIM1")[::3].copy()  # 20 spots: a whole chunk and a part of one


@pytest.fixture
def section(tissue):
    return read_spots(tissue)


@pytest.mark.parametrize(
    ("patch", "mpp", "diameter_um", "width_px"),
    [("hest", 0.7, 55, 160), ("genar", 0.7, 55, 224), ("stem", 0.7, 55, 224), ("stem", 0.2, 55, 275)],
)
def test_width_of_a_patch_by_convention(section, patch, mpp, diameter_um, width_px):
    section.uns[contract.GENAR] |= {contract.MPP: mpp, contract.SPOT_DIAMETER_UM: diameter_um}
    assert FeatureRecipe("tiny", "0", patch=patch).width_px(section) == pytest.approx(width_px)


@pytest.mark.parametrize("facts", [{"widths_um": (112, 0)}, {"context_spots": (0,)}])
def test_senseless_inputs_are_refused(facts):
    with pytest.raises(InputError, match="widths_um"):
        Inputs(**facts)
    with pytest.raises(InputError, match="hest"):
        Inputs(widths_um=(112,)).recipes(FeatureRecipe("tiny", "", "genar"))


@pytest.mark.parametrize("words", [{"widths_um": (112.0, 112.0)}, {"context_spots": (6, 6)}])
def test_the_same_input_twice_is_refused(words):
    with pytest.raises(InputError, match="must each differ"):
        Inputs(**words)


def fixed_section():
    adata = AnnData(np.ones((3, 2), np.float32))
    adata.obs_names = ["a", "b", "c"]
    adata.obsm["spatial"] = np.array([[10.0, 20], [30, 40], [50, 60]])
    return contract.new_section(adata, section="S1", mpp=0.5, spot_diameter_um=55, source="test")


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({}, "S1-52310e54484f1fea.zarr"),
        ({"views": 1}, "S1-0fcc19951cc8a0b7.zarr"),
        ({"patch": "genar"}, "S1-3f0873b22dc24b7f.zarr"),
        ({"width_um": 309.0}, "S1-cddf6ca158a58939.zarr"),
    ],
)
def test_stores_of_version_0_1_keep_their_names(facts, name):
    recipe = FeatureRecipe("efficientnet_lite0", "cf10", **facts)
    assert store_path(fixed_section(), recipe, Path()).name == name


def test_precision_is_another_store(monkeypatch):
    section, recipe = fixed_section(), FeatureRecipe("efficientnet_lite0", "cf10")
    paths = {store_path(section, replace(recipe, precision=p), Path()) for p in ("fp32", "bf16", "fp16")}
    assert len(paths) == 3
    monkeypatch.setattr("genar.features.recipe.RECIPE_VERSION", 2)
    assert store_path(section, recipe, Path()) not in paths
    with pytest.raises(InputError, match="fp32, bf16, fp16"):
        FeatureRecipe("efficientnet_lite0", "", precision="int8")


@pytest.mark.real
def test_real_sections_keep_their_stores(shared):
    known = {
        "SPA138": "a22f482b78ef41ef", "SPA139": "15adb6dfc0d76185",
        "SPA140": "0ffde1469b9cfc15", "SPA141": "f39b8810f6d4c1d4",
    }  # fmt: skip
    recipe = recipe_of(load_encoder())
    for section in read_sections(shared / "data" / "her2st"):
        name = contract.name(section)
        assert store_path(section, recipe, Path()).name == f"{name}-{known[name]}.zarr"


def test_a_changed_image_is_another_slide(tmp_path):
    pixels = noise(3000, 2000)
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="rgb")
    before = _fingerprint(tmp_path / "x.tif")
    pixels[1000:2000] = pixels[1000:2000, :, ::-1]
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="rgb")
    assert _fingerprint(tmp_path / "x.tif") != before


@pytest.mark.filterwarnings("ignore")
def test_a_changed_store_is_another_slide(tmp_path):
    pytest.importorskip("spatialdata")
    marks = []
    for turn in (False, True):
        write_spatialdata(tmp_path / "S1.zarr")
        image = tmp_path / "S1.zarr" / "images" / "he"
        if turn:
            chunk = max((path for path in image.rglob("c/*/*/*") if path.is_file()), key=lambda p: p.stat().st_size)
            chunk.write_bytes(chunk.read_bytes()[::-1])
        marks.append(_fingerprint(image / "zarr.json"))
        shutil.rmtree(tmp_path / "S1.zarr")
    assert marks[0] != marks[1]
