"""What metrics of single genes cannot see: whether genes go together, and lie in space, as they do in the truth."""

import numpy as np
from scipy import sparse
from scipy.spatial import KDTree

from genar.errors import InputError
from genar.evaluation.metrics import pair, pcc

REACH = 1.3
"""Neighbours lie within this many spot distances: the 4 of a square grid or the 6 of a hexagonal one, not the next
ring (1.41 and 1.73)."""


def gene_correlations(values: np.ndarray) -> np.ndarray:
    """Pearson correlation of every two genes over the spots: [N, G] -> [G, G]; NaN for a gene that is constant.

    >>> gene_correlations(np.array([[0.0, 1.0], [1.0, 3.0], [2.0, 5.0]])).round(6)
    array([[1., 1.],
           [1., 1.]])
    """
    x, _ = pair(values, values)
    constant = np.ptp(x, axis=0) == 0
    x = x - x.mean(axis=0)
    x = x / np.where(constant, np.nan, np.sqrt((x * x).sum(axis=0)))
    return x.T @ x


def gene_gene_pcc(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Pearson correlation of the upper triangles of the two gene-gene correlation matrices; [N, G] each.

    Genes that are constant in either are left out; NaN where fewer than three remain, or all pairs of one are
    alike.

    >>> truth = np.random.default_rng(0).normal(size=(20, 5))
    >>> round(gene_gene_pcc(3 * truth + 1, truth), 6)
    1.0
    """
    x, y = pair(predicted, truth)
    varying = (np.ptp(x, axis=0) > 0) & (np.ptp(y, axis=0) > 0)
    if varying.sum() < 3:
        return float("nan")
    above = np.triu_indices(int(varying.sum()), 1)
    # rounded, as with two spots all are 1 or -1 but for the last digits
    found, expected = (gene_correlations(values[:, varying])[above][:, None].round(12) for values in (x, y))
    return float(pcc(found, expected)[0])


def neighbours(coords: np.ndarray, reach: float = REACH) -> sparse.csr_matrix:
    """Symmetric 0-1 graph [N, N] of the spots that are next to each other: at most ``reach`` times the median distance
    of a spot to its nearest apart; ``coords`` [N, 2] in any unit.

    Chosen by distance and not by rank: on a grid the k nearest would depend on the order of the spots. A spot may have
    no neighbour.

    >>> neighbours(np.array([[0, 0], [0, 1], [1, 0], [9, 9]])).sum(axis=1).ravel().tolist()
    [[2.0, 1.0, 1.0, 0.0]]
    """
    coords = np.asarray(coords, dtype=np.float64)
    if coords.ndim != 2 or coords.shape[1] != 2 or not np.isfinite(coords).all():
        raise InputError(f"expected finite coordinates [spots, 2], found shape {coords.shape}")
    n = len(coords)
    if n < 2:
        return sparse.csr_matrix((n, n))
    tree = KDTree(coords)
    nearest = tree.query(coords, k=2)[0][:, 1]
    pairs = tree.query_pairs(reach * float(np.median(nearest)), output_type="ndarray")
    graph = sparse.coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n, n)).tocsr()
    return sparse.csr_matrix(graph + graph.T)


def morans_i(values: np.ndarray, graph: sparse.csr_matrix) -> np.ndarray:
    """Moran's I of each gene, N / sum(w) * sum_ij w_ij z_i z_j / sum_i z_i^2 with z the centred values: [N, G] -> [G].

    ``graph`` [N, N] holds the weights w, not standardised. NaN for a constant gene, and where no spots are neighbours.

    >>> line = neighbours(np.array([[0, 0], [1, 0], [2, 0], [3, 0]]))
    >>> morans_i(np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), line).round(4)
    array([ 0.3333, -1.    ])
    """
    x, _ = pair(values, values)
    if graph.shape != (len(x), len(x)):
        raise InputError(f"the graph of {len(x)} spots must have shape {(len(x), len(x))}, found {graph.shape}")
    defined = (np.ptp(x, axis=0) > 0) & (graph.sum() > 0)
    z = x - x.mean(axis=0)
    squares = np.where(defined, (z * z).sum(axis=0), 1)
    scale = len(x) / max(float(graph.sum()), np.finfo(float).tiny)
    return np.where(defined, scale * (z * (graph @ z)).sum(axis=0) / squares, np.nan)


def structure(
    predicted: np.ndarray, truth: np.ndarray, coords: np.ndarray | None = None
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """``gene_gene_pcc``, and with ``coords`` [N, 2] ``moran_pcc``, the correlation over genes of Moran's I; [N, G] each
    in one space -> metric -> value, and ``moran_predicted``, ``moran_truth`` of genes [G].

    ``moran_mae`` is the mean absolute difference of Moran's I: a prediction that is too smooth keeps the order of
    genes, not the values. All leave out genes undefined in either, and are NaN where fewer than two remain
    (``moran_mae``: none).
    """
    summary = {"gene_gene_pcc": gene_gene_pcc(predicted, truth)}
    if coords is None:
        return summary, {}
    graph = neighbours(coords)
    found, expected = morans_i(predicted, graph), morans_i(truth, graph)
    both = ~np.isnan(found) & ~np.isnan(expected)
    summary |= {"moran_pcc": float("nan"), "moran_mae": float("nan")}
    if both.any():
        summary["moran_pcc"] = float(pcc(found[both][:, None], expected[both][:, None])[0])
        summary["moran_mae"] = float(np.abs(found - expected)[both].mean())
    return summary, {"moran_predicted": found, "moran_truth": expected}
