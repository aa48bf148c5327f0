"""Write an ``.h5ad`` whose matrices memory does not hold, a block of rows after the other."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import h5py
import numpy as np
from anndata import AnnData
from anndata.io import sparse_dataset, write_elem
from scipy import sparse

_CHUNK = 1024  # rows that are compressed together


def write_rows(path: Path, rest: AnnData, blocks: Iterable[tuple[sparse.csr_matrix, Mapping[str, np.ndarray]]]) -> None:
    """Write ``rest``, which has neither X nor layers, and the ``blocks`` of both, csr [n, G] and arrays [n, G], which
    together have its rows. What is read back equals an AnnData that was written whole."""
    rest.write_h5ad(path, compression="gzip")
    first = 0
    with h5py.File(path, "r+") as file:
        for x, layers in blocks:
            last = first + x.shape[0]  # pyright: ignore
            if first:
                sparse_dataset(file["X"]).append(x)  # pyright: ignore
            else:
                file.pop("X", None)
                write_elem(file, "X", x, dataset_kwargs={"compression": "gzip"})
                for name, values in layers.items():
                    _new_array(file, f"layers/{name}", rest.shape, values.dtype)
            for name, values in layers.items():
                file[f"layers/{name}"][first:last] = values  # pyright: ignore
            first = last
    assert first == rest.n_obs


def _new_array(file: h5py.File, name: str, shape: tuple[int, int], dtype) -> None:
    """An empty dataset in anndata's form."""
    chunks = (min(_CHUNK, shape[0]), shape[1])
    array = file.create_dataset(name, shape, dtype, chunks=chunks, compression="gzip")
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
