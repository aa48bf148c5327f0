"""Write a slide image as a pyramid that OpenSlide, QuPath and the HEST library read."""

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

_TILE_PX = 256


def write_pyramid(path: Path, image: np.ndarray, mpp: float) -> None:
    """Write ``image``, uint8 [H, W, 3] of ``mpp`` um per px, as a pyramidal TIFF of JPEG tiles (quality 90).

    Levels are halved until one fits a tile; the resolution tags of each say its pixel size.
    """
    jpeg = {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 90}}
    tags = {"resolutionunit": "CENTIMETER", "metadata": None, "software": "genar"}
    level, per_cm = image, 1e4 / mpp
    with tifffile.TiffWriter(path) as tiff:
        while True:
            reduced = int(level is not image)
            tile = (_TILE_PX, _TILE_PX)
            tiff.write(level, tile=tile, subfiletype=reduced, resolution=(per_cm, per_cm), **jpeg, **tags)
            if max(level.shape) <= _TILE_PX:
                return
            level, per_cm = np.asarray(Image.fromarray(level).reduce(2)), per_cm / 2
