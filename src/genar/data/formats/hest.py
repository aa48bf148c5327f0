"""HEST-1k layout: ``st/<id>.h5ad``, ``wsis/<id>.tif``, ``metadata/<id>.json`` (images and metadata may be missing).

The pixel size is the metadata's ``pixel_size_um_estimated``: TIFFs that the HEST library wrote report a pixel size
ten times too small in their resolution tags.
"""

from pathlib import Path

import anndata

from genar.data import contract, reading
from genar.data.door import number, read_json
from genar.data.reading import ReadOptions

NAME = "hest"
EXPECTED = "HEST-1k layout (st/<id>.h5ad, wsis/<id>.tif, metadata/<id>.json)"


def sections(root: Path) -> list[str]:
    """Ids of the sections in ``root``; empty where ``root`` is not in this layout."""
    found = (root / "st").glob("*.h5ad") if (root / "st").is_dir() else ()
    return [path.stem for path in found if not path.name.startswith(".")]


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
    path = _metadata_of(root, section)
    # the table's empty cells may be written as NaN
    metadata = read_json(path, "JSON, the sample's row of the HEST table") if path.is_file() else {}
    slide = image(root, section, options)
    pitch_um, diameter_um, stated = (
        number(path, key, metadata.get(key)) for key in ("inter_spot_dist", "spot_diameter", "pixel_size_um_estimated")
    )
    if not pitch_um and reading.looks_like_visium(adata):
        pitch_um, diameter_um = reading.VISIUM_PITCH_UM, diameter_um or contract.VISIUM_SPOT_UM
    stated = stated or reading.stated_mpp(adata)
    by_pitch = pitch_um / reading.spot_pitch_px(adata) if contract.SPATIAL in adata.obsm else None
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


def _metadata_of(root: Path, section: str) -> Path:
    return root / "metadata" / f"{section}.json"
