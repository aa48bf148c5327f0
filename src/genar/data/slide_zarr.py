"""The image of a SpatialData store (OME-Zarr, multiscale, 8-bit RGB) as a slide."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from genar.data.door import door, read_json, refuse_large
from genar.data.slide import WHITE, Slide, refuse_endless
from genar.errors import InputError


class ZarrSlide(Slide):
    """An OME-Zarr image, named by its metadata file (``zarr.json`` or ``.zattrs``): axes c, y, x; chunks are read as
    they are needed."""

    def __init__(self, path: Path):
        import zarr

        self.path, self.mpp = path, None
        with door(path, "OME-Zarr image (its metadata)"):
            attributes = read_json(path, "metadata of an image")
            attributes = attributes.get("attributes", attributes)  # Zarr 3 keeps them one level down
            multiscale = attributes.get("ome", attributes)["multiscales"][0]
            axes = "".join(axis["name"] for axis in multiscale["axes"])
            group = zarr.open_group(path.parent, mode="r")
            self._levels: list[Any] = [group[level["path"]] for level in multiscale["datasets"]]
            if not self._levels:
                raise IndexError("no level is named")
        for level in self._levels:
            _check_level(path, axes, level)
        first = self._levels[0]
        stored = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
        refuse_endless(path, first.shape[1] * first.shape[2], stored)
        self.size_px = (first.shape[2], first.shape[1])

    def _region(self, corner_px, size_px, downsample):
        level, scale = self._level_near(downsample)
        array = self._levels[level]
        left, top = (round(c / scale) for c in corner_px)
        width, height = (max(1, round(s / scale)) for s in size_px)
        x0, x1 = np.clip((left, left + width), 0, array.shape[2])
        y0, y1 = np.clip((top, top + height), 0, array.shape[1])
        out = np.full((height, width, 3), WHITE, np.uint8)
        if x1 > x0 and y1 > y0:
            with door(self.path.parent, "image", "copy it anew"):
                out[y0 - top : y1 - top, x0 - left : x1 - left] = np.moveaxis(array[:3, y0:y1, x0:x1], 0, 2)
        return Image.fromarray(out)

    def _level_near(self, downsample):
        scales = [self.size_px[0] / level.shape[2] for level in self._levels]
        fine = [level for level, scale in enumerate(scales) if scale <= max(downsample, 1.0) * 1.001]
        return fine[-1], scales[fine[-1]]

    def close(self):
        """Nothing stays open."""
        self._levels = []


def _check_level(path: Path, axes: str, level) -> None:
    """Refuse a level that is not 8-bit RGB, or is cut into chunks far larger than its files."""
    shape = getattr(level, "shape", ())
    if axes != "cyx" or len(shape) != 3 or shape[0] < 3 or min(shape) < 1 or level.dtype != np.uint8:
        raise InputError(
            f"{path}: expected an 8-bit RGB image with axes c, y, x, found axes {', '.join(axes)}, "
            f"shape {shape} of {getattr(level, 'dtype', 'no array')}"
        )
    refuse_large(path, "a chunk", math.prod(level.chunks), 0)
