"""Open a slide image and read patches by their width in um.

Pyramids are read through OpenSlide, tile by tile; plain TIFF, JPEG and PNG are held in memory. Coordinates are
(x, y) in full-resolution px; what lies outside the image is white, like the glass around tissue.
"""

import abc
import contextlib
import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import ExifTags, Image

from genar.data.door import SMALL_BYTES, door
from genar.errors import InputError

WHITE = 255
# Above this a plain (not pyramidal) image no longer fits comfortably in memory as RGB: 6 GB.
_MAX_PLAIN_PX = 2_000_000_000
# What a file may say of its size, px a byte: blank glass in JPEG takes a byte for 40. More takes minutes.
_PX_A_BYTE, _PX_A_BYTE_SMALL, _FEW_PX = 1000, 50, 120_000_000
_MAX_PAGES, _MAX_TILE_PX, _MAX_PATCH_PX = 1000, 1 << 25, 1 << 15
_WHOLE_PX = 4000  # of a plain image a part of which is shown
_BLOCK_PX = 1024  # slides are looked through in blocks this wide
_SQUARE = 0.05  # by which the sides of a pixel may differ
_OME_UM = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
_TIFF_SUFFIXES = {".tif", ".tiff", ".svs", ".btf", ".tf8"}
# Of TIFFs: those whose numbers are no red, green, blue; YCbCr where the codec does not turn it into that.
_PHOTOMETRIC = {0: "inverted grey", 3: "a palette", 5: "CMYK", 8: "CIELab", 9: "CIELab", 10: "CIELab"}
_YCBCR, _PLAIN_CODECS = 6, {1, 5, 8, 32773, 32946, 50000}


class Slide(abc.ABC):
    """A slide image. ``size_px`` is (W, H); ``mpp`` the pixel size (um) the file itself claims, ``None`` if silent."""

    path: Path
    size_px: tuple[int, int]
    mpp: float | None
    in_memory = False  # True where the whole image is held: then no second process should open it

    @abc.abstractmethod
    def _region(self, corner_px: tuple[int, ...], size_px: tuple[int, int], downsample: float) -> Image.Image:
        """RGB image of the region, at some resolution at least as fine as ``downsample`` px per px."""

    @abc.abstractmethod
    def _level_near(self, downsample: float) -> tuple[int, float]:
        """The coarsest level that is at least as fine as ``downsample``, and its own downsample."""

    def thumbnail(self, longest_px: int) -> np.ndarray:
        """The whole slide, uint8 [h, w, 3], longest side at most ``longest_px``; read block by block."""
        return self.part((0, 0), self.size_px, longest_px)

    def part(self, corner_px: tuple[int, int], size_px: tuple[int, int], longest_px: int) -> np.ndarray:
        """``size_px`` (W, H) of it from ``corner_px``, uint8 [h, w, 3] with a longest side of ``longest_px``, as
        :meth:`thumbnail` shows the whole. Raises ``InputError`` where the image is damaged."""
        (x, y), (width, height), canvas = corner_px, size_px, _Canvas(size_px, longest_px)
        step = int(_BLOCK_PX * self._level_near(canvas.downsample)[1])
        for top in range(0, height, step):
            for left in range(0, width, step):
                size = (min(step, width - left), min(step, height - top))
                canvas.put((left, top), size, self._region((x + left, y + top), size, canvas.downsample))
        return canvas.pixels

    @abc.abstractmethod
    def close(self) -> None:
        """Release the file."""

    def read_patch(self, center_px, width_um: float, out_px: int, *, mpp: float | None = None) -> np.ndarray:
        """The square of ``width_um`` um around ``center_px`` (x, y), resampled to uint8 [out_px, out_px, 3].

        ``mpp`` is the pixel size of the section's metadata, which wins over the file's own tag.
        Raises ``InputError`` where no pixel size is known or the image is damaged there.
        """
        mpp = mpp or self.mpp
        if mpp is None:
            raise InputError(f"{self.path}: the image names no pixel size; pass --mpp (um per px)")
        return self.read_patch_px(center_px, width_um / mpp, out_px)

    def read_patch_px(self, center_px, width_px: float, out_px: int) -> np.ndarray:
        """The square of ``width_px`` full-resolution px around ``center_px``, resampled to uint8 [out_px, out_px, 3].

        Cut at whole pixels, as HEST's patches are: ``round(width_px)`` wide, from ``floor(center - half)``. Raises
        ``InputError`` where it is wider than any patch, or the image is damaged there.
        """
        if not 0 <= width_px <= _MAX_PATCH_PX:
            raise InputError(
                f"{self.path}: a patch of {width_px:g} px; expected at most {_MAX_PATCH_PX}: is --mpp right?"
            )
        size = max(1, round(width_px))
        corner = tuple(int(np.floor(float(c) - size // 2)) for c in center_px)
        region = self._region(corner, (size, size), size / out_px)
        return np.asarray(region.resize((out_px, out_px), Image.Resampling.BILINEAR))


class _PyramidSlide(Slide):
    def __init__(self, path: Path, handle):
        self.path, self._handle = path, handle
        self.size_px = handle.dimensions
        self.is_generic = handle.properties.get("openslide.vendor") == "generic-tiff"
        x, y = (float(handle.properties.get(f"openslide.mpp-{axis}", 0)) for axis in "xy")
        self.mpp = _square_mpp(x, y)

    def _region(self, corner_px, size_px, downsample):
        import openslide

        level, scale = self._level_near(downsample)
        size = (max(1, round(size_px[0] / scale)), max(1, round(size_px[1] / scale)))
        try:
            rgba = self._handle.read_region(corner_px, level, size)
        except openslide.OpenSlideError as error:
            raise InputError(
                f"{self.path}: the image is damaged near px {corner_px} ({error}); copy it anew"
            ) from error
        return _over_glass(rgba)

    def _level_near(self, downsample):
        level = self._handle.get_best_level_for_downsample(max(downsample, 1.0) * 1.001)
        return level, self._handle.level_downsamples[level]

    def close(self):
        self._handle.close()


class _PlainSlide(Slide):
    in_memory = True

    def __init__(self, path: Path, pixels: np.ndarray, mpp: float | None):
        self.path, self._pixels, self.mpp = path, pixels, mpp
        self.size_px = (pixels.shape[1], pixels.shape[0])

    def _region(self, corner_px, size_px, downsample):
        (left, top), (width, height) = corner_px, size_px
        out = np.full((height, width, 3), WHITE, np.uint8)
        x0, x1 = np.clip((left, left + width), 0, self.size_px[0])
        y0, y1 = np.clip((top, top + height), 0, self.size_px[1])
        out[y0 - top : y1 - top, x0 - left : x1 - left] = self._pixels[y0:y1, x0:x1]
        return Image.fromarray(out)

    def _level_near(self, downsample):
        return 0, 1.0

    def close(self):
        del self._pixels

    def thumbnail(self, longest_px):
        return _shrunk(Image.fromarray(self._pixels), longest_px)


class _Canvas:
    """A small picture of a large one, uint8 [h, w, 3], filled block by block. White where nothing was put."""

    def __init__(self, size_px: tuple[int, int], longest_px: int):
        self.downsample = max(1.0, max(size_px) / longest_px)
        shape = [max(1, round(side / self.downsample)) for side in size_px]
        self.pixels = np.full((shape[1], shape[0], 3), WHITE, np.uint8)

    def put(self, corner_px: tuple[int, int], size_px: tuple[int, int], block: Image.Image) -> None:
        """Draw ``block``, which shows ``size_px`` full-resolution px from ``corner_px``."""
        limits = self.pixels.shape[1::-1]
        start = [round(c / self.downsample) for c in corner_px]
        stop = [
            min(limit, round((c + s) / self.downsample)) for c, s, limit in zip(corner_px, size_px, limits, strict=True)
        ]
        if stop[0] > start[0] and stop[1] > start[1]:
            small = block.convert("RGB").resize((stop[0] - start[0], stop[1] - start[1]), Image.Resampling.BOX)
            self.pixels[start[1] : stop[1], start[0] : stop[0]] = np.asarray(small)


def _shrunk(image: Image.Image, longest_px: int) -> np.ndarray:
    image.thumbnail((longest_px, longest_px), Image.Resampling.BOX)
    return np.asarray(image)


def open_slide(path: str | Path) -> Slide:
    """Open a slide: anything OpenSlide reads, a plain TIFF, JPEG or PNG, or the image of a SpatialData store, named by
    its metadata file (``images/<name>/zarr.json``).

    Raises ``InputError`` with one line where the file is missing, truncated or not an image.

    >>> slide = genar.open_slide("tissue/wsis/SIM1.tif")
    >>> slide.mpp, slide.read_patch((200, 200), width_um=112, out_px=224).shape
    (2.0, (224, 224, 3))
    """
    path = Path(path)
    return _open_pyramid(path) or _PlainSlide(path, *_read_plain(path))


def _open_pyramid(path: Path) -> Slide | None:
    """The slide where it is read tile by tile; ``None`` where the file is a plain image, if it is one."""
    import openslide

    if not path.is_file():
        raise InputError(f"{path}: no such slide image; expected a file (.tif, .svs, .ndpi, .jpg, .png, …)")
    if path.name in ("zarr.json", ".zattrs"):
        from genar.data.slide_zarr import ZarrSlide

        return ZarrSlide(path)
    looks = _look_at_tiff(path) if path.suffix.lower() in _TIFF_SUFFIXES else _TiffLooks()
    try:
        with door(path, "slide", "OpenSlide cannot read it: is the file complete?"):
            slide = _PyramidSlide(path, openslide.OpenSlide(str(path)))
    except InputError as error:
        cause = error.__cause__
        if isinstance(cause, openslide.OpenSlideUnsupportedFormatError) or "Unsupported TIFF compression" in str(cause):
            return None
        raise
    # OpenSlide takes the first page for the slide, and any fourth channel for how opaque it is
    if slide.is_generic and (math.prod(slide.size_px) < looks.largest_px or looks.fourth_is_no_alpha):
        slide.close()
        return None
    slide.mpp = slide.mpp or looks.ome_mpp
    return slide


@dataclass(frozen=True)
class Glance:
    """A slide at a glance: ``view`` uint8 [h, w, 3], the slide's ``size_px`` (W, H), ``mpp`` (um) by its tags."""

    view: np.ndarray
    size_px: tuple[int, int]
    mpp: float | None


def glance(path: str | Path, longest_px: int) -> Glance:
    """Look at the whole slide, longest side at most ``longest_px``, without holding its pixels in memory.

    Pyramids, tiled and striped TIFFs and JPEGs are read piece by piece; a PNG or a TIFF compressed in one piece cannot
    be. Raises ``InputError`` as :func:`open_slide` does, also for an image that ends too early.
    """
    path = Path(path)
    if (slide := _open_pyramid(path)) is not None:
        with contextlib.closing(slide):
            return Glance(slide.thumbnail(longest_px), slide.size_px, slide.mpp)
    if path.suffix.lower() in _TIFF_SUFFIXES:
        return _glance_at_tiff(path, longest_px)
    with _opened(path) as image:
        size = image.size
        image.draft("RGB", (longest_px, longest_px))  # a JPEG is decoded at an eighth of its size, if that is enough
        return Glance(_shrunk(_over_glass(image), longest_px), size, None)


def closeup(path: str | Path, corner_px: tuple[int, int], size_px: tuple[int, int], longest_px: int) -> np.ndarray:
    """``size_px`` (W, H) of a slide from ``corner_px``, uint8 [h, w, 3], longest side about ``longest_px``; less of a
    small part of a large plain image, which is looked at as a whole. Raises as :func:`glance` does."""
    path = Path(path)
    if (slide := _open_pyramid(path)) is not None:
        with contextlib.closing(slide):
            return slide.part(corner_px, size_px, longest_px)
    full = max(image_head(path)[0])
    view = glance(path, min(_WHOLE_PX, round(longest_px * full / max(size_px)))).view
    scale = max(view.shape) / full
    (x0, y0), (x1, y1) = ((round(c * scale) for c in at) for at in (corner_px, np.add(corner_px, size_px)))
    return view[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]


def image_head(path: str | Path) -> tuple[tuple[int, int], float | None]:
    """Size (W, H) px of a slide and the pixel size (um) its own tags claim, by its head alone: nothing is decoded.

    Raises ``InputError`` where it is missing, not an image or of no pixels; whether it is whole shows where its pixels
    are needed.
    """
    size_px, mpp = _head(Path(path))
    if min(size_px) < 1:
        raise InputError(f"{path}: the image says to be of {size_px[0]} x {size_px[1]} px; is it damaged?")
    return size_px, mpp


def _head(path: Path) -> tuple[tuple[int, int], float | None]:
    if (slide := _open_pyramid(path)) is not None:
        with contextlib.closing(slide):
            return slide.size_px, slide.mpp
    if path.suffix.lower() in _TIFF_SUFFIXES:
        with _largest_page(path) as page:
            return (page.imagewidth, page.imagelength), _resolution_mpp(page)
    with _opened(path) as image:
        return image.size, None


def image_mpp(path: str | Path) -> float | None:
    """The pixel size (um) that the image's own tags claim; ``None`` where it is silent or no readable image."""
    try:
        return image_head(path)[1]
    except InputError:
        return None


def _over_glass(image: Image.Image) -> Image.Image:
    """As RGB; what is transparent is white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    glass = Image.new("RGB", rgba.size, (WHITE,) * 3)
    glass.paste(rgba, mask=rgba.getchannel("A"))
    return glass


@dataclass(frozen=True)
class _TiffLooks:
    """What OpenSlide does not tell of a TIFF."""

    largest_px: int = 0
    """pixels of its largest page"""
    fourth_is_no_alpha: bool = False
    ome_mpp: float | None = None
    """by its OME metadata"""


def _look_at_tiff(path: Path) -> _TiffLooks:
    """``InputError`` where a TIFF does not hold all that it says, or its largest page is not 8-bit or stored turned."""
    import tifffile

    size, end, largest = path.stat().st_size, 0, 0
    fourth, kind, turned = False, np.dtype(np.uint8), 1
    with door(path, "TIFF", "is it complete, and an image?"), tifffile.TiffFile(path) as tiff:
        page: Any
        for number, page in enumerate(tiff.pages):
            if number >= _MAX_PAGES or page.tilewidth * page.tilelength > _MAX_TILE_PX:
                raise InputError(
                    f"{path}: page {number} has tiles of {page.tilewidth} x {page.tilelength} px; expected at most "
                    f"{_MAX_PAGES} pages, and tiles below {_MAX_TILE_PX:,} px; is it damaged?"
                )
            refuse_endless(path, n_px := page.imagewidth * page.imagelength, size)
            if n_px > largest:
                largest, fourth, kind = n_px, _fourth_is_no_alpha(page), page.dtype
                turned = getattr(page.tags.get("Orientation"), "value", 1)
            if number == 0:
                _refuse_planes(path, tiff, page)
            ends = (offset + n for offset, n in zip(page.dataoffsets, page.databytecounts, strict=False))
            end = max(end, *ends, 1)
        ome_mpp = _ome_mpp(tiff)
    if not 1 < end <= size:
        raise InputError(f"{path}: truncated TIFF: expected {end:,} bytes, found {size:,}; copy it again")
    if kind != np.uint8:
        raise InputError(f"{path}: expected an 8-bit RGB image, found {kind}; convert it to 8-bit RGB")
    _refuse_turned(path, turned)
    return _TiffLooks(largest, fourth, ome_mpp)


def _refuse_turned(path: Path, orientation: int) -> None:
    """``InputError`` where the pixels are not stored as they are shown: nobody knows which ones coordinates mean."""
    if orientation not in (0, 1):  # some programs write 0 for what they do not know
        raise InputError(f"{path}: its pixels are stored turned (Orientation {orientation}); write it upright")


def _fourth_is_no_alpha(page: Any) -> bool:
    return page.samplesperpixel == 4 and not {1, 2} & set(page.extrasamples)


def _ome_mpp(tiff: Any) -> float | None:
    """Pixel size (um) of the largest image that the OME metadata tell of; ``None`` without."""
    if not tiff.is_ome:
        return None
    found = ElementTree.fromstring(tiff.ome_metadata).iterfind(".//{*}Pixels")
    facts = max((p.attrib for p in found), key=lambda p: int(p["SizeX"]) * int(p["SizeY"]), default={})
    x, y = (
        float(facts.get(f"PhysicalSize{axis}", 0)) * _OME_UM.get(facts.get(f"PhysicalSize{axis}Unit", "µm"), 0)
        for axis in "XY"
    )
    return _square_mpp(x, y)


def _refuse_planes(path: Path, tiff: Any, page: Any) -> None:
    """``InputError`` where each colour has a page of its own: read as a slide, the first alone would be seen, grey."""
    if page.samplesperpixel > 1 or page.photometric not in (0, 1):
        return
    axes = dict(zip(tiff.series[0].axes, tiff.series[0].shape, strict=True))
    if axes.get("C", 1) > 1 or math.prod(axes.values()) == 3 * page.size:  # those that do not say so
        raise InputError(f"{path}: its colours are on pages of their own; write it as RGB with the colours in one page")


def refuse_endless(path: Path, n_px: int, n_bytes: int) -> None:
    """``InputError`` where an image says to have far more pixels than its ``n_bytes`` can hold."""
    most = max(_FEW_PX, n_bytes * (_PX_A_BYTE_SMALL if n_bytes < SMALL_BYTES else _PX_A_BYTE))
    if n_px > most:
        raise InputError(f"{path}: {n_px:,} px in {n_bytes:,} bytes; expected at most {most:,}: is it damaged?")


_plain_limit = threading.Lock()


def _read_plain(path: Path) -> tuple[np.ndarray, float | None]:
    if path.suffix.lower() in _TIFF_SUFFIXES:
        return _read_plain_tiff(path)
    with _opened(path) as image:
        return np.asarray(image if image.mode == "RGB" else _over_glass(image)), None


@contextlib.contextmanager
def _opened(path: Path):
    """A plain JPEG or PNG, opened by Pillow but not yet decoded; ``InputError`` where it or its pixels are damaged."""
    with _plain_limit:  # Pillow's guard against decompression bombs is global and far below a slide's size
        guard, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            # these two alone: to open others, Pillow starts other programs
            with door(path, "image"), Image.open(path, formats=("JPEG", "PNG")) as image:
                _refuse_huge(path, image.width * image.height)
                # of 16 bits a colour, Pillow takes the high byte
                kind = image.mode if image.mode[0] in "IF" else str(image.tile[0][3])
                if kind[0] in "IF" or kind.endswith(";16B"):
                    raise InputError(f"{path}: expected an 8-bit RGB image, found {kind}; convert it to RGB")
                if image.format == "JPEG" or "exif" in image.info:  # else a PNG would be decoded to look for it
                    _refuse_turned(path, image.getexif().get(ExifTags.Base.Orientation, 1))
                yield image
        finally:
            Image.MAX_IMAGE_PIXELS = guard


@contextlib.contextmanager
def _largest_page(path: Path):
    """The largest page of a plain TIFF, the first of those: some begin with a label or a thumbnail.

    ``InputError`` where it or its pixels are damaged or not 8-bit RGB or grey.
    """
    import tifffile

    with door(path, "image", "is it damaged? copy it anew"), tifffile.TiffFile(path) as tiff:
        pages: Any = tiff.pages
        page = max(pages, key=lambda page: page.imagewidth * page.imagelength)
        _refuse_huge(path, max(page.imagewidth * page.imagelength, math.prod(page.shape) // 3))
        deep = page.dtype != np.uint8 or page.shape[:2] != (page.imagelength, page.imagewidth)
        if deep or page.ndim > 3 or (page.ndim == 3 and page.shape[2] < 3):
            raise InputError(f"{path}: expected an 8-bit RGB image, found shape {page.shape} of {page.dtype}")
        kind = _PHOTOMETRIC.get(int(page.photometric))
        if int(page.photometric) == _YCBCR and int(page.compression) in _PLAIN_CODECS:
            kind = "YCbCr"
        if kind:
            raise InputError(f"{path}: expected an 8-bit RGB image, found {kind}; convert it to RGB")
        yield page


def _rgb(pixels: np.ndarray, page) -> np.ndarray:
    """Grey [h, w] or [h, w, 1] or RGB and more of a TIFF's page as RGB [h, w, 3]; what is transparent is white."""
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if pixels.shape[2] == 4 and page.extrasamples and not _fourth_is_no_alpha(page):
        return np.asarray(_over_glass(Image.fromarray(np.ascontiguousarray(pixels))))
    return np.ascontiguousarray(pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, axis=2))


def _read_plain_tiff(path: Path) -> tuple[np.ndarray, float | None]:
    with _largest_page(path) as page:
        return _rgb(page.asarray(), page), _resolution_mpp(page)


def _glance_at_tiff(path: Path, longest_px: int) -> Glance:
    with _largest_page(path) as page:
        size = (page.imagewidth, page.imagelength)
        canvas = _Canvas(size, longest_px)
        for top, left, block in _pieces(page):
            canvas.put((left, top), block.shape[1::-1], Image.fromarray(_rgb(block, page)))
        return Glance(canvas.pixels, size, _resolution_mpp(page))


def _pieces(page):
    """(top, left, pixels [h, w] or [h, w, samples]) of a TIFF page, some rows or a tile at a time."""
    if page.is_memmappable:
        import tifffile

        whole = tifffile.memmap(page.parent.filehandle.path, page=page.index, mode="r")
        rows = max(1, _BLOCK_PX**2 // page.imagewidth)
        yield from ((top, 0, np.asarray(whole[top : top + rows])) for top in range(0, page.imagelength, rows))
        return
    rows = {}  # strips are often few rows high, less than a pixel of the view: gather some before they are shrunk
    for segment, (_, _, top, left, _), shape in page.segments():
        if segment is not None and not page.is_tiled:
            rows[top] = segment[0, : shape[1], : shape[2]]
            if sum(len(strip) for strip in rows.values()) >= _BLOCK_PX // 8:
                yield min(rows), 0, np.concatenate([rows[t] for t in sorted(rows)])
                rows = {}
        elif segment is not None:
            yield top, left, segment[0, : page.imagelength - top, : page.imagewidth - left]  # tiles jut out
    if rows:
        yield min(rows), 0, np.concatenate([rows[t] for t in sorted(rows)])


def _refuse_huge(path: Path, n_px: int) -> None:
    n_bytes = path.stat().st_size
    if n_px > (_MAX_PLAIN_PX if n_bytes >= SMALL_BYTES else _FEW_PX):
        raise InputError(
            f"{path}: {n_px:,} px in one plain image of {n_bytes:,} bytes; write it as a pyramidal tiled TIFF first"
        )
    refuse_endless(path, n_px, n_bytes)


def _resolution_mpp(page) -> float | None:
    """Pixel size from the resolution tags; ``None`` where they are absent or carry no unit (dots per inch of a
    screen)."""
    tags, unit = [page.tags.get(f"{axis}Resolution") for axis in "XY"], page.tags.get("ResolutionUnit")
    um = {2: 25_400.0, 3: 10_000.0}.get(int(unit.value), 0.0) if unit is not None else 0.0
    x, y = (um * tag.value[1] / tag.value[0] if tag is not None and tag.value[0] else 0.0 for tag in tags)
    return _square_mpp(x, y) or _ome_mpp(page.parent)


def _square_mpp(x: float, y: float) -> float | None:
    """The pixel size where it is one of a microscope (72 or 300 dots per inch are a printer's default) and, where both
    sides are told, of a square."""
    if y and abs(x - y) > _SQUARE * y:
        return None
    return x if 0.005 < x < 20 else None
