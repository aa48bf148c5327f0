"""The nearest spots of each spot, the same whatever the order in which the spots come."""

import numpy as np
from scipy.spatial import KDTree

_SPARE = 12  # nearest spots looked at beyond those asked for, so that equally far ones are all there
_SPOTS_AT_ONCE = 1 << 16
_DIGITS = 5  # of distances and angles: what differs by less is alike
_TURN = 0.1  # rad: no array's direction lies where angles begin anew


def nearest_spots(coords: np.ndarray, n: int) -> np.ndarray:
    """For each spot of ``coords`` [N, 2] its ``n`` nearest others, int [N, n], nearest first; all others where they are
    fewer, itself where there are none.

    On a grid several spots are equally far: of those pairs that lie opposite each other come first, so that their mean
    lies at the spot. Spots that lie at one place come in their own order.

    >>> corner = nearest_spots(np.array([[0, 0], [1, 0], [0, 2], [9, 9]]), 2)
    >>> corner.tolist()
    [[1, 2], [0, 2], [0, 1], [2, 1]]
    """
    coords = np.asarray(coords, dtype=np.float64)
    n_most = min(n, len(coords) - 1)
    if n_most < 1:
        return np.arange(len(coords))[:, None]
    tree = KDTree(coords)
    unit = float(np.median(tree.query(coords, k=2)[0][:, 1])) or 1.0
    found = np.empty((len(coords), n_most), dtype=int)
    for start in range(0, len(coords), _SPOTS_AT_ONCE):
        rows = np.arange(start, min(start + _SPOTS_AT_ONCE, len(coords)))
        near = tree.query(coords[rows], k=min(n_most + 1 + _SPARE, len(coords)))[1]
        dx, dy = np.moveaxis(coords[near] - coords[rows, None], 2, 0)
        far = np.where(near == rows[:, None], np.inf, np.hypot(dx, dy) / unit).round(_DIGITS)
        angle = (np.arctan2(dy, dx) + _TURN) % (2 * np.pi)
        order = np.lexsort((angle, (angle % np.pi).round(_DIGITS), far))
        found[rows] = np.take_along_axis(near, order, axis=1)[:, :n_most]
    return found
