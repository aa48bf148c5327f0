"""What all formats need of a prediction."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from genar.data import contract
from genar.errors import InputError, first_names

IMAGE_PX = 4000
"""Longest side of the tissue's image in an export."""


def cut(predicted: AnnData, genes: Sequence[str]) -> AnnData:
    """The prediction with ``genes`` alone (all where none is named). Raises ``InputError`` where one, the counts or the
    positions are missing, a name stands twice, or a place or a value is NaN or infinite."""
    genes = [genes] if isinstance(genes, str) else list(dict.fromkeys(genes))
    if not predicted.n_obs:
        raise InputError("the prediction has no spots; expected at least one")
    if missing := [gene for gene in genes if gene not in predicted.var_names]:
        raise InputError(
            f"genes: {len(missing)} of {len(genes)} are not in the prediction ({first_names(missing)}); "
            f"it has {first_names(predicted.var_names)}"
        )
    if contract.GENAR not in predicted.uns or contract.SPATIAL not in predicted.obsm:
        raise InputError("no positions: expected obsm['spatial'] and uns['genar'], as `genar predict` writes them")
    if predicted.X is None:
        raise InputError("no X: expected predicted counts there, as `genar predict` writes them")
    predicted = predicted[:, genes] if genes else predicted
    predicted = predicted.to_memory() if predicted.isbacked else predicted.copy()
    contract.check_prediction(predicted)
    return predicted


def plain_table(predicted: AnnData) -> AnnData:
    """Counts (csr), layers and names, without what other programs cannot write."""
    table = AnnData(
        sparse.csr_matrix(predicted.X, dtype=np.float32),
        obs=pd.DataFrame(index=predicted.obs_names),
        var=pd.DataFrame(predicted.var),
        layers={name: contract.layer(predicted, name).astype(np.float32) for name in contract.layer_names(predicted)},
    )
    table.obsm[contract.SPATIAL] = contract.coords_px(predicted)
    table.uns[contract.GENAR] = predicted.uns[contract.GENAR]
    return table


def missing(package: str, extra: str) -> InputError:
    """The error that says which extra to install."""
    return InputError(f"this format needs {package}; install it with: pip install 'genar[{extra}]'")
