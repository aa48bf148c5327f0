"""Pixels of slides: colours, bits, transparency and orientation that are read, or refused."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from genar.data import open_slide
from genar.data.slide import glance, image_head
from genar.errors import InputError
from slides import STRIPED, TILED, gradient, noise


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


@pytest.mark.parametrize(("mode", "told"), [("YCbCr", "YCbCr"), ("LAB", "CIELab")])
def test_colours_that_are_not_rgb_are_refused(tmp_path, mode, told):
    Image.new("RGB", (300, 300), (200, 120, 180)).convert(mode).save(tmp_path / "y.tif")
    with pytest.raises(InputError, match=f"expected an 8-bit RGB image, found {told}"):
        open_slide(tmp_path / "y.tif")


@pytest.mark.parametrize("tile", [None, (256, 256)])
@pytest.mark.parametrize("more", [{}, {"metadata": {"axes": "CYX"}}, {"ome": True, "metadata": {"axes": "CYX"}}])
def test_colours_on_pages_of_their_own_are_refused(tmp_path, tile, more):
    tifffile.imwrite(tmp_path / "x.tif", noise().transpose(2, 0, 1), photometric="minisblack", tile=tile, **more)
    with pytest.raises(InputError, match="colours are on pages of their own"):
        open_slide(tmp_path / "x.tif")
    tifffile.imwrite(tmp_path / "grey.tif", noise()[..., 0], photometric="minisblack", tile=tile)
    assert open_slide(tmp_path / "grey.tif").size_px == (500, 400)


@pytest.mark.parametrize(
    ("pixels", "kind", "says"),
    [(noise()[..., 0], {"photometric": "miniswhite"}, "inverted"),
     (np.dstack([noise(), noise()[..., :1]]), {"photometric": "separated"}, "CMYK"),
     (noise()[..., 0], {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}, "palette")],
)  # fmt: skip
def test_numbers_that_are_no_colours_are_refused(tmp_path, pixels, kind, says):
    tifffile.imwrite(tmp_path / "x.tif", pixels, **kind)
    with pytest.raises(InputError, match=says):
        open_slide(tmp_path / "x.tif")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_what_is_transparent_is_white(tmp_path, suffix):
    alpha = np.where(np.arange(500) < 250, 0, 255)[None, :, None].repeat(400, 0).astype(np.uint8)
    pixels = np.concatenate([noise(), alpha], axis=2)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(pixels).save(path) if suffix == "png" else tifffile.imwrite(
        path, pixels, photometric="rgb", extrasamples=["unassalpha"]
    )
    patch = open_slide(path).read_patch_px((250, 200), 400, 400)
    assert (patch[:, :200] == 255).all()
    np.testing.assert_array_equal(patch[:, 200:], noise()[:, 250:450])
    assert (glance(path, 500).view[:, :250] == 255).all()


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
