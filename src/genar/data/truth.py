"""The measured section of a prediction, read as the predicted one was."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from anndata import AnnData

from genar.data import contract
from genar.data.formats import find_section, options_for, used_by


def read_truth(path: str | Path, predicted: AnnData, **options) -> AnnData:
    """The section at ``path``, with the pixel size (um per px) and the bins (um) of the prediction where ``options``,
    fields of ``ReadOptions``, name no others.

    Where its spots do not lie at the prediction's px, it may be in px of another image: then its own pixel size is
    taken, if it has one. Raises ``InputError`` as ``read_section`` does.
    """
    ref, told = find_section(path), predicted.uns.get(contract.GENAR, {})
    if told.get(contract.SOURCE) == "visium_hd" and told.get(contract.PITCH_UM):
        options = {**used_by([ref], {"bin_um": float(told[contract.PITCH_UM])}), **options}
    how = options_for([ref], **options)
    if how.mpp is not None or not told.get(contract.MPP):
        return ref.read(how)
    section = ref.read(replace(how, mpp=float(told[contract.MPP])))
    if section.uns[contract.GENAR][contract.MPP_BY] and not _at_the_same_px(predicted, section):
        return ref.read(how)
    return section


def _at_the_same_px(predicted: AnnData, section: AnnData) -> bool:
    """Whether spots of one name lie within a spot of each other."""
    at = section.obs_names.get_indexer(predicted.obs_names)
    if contract.SPATIAL not in predicted.obsm or not (at >= 0).any():
        return False
    apart = contract.coords_px(predicted)[at >= 0] - contract.coords_px(section)[at[at >= 0]]
    return bool((np.linalg.norm(apart, axis=1) <= contract.spot_diameter_px(section)).all())
