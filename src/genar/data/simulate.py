"""Simulated tissue: an H&E-like image drawn nucleus by nucleus, and counts that can be read from it.

Glands, stroma, lymphoid aggregates and fat are laid out from smooth random fields. Genes belong to modules that follow
these regions; each module also has an activity that varies smoothly in space and that the image shows (collagen
density, cytoplasm, size and darkness of nuclei, packing of lymphocytes). The depth of a spot follows the number of
nuclei under it. Nothing here comes from a patient, and every file says so.

Gene modules depend on the seed alone, so a model can carry them from one section to the next; the layout depends on
the seed and the section's name. Lengths are um unless a name ends in ``_px``.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import tifffile
from anndata import AnnData
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial import KDTree

from genar.data import contract
from genar.data.door import door
from genar.data.files import replacing
from genar.data.pyramid import write_pyramid
from genar.errors import InputError

KINDS = ("gland", "stroma", "immune", "fat")
MARKERS = {
    "gland": "EPCAM KRT8 KRT18 KRT19 ERBB2 CDH1 MUC1 CLDN3 CLDN4 ELF3 GATA3 TFF3",
    "proliferation": "MKI67 TOP2A PCNA CCNB1 CDK1 TYMS UBE2C BIRC5",
    "stroma": "COL1A1 COL1A2 COL3A1 DCN LUM VIM SPARC FN1 POSTN ACTA2 BGN FBLN1",
    "immune": "CD74 PTPRC IGKC IGHG1 CD3E CD3D CD79A MS4A1 CCL19 LTB CXCR4 TRBC1",
    "fat": "FABP4 PLIN1 PLIN4 ADIPOQ LEP CIDEC LPL ADH1B",
    "housekeeping": "ACTB GAPDH B2M EEF1A1 TMSB10 UBC PPIA TUBA1B MT-CO1 MT-CO2 MT-ND1 MT-ATP6 RPL3 RPL13 RPLP0 RPS4X "
    "RPS6 RPS18",
}
N_NAMED = sum(len(names.split()) for names in MARKERS.values())
GRID_PX = 4  # regions live on a grid this coarse; edges are sharpened at full resolution
# Optical density of haematoxylin and eosin in (R, G, B): the reference matrix of Macenko et al. 2009.
HAEMATOXYLIN, EOSIN = (0.5626, 0.7201, 0.4062), (0.2159, 0.8012, 0.5581)
Nuclei = dict[str, np.ndarray]  # of each kind [n, 6]: x, y, half axes a and b, angle, optical density
Outline = Callable[[np.ndarray], np.ndarray]  # angle -> distance from the centre


@dataclass(frozen=True)
class TissueConfig:
    """What to simulate: a square array of spots over one piece of tissue. ``ValueError`` where a number cannot be."""

    n_rows: int = 22
    """Rows of the array of spots; the spots that miss the tissue are dropped."""
    n_cols: int = 20
    """Columns of the array."""
    pitch_um: float = 110.0
    """Distance between spot centres, um."""
    spot_diameter_um: float = 55.0
    """Diameter of a spot, um."""
    mpp: float = 0.7
    """Pixel size, um per px."""
    n_genes: int = 600
    """Genes measured: the named markers, then SIMG0001, SIMG0002, ..."""
    counts_per_nucleus: float = 700.0
    """Counts that one nucleus under a spot adds to its library (median library about 8000); one more is ambient."""
    library_sd: float = 0.15
    """Noise of the library size, sd of the natural logarithm."""
    dispersion: float = 0.1
    """Negative binomial: variance = mean + dispersion * mean^2; 0 is Poisson."""

    def __post_init__(self) -> None:
        if min(self.n_rows, self.n_cols) < 4:
            raise ValueError(f"n_rows and n_cols must be at least 4, found {self.n_rows} and {self.n_cols}")
        if not 0 < self.spot_diameter_um <= self.pitch_um:
            raise ValueError(f"spot_diameter_um must be above 0 and at most pitch_um, found {self.spot_diameter_um}")
        if not 0.2 <= self.mpp <= 2:
            raise ValueError(f"mpp must be 0.2 to 2 um per px, found {self.mpp}")
        if self.n_genes < N_NAMED:
            raise ValueError(f"n_genes must be at least {N_NAMED} (the named markers), found {self.n_genes}")
        if self.counts_per_nucleus <= 0 or self.library_sd < 0 or self.dispersion < 0:
            found = f"{self.counts_per_nucleus}, {self.library_sd} and {self.dispersion}"
            raise ValueError(f"counts_per_nucleus must be above 0, library_sd and dispersion at least 0, found {found}")

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height of the full-resolution image, px."""
        return round(self.n_cols * self.pitch_um / self.mpp), round(self.n_rows * self.pitch_um / self.mpp)


@dataclass(frozen=True)
class _Layout:
    """Where things lie: float32 maps [h, w] on a grid of ``step`` um; a depth is positive inside, um."""

    step: float
    tissue: np.ndarray  # depth
    gland: np.ndarray  # depth, -30 where no gland is near
    lumen: np.ndarray  # depth, likewise
    fat: np.ndarray  # positive inside, no unit
    immune: np.ndarray  # positive inside, no unit
    septum: np.ndarray  # distance from the nearest wall between two fat cells
    across: np.ndarray  # coordinate across the fibres
    along: np.ndarray  # coordinate along the fibres
    activity: dict[str, np.ndarray]  # of each module: mean 0, sd 1
    rings: np.ndarray  # [n, 4]: x, y, angle and depth of the gland nuclei

    def at(self, field: np.ndarray, xy: np.ndarray) -> np.ndarray:
        """Values of a map at the points ``xy`` [..., 2]; the nearest grid point counts."""
        col, row = np.moveaxis((xy / self.step).astype(int), -1, 0)
        return field[row.clip(0, field.shape[0] - 1), col.clip(0, field.shape[1] - 1)]

    def kinds(self) -> dict[str, np.ndarray]:
        """One bool map for each of ``KINDS``; they are disjoint and together fill the tissue. A lumen is gland."""
        tissue = self.tissue > 0
        gland = tissue & (self.gland > 0)
        immune = tissue & ~gland & (self.immune > 0)
        fat = tissue & ~gland & ~immune & (self.fat > 0)
        return {"gland": gland, "stroma": tissue & ~gland & ~immune & ~fat, "immune": immune, "fat": fat}

    def direction(self, field: np.ndarray, xy: np.ndarray) -> np.ndarray:
        """Angle of the level lines of a map at ``xy`` [n, 2]."""
        d_row, d_col = np.gradient(field)
        return np.arctan2(self.at(d_row, xy), self.at(d_col, xy)) + np.pi / 2


def _field(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> np.ndarray:
    """Gaussian random field of mean 0 and sd 1, smooth over ``sigma`` grid points (periodic)."""
    noise = np.fft.rfft2(rng.standard_normal(shape))
    f2 = np.fft.fftfreq(shape[0])[:, None] ** 2 + np.fft.rfftfreq(shape[1]) ** 2
    smooth = np.fft.irfft2(noise * np.exp(-2 * (np.pi * sigma) ** 2 * f2), shape)
    return ((smooth - smooth.mean()) / smooth.std()).astype(np.float32)


def _lattice(rng: np.random.Generator, extent: tuple[float, float], spacing: float) -> np.ndarray:
    """Points [n, 2] of a jittered triangular lattice over ``extent`` (x, y)."""
    rows, cols = (int(side / step) + 1 for side, step in zip(extent[::-1], (0.866 * spacing, spacing), strict=True))
    y, x = np.meshgrid(np.arange(rows) * 0.866, np.arange(cols, dtype=float), indexing="ij")
    x[1::2] += 0.5
    xy = np.stack([x.ravel(), y.ravel()], axis=1)
    return (xy + rng.uniform(-0.32, 0.32, xy.shape)) * spacing


def _make_layout(rng: np.random.Generator, config: TissueConfig) -> _Layout:
    step = GRID_PX * config.mpp
    shape = (-(-config.size_px[1] // GRID_PX), -(-config.size_px[0] // GRID_PX))
    y, x = (axis.astype(np.float32) for axis in np.mgrid[: shape[0], : shape[1]])
    x, y = (x + 0.5) * step, (y + 0.5) * step
    width, height = shape[1] * step, shape[0] * step

    def field(scale: float) -> np.ndarray:
        return _field(rng, shape, scale / step)

    # A rounded rectangle whose outline wanders and is frayed at the scale of a cell.
    rounded = (np.abs(2 * x / width - 1) ** 5 + np.abs(2 * y / height - 1) ** 5) ** (1 / 5)
    half = min(width, height) / 2
    tissue = half * (0.95 - rounded + 0.016 * field(130)) + 7 * field(25) + 1.5 * field(6)
    tissue = np.minimum(tissue, half * (1 - rounded) - 8)  # the background shows on every side
    fat, immune = (m - np.quantile(m, 1 - share) for m, share in ((field(120), 0.16), (field(42), 0.1)))
    fat -= 3 * np.clip(immune + 0.6, 0, None)  # aggregates and fat lie apart
    tumour = field(190) > -0.8
    activity = {module: field(110) for module in MARKERS if module != "housekeeping"}
    allowed = np.where(tumour & (fat < -0.1) & (immune < -0.1), tissue, -1)
    gland, lumen, rings = _place_glands(rng, allowed, step)

    sites = _lattice(rng, (width, height), 62.0)
    near = KDTree(sites).query(np.stack([x.ravel(), y.ravel()], axis=1), k=3)[0].reshape(*shape, 3)
    # Distance from a wall; the third site rounds the corners where three fat cells meet.
    septum = 0.5 / (1 / (near[..., 1] - near[..., 0] + 0.1) + 1 / (near[..., 2] - near[..., 0] + 0.1))
    septum = np.minimum(septum, np.abs(tissue))  # a thin capsule closes the fat cells at the edge
    # Fibres are the level lines of a plane that is bent by noise and wraps around the glands.
    turn = rng.uniform(0, np.pi)
    across = np.cos(turn) * x + np.sin(turn) * y + 50 * field(70) + 5 * field(22) - 1.5 * gland
    along = np.cos(turn) * y - np.sin(turn) * x + 40 * field(70)
    tissue, fat, septum, across, along = (m.astype(np.float32) for m in (tissue, fat, septum, across, along))
    return _Layout(step, tissue, gland, lumen, fat, immune, septum, across, along, activity, rings)


def _place_glands(rng: np.random.Generator, allowed: np.ndarray, step: float) -> tuple[np.ndarray, ...]:
    """Throw glands, none over another, where ``allowed`` um around are free: depths of gland and lumen, and nuclei."""
    gland, lumen = (np.full(allowed.shape, -30.0, dtype=np.float32) for _ in range(2))
    circles, rings = np.zeros((0, 3)), [np.zeros((0, 4))]
    for _ in range(int(allowed.size * step**2 / 450)):
        x, y = rng.uniform(0, 1, 2) * allowed.shape[::-1] * step
        radius = rng.uniform(28, 78)
        too_near = np.hypot(circles[:, 0] - x, circles[:, 1] - y) < 0.96 * (circles[:, 2] + radius) + 6
        if too_near.any() or allowed[int(y / step), int(x / step)] < 1.1 * radius + 5:
            continue
        circles = np.vstack([circles, (x, y, radius)])
        outline = _wobble(rng)
        wall = max(17, rng.uniform(0.4, 1) * radius)  # a wall of the whole radius makes a solid nest
        reach = 1.5 * radius + 30
        rows, cols = (slice(max(0, int((c - reach) / step)), int((c + reach) / step) + 1) for c in (y, x))
        dy, dx = np.mgrid[rows, cols][:, : allowed.shape[0] - rows.start, : allowed.shape[1] - cols.start] * step
        dy, dx = dy + step / 2 - y, dx + step / 2 - x
        depth = radius - np.hypot(dx, dy) / outline(np.arctan2(dy, dx))
        gland[rows, cols] = np.maximum(gland[rows, cols], depth)
        lumen[rows, cols] = np.maximum(lumen[rows, cols], depth - wall)
        rings.append(_ring_nuclei(rng, radius, wall, outline) + np.array([x, y, 0, 0]))
    return gland, lumen, np.concatenate(rings)


def _wobble(rng: np.random.Generator) -> Outline:
    """A closed outline: its distance from the centre, mean 1, for every angle."""
    order = np.arange(2, 6)
    size = rng.uniform(0, 1, 4) * (0.24, 0.12, 0.07, 0.05)
    phase = rng.uniform(0, 2 * np.pi, 4)
    return lambda angle: 1 + (size * np.cos(order * np.asarray(angle)[..., None] + phase)).sum(axis=-1)


def _ring_nuclei(rng: np.random.Generator, radius: float, wall: float, outline: Outline) -> np.ndarray:
    """Nuclei in rings from the rim of a gland to its lumen: x, y (from its centre), angle and depth, [n, 4]."""
    rings = [np.zeros((0, 4))]
    for ring, depth in enumerate(np.arange(6.5, min(wall - 3, radius - 1), 9.5)):
        n = max(1, int(2 * np.pi * (radius - depth) / (8.5 + 1.5 * ring)))
        angle = rng.uniform(0, 2 * np.pi) + 2 * np.pi * (np.arange(n) + rng.uniform(-0.25, 0.25, n)) / n
        depths = depth + rng.normal(0, 1.3, n)
        r = (radius - depths) * outline(angle)
        # The outer ring is columnar: long axis to the centre. The inner ones lie less and less in order.
        turned = angle + rng.normal(0, 0.2 + 0.5 * ring, n)
        rings.append(np.stack([r * np.cos(angle), r * np.sin(angle), turned, depths], axis=1))
    return np.concatenate(rings)


def _make_nuclei(rng: np.random.Generator, layout: _Layout) -> Nuclei:
    """Nuclei of every kind, in shape and place true to it."""
    extent = (layout.tissue.shape[1] * layout.step, layout.tissue.shape[0] * layout.step)
    outside_gland = -layout.gland - 3

    def keep(xy: np.ndarray, chance: np.ndarray) -> np.ndarray:
        inside = (layout.at(layout.tissue, xy) > 5) & (layout.at(outside_gland, xy) > 0)
        return xy[inside & (rng.uniform(size=len(xy)) < chance)]

    def shaped(xy: np.ndarray, axes: tuple[float, float], angle: np.ndarray, density: float) -> np.ndarray:
        size = np.exp(rng.normal(0, 0.12, (len(xy), 2))) * axes
        dark = density * np.exp(rng.normal(0, 0.13, len(xy)))
        return np.column_stack([xy, size, angle, dark])

    points = _lattice(rng, extent, 16.0)
    xy = keep(points, 0.55 * (layout.at(layout.fat, points) < 0) * (layout.at(layout.immune, points) < 0.1))
    stroma = shaped(xy, (6.8, 1.9), layout.direction(layout.across, xy) + rng.normal(0, 0.15, len(xy)), 0.95)

    points = _lattice(rng, extent, 6.2)
    packed = np.clip(0.75 + 0.2 * layout.at(layout.activity["immune"], points), 0.3, 1)
    xy = keep(points, packed / (1 + np.exp(-9 * layout.at(layout.immune, points))))  # a few wander out of it
    immune = shaped(xy, (2.9, 2.7), rng.uniform(0, np.pi, len(xy)), 1.55)

    points = _lattice(rng, extent, 6.0)
    flat = (layout.at(layout.fat, points) > 0) & (layout.at(layout.septum, points) < 1.5)
    xy = keep(points, 0.2 * flat * (layout.at(layout.immune, points) < 0))
    fat = shaped(xy, (4.8, 1.6), layout.direction(layout.septum, xy), 1.0)

    xy, angle, depth = layout.rings[:, :2], layout.rings[:, 2], layout.rings[:, 3]
    own = np.abs(layout.at(layout.gland, xy) - depth) < 4  # else it lies in the lumen of a gland it touches
    own &= layout.at(layout.tissue, xy) > 4
    gland = shaped(xy[own], (4.7, 3.5), angle[own], 0.95)
    cycling = layout.at(layout.activity["proliferation"], xy[own]).clip(-2, 2)[:, None]
    gland[:, 2:4] *= 1 + 0.09 * cycling  # proliferating nuclei are larger and darker
    gland[:, 5:] *= 1 + 0.2 * cycling
    return {"stroma": stroma, "fat": fat, "gland": gland, "immune": immune}


def _stamp(canvas: np.ndarray, nuclei: np.ndarray, mpp: float) -> None:
    """Draw ``nuclei`` [n, 6] as rotated ellipses with a soft edge and a darker rim; the denser of two wins."""
    for part in np.array_split(nuclei, max(1, len(nuclei) // 1000)):
        x, y, a, b = (part[:, :4] / mpp - (0.5, 0.5, 0, 0)).T[:, :, None, None]
        cos, sin, dark = (values[:, None, None] for values in (np.cos(part[:, 4]), np.sin(part[:, 4]), part[:, 5]))
        half = int(np.ceil(part[:, 2:4].max(initial=0) / mpp)) + 2
        left, top = np.floor(part[:, :2].T / mpp).astype(int) - half
        span = np.arange(2 * half + 1)
        dx, dy = left[:, None, None] + span - x, top[:, None, None] + span[:, None] - y
        r = np.hypot((cos * dx + sin * dy) / a, (cos * dy - sin * dx) / b)
        sprite = dark * np.clip((1 - r) * b + 0.5, 0, 1) * (0.78 + 0.22 * r**2)
        for stamp, row, col in zip(sprite.astype(np.float32), top, left, strict=True):
            r0, c0 = max(0, row), max(0, col)
            target = canvas[r0 : row + len(span), c0 : col + len(span)]
            np.maximum(target, stamp[r0 - row :, c0 - col :][: target.shape[0], : target.shape[1]], out=target)


def _paint(rng: np.random.Generator, layout: _Layout, nuclei: Nuclei, config: TissueConfig) -> np.ndarray:
    """The full-resolution image, uint8 [H, W, 3]: maps of both stains, mixed by the Beer-Lambert law."""
    width, height = config.size_px

    def full(field: np.ndarray) -> np.ndarray:
        size = (field.shape[1] * GRID_PX, field.shape[0] * GRID_PX)
        return np.asarray(Image.fromarray(field).resize(size, Image.Resampling.BILINEAR))[:height, :width]

    def soft(field: np.ndarray, blur: float) -> np.ndarray:
        return np.clip(full(field) / blur + 0.5, 0, 1)

    white = rng.standard_normal((height, width), dtype=np.float32)
    grain = 4 * gaussian_filter(white, 1.1 * 0.7 / config.mpp)
    texture = _field(rng, (512, 512), 0.9)
    waves = np.stack([full(layout.along) / 14, full(layout.across) / 1.5])
    fibre = map_coordinates(texture, waves, order=1, mode="grid-wrap")
    collagen = 0.4 + 0.06 * full(layout.activity["stroma"])
    eosin = np.clip(collagen + 0.085 * fibre + 0.025 * grain, 0.04, None)
    haem = np.full_like(eosin, 0.06)

    def layer(alpha: np.ndarray, eosin_density: np.ndarray | float, haem_density: np.ndarray | float) -> None:
        for stain, density in ((eosin, eosin_density), (haem, haem_density)):
            stain += alpha * (density - stain)  # in place

    fat = soft(layout.fat, 0.05)
    wall = 0.36 + 0.06 * full(layout.activity["fat"])
    layer(fat, wall * (1 - soft(layout.septum - 1.6, 1.2)) + 0.01, 0.02)
    layer(0.75 * soft(layout.immune, 0.5), 0.26 + 0.03 * grain, 0.16)
    layer(soft(layout.gland + 1.2, 1.2), 0.06, 0.02)  # a cleft: glands shrink away from the stroma
    cytoplasm = 0.36 + 0.05 * full(layout.activity["gland"]) + 0.05 * grain
    layer(soft(layout.gland, 1.2), cytoplasm, 0.2 + 0.02 * grain)
    layer(soft(layout.lumen, 1.5), 0.03, 0.01)
    layer(1 - soft(layout.tissue, 2.0), 0.0, 0.0)

    canvas = np.zeros_like(haem)
    for kind in nuclei.values():
        _stamp(canvas, kind, config.mpp)
    canvas *= 1 + 0.16 * grain  # chromatin
    eosin *= 1 - 0.35 * np.clip(canvas, 0, 1)
    haem = gaussian_filter(np.maximum(haem, canvas), 0.45 * 0.7 / config.mpp)
    strength = rng.normal(1, 0.04, 2)  # staining differs from slide to slide
    image = np.empty((height, width, 3), dtype=np.uint8)
    for channel in range(3):
        density = strength[0] * HAEMATOXYLIN[channel] * haem + strength[1] * EOSIN[channel] * eosin + 0.04
        image[..., channel] = np.clip(255 * np.exp(-density) + 1.2 * white, 0, 255)
    return image


def sample_counts(rng: np.random.Generator, mean: np.ndarray, dispersion: float) -> np.ndarray:
    """Negative binomial counts with ``mean`` and variance mean + dispersion * mean^2, int64 of the same shape."""
    return rng.poisson(mean if dispersion == 0 else rng.gamma(1 / dispersion, mean * dispersion))


def gene_programs(seed: int, n_genes: int) -> pd.DataFrame:
    """Genes by ``module``, ``base`` (abundance), ``fold`` (in the module's region) and ``loading`` (on its activity).

    The unnamed genes spread over the modules too, with smaller folds; "none" follows nothing.
    """
    rng = np.random.default_rng([seed, 0])
    named = [(gene, module) for module, genes in MARKERS.items() for gene in genes.split()]
    n_other = n_genes - len(named)
    modules = [*(module for module in MARKERS if module != "housekeeping"), "none"]
    other = rng.choice(modules, n_other, p=[0.13, 0.07, 0.13, 0.09, 0.06, 0.52])
    module = np.array([module for _, module in named] + list(other))
    is_named = np.arange(n_genes) < len(named)
    is_house = module == "housekeeping"
    base = np.exp(rng.normal(1.2 * is_house + 0.3 * is_named, np.where(is_named, 0.6, 1.2)))
    follows = ~is_house & (module != "none")
    fold = np.exp(follows * rng.normal(np.where(is_named, 2.6, 1.3), 0.3))
    loading = follows * rng.uniform(0.25, 0.55, n_genes)
    names = [gene for gene, _ in named] + [f"SIMG{i:04d}" for i in range(1, n_other + 1)]
    return pd.DataFrame({"module": module, "base": base, "fold": fold, "loading": loading}, index=pd.Index(names))


def _spots(layout: _Layout, nuclei: Nuclei, config: TissueConfig) -> pd.DataFrame:
    """The spots at least half on tissue: place on the array and in px, nuclei under them, area of each kind."""
    col, row = (axis.ravel() for axis in np.meshgrid(np.arange(config.n_cols), np.arange(config.n_rows)))
    centres = (np.stack([col, row], axis=1) + 0.5) * config.pitch_um
    radius = config.spot_diameter_um / 2
    steps = np.arange(-int(radius / layout.step), int(radius / layout.step) + 1) * layout.step
    offsets = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    disc = centres[:, None] + offsets[np.hypot(*offsets.T) <= radius]
    xy = np.concatenate(list(nuclei.values()))[:, :2]
    # HEST-1k calls the array's x "row", and the px of y "row".
    columns = {"array_row": col, "array_col": row}
    columns |= {"pxl_row_in_fullres": centres[:, 1] / config.mpp, "pxl_col_in_fullres": centres[:, 0] / config.mpp}
    columns |= {"in_tissue": True, "n_nuclei": KDTree(xy).query_ball_point(centres, radius, return_length=True)}
    columns |= {f"fraction_{kind}": layout.at(mask, disc).mean(axis=1) for kind, mask in layout.kinds().items()}
    names = [f"{x:03d}x{y:03d}" for x, y in zip(col, row, strict=True)]
    spots = pd.DataFrame(columns, index=pd.Index(names))
    return spots.loc[spots[[f"fraction_{kind}" for kind in KINDS]].sum(axis=1) >= 0.5]


def _expected_shares(programs: pd.DataFrame, spots: pd.DataFrame, activity: dict[str, np.ndarray]) -> np.ndarray:
    """Expected share of each gene in the counts of each spot, [N, G]; ``activity`` is [N] each. Rows sum to 1."""
    base, fold, loading = (programs[column].to_numpy() for column in ("base", "fold", "loading"))
    fractions = spots[[f"fraction_{kind}" for kind in KINDS]].to_numpy()
    fractions = fractions / fractions.sum(axis=1, keepdims=True)  # an edge spot lies partly outside the tissue
    share = np.tile(base, (len(spots), 1))
    for module, field in activity.items():
        mine = (programs["module"] == module).to_numpy()
        region = fractions[:, [KINDS.index("gland" if module == "proliferation" else module)]]
        drive = np.exp(loading[mine] * field.clip(-2.5, 2.5)[:, None])
        share[:, mine] *= 1 + (fold[mine] * drive - 1) * region
    return share / share.sum(axis=1, keepdims=True)


def simulate_section(section: str, seed: int, config: TissueConfig = TissueConfig()) -> tuple[AnnData, np.ndarray]:
    """Simulate one section: an AnnData that fulfils the contract, and its image, uint8 [H, W, 3].

    ``obs`` also holds the truth: ``n_nuclei`` under the spot and ``fraction_<kind>`` of its area for each of
    ``KINDS``; ``var["module"]`` is the module of a gene. The same arguments give the same counts and pixels.
    """
    rng = np.random.default_rng([seed, 1, zlib.crc32(section.encode())])
    layout = _make_layout(rng, config)
    nuclei = _make_nuclei(rng, layout)
    image = _paint(rng, layout, nuclei, config)
    spots = _spots(layout, nuclei, config)
    programs = gene_programs(seed, config.n_genes)

    px = spots[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()
    activity = {module: layout.at(field, px * config.mpp) for module, field in layout.activity.items()}
    noise = np.exp(rng.normal(0, config.library_sd, len(spots)))
    depth = config.counts_per_nucleus * (spots["n_nuclei"].to_numpy() + 1) * noise
    counts = sample_counts(rng, depth[:, None] * _expected_shares(programs, spots, activity), config.dispersion)

    adata = AnnData(counts.astype(np.float32), obs=spots, var=programs["module"].to_frame())
    adata.obsm[contract.SPATIAL] = px
    adata.uns[contract.SPATIAL] = {"ST": _overview(image, config)}
    adata.uns["simulated"] = True
    contract.new_section(
        adata,
        section=section,
        mpp=config.mpp,
        spot_diameter_um=config.spot_diameter_um,
        pitch_um=config.pitch_um,
        source="simulated",
        patient=f"Simulated {section}",
    )
    return adata, image


def _overview(image: np.ndarray, config: TissueConfig) -> dict:
    scale = min(1.0, 1000 / max(image.shape))
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    spot_px = config.spot_diameter_um / config.mpp
    factors = {"spot_diameter_fullres": spot_px, "tissue_downscaled_fullres_scalef": scale}
    return {"images": {"downscaled_fullres": small}, "scalefactors": factors}


def write_tissue(
    out: str | Path, sections: Sequence[str] = ("SIM1", "SIM2"), seed: int = 0, config: TissueConfig = TissueConfig()
) -> Path:
    """Write sections in the layout of HEST-1k under ``out`` and return it: ``st/``, ``wsis/`` and ``metadata/``.

    A file appears under its name only once it is whole; writing again gives the same counts and pixels.
    Raises ``InputError`` where a section's name is used twice or is not a file name, or a section or image of that name
    lies there that was not simulated.

    >>> from genar.data.simulate import TissueConfig
    >>> small = TissueConfig(n_rows=4, n_cols=4, n_genes=80, mpp=2.0)
    >>> folder = genar.write_tissue("simulated", ("A",), config=small)
    >>> sorted(path.name for path in folder.iterdir())
    ['metadata', 'st', 'wsis']
    """
    out = Path(out)
    if not sections or len(set(sections)) < len(sections) or not all(n and Path(n).name == n for n in sections):
        raise InputError(f"sections must be names fit for a file, at least one and each once, found {list(sections)}")
    for section in sections:
        _refuse_measured(out, section)
    for section in sections:
        adata, image = simulate_section(section, seed, config)
        with replacing(out / "wsis" / f"{section}.tif") as path:
            write_pyramid(path, image, config.mpp)
        with replacing(out / "st" / f"{section}.h5ad") as path:
            adata.write_h5ad(path, compression="gzip")
        with replacing(out / "metadata" / f"{section}.json") as path:
            path.write_text(json.dumps(_metadata(adata, image, config), indent=2) + "\n", encoding="utf-8")
    return out


def _refuse_measured(folder: Path, section: str) -> None:
    counts, image = folder / "st" / f"{section}.h5ad", folder / "wsis" / f"{section}.tif"
    ours = True
    if counts.is_file():
        with door(counts, ".h5ad file", "choose another folder"), h5py.File(counts) as file:
            ours = "uns/simulated" in file
    elif image.is_file():
        with door(image, "TIFF", "choose another folder"), tifffile.TiffFile(image) as file:
            ours = file.pages.first.software == "genar"
    if not ours:
        raise InputError(f"{counts if counts.is_file() else image}: is there and not simulated; choose another folder")


def _metadata(adata: AnnData, image: np.ndarray, config: TissueConfig) -> dict:
    """The row of the HEST-1k table for a section, as far as it has a meaning here."""
    section = contract.name(adata)
    return {
        "dataset_title": "Simulated tissue (not a patient's)",
        "simulated": True,
        "id": section,
        "image_filename": f"{section}.tif",
        "organ": "Simulated",
        "disease_state": "Simulated",
        "species": "Simulated",
        "patient": f"Simulated {section}",
        "st_technology": "Simulated",
        "inter_spot_dist": config.pitch_um,
        "spot_diameter": config.spot_diameter_um,
        "spots_under_tissue": adata.n_obs,
        "nb_genes": adata.n_vars,
        "pixel_size_um_estimated": config.mpp,
        "fullres_px_width": image.shape[1],
        "fullres_px_height": image.shape[0],
    }
