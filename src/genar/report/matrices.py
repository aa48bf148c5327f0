"""Matrices of a page: [spots, genes], gene by gene, in as few bytes as the eye needs."""

import base64
import zlib

import numpy as np


def pack(values: np.ndarray) -> dict:
    """A matrix [N, G] of whole or other numbers >= 0 as JSON: whole ones as they are, others to 1/65535 of a gene's
    largest value.

    ``data`` is base64 of the deflated little-endian integers [G, N] of ``type`` (``uint16`` or ``uint32``); a value is
    the integer times the ``step`` of its gene.

    >>> pack(np.array([[1.0], [3.0]]))["step"]
    [1.0]
    """
    columns = np.nan_to_num(np.asarray(values, dtype=np.float64).T)
    if (columns == np.rint(columns)).all():
        kind, step = "uint16" if columns.max(initial=0) < 1 << 16 else "uint32", np.ones(len(columns))
    else:
        kind, step = "uint16", np.maximum(columns.max(axis=1, initial=0), 1e-9) / 65535
    whole = np.rint(columns / step[:, None]).astype(np.dtype(kind).newbyteorder("<"))
    data = base64.b64encode(zlib.compress(whole.tobytes(), 9)).decode()
    return {"type": kind, "step": [float(f"{value:.6g}") for value in step], "data": data}
