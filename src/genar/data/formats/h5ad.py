"""Any AnnData file with raw counts (X, or layer ``counts``) and spot centres in ``obsm["spatial"]``, (x, y) in
full-resolution px.

The pixel size comes from what GenAR itself wrote (``uns["genar"]``) or ``microns_per_pixel`` of the scalefactors, then
from the pitch where the array positions are Visium's, then from the image. The image is ``--image``, the one that
``uns`` names if it is still there, or ``<id>.tif`` (``.svs``, ``.jpg``, …) beside the file.
"""

import math
from pathlib import Path

from anndata import AnnData

from genar.data import contract, reading
from genar.data.reading import ReadOptions

NAME = "h5ad"
EXPECTED = "AnnData files (*.h5ad with raw counts and obsm['spatial'])"


def sections(root: Path) -> list[str]:
    """Ids of the ``.h5ad`` files in ``root``."""
    return [path.stem for path in root.glob("*.h5ad") if not path.name.startswith(".")]


def is_prediction(root: Path, section: str) -> bool:
    """Whether the file holds a prediction of GenAR's; by its head alone."""
    import h5py

    try:
        with h5py.File(root / f"{section}.h5ad") as file:
            return f"uns/{contract.GENAR}/{contract.PREDICTION}" in file
    except OSError:  # none of HDF5; who reads it says so
        return False


def of_file(path: Path) -> tuple[Path, str] | None:
    """Folder and id of a file."""
    return (path.parent, path.stem) if path.suffix == ".h5ad" else None


def read(root: Path, section: str, options: ReadOptions) -> AnnData:
    """Read one file as the contract has it."""
    adata = reading.read_adata(root / f"{section}.h5ad")
    reading.refuse_prediction(adata, root / f"{section}.h5ad")
    reading.keep_one_library(adata, root / f"{section}.h5ad")
    image = (
        reading.named_image(section, options)
        or _named_inside(adata, root)
        or reading.named_image(section, options, root)
    )
    return as_section(adata, section, options, image, NAME)


def as_section(adata: AnnData, section: str, options: ReadOptions, image: Path | None, source: str) -> AnnData:
    """An AnnData with counts and ``obsm["spatial"]`` as the contract has it."""
    counts_from, told = reading.keep_raw_counts(adata), adata.uns.get(contract.GENAR, {})
    diameter_um, pitch_um = (float(told.get(key) or 0) for key in (contract.SPOT_DIAMETER_UM, contract.PITCH_UM))
    if not pitch_um and reading.looks_like_visium(adata):
        diameter_um, pitch_um = contract.VISIUM_SPOT_UM, reading.VISIUM_PITCH_UM
    stated = told.get(contract.MPP) or reading.stated_mpp(adata)
    pitch_px = reading.spot_pitch_px(adata) if contract.SPATIAL in adata.obsm else math.nan
    pitch = pitch_um / pitch_px if pitch_um else 0
    mpp, by = reading.pixel_size(section, options, metadata_mpp=stated, pitch_mpp=pitch, slide=image)
    if not pitch_um and math.isfinite(pitch_px):  # nobody says it
        pitch_um = pitch_px * mpp
    adata, note = reading.under_tissue(adata)
    return contract.new_section(
        adata,
        section=section,
        slide=image or "",
        mpp=mpp,
        spot_diameter_um=diameter_um or reading.stated_diameter_px(adata) * mpp,
        pitch_um=pitch_um,
        source=source,
        patient=contract.patient_of(told.get(contract.PATIENT)),
        mpp_by=by,
        counts_from=counts_from,
        note=note,
    )


def _named_inside(adata: AnnData, root: Path) -> Path | None:
    """The image that a file in ``root`` names, where it is still there: GenAR's own slot, or scanpy's source image."""
    named = [adata.uns.get(contract.GENAR, {}).get(contract.SLIDE)]
    named += [library.get("metadata", {}).get("source_image_path") for library in contract.libraries(adata)]
    paths = [root / str(name) for name in named if name]  # never by the folder that a command is started from
    return next((path for path in paths if path.is_file()), None)
