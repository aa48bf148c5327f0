"""Pixels of small slides, and the two ways of laying them into a TIFF."""

import numpy as np

TILED, STRIPED = {"tile": (64, 64)}, {"rowsperstrip": 16}


def gradient(height=384, width=512):
    """Colours that say where they are."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x // 2, y // 2, np.full_like(x, 128)], axis=2).astype(np.uint8)


def noise(height=400, width=500):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    pixels[..., 1] //= 2
    return pixels
