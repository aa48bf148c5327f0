"""Tissue is found on a slide, without pen, dust and bled stain, and spots are laid on it."""

import subprocess
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageDraw

from genar.data import contract, find_sections, read_section
from genar.data.simulate import TissueConfig, simulate_section
from genar.data.slide import glance, image_head, open_slide
from genar.data.tissue import find_tissue, on_tissue, place_spots
from genar.errors import InputError

UM, AT = 7.7, 120  # um per px of the view; where the tissue lies on the glass, px
INKS = {
    "blue": (30, 60, 170),
    "green": (20, 130, 60),
    "black": (25, 25, 25),
    "red": (200, 30, 40),
    "pink": (240, 90, 100),
}


@pytest.fixture(scope="module")
def drawn():
    """A simulated section on a wide glass, and where its tissue truly is."""
    section, image = simulate_section("T", 1, TissueConfig(n_rows=14, n_cols=14, n_genes=120, counts_per_nucleus=20))
    small = np.asarray(Image.fromarray(image).reduce(11))
    view = np.full((440, 440, 3), (246, 245, 247), np.uint8)
    view[AT : AT + small.shape[0], AT : AT + small.shape[1]] = small
    spots = contract.coords_px(section) / 11 + AT
    return view, spots, section


def mark(view):
    """Pen strokes of every colour and grey dust, all beside the tissue."""
    image = Image.fromarray(view)
    draw = ImageDraw.Draw(image)
    for i, colour in enumerate(INKS.values()):
        draw.line([(20 + 80 * i, 15), (70 + 80 * i, 60)], fill=colour, width=16)
    for i in range(20):
        draw.ellipse([20 * i, 380 + i, 20 * i + 1 + i // 2, 381 + i + i // 2], fill=(150, 150, 152))
    draw.ellipse([30, 90, 70, 130], fill=(170, 170, 172))
    return np.asarray(image)


def spots_on(mask, spots):
    return on_tissue(spots, mask, mask.shape[::-1])


def test_tissue_is_found_and_glass_is_not(drawn):
    view, spots, _ = drawn
    mask = find_tissue(view, UM)
    assert spots_on(mask, spots).all()
    margin = 12
    glass = np.ones_like(mask)
    glass[AT - margin : AT + 200 + margin, AT - margin : AT + 200 + margin] = False
    assert not mask[glass].any()


def test_pen_marks_and_dust_are_no_tissue(drawn):
    view, spots, _ = drawn
    mask = find_tissue(mark(view), UM)
    assert spots_on(mask, spots).all()
    assert not mask[:80].any()
    assert not mask[375:].any()
    assert not mask[85:135, 25:75].any()


@pytest.mark.parametrize("ink", INKS)
def test_ink_over_tissue_is_left_out(drawn, ink):
    image = Image.fromarray(drawn[0])
    ImageDraw.Draw(image).rectangle([150, 180, 260, 200], fill=INKS[ink])
    mask = find_tissue(np.asarray(image), UM)
    assert not mask[181:199, 151:259].any()
    assert mask[230, 200]
    assert mask[150, 200]


def test_pale_fat_is_tissue(drawn):
    _, spots, section = drawn
    fat = section.obs["fraction_fat"].to_numpy() > 0.8
    assert fat.sum() >= 3
    assert spots_on(find_tissue(drawn[0], UM), spots[fat]).all()


def test_stain_that_bled_onto_the_glass_is_no_tissue(drawn):
    view = drawn[0].copy()
    y, x = np.mgrid[: view.shape[0], : view.shape[1]]
    bled = np.exp(-(((x - 60) / 40.0) ** 2 + ((y - 250) / 60.0) ** 2))[..., None] * np.array([3, 24, 12])
    mask = find_tissue((view - bled).clip(0, 255).astype(np.uint8), UM)
    assert not mask[:, :90].any()


def test_glass_alone_has_no_tissue():
    rng = np.random.default_rng(0)
    noisy = rng.normal(240, 2, (300, 300, 3)).clip(0, 255).astype(np.uint8)
    assert not find_tissue(noisy, 8.0).any()
    assert not find_tissue(np.zeros((50, 50, 3), np.uint8), 8.0).any()


# --- bare slides


def write_slide(path, view, mpp=2.0, *, times=2):
    """The view as a slide of twice its size, in whatever format its suffix says."""
    pixels = np.repeat(np.repeat(view, times, 0), times, 1)
    tags = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER", "photometric": "rgb"}
    if path.suffix in (".jpg", ".png"):
        Image.fromarray(pixels).save(path)
    elif path.stem.startswith("strip"):
        tifffile.imwrite(path, pixels, rowsperstrip=3, compression="deflate", **tags)
    elif path.stem.startswith("raw"):
        tifffile.imwrite(path, pixels, **tags)
    else:
        with tifffile.TiffWriter(path) as tiff:
            for level in range(2):
                small = np.asarray(Image.fromarray(pixels).reduce(2**level))
                tiff.write(small, tile=(128, 128), subfiletype=int(level > 0), compression="deflate", **tags)
    return path


@pytest.mark.parametrize("name", ["pyramid.tif", "strips.tiff", "raw.tif", "plain.jpg", "plain.png"])
def test_spots_are_laid_on_the_tissue_of_any_slide(drawn, tmp_path, name):
    mpp = UM / 2
    path = write_slide(tmp_path / name, mark(drawn[0]), mpp)
    placed = read_section(path, spacing_um=100, mpp=None if path.suffix.startswith(".tif") else mpp)
    assert placed.n_vars == 0
    assert contract.name(placed) == path.stem
    assert placed.uns["genar"]["source"] == "slide"
    xy = contract.coords_um(placed)
    steps = np.unique(np.diff(np.unique(xy[:, 0])).round(6))
    np.testing.assert_allclose(steps, 100, rtol=1e-3)
    true = contract.coords_um(drawn[2])  # spots 110 um apart that cover the tissue
    assert len(xy) == pytest.approx(len(true) * 1.1**2, rel=0.15)
    lowest, highest = true.min(0) + AT * UM - 100, true.max(0) + AT * UM + 100
    assert ((xy > lowest) & (xy < highest)).all()
    assert len(place_spots(path, spacing_um=200, mpp=mpp)) == pytest.approx(len(xy) / 4, rel=0.15)


@pytest.mark.parametrize("name", ["pyramid.tif", "strips.tiff", "raw.tif", "plain.jpg", "plain.png"])
def test_a_glance_shows_what_the_whole_image_holds(drawn, tmp_path, name):
    path = write_slide(tmp_path / name, drawn[0])
    look, slide = glance(path, 220), open_slide(path)
    assert look.size_px == slide.size_px == image_head(path)[0] == (880, 880)
    assert look.mpp == slide.mpp == image_head(path)[1]
    assert look.view.shape == (220, 220, 3)
    whole = np.asarray(Image.fromarray(drawn[0]).reduce(2)).astype(float)
    assert np.abs(look.view - whole).mean() < 2
    slide.close()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count a peak in other units, or not at all")
def test_a_glance_holds_no_whole_image(tmp_path):
    """75 MB of pixels, in strips and as JPEG, looked at within 45 MB."""
    pixels = np.full((5000, 5000, 3), 200, np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", compression="deflate", rowsperstrip=64)
    tifffile.imwrite(tmp_path / "b.tif", pixels, photometric="rgb", compression="deflate", tile=(256, 256))
    Image.fromarray(pixels).save(tmp_path / "c.jpg")
    code = (
        "import resource, sys, openslide, tifffile, PIL.JpegImagePlugin, imagecodecs\n"
        "from genar.data.slide import glance\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak()\n"
        "for path in sys.argv[1:]: assert glance(path, 700).view.mean() == 200\n"
        "print(peak() - before)"
    )
    files = [str(tmp_path / name) for name in ("a.tif", "b.tif", "c.jpg")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 45


def test_slides_in_a_folder_are_sections_but_never_the_pictures_of_space_ranger(drawn, tmp_path):
    for name in ("b.jpg", "a.tif", "a.png", "tissue_hires_image.png"):
        write_slide(tmp_path / name, drawn[0])
    refs = find_sections(tmp_path)
    assert [ref.id for ref in refs] == ["a.png", "a.tif", "b"]
    assert {ref.format for ref in refs} == {"slide"}
    assert refs[1].read().n_obs > 10


def test_bare_slides_that_cannot_be_used_are_one_line(drawn, tmp_path):
    path = write_slide(tmp_path / "a.png", drawn[0])
    with pytest.raises(InputError, match=r"a\.png: the image names no pixel size; pass --mpp"):
        read_section(path)
    with pytest.raises(InputError, match="--spacing-um must be a positive"):
        read_section(path, mpp=2, spacing_um=0)
    with pytest.raises(InputError, match="less than a pixel"):
        read_section(path, mpp=2, spacing_um=1)
    with pytest.raises(InputError, match="--image"):
        read_section(path, mpp=2, image=path)
    empty = write_slide(tmp_path / "b.png", np.full((100, 100, 3), 240, np.uint8))
    with pytest.raises(InputError, match=r"b\.png: no tissue found"):
        read_section(empty, mpp=2)
    for name in ("a.png", "c.jpg", "d.tif"):
        whole = write_slide(tmp_path / name, drawn[0])
        whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(InputError, match=r"complete|truncated") as caught:
            read_section(whole, mpp=2)
        assert "\n" not in str(caught.value)


@pytest.mark.real
def test_tissue_of_a_real_section_holds_its_spots_and_not_the_bled_stain(shared):
    slide = shared / "data" / "her2st" / "wsis" / "SPA141.tif"
    section = read_section(f"{shared / 'data' / 'her2st'}:SPA141")
    look = glance(slide, 860)
    um = look.size_px[1] * contract.mpp(section) / 860
    marked = Image.fromarray(look.view)
    for i, colour in enumerate(INKS.values()):
        ImageDraw.Draw(marked).line([(40 + 80 * i, 20), (70 + 80 * i, 240)], fill=colour, width=50)
    mask = find_tissue(np.asarray(marked), um)
    assert on_tissue(contract.coords_px(section), mask, look.size_px).mean() > 0.97
    assert not mask[:260, :480].any()
    assert not mask[300:450, 705:800].any()  # pink glass
