"""Find the tissue of a slide and lay spots on it.

H&E absorbs green: eosin far more than red and blue, haematoxylin more than blue and about as much as red. Glass, grey
dust and black ink absorb all alike, blue and green ink red most, red ink blue as much as green. So the excess of green
tells tissue from all of them, however pale it is; smoothed and with two thresholds it reaches into fat, whose thin
walls are all that is stained. Stain that has bled onto the glass is as pale as fat, but smooth: pale tissue must have
texture. Saturated ink is left out.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import ndimage, sparse

from genar.data import contract
from genar.data.reading import refuse_fine_tag
from genar.data.slide import glance, image_head
from genar.errors import InputError

VIEW_UM = 8.0  # width of a pixel of the view on which tissue is looked for
_LONGEST_PX = 4000
# Excess of green, natural units of optical density. Tissue has a place above STRONG and reaches as far as WEAK.
_STRONG, _WEAK = 0.06, 0.015
_SOLID, _TEXTURE = 0.2, 0.02  # paler than SOLID, it must vary by TEXTURE (sd of the optical density within 16 um)
_SMOOTH_UM, _CLOSE_UM, _INK_MARGIN_UM = 16.0, 40.0, 24.0
_LEAST_MM2, _HOLE_MM2 = 0.03, 0.15


def find_tissue(view: np.ndarray, um_per_px: float) -> np.ndarray:
    """Mask bool [h, w] of the tissue in ``view``, uint8 [h, w, 3], a slide at low resolution.

    Pieces below 0.03 mm2 are dust, holes below 0.15 mm2 belong to the tissue; ink and 24 um around it do not.
    """
    density = -np.log(np.clip(view, 1, None) / _glass_colour(view)).astype(np.float32)
    red, green, blue = np.moveaxis(density, 2, 0)
    margin = max(1, round(_INK_MARGIN_UM / um_per_px))
    ink = ndimage.binary_dilation(_ink(view, red, green, blue), iterations=margin)  # with the rim that JPEG colours
    excess = np.where(ink, 0, green - np.maximum(blue, 0.8 * red)).clip(-0.5, 1)
    sigma, grey = _SMOOTH_UM / um_per_px, np.where(ink, 0, density.mean(axis=2))
    smooth = ndimage.gaussian_filter(excess, sigma)
    mean_square = ndimage.gaussian_filter(grey**2, sigma)
    texture = np.sqrt(np.clip(mean_square - ndimage.gaussian_filter(grey, sigma) ** 2, 0, None))
    weak = (smooth > _WEAK) & ((texture > _TEXTURE) | (smooth > _SOLID))
    labels, n = _pieces(weak)
    strong = np.zeros(n + 1, bool)
    strong[np.unique(labels[weak & (smooth > _STRONG)])] = True
    mask = _closed(strong[labels] & (labels > 0), round(_CLOSE_UM / um_per_px))
    px_per_mm2 = (1000 / um_per_px) ** 2
    mask = _without_small(mask, _LEAST_MM2 * px_per_mm2)
    mask = ~_without_small(~mask, _HOLE_MM2 * px_per_mm2, keep_border=True)  # what reaches the border is no hole
    return np.logical_and(mask, np.logical_not(ink))


def _glass_colour(view: np.ndarray) -> np.ndarray:
    """Colour [3] of bare glass: the commonest bright pixel without colour; nearly white where there is none."""
    level = view.max(axis=2)
    neutral = view[(level > 150) & (level.astype(int) - view.min(axis=2) < 26)]
    if len(neutral) < 0.005 * level.size:
        return np.array([245.0, 245.0, 245.0])
    commonest = np.bincount(neutral.max(axis=1)).argmax()
    return np.median(neutral[np.abs(neutral.max(axis=1).astype(int) - commonest) <= 3], axis=0).astype(float)


def _ink(view: np.ndarray, red, green, blue) -> np.ndarray:
    """Pen marks: black, far more saturated than any stain, or coloured as no H&E is (blue, green, red)."""
    high, low = view.max(axis=2).astype(float), view.min(axis=2).astype(float)
    saturation = (high - low) / np.maximum(high, 1)
    black = high < 60
    cold = (red > 1.3 * green) & (saturation > 0.4)
    warm = (blue > 0.88 * green) & (green > 0.25) & (red < 0.25 * green) & (saturation > 0.35)
    ink = black | cold | warm | (saturation > 0.75)
    return ndimage.binary_opening(ink, structure=np.ones((2, 2)))


def _closed(mask: np.ndarray, radius: int) -> np.ndarray:
    """Gaps up to twice the radius are bridged; distances, so that a large radius costs nothing."""
    if radius < 1 or not mask.any():
        return mask
    padded = np.pad(mask, radius + 1)
    near = ndimage.distance_transform_edt(~padded) <= radius  # pyright: ignore
    closed = ndimage.distance_transform_edt(near) > radius  # pyright: ignore
    return closed[radius + 1 : -radius - 1, radius + 1 : -radius - 1] | mask


def _pieces(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Connected pieces of a mask: labels [h, w] from 1, and how many there are."""
    labels = np.zeros(mask.shape, np.int32)
    return labels, int(ndimage.label(mask, output=labels))  # pyright: ignore


def _without_small(mask: np.ndarray, least_px: float, *, keep_border: bool = False) -> np.ndarray:
    labels, n = _pieces(mask)
    sizes = np.bincount(labels.ravel(), minlength=n + 1)
    keep = sizes >= least_px
    if keep_border:
        keep[np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])] = True
    keep[0] = False
    return keep[labels]


def tissue_of(slide: str | Path, mpp: float | None = None) -> tuple[np.ndarray, np.ndarray, tuple[int, int], float]:
    """A slide at low resolution, uint8 [h, w, 3], its tissue mask [h, w], its size (W, H) px, and its pixel size (um).

    Raises ``InputError`` where the image is damaged, or names no pixel size and ``mpp`` is not given.
    """
    size_px, tag = image_head(slide)
    mpp = mpp or tag
    if mpp is None:
        raise InputError(f"{slide}: the image names no pixel size; pass --mpp (um per px)")
    view = glance(slide, max(64, min(_LONGEST_PX, round(max(size_px) * mpp / VIEW_UM)))).view
    return view, find_tissue(view, max(size_px) * mpp / max(view.shape)), size_px, mpp


def on_tissue(xy_px: np.ndarray, mask: np.ndarray, size_px: tuple[int, int]) -> np.ndarray:
    """Which points [N, 2] (x, y), full-resolution px of a slide of ``size_px``, lie on the mask: bool [N]."""
    shape = np.array(mask.shape[::-1])
    col, row = (xy_px / np.asarray(size_px) * shape).astype(int).T
    inside = (col >= 0) & (row >= 0) & (col < shape[0]) & (row < shape[1])
    return inside & mask[row.clip(0, shape[1] - 1), col.clip(0, shape[0] - 1)]


def _grid(size_px: tuple[int, int], step: float, hexagonal: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns and rows [N] and centres [N, 2] (x, y) of a grid of ``step`` px over a slide, row by row; a hexagonal one
    has Visium's columns, two apart in a row and shifted by one from row to row."""
    apart = (step / 2, step * math.sqrt(3) / 2) if hexagonal else (step, step)
    counts = (len(np.arange(step / 2, side, one)) for side, one in zip(size_px, apart, strict=True))
    col, row = (axis.ravel() for axis in np.meshgrid(*map(np.arange, counts)))
    if hexagonal:
        taken = (col + row) % 2 == 0
        col, row = col[taken], row[taken]
    return col, row, step / 2 + np.column_stack([col, row]) * apart


def place_spots(
    slide: str | Path,
    *,
    spacing_um: float = 100.0,
    spot_um: float = contract.VISIUM_SPOT_UM,
    hexagonal: bool = False,
    mpp: float | None = None,
    section: str = "",
) -> AnnData:
    """Spots on the tissue of a bare slide: N spots x 0 genes, as the contract has it, named by row and column.

    A square grid of ``spacing_um`` um over the whole slide, or a ``hexagonal`` one as Visium's; spots whose centre lies
    on tissue stay, round and ``spot_um`` um wide. ``mpp`` (um per px) overrides the pixel size; ``section`` is its
    name, the file's where none is given. Raises ``InputError`` where no pixel size is known or the image's tag says a
    finer one than any scanner's, no tissue is found or none of it lies on the grid.

    >>> spots = genar.place_spots("tissue/wsis/SIM2.tif", spacing_um=200, mpp=2.0)
    >>> spots.n_vars, spots.obsm["spatial"].shape[1]
    (0, 2)
    """
    slide = Path(slide)
    section = section or slide.stem
    if not spacing_um > 0:
        raise InputError(f"--spacing-um must be positive, found {spacing_um}")
    view, mask, size_px, mpp_used = tissue_of(slide, mpp)
    if not mpp:
        refuse_fine_tag(slide, mpp_used)
    step = spacing_um / mpp_used
    if step < 1:
        raise InputError(f"{slide}: --spacing-um {spacing_um:g} is less than a pixel ({mpp_used:g} um)")
    if not mask.any():
        raise InputError(f"{slide}: no tissue found; is it an H&E slide, and is the pixel size {mpp_used:g} um right?")
    col, row, xy = _grid(size_px, step, hexagonal)
    kept = on_tissue(xy, mask, size_px)
    if not kept.any():
        raise InputError(f"{slide}: no spot of a grid of {spacing_um:g} um lies on tissue; pass a smaller --spacing-um")
    obs = pd.DataFrame({"array_row": row[kept], "array_col": col[kept]})
    obs.index = pd.Index([f"{r:04d}x{c:04d}" for r, c in obs.to_numpy()])
    adata = AnnData(sparse.csr_matrix((int(kept.sum()), 0), dtype=np.float32), obs=obs)
    adata.obsm[contract.SPATIAL] = xy[kept]
    scale = view.shape[1] / size_px[0]
    factors = {"spot_diameter_fullres": spot_um / mpp_used, "tissue_hires_scalef": scale}
    adata.uns[contract.SPATIAL] = {section: {"images": {"hires": view}, "scalefactors": factors}}
    by = {} if mpp else {"image": mpp_used}
    return contract.new_section(
        adata, section=section, slide=slide, mpp=mpp_used, spot_diameter_um=spot_um,
        pitch_um=spacing_um, source="slide", mpp_by=by,
    )  # fmt: skip
