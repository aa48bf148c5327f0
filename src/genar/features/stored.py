"""Read stored features, as a model sees them: all of a section, or the rows that are asked for."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from anndata import AnnData

from genar.data import contract
from genar.data.door import check_zarr, door
from genar.data.neighbours import nearest_spots
from genar.errors import InputError
from genar.features.recipe import Inputs

_BLOCK = 4096  # spots that are looked through at a time
_KIND, _REMEDY = "feature store", "delete it and embed again"


def read_features(path: str | Path, section: AnnData) -> np.ndarray:
    """Features float32 [N, views, F] of the section's spots, in their order.

    Raises ``InputError`` where the store is damaged or its rows are not the section's spots.

    >>> section, encoder = genar.read_section("tissue:SIM1"), genar.load_encoder()
    >>> store = genar.embed(section, encoder, genar.recipe_of(encoder, views=1), "features")
    >>> genar.read_features(store, section).dtype
    dtype('float32')
    """
    return _Store(Path(path), section).read(slice(None))


def read_inputs(paths: Sequence[Path], section: AnnData, inputs: Inputs) -> np.ndarray:
    """Features float32 [N, views, blocks F]: each patch width's, then the neighbours' means of the last width.

    The neighbours' mean is taken view by view. A section of fewer spots takes those there are; a lone spot itself.
    Raises ``InputError`` where a store is damaged or of other spots.
    """
    return StoredInputs(paths, section, inputs)[:]


class StoredInputs:
    """What :func:`read_inputs` reads, left on disk: ``stored[a:b]`` and ``stored[rows]`` are float32 [n, views, blocks
    F] of those spots alone, in memory and time of as many.

    Raises ``InputError`` as :func:`read_features` does: where the rows are not the section's spots when it is made,
    where values are damaged when they are read.
    """

    def __init__(self, paths: Sequence[Path], section: AnnData, inputs: Inputs):
        self._stores = [_Store(path, section) for path in paths]
        self._context = inputs.context_spots
        self._near = nearest_spots(contract.coords_um(section), max(inputs.context_spots)) if self._context else None
        n_spots, views, width = self._stores[0].shape
        self.shape = (n_spots, views, width * inputs.n_blocks)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        parts = [store.read(rows) for store in self._stores]
        for n in self._context:
            assert self._near is not None
            among = self._near[rows, :n]
            near, place = np.unique(among, return_inverse=True)
            values, place = self._stores[-1].read(near), place.reshape(among.shape)
            total = values[place[:, 0]]
            for one in place.T[1:]:  # one neighbour of all at a time: together they would take n times the memory
                total += values[one]
            parts.append(total / len(place.T))
        return np.concatenate(parts, axis=2)

    def check(self) -> None:
        """Read every value once; ``InputError`` where one is damaged."""
        for store in self._stores:
            for first in range(0, len(self), _BLOCK):
                store.read(slice(first, first + _BLOCK))


class _Store:
    """One store, opened."""

    def __init__(self, path: Path, section: AnnData):
        import zarr

        self._path = path
        with door(path, _KIND, _REMEDY):
            check_zarr(path, _REMEDY)
            group = zarr.open_group(path, mode="r")
            barcodes = [str(name) for name in group["barcode"][:]]  # pyright: ignore
            self._values = group["features"]
            self.shape: tuple[int, int, int] = self._values.shape  # pyright: ignore
            if len(self.shape) != 3 or self.shape[0] != len(barcodes):
                raise InputError(f"{path}: features of shape {self.shape}; {_REMEDY}")
        if barcodes != list(section.obs_names):
            raise InputError(
                f"{path}: its {len(barcodes)} rows are not the {section.n_obs} spots of section "
                f"{contract.name(section)}; {_REMEDY}"
            )

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        """Features float32 [n, views, F] of a range of rows, or of rising ``rows``."""
        if not isinstance(rows, slice) and len(rows) and rows[-1] - rows[0] == len(rows) - 1:
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
        with door(self._path, _KIND, _REMEDY):
            values = self._values[rows] if isinstance(rows, slice) else self._values.oindex[rows]  # pyright: ignore
            features = np.asarray(values, dtype=np.float32)
        if not np.isfinite(features).all():
            raise InputError(f"{self._path}: holds NaN or infinite features; {_REMEDY}")
        return features
