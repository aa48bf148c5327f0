"""Read stored features, as a model sees them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from anndata import AnnData
from scipy.spatial import KDTree

from genar.data import contract
from genar.data.door import check_zarr, door
from genar.errors import InputError
from genar.features.recipe import Inputs


def read_features(path: Path, section: AnnData) -> np.ndarray:
    """Features float32 [N, views, F] of the section's spots, in their order.

    Raises ``InputError`` where the store is damaged or its rows are not the section's spots.
    """
    import zarr

    with door(path, "feature store", "delete it and embed again"):
        check_zarr(path, "delete it and embed again")
        group = zarr.open_group(path, mode="r")
        barcodes = [str(name) for name in group["barcode"][:]]  # pyright: ignore
        features = np.asarray(group["features"][:], dtype=np.float32)  # pyright: ignore
        if features.ndim != 3 or len(features) != len(barcodes):
            raise InputError(f"{path}: features of shape {features.shape}; delete it and embed again")
    if barcodes != list(section.obs_names):
        raise InputError(
            f"{path}: its {len(barcodes)} rows are not the {section.n_obs} spots of section {contract.name(section)}; "
            "delete the store and embed again"
        )
    if not np.isfinite(features).all():
        raise InputError(f"{path}: holds NaN or infinite features; delete it and embed again")
    return features


def read_inputs(paths: Sequence[Path], section: AnnData, inputs: Inputs) -> np.ndarray:
    """Features float32 [N, views, blocks F]: each patch width's, then the neighbours' means of the first width.

    The neighbours' mean is taken view by view. A section of fewer spots takes those there are; a lone spot itself.
    """
    parts = [read_features(path, section) for path in paths]
    if inputs.context_spots:
        coords, own = contract.coords_um(section), parts[0]
        n_most = min(max(inputs.context_spots), len(coords) - 1)
        nearest = KDTree(coords).query(coords, k=n_most + 1)[1].reshape(len(coords), -1)
        others = _without_self(nearest)
        for n in inputs.context_spots:
            among = others[:, : min(n, n_most)] if n_most else np.arange(len(coords))[:, None]
            parts.append(own[among].mean(axis=1))
    return np.concatenate(parts, axis=2)


def _without_self(nearest: np.ndarray) -> np.ndarray:
    """Neighbours [N, n] of [N, n + 1]; the spot itself need not come first where two lie at one place."""
    others = np.empty((len(nearest), nearest.shape[1] - 1), dtype=int)
    for spot, row in enumerate(nearest):
        others[spot] = row[row != spot][: nearest.shape[1] - 1]
    return others
