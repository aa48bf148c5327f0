"""Slides of every format: their size, pixel size, patches and damage."""

import shutil
import struct

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from genar.data import contract, open_slide, read_section
from genar.data.slide import glance, image_head
from genar.errors import InputError
from slides import TILED, gradient, noise

MPP, SQUARE = 0.5, (300, 180, 40)  # um per px; left, top, side of a black square on grey, px
RESOLUTION = {"resolution": (1e4 / MPP, 1e4 / MPP), "resolutionunit": "CENTIMETER"}


@pytest.fixture(scope="module")
def truth(tissue):
    with tifffile.TiffFile(tissue / "wsis" / "SIM1.tif") as tiff:
        return tiff.pages.first.asarray()


@pytest.mark.parametrize("name", ["pyramid.tif", "pyramid.tiff", "striped.tif", "plain.jpg", "plain.png", "grey.png"])
def test_every_format_gives_the_same_size_and_patches(tissue, truth, tmp_path, name):
    path = tmp_path / name
    if name.startswith("pyramid"):
        shutil.copy(tissue / "wsis" / "SIM1.tif", path)
    elif name == "striped.tif":
        tifffile.imwrite(path, truth, photometric="rgb", rowsperstrip=64, **RESOLUTION)
    elif name == "grey.png":
        truth = np.repeat(truth[..., :1], 3, axis=2)
        Image.fromarray(truth[..., 0]).save(path)
    else:
        Image.fromarray(truth).save(path, quality=90)
    slide = open_slide(path)
    assert slide.size_px == truth.shape[1::-1]
    for x, y in ((600, 640), (300, 900)):
        patch = slide.read_patch((x, y), 112, 224, mpp=0.5).astype(float)
        assert np.abs(patch - truth[y - 112 : y + 112, x - 112 : x + 112]).mean() < (3 if "jpg" in name else 1)
    slide.close()


@pytest.fixture(scope="module")
def pixels():
    image = np.full((400, 500, 3), 160, np.uint8)
    left, top, side = SQUARE
    image[top : top + side, left : left + side] = 0
    return image


def test_a_grey_tiff_is_read_as_rgb(tmp_path, pixels):
    path = tmp_path / "grey.tif"
    tifffile.imwrite(path, pixels[..., 0], photometric="minisblack")
    slide = open_slide(path)
    assert (slide.read_patch_px((100, 100), 32, 32) == 160).all()
    slide.close()


def test_sixteen_bit_tiff_is_refused(tmp_path):
    path = tmp_path / "deep.tif"
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint16), photometric="rgb")
    with pytest.raises(InputError, match=r"deep\.tif: expected an 8-bit RGB image.*uint16"):
        open_slide(path)


def write_pyramid(path, image, **tags):
    with tifffile.TiffWriter(path) as tiff:
        for level in range(3):
            small = np.asarray(Image.fromarray(image).reduce(2**level))
            tiff.write(
                small, tile=(128, 128), subfiletype=int(level > 0), photometric="rgb", compression="deflate", **tags
            )


@pytest.fixture(params=["pyramid.tif", "striped.tif", "plain.png"])
def slide(request, pixels, tmp_path):
    path = tmp_path / request.param
    if request.param == "pyramid.tif":
        write_pyramid(path, pixels, **RESOLUTION)
    elif request.param == "striped.tif":
        tifffile.imwrite(path, pixels, photometric="rgb", rowsperstrip=16, **RESOLUTION)
    else:
        Image.fromarray(pixels).save(path)
    slide = open_slide(path)
    yield slide
    slide.close()


# --- patches


def test_square_is_read_at_its_place_and_size_in_um(slide):
    left, top, side = SQUARE
    center = (left + side / 2, top + side / 2)
    patch = slide.read_patch(
        center, 2 * side * MPP, 160, mpp=MPP
    )  # twice as wide as the square: its half in the middle
    assert patch.shape == (160, 160, 3)
    assert patch.dtype == np.uint8
    dark = patch[..., 0] < 80
    rows, cols = np.flatnonzero(dark.any(axis=1)), np.flatnonzero(dark.any(axis=0))
    for edges in (rows, cols):
        np.testing.assert_allclose(edges[[0, -1]], [40, 119], atol=1)
    assert dark.sum() == pytest.approx(80 * 80, rel=0.05)


def test_x_is_the_column_and_y_the_row(slide):
    left, top, side = SQUARE
    assert (slide.read_patch_px((left + side / 2, top + side / 2), side, side) == 0).all()
    assert (slide.read_patch_px((top + side / 2, left + side / 2), side, side) == 160).all()


def test_mpp_given_wins_over_the_tag(slide):
    center = (250, 200)
    expected = slide.read_patch_px(center, 100, 64)
    np.testing.assert_array_equal(slide.read_patch(center, 100, 64, mpp=1.0), expected)


def test_tag_is_the_pixel_size_where_the_file_has_one(slide):
    if slide.path.suffix == ".png":
        assert slide.mpp is None
        with pytest.raises(InputError, match=r"plain\.png.*--mpp"):
            slide.read_patch((250, 200), 50, 64)
    else:
        assert slide.mpp == pytest.approx(MPP, rel=1e-4)
        np.testing.assert_array_equal(slide.read_patch((250, 200), 50, 64), slide.read_patch_px((250, 200), 100, 64))


@pytest.mark.parametrize("kind", ["pyramid", "striped"])
@pytest.mark.parametrize(("resolution", "unit"), [((72, 72), "INCH"), ((10, 10), "CENTIMETER")])
def test_a_writers_default_resolution_is_no_pixel_size(tmp_path, pixels, kind, resolution, unit):
    tags = {"resolution": resolution, "resolutionunit": unit}
    if kind == "pyramid":
        write_pyramid(tmp_path / "a.tif", pixels, **tags)
    else:
        tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", **tags)
    slide = open_slide(tmp_path / "a.tif")
    assert slide.mpp is None
    slide.close()


def test_outside_is_white(slide):
    patch = slide.read_patch_px((0, 0), 64, 64)
    assert (patch[:32] == 255).all()
    assert (patch[:, :32] == 255).all()
    assert (patch[33:, 33:] == 160).all()
    patch = slide.read_patch_px((500, 400), 64, 64)
    assert (patch[32:] == 255).all()
    assert (patch[:, 32:] == 255).all()
    assert (patch[:31, :31] == 160).all()


@pytest.mark.parametrize("center", [(-500, 200), (2000, 200), (250, -500), (250, 2000)])
def test_wholly_outside_is_white(slide, center):
    assert (slide.read_patch_px(center, 64, 32) == 255).all()


def test_a_patch_wider_than_the_slide_holds_it_on_white(slide):
    patch = slide.read_patch_px((250, 200), 1000, 250)
    assert (patch[:70] == 255).all()
    assert patch[125, 125].tolist() == [160, 160, 160]
    assert patch.min() < 30


@pytest.mark.parametrize(("width_px", "out_px"), [(448, 224), (900, 224), (900, 100)])
def test_wide_patches_resemble_level_0_made_smaller(tmp_path, truth, width_px, out_px):
    truth = truth[:1024, :1024]  # halves evenly, so that levels lie exactly on each other
    write_pyramid(tmp_path / "even.tif", truth)
    slide = open_slide(tmp_path / "even.tif")
    x, y, half = 512, 500, width_px // 2

    def blurred(patch):  # grain differs from level to level; what is 1 / 50 of the patch must not
        return np.asarray(Image.fromarray(patch).resize((50, 50), Image.Resampling.BOX)).astype(float)

    def correlation(shift):
        fine = truth[y - half + shift : y + half + shift, x - half : x + half]
        return np.corrcoef(patch.ravel(), blurred(fine).ravel())[0, 1]

    patch = blurred(slide.read_patch_px((x, y), width_px, out_px))
    assert np.abs(patch - blurred(truth[y - half : y + half, x - half : x + half])).mean() < 4
    assert correlation(0) > 0.98
    assert correlation(0) > max(correlation(-width_px // 50), correlation(width_px // 50)) + 0.02
    slide.close()


def test_thumbnail_keeps_the_shape(slide):
    thumbnail = slide.thumbnail(100)
    assert thumbnail.shape == (80, 100, 3)
    assert thumbnail.dtype == np.uint8
    left, top, side = SQUARE
    assert thumbnail[(top + side // 2) // 5, (left + side // 2) // 5].max() < 40


def cut(path, share=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def test_truncated_pyramid_is_refused(tissue, tmp_path):
    path = tmp_path / "cut.tif"
    shutil.copy(tissue / "wsis" / "SIM1.tif", path)
    cut(path)
    with pytest.raises(InputError, match=r"cut\.tif: (truncated|not a readable) TIFF"):
        open_slide(path)


@pytest.mark.parametrize("share", [0.02, 0.6, 0.99])
def test_truncated_striped_tiff_is_refused(truth, tmp_path, share):
    path = tmp_path / "cut.tif"
    tifffile.imwrite(path, truth, photometric="rgb", rowsperstrip=64)
    cut(path, share)
    with pytest.raises(InputError, match=r"cut\.tif: (truncated|not a readable) TIFF"):
        open_slide(path)


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png"])
@pytest.mark.parametrize("share", [0.001, 0.6])
def test_truncated_plain_image_is_refused(truth, tmp_path, name, share):
    path = tmp_path / name
    Image.fromarray(truth).save(path)
    cut(path, share)
    with pytest.raises(InputError, match=rf"{name}: not a readable image"):
        open_slide(path)


@pytest.mark.parametrize("kind", ["pyramid", "striped"])
def test_damaged_pixels_are_refused(tmp_path, pixels, kind):
    path = tmp_path / "bad.tif"
    noise = np.random.default_rng(0).integers(0, 255, pixels.shape, np.uint8)
    if kind == "pyramid":
        write_pyramid(path, noise)
    else:
        tifffile.imwrite(path, noise, photometric="rgb", compression="deflate", rowsperstrip=16)
    with tifffile.TiffFile(path) as tiff:
        offsets = tiff.pages.first.dataoffsets
    content = bytearray(path.read_bytes())
    for offset in offsets:
        content[offset : offset + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.tif: "):
        open_slide(path).read_patch_px((250, 200), 64, 64)


def test_a_compression_without_decoder_is_named(tmp_path, pixels):
    path = tmp_path / "fax.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", compression="deflate", rowsperstrip=16)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages.first.tags["Compression"].overwrite(3)  # CCITT fax, for pages of two colours
    with pytest.raises(InputError, match=r"fax\.tif: "):
        open_slide(path).read_patch_px((250, 200), 64, 64)
    with pytest.raises(InputError, match=r"fax\.tif: "):
        glance(path, 100)


@pytest.mark.parametrize("suffix", [".tif", ".svs", ".png", ".jpg", ".ndpi"])
@pytest.mark.parametrize("content", [b"", b"not an image at all\n" * 50])
def test_a_file_that_is_no_image_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"text{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"text\{suffix}: .*(not a readable|cannot read)"):
        open_slide(path)


def test_a_tiff_header_alone_is_refused(tmp_path):
    path = tmp_path / "header.tif"
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 8))
    with pytest.raises(InputError, match=r"header\.tif: .*TIFF"):
        open_slide(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.tif: no such slide image"):
        open_slide(tmp_path / "gone.tif")


# --- real


@pytest.mark.real
def test_patches_agree_with_those_of_the_hest_library(shared):
    her2st = shared / "data" / "her2st"
    section = read_section(f"{her2st}:SPA141")
    slide = open_slide(contract.slide_path(section))
    with h5py.File(her2st / "peer" / "SPA141_patches_24spots.h5") as peer:
        names = [name.decode() for name in peer["barcode"][:, 0]]
        images, corners = peer["img"][:].astype(float), peer["coords"][:]
    centers = contract.coords_px(section)[section.obs_names.get_indexer(names)]
    size = round(112 / contract.mpp(section))
    np.testing.assert_allclose(centers - size // 2, corners, atol=1)
    ours = np.stack([slide.read_patch(center, 112, 224, mpp=contract.mpp(section)) for center in centers])
    slide.close()
    assert np.abs(ours - images).mean() < 3


@pytest.mark.real
def test_tag_of_a_file_written_by_the_hest_library_is_ten_times_too_small(shared):
    her2st = shared / "data" / "her2st"
    slide = open_slide(her2st / "peer" / "SPA141_crop512_hest_tiff_save.tif")
    section = read_section(f"{her2st}:SPA141")
    assert slide.size_px == (512, 512)
    assert slide.mpp == pytest.approx(contract.mpp(section) / 10, rel=0.01)
    slide.close()
    whole = open_slide(contract.slide_path(section))
    assert whole.mpp == pytest.approx(contract.mpp(section), rel=0.01)
    whole.close()


@pytest.mark.parametrize("compression", ["jpeg2000", "webp"])
def test_tiles_that_openslide_cannot_unpack_are_read(tmp_path, compression):
    path, pixels = tmp_path / "c.tif", gradient()
    arguments = {"lossless": True} if compression == "webp" else {}
    tifffile.imwrite(path, pixels, photometric="rgb", compression=compression, compressionargs=arguments, **TILED)
    assert np.abs(open_slide(path).read_patch_px((200, 200), 64, 64).astype(int) - pixels[168:232, 168:232]).max() <= 2


def test_a_big_tiff_in_strips_is_read(tmp_path):
    tifffile.imwrite(tmp_path / "x.btf", noise(), bigtiff=True, photometric="rgb")
    patch = open_slide(tmp_path / "x.btf").read_patch_px((200, 200), 100, 100)
    np.testing.assert_array_equal(patch, noise()[150:250, 150:250])


@pytest.mark.parametrize("tiled", [None, (64, 64)])
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_a_thumbnail_before_the_slide_is_not_taken_for_it(tmp_path, tiled, compression):
    path, pixels = tmp_path / "thumb_first.tif", noise()
    with tifffile.TiffWriter(path) as tiff:
        for page in (pixels[::4, ::4], pixels):
            tiff.write(
                page, photometric="rgb", tile=tiled, compression=compression, metadata=None, resolution=(20000, 20000),
                resolutionunit="CENTIMETER",
            )  # fmt: skip
    slide = open_slide(path)
    assert image_head(path) == (slide.size_px, slide.mpp) == ((500, 400), 0.5)
    assert np.array_equal(slide.read_patch_px((250, 200), 100, 100), pixels[150:250, 200:300])
    assert np.abs(glance(path, 500).view.astype(int) - pixels).max() == 0
