"""Stores of SpatialData: tables of one region or several, images in other frames or beside the store."""

import shutil
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from PIL import Image

from genar.data import contract, find_sections, open_slide, read_section
from genar.errors import InputError
from section_files import write_spatialdata


@pytest.mark.filterwarnings("ignore")
def test_spatialdata_gives_counts_positions_in_px_of_its_image_and_patches(tmp_path):
    pixels, xy, table = write_spatialdata(tmp_path / "S1.zarr")
    section = read_section(tmp_path / "S1.zarr", mpp=0.6)
    assert contract.name(section) == "S1"
    assert list(section.obs_names) == list(table.obs_names)
    np.testing.assert_array_equal(contract.counts(section), table.X)
    np.testing.assert_allclose(contract.coords_px(section), xy)
    slide = open_slide(contract.slide_path(section))
    assert slide.size_px == (400, 300)
    patch = slide.read_patch_px((100, 60), 32, 32)
    np.testing.assert_array_equal(patch, np.moveaxis(pixels, 0, 2)[44:76, 84:116])
    assert (slide.read_patch_px((0, 0), 32, 32)[:16] == 255).all()
    assert slide.thumbnail(100).shape == (75, 100, 3)
    with pytest.raises(InputError, match=r"S1.*--mpp"):
        read_section(tmp_path / "S1.zarr")
    assert [ref.format for ref in find_sections(tmp_path)] == ["spatialdata"]


@pytest.mark.filterwarnings("ignore")
def test_of_a_table_of_several_regions_the_rows_of_the_shapes_are_read(tmp_path):
    _, xy, table = write_spatialdata(tmp_path / "S1.zarr")
    import spatialdata as sd

    store = sd.read_zarr(tmp_path / "S1.zarr")
    other = table.copy()
    other.obs["region"] = pd.Categorical(["cells"] * table.n_obs)
    both = anndata.concat([table, other], index_unique="-")
    both.obs["region"] = pd.Categorical(both.obs["region"])
    del both.uns
    region = {"region": ["spots", "cells"], "region_key": "region", "instance_key": "instance_id"}
    store.tables["table"] = sd.models.TableModel.parse(both, **region)
    store.write(tmp_path / "S2.zarr")
    section = read_section(tmp_path / "S2.zarr", mpp=0.6)
    np.testing.assert_allclose(contract.coords_px(section), xy)
    # circles of radius 10 in a frame of the same scale as the image's px
    assert contract.spot_diameter_px(section) == pytest.approx(20)


@pytest.fixture
def store(tmp_path):
    pytest.importorskip("spatialdata")
    write_spatialdata(tmp_path / "S1.zarr")
    return tmp_path / "S1.zarr"


def rewritten(store, change):
    import spatialdata as sd

    data = sd.read_zarr(store)
    change(data)
    data.write(store.with_name("S2.zarr"))
    return store.with_name("S2.zarr")


@pytest.mark.filterwarnings("ignore")
def test_a_larger_image_that_is_no_rgb_is_not_taken(store):
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Identity

    def add(data):
        dapi = np.zeros((4, 900, 1200), np.uint16)
        data.images["dapi"] = Image2DModel.parse(dapi, dims=("c", "y", "x"), transformations={"global": Identity()})

    one, two = (read_section(path, mpp=0.6) for path in (store, rewritten(store, add)))
    assert open_slide(contract.slide_path(two)).size_px == (400, 300)
    np.testing.assert_allclose(contract.coords_px(one), contract.coords_px(two))


@pytest.mark.filterwarnings("ignore")
def test_an_image_beside_the_store_lies_where_its_like_does(store, tmp_path):
    expected = contract.coords_px(read_section(store, mpp=0.6))
    Image.new("RGB", (400, 300)).save(tmp_path / "he.png")
    section = read_section(store, mpp=0.6, image=tmp_path / "he.png")
    np.testing.assert_allclose(contract.coords_px(section), expected)
    Image.new("RGB", (123, 300)).save(tmp_path / "other.png")
    with pytest.raises(InputError, match=r"123 x 300 px; no image of .*S1\.zarr is as large, and its spots"):
        read_section(store, mpp=0.6, image=tmp_path / "other.png")


@pytest.mark.filterwarnings("ignore")
def test_the_pixel_size_of_a_table_is_that_of_its_own_frame(store):
    from spatialdata.transformations import Identity, Scale, set_transformation

    def shrink(data):  # the image is at a quarter of the frame of the spots
        set_transformation(data.shapes["spots"], Identity(), "global")
        set_transformation(data.images["he"], Scale([4.0, 4.0], axes=("x", "y")), "global")
        factors = {"microns_per_pixel": 0.5, "spot_diameter_fullres": 20.0}
        data.tables["table"].uns["spatial"] = {"a": {"images": {}, "scalefactors": factors}}

    section = read_section(rewritten(store, shrink))
    assert contract.mpp(section) == pytest.approx(2.0)
    assert section.uns["genar"]["spot_diameter_um"] == pytest.approx(10.0)


def test_a_picture_goes_into_the_px_of_the_image_with_the_spots():
    from genar.data.formats.spatialdata import _rescale

    factors = {"spot_diameter_fullres": 50.0, "microns_per_pixel": 1.0, "tissue_hires_scalef": 0.1}
    section = AnnData(np.ones((2, 2), np.float32), uns={"spatial": {"lib": {"images": {}, "scalefactors": factors}}})
    _rescale(section, 2.0)  # two px of the image to one of the frame that the table speaks of
    found = section.uns["spatial"]["lib"]["scalefactors"]
    assert found == {"spot_diameter_fullres": 100.0, "microns_per_pixel": 0.5, "tissue_hires_scalef": 0.05}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["hires", "lowres"])
def test_small_pictures_of_space_ranger_are_no_slide(tmp_path, kind):
    write_spatialdata(tmp_path / "S1.zarr", name=f"P1_{kind}_image")
    assert contract.slide_path(read_section(tmp_path / "S1.zarr", mpp=0.6)) is None


@pytest.mark.filterwarnings("ignore")
def test_spatialdata_that_is_damaged_or_has_no_rgb_image_is_one_line(tmp_path, monkeypatch):
    write_spatialdata(tmp_path / "S1.zarr", channels=2)
    section = read_section(tmp_path / "S1.zarr", mpp=0.6)
    with pytest.raises(InputError, match="expected an 8-bit RGB image"):
        open_slide(contract.slide_path(section))
    shutil.rmtree(tmp_path / "S1.zarr" / "tables")
    with pytest.raises(InputError, match=r"S1\.zarr"):
        read_section(tmp_path / "S1.zarr", mpp=0.6)
    monkeypatch.setitem(sys.modules, "spatialdata", None)
    with pytest.raises(InputError, match=r"pip install 'genar\[spatialdata\]'"):
        read_section(tmp_path / "S1.zarr", mpp=0.6)
