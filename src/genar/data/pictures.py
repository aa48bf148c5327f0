"""The small pictures of a section in ``uns["spatial"]``, over which scanpy and squidpy draw spots.

Both look for an image ``hires``, its scale factor ``tissue_hires_scalef`` (px of the image to a full-resolution px) and
``spot_diameter_fullres`` (full-resolution px); squidpy for no other by itself.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from anndata import AnnData

from genar.data import contract
from genar.data.slide import glance
from genar.errors import InputError, SectionWarning

_LONGEST_PX = 2000  # Space Ranger's own hires of a standard slide; those of large ones are shrunk to it
_THUMBNAIL_PX = 1000
_HIRES = "hires"


def of_space_ranger(spatial: Path, factors: Mapping) -> tuple[dict, str]:
    """scanpy's library {images, scalefactors} of the PNGs ``tissue_hires_image`` and ``tissue_lowres_image`` in
    ``spatial``, uint8 [h, w, 3], and a note of those that are left out because they cannot be read."""
    images, scales, lost = {}, dict(factors), []
    for kind in (_HIRES, "lowres"):
        path, key = spatial / f"tissue_{kind}_image.png", f"tissue_{kind}_scalef"
        if not path.is_file() or not factors.get(key):
            continue
        try:
            seen = glance(path, _LONGEST_PX)
        except InputError as error:
            lost.append(f"a picture is left out: {error}")
            continue
        images[kind] = seen.view
        scales[key] = float(factors[key]) * seen.view.shape[1] / seen.size_px[0]
    return {"images": images, "scalefactors": scales}, "; ".join(lost)


def for_plots(section: AnnData) -> dict:
    """``uns["spatial"]`` with what the plots of scanpy and squidpy look for: the first image goes by the name
    ``hires``, too, where none has it; where there is none at all, a thumbnail of the slide is made, if it can be
    read."""
    spatial = section.uns.get(contract.SPATIAL, {})
    found = {}
    for key, library in (spatial if isinstance(spatial, Mapping) else {}).items():
        if isinstance(library, Mapping):  # CELLxGENE keeps a flag beside them
            found[key] = {**library, "images": dict(library.get("images", {}))}
            found[key]["scalefactors"] = dict(library.get("scalefactors", {}))
    if not any(library["images"] for library in found.values()) and (made := _thumbnail(section)):
        view, scale = made
        library = found.setdefault(next(iter(found), contract.name(section)), {"images": {}, "scalefactors": {}})
        library["images"][_HIRES], library["scalefactors"][f"tissue_{_HIRES}_scalef"] = view, scale
    for library in found.values():
        images, factors = library["images"], library["scalefactors"]
        name = next((name for name in images if f"tissue_{name}_scalef" in factors), None)
        if name is not None and _HIRES not in images:
            images[_HIRES], factors[f"tissue_{_HIRES}_scalef"] = images[name], factors[f"tissue_{name}_scalef"]
        factors.setdefault("spot_diameter_fullres", contract.spot_diameter_px(section))
    return found


def _thumbnail(section: AnnData) -> tuple[np.ndarray, float] | None:
    """A small picture of the section's slide, uint8 [h, w, 3], and its scale; ``None`` without a slide that can be
    read."""
    path = contract.slide_path(section)
    if path is None or not path.is_file():
        return None
    try:
        seen = glance(path, _THUMBNAIL_PX)
    except InputError as error:
        said = f"section {contract.name(section)}: no picture to plot over: {error}"
        warnings.warn(said, SectionWarning, stacklevel=2)
        return None
    return seen.view, seen.view.shape[1] / seen.size_px[0]
