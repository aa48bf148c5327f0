"""Any AnnData file with raw counts (X, or layer ``counts``) and spot centres in ``obsm["spatial"]``, (x, y) in
full-resolution px.

The pixel size comes from what GenAR itself wrote (``uns["genar"]``) or ``microns_per_pixel`` of the scalefactors, then
from the pitch where the array positions are Visium's, then from the image. The image is ``--image``, the one that
``uns`` names if it is still there, or ``<id>.tif`` (``.svs``, ``.jpg``, …) beside the file.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from genar.data import contract, reading
from genar.data.reading import ReadOptions
from genar.errors import InputError

NAME = "h5ad"
_FEW = 10
EXPECTED = "AnnData files (*.h5ad with raw counts and obsm['spatial'])"


def sections(root: Path) -> list[str]:
    """Ids of the ``.h5ad`` files in ``root``."""
    return [path.stem for path in root.glob("*.h5ad") if not path.name.startswith(".")]


def of_file(path: Path) -> tuple[Path, str] | None:
    """Folder and id of a file."""
    return (path.parent, path.stem) if path.suffix == ".h5ad" else None


def read(root: Path, section: str, options: ReadOptions) -> AnnData:
    """Read one file as the contract has it."""
    adata = reading.read_adata(root / f"{section}.h5ad")
    reading.refuse_prediction(adata, root / f"{section}.h5ad")
    _keep_one_library(adata, root / f"{section}.h5ad")
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
    pitch = pitch_um / reading.spot_pitch_px(adata) if contract.SPATIAL in adata.obsm else 0
    adata, note = reading.under_tissue(adata)
    mpp, by = reading.pixel_size(section, options, metadata_mpp=stated, pitch_mpp=pitch, slide=image)
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


def _keep_one_library(adata: AnnData, path: Path) -> None:
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


def _share_places(adata: AnnData) -> bool:
    """Whether more than half of the spots lie where another lies, as those of concatenated sections may."""
    if contract.SPATIAL not in adata.obsm or adata.n_obs < _FEW:
        return False
    places = pd.DataFrame(np.asarray(adata.obsm[contract.SPATIAL]))
    return bool(places.duplicated(keep=False).mean() > 0.5 and places.drop_duplicates().shape[0] > 1)


def _named_inside(adata: AnnData, root: Path) -> Path | None:
    """The image that a file in ``root`` names, where it is still there: GenAR's own slot, or scanpy's source image."""
    named = [adata.uns.get(contract.GENAR, {}).get(contract.SLIDE)]
    named += [library.get("metadata", {}).get("source_image_path") for library in contract.libraries(adata)]
    paths = [root / str(name) for name in named if name]  # never by the folder that a command is started from
    return next((path for path in paths if path.is_file()), None)
