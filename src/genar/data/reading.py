"""What the readers of all formats share: their options, the pixel size of a section and its image."""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.spatial import KDTree

from genar.data import contract
from genar.data.door import check_hdf5, door, number
from genar.data.slide import image_mpp
from genar.errors import InputError, SectionWarning

SLIDE_SUFFIXES = (".svs", ".tif", ".tiff", ".btf", ".tf8", ".ndpi", ".mrxs", ".scn", ".bif", ".jpg", ".jpeg", ".png")
# Two sources of the pixel size that differ by more are worth a warning.
MPP_TOLERANCE = 0.05
VISIUM_PITCH_UM = 100.0
_FINEST_UM = 0.1  # pixel size of an image's tag that is believed
_ARRAY = ("array_row", "array_col")
_FEW = 10  # spots of which nothing is told
MPP_SOURCES = {"metadata": "the metadata", "pitch": "the spot pitch", "image": "the image's tag"}


@dataclass(frozen=True)
class ReadOptions:
    """What a user may say about sections beyond where they lie."""

    mpp: float | None = None
    """pixel size, um per px; overrides every other source"""
    image: Path | None = None
    """full-resolution image of the one section, or a folder of images named by section (``<id>.tif``)"""
    bin_um: float = 56.0
    """width of the spots into which Visium HD bins are pooled, um; 56 is about the diameter of a Visium spot"""
    spacing_um: float = 100.0
    """pitch of the grid laid on a bare slide, um; 100 is Visium's"""
    spot_um: float = contract.VISIUM_SPOT_UM
    """diameter of the spots laid on a bare slide, um"""
    hexagonal: bool = False
    """whether they lie as Visium's, and not on a square grid"""

    def __post_init__(self):
        for name in ("mpp", "bin_um", "spacing_um", "spot_um"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float | np.number) and 0 < value < 1e5):
                raise InputError(f"--{name.replace('_', '-')} must be a positive number of um, found {value!r}")
        if self.image is not None:
            object.__setattr__(self, "image", Path(self.image))
            if not self.image.exists():  # pyright: ignore
                raise InputError(f"{self.image}: no such image; expected a full-resolution image, or a folder of them")


def named_image(section: str, options: ReadOptions, folder: Path | None = None) -> Path | None:
    """The image that ``--image`` names for the section; else ``<section>.<suffix>`` in ``folder``; else ``None``.

    Raises ``InputError`` where ``--image`` is a folder without an image of that name.
    """
    if options.image is not None:
        if options.image.is_file():
            return options.image
        if found := _stem_in(options.image, section):
            return found
        raise InputError(f"{options.image}: no image of section {section}; expected {section}.tif, .svs, .jpg, … there")
    return _stem_in(folder, section) if folder else None


def _stem_in(folder: Path, stem: str) -> Path | None:
    suffixes = (*SLIDE_SUFFIXES, ".ome.tif", ".ome.tiff")
    found = next((p for suffix in suffixes if (p := folder / f"{stem}{suffix}").is_file()), None)
    if found is None and folder.is_dir():  # .TIF, .JPG
        named = (p for p in sorted(folder.iterdir()) if p.stem == stem and p.suffix.lower() in SLIDE_SUFFIXES)
        found = next((p for p in named if p.is_file()), None)
    return found


def pixel_size(
    section: str,
    options: ReadOptions,
    *,
    metadata_mpp: float | None = None,
    pitch_mpp: float | None = None,
    slide: Path | None = None,
) -> tuple[float, dict[str, float]]:
    """The pixel size (um per px) and what each source says of it.

    ``options.mpp`` wins, then the format's metadata, then the spot pitch, then the image's own tag. Two that differ by
    more than 5 % are worth a warning with all values, but for a tag ten times too small, as the HEST library writes it.
    Raises ``InputError`` asking for ``--mpp`` where no source says anything.
    """
    tag = image_mpp(slide) if slide is not None else None
    by = {"metadata": metadata_mpp, "pitch": pitch_mpp, "image": tag}
    by = {source: float(value) for source, value in by.items() if value and np.isfinite(value)}
    if options.mpp:
        return options.mpp, by
    if not by:
        raise InputError(
            f"section {section}: no pixel size in the metadata, the spot pitch or the image's tags; "
            "pass --mpp (um per px)"
        )
    used, mpp = next(iter(by.items()))
    if used == "image":
        refuse_fine_tag(f"section {section}", mpp)
    if disagreeing(by):
        told = ", ".join(f"{value:.4f} um by {MPP_SOURCES[source]}" for source, value in by.items())
        warnings.warn(
            f"section {section}: pixel size {told}; that of {MPP_SOURCES[used]} is used, --mpp overrides it",
            SectionWarning,
            stacklevel=2,
        )
    return mpp, by


def refuse_fine_tag(where: object, mpp: float) -> None:
    """``InputError`` where an image's tag, the only source, says a finer pixel (um) than any scanner's."""
    if mpp < _FINEST_UM:
        raise InputError(
            f"{where}: the image's tag says {mpp:.4g} um a pixel, finer than any scanner; TIFFs of the HEST library "
            f"say a tenth of the truth: pass --mpp {10 * mpp:.4g}, or --mpp {mpp:.4g} if it is so"
        )


def stated_mpp(adata) -> float | None:
    """Pixel size (um) by Space Ranger's scalefactors, where they are kept."""
    factors = (library.get("scalefactors", {}) for library in contract.libraries(adata))
    return next((one["microns_per_pixel"] for one in factors if "microns_per_pixel" in one), None)


def disagreeing(by: dict[str, float]) -> bool:
    """Whether two sources of the pixel size differ by more than 5 %; an image tag ten times too small is excused."""
    values = [value for source, value in by.items() if source != "image"]
    tag = by.get("image")
    if tag is not None and not (values and _alike(10 * tag, values[0])):
        values.append(tag)
    return bool(values) and not _alike(max(values), min(values))


def _alike(one: float, other: float) -> bool:
    return abs(one / other - 1) <= MPP_TOLERANCE


def pitch_px(xy) -> float:
    """Distance of neighbouring spots, px: the median over all spots of the distance to the four nearest.

    Four, because spot positions are noisy and the nearest alone comes out too near (6 % on HER2ST). NaN where there is
    no distance to speak of.
    """
    xy = np.asarray(xy, dtype=float)
    if xy.ndim != 2 or len(xy) < 2 or not np.isfinite(xy).all():
        return float("nan")  # contract.check says so with a better line
    return float(np.median(KDTree(xy).query(xy, k=min(5, len(xy)))[0][:, 1:])) or float("nan")


def array_pitch_px(array: np.ndarray, xy: np.ndarray) -> float:
    """Pixels for one step of the array, from a linear fit of px [N, 2] on array positions [N, 2], axes in any order.

    NaN where the spots lie on one line or there are fewer than three.
    """
    return float(_steps_px(array, xy).mean())


def _steps_px(array: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Pixels [2] for one step along either axis of the array; NaN as :func:`array_pitch_px`."""
    if len(array) < 3 or not np.isfinite(xy).all():
        return np.full(2, np.nan)
    design = np.column_stack([array - array.mean(axis=0), np.ones(len(array))])
    slopes, _, rank, _ = np.linalg.lstsq(design, xy, rcond=None)
    return np.linalg.norm(slopes[:2], axis=1) if rank == 3 else np.full(2, np.nan)


def visium_pitch_px(array: np.ndarray, xy) -> float:
    """Distance of neighbouring Visium spots, px, from array positions (row, column) [N, 2] and px [N, 2]: right also
    where most spots are left out. From the neighbours' distances where the array tells nothing.

    Neighbours in a row are two columns apart, so a column is 50 um, and a row is the square root of 3 times that. Where
    both do not give the same pitch, rows and columns are exchanged, or the positions are not of this array.
    """
    array, xy = np.asarray(array, dtype=float), np.asarray(xy, dtype=float)
    for places in (array, array[:, ::-1]):
        one, other = _steps_px(places * [math.sqrt(3), 1], xy)
        if one > 0 and other > 0 and _alike(one, other):
            return float(one + other)
    return pitch_px(xy)


def spot_pitch_px(adata) -> float:
    """Distance of neighbouring spots, px: by the array positions where they are Visium's, else by the neighbours."""
    xy = adata.obsm[contract.SPATIAL]
    if looks_like_visium(adata) and np.asarray(xy).shape == (adata.n_obs, 2):
        return visium_pitch_px(adata.obs[list(_ARRAY)].to_numpy(float), xy)
    return pitch_px(xy)


def looks_like_visium(adata) -> bool:
    """Whether ``obs`` holds Visium's array positions: row and column have the same parity at every spot."""
    if not set(_ARRAY) <= set(adata.obs) or adata.n_obs < _FEW:
        return False
    places = adata.obs[list(_ARRAY)].apply(pd.to_numeric, errors="coerce")
    row, col = places.to_numpy(np.float64).T
    return bool(((row + col) % 2 == 0).all() and np.ptp(col) > 1)


def read_adata(path: Path) -> anndata.AnnData:
    """Read an ``.h5ad``; ``InputError`` where it is none, is far larger unpacked than its size allows, or holds a
    sparse matrix or slots of ``uns`` that are not sound (the code underneath trusts their indices, and would crash)."""
    if path.is_dir():
        found = sorted(path.glob("predictions/*.h5ad"))
        raise InputError(f"{path}: expected an .h5ad file, found a folder{f'; name {found[0]}' if found else ''}")
    if not path.exists():
        raise InputError(f"{path}: no such file")
    with door(path, ".h5ad file"):
        check_hdf5(path)
        adata = anndata.read_h5ad(path)
        layers = [adata.layers[name] for name in contract.layer_names(adata)]
        for matrix in (adata.X, *layers, adata.raw.X if adata.raw is not None else None):
            check_sparse(matrix)
        _check_uns(path, adata)
        return adata


def check_sparse(matrix) -> None:
    """Refuse a compressed matrix whose indices lead out of it. Raises ``ValueError``."""
    if sparse.issparse(matrix) and hasattr(matrix, "check_format"):
        if not all(np.issubdtype(part.dtype, np.integer) for part in (matrix.indptr, matrix.indices)):
            raise ValueError("the indices of a sparse matrix must be whole numbers")  # NaN passes scipy's check
        starts = matrix.indptr.astype(np.int64)  # differences of small numbers would wrap around
        if (np.diff(starts) < 0).any():  # where the last is 0, scipy looks at none
            raise ValueError("the row or column starts of a sparse matrix must grow")
        matrix.check_format(full_check=True)


def _check_uns(path: Path, adata: anndata.AnnData) -> None:
    """Refuse slots of ``uns`` that are not what GenAR and scanpy put there."""
    told = adata.uns.get(contract.GENAR, {})
    if not isinstance(told, Mapping):
        raise InputError(f"{path}: uns['genar'] must be a mapping, found {type(told).__name__}")
    if contract.SECTION in told:
        contract.check_name(told[contract.SECTION])
    for key in (contract.MPP, contract.SPOT_DIAMETER_UM, contract.PITCH_UM):
        number(path, f"uns['genar']['{key}']", _plain(told.get(key)))
    spatial = adata.uns.get(contract.SPATIAL, {})
    libraries: Iterable[Any] = spatial.values() if isinstance(spatial, Mapping) else ()
    libraries = [value for value in libraries if not isinstance(value, bool | np.bool_)]  # CELLxGENE's is_single
    for library in libraries:
        parts: list[Any] = [0]
        if isinstance(library, Mapping):
            parts = [library.get(part, {}) for part in ("images", "scalefactors")]
        if not all(isinstance(part, Mapping) for part in parts):
            raise InputError(
                f"{path}: uns['spatial'] must hold images and scalefactors of each library, as scanpy has it"
            )
        for key, value in dict(parts[-1]).items():
            if key in ("spot_diameter_fullres", "microns_per_pixel") or key.endswith("_scalef"):
                number(path, f"scalefactor {key}", _plain(value))


def _plain(value):
    """A NumPy scalar as Python's own."""
    return value.item() if isinstance(value, np.generic) else value


def refuse_prediction(adata, path: Path) -> None:
    """``InputError`` where a prediction of GenAR's is given for a measured section."""
    if contract.PREDICTION in adata.uns.get(contract.GENAR, {}):
        raise InputError(f"{path}: holds predicted counts, no measured ones; name the measured section")


def keep_one_library(adata: anndata.AnnData, path: Path) -> None:
    """Refuse several sections in one file; of several libraries in ``uns`` keep the one that all spots belong to."""
    spatial = adata.uns.get(contract.SPATIAL)
    names = [name for name, value in spatial.items() if isinstance(value, Mapping)] if spatial else []  # pyright: ignore
    own = set(adata.obs["library_id"].astype(str)) if "library_id" in adata.obs else set()
    if len(own) > 1 or _share_places(adata):
        found = f"obs['library_id'] names {len(own)}" if len(own) > 1 else "most spots lie at another's place"
        raise InputError(
            f"{path}: several sections in one file ({found}); expected one: write the spots of each to a file of their "
            "own"
        )
    if len(names) < 2:
        return
    if len(own) != 1 or not own <= set(names):
        raise InputError(
            f"{path}: uns['spatial'] holds {len(names)} libraries ({', '.join(names[:3])}); expected one section a "
            "file: write the spots of each library to a file of their own, with that library alone in uns['spatial']"
        )
    adata.uns[contract.SPATIAL] = {name: value for name, value in spatial.items() if name in own}  # pyright: ignore


def _share_places(adata: anndata.AnnData) -> bool:
    """Whether more than half of the spots lie where another lies, on the image or in Visium's array, as those of
    concatenated sections do."""
    if adata.n_obs < _FEW:
        return False
    tables = [pd.DataFrame(np.asarray(adata.obsm[contract.SPATIAL]))] if contract.SPATIAL in adata.obsm else []
    tables += [pd.DataFrame(adata.obs)[list(_ARRAY)]] if looks_like_visium(adata) else []
    return any(one.duplicated(keep=False).mean() > 0.5 and one.drop_duplicates().shape[0] > 1 for one in tables)


def keep_raw_counts(adata) -> str:
    """Put raw counts into X: a layer ``counts`` wins, as scanpy's users keep them there. Returns where they were."""
    if "counts" in adata.layers:
        adata.X = adata.layers["counts"]
        return "layers['counts']"
    return "X"


def stated_diameter_px(adata) -> float:
    """Diameter of a spot, full-resolution px, by scanpy's scalefactors; 0 where they are silent."""
    for library in contract.libraries(adata):
        if diameter := library.get("scalefactors", {}).get("spot_diameter_fullres"):
            return float(diameter)
    return 0.0


def missing_package(path: Path, package: str, extra: str) -> InputError:
    """The error that says which extra to install."""
    return InputError(f"{path}: reading this format needs {package}; install it with: pip install 'genar[{extra}]'")


def under_tissue(adata: anndata.AnnData) -> tuple[anndata.AnnData, str]:
    """Without the spots whose ``obs["in_tissue"]`` is 0, as Space Ranger's outputs are read, and a note of them."""
    if "in_tissue" not in adata.obs:
        return adata, ""
    outside = np.asarray(adata.obs["in_tissue"].astype(str).isin(["0", "0.0", "False"]))
    if not outside.any() or outside.all():
        return adata, ""
    return adata[~outside].copy(), f"{outside.sum()} spots are not under tissue and are dropped"
