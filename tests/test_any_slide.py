"""Slides as microscopes, converters and strangers write them; sections whose images lie beside, or in other frames."""

import os
import threading

import anndata
import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from genar.data import contract, open_slide, read_section
from genar.data.slide import glance, image_head
from genar.errors import InputError
from section_files import write_h5ad, write_spatialdata
from slides import STRIPED, TILED, gradient


@pytest.mark.parametrize("how", [TILED, STRIPED])
def test_a_slide_that_is_stored_turned_is_refused(tmp_path, how):
    tifffile.imwrite(tmp_path / "t.tif", gradient(), photometric="rgb", extratags=[(274, "H", 1, 4, True)], **how)
    with pytest.raises(InputError, match=r"its pixels are stored turned \(Orientation 4\); write it upright"):
        open_slide(tmp_path / "t.tif")


@pytest.mark.parametrize("name", ["t.jpg", "t.png"])
def test_so_is_a_photograph_that_is_turned(tmp_path, name):
    for orientation in (0, 1, 6):
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(gradient()).save(tmp_path / name, exif=exif)
        if orientation < 2:
            assert open_slide(tmp_path / name).size_px == (512, 384)
    with pytest.raises(InputError, match=r"its pixels are stored turned \(Orientation 6\); write it upright"):
        open_slide(tmp_path / name)
    with pytest.raises(InputError, match="Orientation 6"):
        image_head(tmp_path / name)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@pytest.mark.parametrize("how", [TILED, STRIPED])
def test_a_slide_of_more_bits_is_refused(tmp_path, dtype, how):
    tifffile.imwrite(tmp_path / "d.tif", gradient().astype(dtype) * 16, photometric="rgb", **how)
    with pytest.raises(InputError, match=rf"expected an 8-bit RGB image, found {dtype}"):
        open_slide(tmp_path / "d.tif")


def test_a_deep_grey_png_is_refused(tmp_path):
    Image.fromarray(gradient()[..., 0].astype(np.uint16) * 200).save(tmp_path / "d.png")
    with pytest.raises(InputError, match=r"expected an 8-bit RGB image, found I;16"):
        open_slide(tmp_path / "d.png")


@pytest.mark.parametrize("how", [TILED, STRIPED])
def test_a_fourth_channel_that_is_no_alpha_hides_nothing(tmp_path, how):
    pixels = np.concatenate([gradient(), np.zeros((384, 512, 1), np.uint8)], axis=2)
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="rgb", extrasamples=["unspecified"], **how)
    assert np.array_equal(
        open_slide(tmp_path / "x.tif").read_patch_px((200, 200), 64, 64), pixels[168:232, 168:232, :3]
    )
    assert (glance(tmp_path / "x.tif", 512).view == pixels[..., :3]).all()
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["unassalpha"], **how)
    assert (open_slide(tmp_path / "a.tif").read_patch_px((200, 200), 64, 64) == 255).all()


@pytest.mark.parametrize("compression", ["jpeg2000", "webp"])
def test_tiles_that_openslide_cannot_unpack_are_read(tmp_path, compression):
    path, pixels = tmp_path / "c.tif", gradient()
    arguments = {"lossless": True} if compression == "webp" else {}
    tifffile.imwrite(path, pixels, photometric="rgb", compression=compression, compressionargs=arguments, **TILED)
    assert np.abs(open_slide(path).read_patch_px((200, 200), 64, 64).astype(int) - pixels[168:232, 168:232]).max() <= 2


@pytest.mark.parametrize("how", [TILED, STRIPED])
@pytest.mark.parametrize(("size", "unit", "mpp"), [(0.7, "µm", 0.7), (700, "nm", 0.7), (0.7, "reference frame", None)])
def test_ome_metadata_give_the_pixel_size(tmp_path, how, size, unit, mpp):
    metadata = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeXUnit": unit, "PhysicalSizeY": size}
    metadata["PhysicalSizeYUnit"] = unit
    tifffile.imwrite(tmp_path / "o.ome.tif", gradient(), photometric="rgb", metadata=metadata, **how)
    assert open_slide(tmp_path / "o.ome.tif").mpp == image_head(tmp_path / "o.ome.tif")[1] == pytest.approx(mpp)


@pytest.mark.parametrize("how", [TILED, STRIPED])
def test_pixels_that_are_no_squares_have_no_size(tmp_path, how):
    resolution = {"resolution": (1e4 / 1.4, 1e4 / 0.7), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "n.tif", gradient(), photometric="rgb", **resolution, **how)
    slide = open_slide(tmp_path / "n.tif")
    assert slide.mpp is None
    with pytest.raises(InputError, match="names no pixel size; pass --mpp"):
        slide.read_patch((100, 100), 30, 30)


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


def with_dataset(path, **how):
    write_h5ad(path)
    with h5py.File(path, "r+") as file:
        how.pop("add")(file["uns"], **how)


def external(group, secret):
    group.create_dataset("note", (8,), "S1", external=[(str(secret), 0, 8)])


def virtual(group, secret):
    layout = h5py.VirtualLayout((8,), "i4")
    layout[:] = h5py.VirtualSource(str(secret), "data", (8,))
    group.create_virtual_dataset("note", layout)


def linked(group, secret):
    group["note"] = h5py.ExternalLink(str(secret), "/data")


@pytest.mark.parametrize("add", [external, virtual, linked])
def test_an_hdf5_file_that_reaches_into_another_is_refused(tmp_path, add):
    secret = tmp_path / "secret"
    secret.write_bytes(b"hf_token")
    with_dataset(tmp_path / "s.h5ad", add=add, secret=secret)
    with pytest.raises(InputError, match=r"s\.h5ad: its note lies in another file; expected all of it in this one"):
        read_section(tmp_path / "s.h5ad", mpp=0.5)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_link_to_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with_dataset(tmp_path / "s.h5ad", add=linked, secret=tmp_path / "pipe")
    found = []

    def read():
        with pytest.raises(InputError, match="its note lies in another file"):
            read_section(tmp_path / "s.h5ad", mpp=0.5)
        found.append(True)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert found


def test_spots_beside_the_tissue_are_dropped_from_hest_too(tissue, tmp_path):
    for kind, suffix in (("st", "h5ad"), ("metadata", "json"), ("wsis", "tif")):
        (tmp_path / kind).mkdir()
        os.symlink(tissue / kind / f"SIM1.{suffix}", tmp_path / kind / f"SIM1.{suffix}")
    adata = anndata.read_h5ad(tissue / "st" / "SIM1.h5ad")
    adata.obs["in_tissue"] = np.r_[[0] * 5, [1] * (adata.n_obs - 5)]
    (tmp_path / "st" / "SIM1.h5ad").unlink()
    adata.write_h5ad(tmp_path / "st" / "SIM1.h5ad")
    assert read_section(f"{tmp_path}:SIM1").n_obs == adata.n_obs - 5
