"""HEST-1k layout: ``st/<id>.h5ad``, ``wsis/<id>.tif``, ``metadata/<id>.json`` (images and metadata may be missing).

The pixel size is the metadata's ``pixel_size_um_estimated``: TIFFs that the HEST library wrote report a pixel size
ten times too small in their resolution tags.
"""

import math
import warnings
from pathlib import Path

import anndata

from genar.data import contract, reading
from genar.data.door import number, read_json
from genar.data.reading import ReadOptions
from genar.errors import SectionWarning

NAME = "hest"
_MPP = "pixel_size_um_estimated"
_POOLED = 4  # bins a side at least; a pixel size is less wrong than that
EXPECTED = "HEST-1k layout (st/<id>.h5ad, wsis/<id>.tif, metadata/<id>.json)"


def sections(root: Path) -> list[str]:
    """Ids of the sections in ``root``; empty where ``root`` is not in this layout."""
    found = (root / "st").glob("*.h5ad") if (root / "st").is_dir() else ()
    return [path.stem for path in found if not path.name.startswith(".")]


def incomplete(root: Path) -> list[str]:
    """Images of ``root`` without counts."""
    held = set(sections(root))
    images = (p for p in (root / "wsis").glob("*") if p.suffix.lower() in reading.SLIDE_SUFFIXES)
    named = sorted(p.stem.removesuffix(".ome") for p in images if not p.name.startswith("."))
    return [f"{name} (no st/{name}.h5ad)" for name in named if name not in held]


def patient(root: Path, section: str) -> str:
    """Who a section is of, by its metadata."""
    return contract.patient_of(_facts(_metadata_of(root, section)).get("patient"))


def stated_mpp(root: Path, section: str) -> float | None:
    """Pixel size (um) by its metadata."""
    path = _metadata_of(root, section)
    return number(path, _MPP, _facts(path).get(_MPP)) or None


def _facts(path: Path) -> dict:
    """The metadata, whose empty cells may be written as NaN; none where there is no file."""
    return read_json(path, "JSON, the sample's row of the HEST table") if path.is_file() else {}


def of_file(path: Path) -> tuple[Path, str] | None:
    """Folder and id of a section's own ``st/<id>.h5ad``."""
    folder = path.absolute().parent  # named from within the folder, too
    return (folder.parent, path.stem) if path.suffix == ".h5ad" and folder.name == "st" else None


def image(root: Path, section: str, options: ReadOptions) -> Path | None:
    """The one that ``--image`` names, or that in ``wsis/``."""
    return reading.named_image(section, options, root / "wsis")


def read(root: Path, section: str, options: ReadOptions) -> anndata.AnnData:
    """Read one section as the contract has it.

    Raises ``InputError`` where the file is not an AnnData, breaks the contract or no pixel size is known.
    """
    adata = reading.read_adata(root / "st" / f"{section}.h5ad")
    reading.refuse_prediction(adata, root / "st" / f"{section}.h5ad")
    reading.keep_one_library(adata, root / "st" / f"{section}.h5ad")
    path = _metadata_of(root, section)
    metadata = _facts(path)
    slide = image(root, section, options)
    pitch_um, diameter_um, stated = (
        number(path, key, metadata.get(key)) for key in ("inter_spot_dist", "spot_diameter", _MPP)
    )
    if not pitch_um and reading.looks_like_visium(adata):
        pitch_um, diameter_um = reading.VISIUM_PITCH_UM, diameter_um or contract.VISIUM_SPOT_UM
    stated = stated or reading.stated_mpp(adata)
    pitch_px = reading.spot_pitch_px(adata) if contract.SPATIAL in adata.obsm else math.nan
    measured_um = pitch_px * (options.mpp or stated or math.nan)
    if pooled := _is_pooled(pitch_um, measured_um):
        told, pitch_um, diameter_um = pitch_um, measured_um, 0.0
        warnings.warn(
            f"section {section}: its metadata say bins {told:g} um apart; in the file they are pooled to spots "
            f"{pitch_um:.4g} um apart, which are used",
            SectionWarning,
            stacklevel=2,
        )
    by_pitch = None if pooled else pitch_um / pitch_px
    mpp, by = reading.pixel_size(section, options, metadata_mpp=stated, pitch_mpp=by_pitch, slide=slide)
    diameter_um = diameter_um or reading.stated_diameter_px(adata) * mpp
    counts_from = reading.keep_raw_counts(adata)
    adata, note = reading.under_tissue(adata)
    return contract.new_section(
        adata,
        section=section,
        slide=slide or "",
        mpp=mpp,
        spot_diameter_um=diameter_um,
        pitch_um=pitch_um,
        source=contract.SIMULATED if metadata.get("simulated") else NAME,
        patient=contract.patient_of(metadata.get("patient")),
        mpp_by=by,
        counts_from=counts_from,
        note=note,
    )


def _is_pooled(pitch_um: float, measured_um: float) -> bool:
    """Whether spots lie so much farther apart than stated that they are pooled of smaller bins, as HEST's Visium HD
    sections are, whose metadata tell of the bins."""
    return 0 < _POOLED * pitch_um < measured_um


def _metadata_of(root: Path, section: str) -> Path:
    return root / "metadata" / f"{section}.json"
