"""Open a slide image and read patches by their width in um.

Pyramids are read through OpenSlide, tile by tile; plain TIFF, JPEG and PNG are held in memory. Coordinates are
(x, y) in full-resolution px; what lies outside the image is white, like the glass around tissue.
"""

import abc
import threading
from pathlib import Path

import numpy as np
from PIL import Image

from genar.errors import InputError

WHITE = 255
# Above this a plain (not pyramidal) image no longer fits comfortably in memory as RGB: 6 GB.
_MAX_PLAIN_PX = 2_000_000_000
_TIFF_SUFFIXES = {".tif", ".tiff", ".svs"}


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
    def thumbnail(self, longest_px: int) -> np.ndarray:
        """The whole slide, uint8 [h, w, 3], longest side at most ``longest_px``."""

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

        Cut at whole pixels, as HEST's patches are: ``round(width_px)`` wide, from ``floor(center - half)``.
        """
        size = max(1, round(width_px))
        corner = tuple(int(np.floor(float(c) - size // 2)) for c in center_px)
        region = self._region(corner, (size, size), size / out_px)
        return np.asarray(region.resize((out_px, out_px), Image.Resampling.BILINEAR))


class _PyramidSlide(Slide):
    def __init__(self, path: Path, handle):
        self.path, self._handle = path, handle
        self.size_px = handle.dimensions
        tag = handle.properties.get("openslide.mpp-x")
        self.mpp = _plausible_mpp(float(tag)) if tag else None

    def _region(self, corner_px, size_px, downsample):
        import openslide

        level = self._handle.get_best_level_for_downsample(max(downsample, 1.0) * 1.001)
        scale = self._handle.level_downsamples[level]
        size = (max(1, round(size_px[0] / scale)), max(1, round(size_px[1] / scale)))
        try:
            rgba = self._handle.read_region(corner_px, level, size)
        except openslide.OpenSlideError as error:
            raise InputError(
                f"{self.path}: the image is damaged near px {corner_px} ({error}); copy it anew"
            ) from error
        glass = Image.new("RGB", size, (WHITE,) * 3)
        glass.paste(rgba, mask=rgba.getchannel("A"))
        return glass

    def thumbnail(self, longest_px):
        return np.asarray(self._handle.get_thumbnail((longest_px, longest_px)).convert("RGB"))

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

    def close(self):
        del self._pixels

    def thumbnail(self, longest_px):
        image = Image.fromarray(self._pixels)
        image.thumbnail((longest_px, longest_px), Image.Resampling.BOX)
        return np.asarray(image)


def open_slide(path: str | Path) -> Slide:
    """Open a slide: anything OpenSlide reads, or a plain TIFF, JPEG or PNG.

    Raises ``InputError`` with one line where the file is missing, truncated or not an image.
    """
    import openslide

    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such slide image; expected a file (.tif, .svs, .ndpi, .jpg, .png, …)")
    if path.suffix.lower() in _TIFF_SUFFIXES:
        _refuse_truncated_tiff(path)
    try:
        return _PyramidSlide(path, openslide.OpenSlide(str(path)))
    except openslide.OpenSlideUnsupportedFormatError:
        return _PlainSlide(path, *_read_plain(path))
    except openslide.OpenSlideError as error:
        raise InputError(f"{path}: OpenSlide cannot read it ({error}); is the file complete?") from error


def _refuse_truncated_tiff(path: Path) -> None:
    import struct

    import tifffile

    size = path.stat().st_size
    try:
        with tifffile.TiffFile(path) as tiff:
            ends = [
                offset + length
                for page in tiff.pages
                for offset, length in zip(page.dataoffsets, page.databytecounts, strict=False)
            ]
    except (tifffile.TiffFileError, struct.error, ValueError, IndexError, KeyError) as error:
        raise InputError(f"{path}: not a readable TIFF ({error}); is it complete, and an image?") from error
    if not ends or max(ends) > size:
        raise InputError(
            f"{path}: truncated TIFF: expected {max(ends, default=1):,} bytes, found {size:,}; copy it again"
        )


_plain_limit = threading.Lock()


def _read_plain(path: Path) -> tuple[np.ndarray, float | None]:
    if path.suffix.lower() in _TIFF_SUFFIXES:
        return _read_plain_tiff(path)
    with _plain_limit:  # Pillow's guard against decompression bombs is global and far below a slide's size
        guard, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(path) as image:
                _refuse_huge(path, image.width * image.height)
                return np.asarray(image.convert("RGB")), None
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
            raise InputError(f"{path}: not a readable image ({error}); is it complete?") from error
        finally:
            Image.MAX_IMAGE_PIXELS = guard


def _read_plain_tiff(path: Path) -> tuple[np.ndarray, float | None]:
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        _refuse_huge(path, page.imagewidth * page.imagelength)
        try:
            pixels = page.asarray()
        except (RuntimeError, ValueError, OSError) as error:  # the codecs' errors are RuntimeErrors
            raise InputError(f"{path}: the image is damaged ({error}); copy it anew") from error
        mpp = _resolution_mpp(page)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.ndim != 3 or pixels.shape[2] < 3 or pixels.dtype != np.uint8:
        raise InputError(f"{path}: expected an 8-bit RGB image, found shape {pixels.shape} of {pixels.dtype}")
    return np.ascontiguousarray(pixels[..., :3]), mpp


def _refuse_huge(path: Path, n_px: int) -> None:
    if n_px > _MAX_PLAIN_PX:
        raise InputError(f"{path}: {n_px:,} px in one plain image; write it as a pyramidal tiled TIFF first")


def _resolution_mpp(page) -> float | None:
    """Pixel size from the resolution tags; ``None`` where they are absent or carry no unit (dots per inch of a
    screen)."""
    tag, unit = page.tags.get("XResolution"), page.tags.get("ResolutionUnit")
    if tag is None or unit is None or tag.value[0] == 0:
        return None
    um = {2: 25_400.0, 3: 10_000.0}.get(int(unit.value))
    return _plausible_mpp(um * tag.value[1] / tag.value[0]) if um else None


def _plausible_mpp(mpp: float) -> float | None:
    return mpp if 0 < mpp < 20 else None  # 72 or 300 dots per inch are a printer's default, not a microscope's
