"""HEST-1k layout: ``st/<id>.h5ad``, ``wsis/<id>.tif``, ``metadata/<id>.json`` (images and metadata may be missing).

The pixel size is the metadata's ``pixel_size_um_estimated``: TIFFs that the HEST library wrote report a pixel size
ten times too small in their resolution tags.
"""

import json
import warnings
from pathlib import Path

import anndata
import numpy as np
from scipy.spatial import KDTree

from genar.data import contract
from genar.errors import InputError

NAME = "hest"
_SLIDE_SUFFIXES = (".tif", ".tiff", ".svs", ".ndpi", ".jpg", ".jpeg", ".png")
# Two sources of the pixel size that differ by more are worth a warning.
_MPP_TOLERANCE = 0.05


def sections(root: Path) -> list[str]:
    """Ids of the sections in ``root``, naturally sorted; empty where ``root`` is not in this layout."""
    if not (root / "st").is_dir():
        return []
    return sorted((path.stem for path in (root / "st").glob("*.h5ad")), key=contract.section_key)


def read(root: Path, section: str, *, mpp: float | None = None) -> anndata.AnnData:
    """Read one section as the contract has it. ``mpp`` overrides the pixel size (um per px).

    Raises ``InputError`` where the file is not an AnnData, breaks the contract or no pixel size is known.
    """
    path = root / "st" / f"{section}.h5ad"
    try:
        adata = anndata.read_h5ad(path)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a readable .h5ad file ({error}); is it complete?") from error
    metadata = _read_metadata(root / "metadata" / f"{section}.json")
    slide = next((p for s in _SLIDE_SUFFIXES if (p := root / "wsis" / f"{section}{s}").is_file()), None)
    pitch_um = float(metadata.get("inter_spot_dist") or 0)
    mpp = mpp or _pixel_size(section, metadata, adata, pitch_um, slide)
    diameter_um = metadata.get("spot_diameter") or _spot_diameter_px(adata) * mpp
    _keep_raw_counts(adata)
    return contract.new_section(
        adata,
        section=section,
        slide=slide or "",
        mpp=mpp,
        spot_diameter_um=diameter_um,
        pitch_um=pitch_um,
        source="simulated" if metadata.get("simulated") else NAME,
        patient=metadata.get("patient") or "",
    )


def _read_metadata(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        # the table's empty cells may be written as NaN
        metadata = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); expected the sample's row of the HEST table") from error
    if not isinstance(metadata, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(metadata).__name__}")
    return metadata


def _pixel_size(section: str, metadata: dict, adata, pitch_um: float, slide: Path | None) -> float:
    stated = metadata.get("pixel_size_um_estimated")
    by_pitch = pitch_um / _nearest_px(adata) if pitch_um and adata.n_obs > 1 else None
    if stated and by_pitch and abs(by_pitch / stated - 1) > _MPP_TOLERANCE:
        warnings.warn(
            f"section {section}: pixel size {stated:.4f} um by the metadata, {by_pitch:.4f} um by the spot pitch; "
            "the metadata's is used, --mpp overrides it",
            stacklevel=2,
        )
    if stated or by_pitch:
        return float(stated or by_pitch)  # pyright: ignore
    if slide is not None:
        from genar.data.slide import open_slide

        if tag := open_slide(slide).mpp:
            return tag
    raise InputError(f"section {section}: no pixel size in metadata/{section}.json; pass --mpp (um per px)")


def _nearest_px(adata) -> float:
    """Median distance of a spot to its four nearest neighbours, px: the pitch of the array.

    Four, because spot positions are noisy and the nearest alone comes out too near (6 % on HER2ST).
    """
    if contract.SPATIAL not in adata.obsm:
        return float("inf")  # contract.check says so with a better line
    xy = np.asarray(adata.obsm[contract.SPATIAL], dtype=float)
    if not np.isfinite(xy).all():
        return float("inf")
    return float(np.median(KDTree(xy).query(xy, k=min(5, len(xy)))[0][:, 1:])) or float("inf")


def _spot_diameter_px(adata) -> float:
    for library in adata.uns.get("spatial", {}).values():
        if diameter := library.get("scalefactors", {}).get("spot_diameter_fullres"):
            return float(diameter)
    return 0.0


def _keep_raw_counts(adata) -> None:
    """A layer ``counts`` wins over X, as scanpy's users keep raw counts there."""
    if "counts" in adata.layers:
        adata.X = adata.layers["counts"]
