"""What metrics of single genes cannot see: whether genes go together, and lie in space, as they do in the truth."""

from collections.abc import Iterator

import numpy as np
from scipy import sparse
from scipy.spatial import KDTree

from genar.errors import InputError
from genar.evaluation.metrics import pair, pcc

REACH = 1.3
"""Neighbours lie within this many spot distances: the 4 of a square grid or the 6 of a hexagonal one, not the next
ring (1.41 and 1.73)."""
_GENES_AT_ONCE = 512  # of the rows of a matrix of genes by genes


def gene_gene_pcc(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Pearson correlation of the upper triangles of the two gene-gene correlation matrices; [N, G] each.

    Genes that are constant in either are left out; NaN where fewer than three remain, or all pairs of one are
    alike. The matrices are made a block of genes at a time: memory grows with the genes, not with their square.

    >>> truth = np.random.default_rng(0).normal(size=(20, 5))
    >>> round(gene_gene_pcc(3 * truth + 1, truth), 6)
    1.0
    """
    both = pair(predicted, truth)
    varying = np.logical_and(*(np.ptp(values, axis=0) > 0 for values in both))
    n_genes = int(varying.sum())
    if n_genes < 3:
        return float("nan")
    unit = [_of_length_one(values[:, varying]) for values in both]
    found = np.array([(b.sum(axis=1), b.min(axis=1), b.max(axis=1)) for b in _correlations(unit)])  # [blocks, 3, 2]
    if (found[:, 1].min(axis=0) == found[:, 2].max(axis=0)).any():
        return float("nan")
    mean = found[:, 0].sum(axis=0) / (n_genes * (n_genes - 1) / 2)
    products = np.zeros((2, 2))
    for block in _correlations(unit):
        centred = block - mean[:, None]
        products += centred @ centred.T
    return float(products[0, 1] / np.sqrt(products[0, 0] * products[1, 1]))


def _of_length_one(values: np.ndarray) -> np.ndarray:
    """The columns of [N, G], centred and of length one: their products are correlations."""
    x = values - values.mean(axis=0)
    return x / np.sqrt((x * x).sum(axis=0))


def _correlations(unit: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The correlations of every two genes in the prediction and in the truth, [2, n], block after block."""
    n_genes = unit[0].shape[1]
    for start in range(0, n_genes - 1, _GENES_AT_ONCE):
        rows = np.arange(start, min(start + _GENES_AT_ONCE, n_genes))
        above = np.arange(n_genes) > rows[:, None]
        # rounded, as with two spots all are 1 or -1 but for the last digits
        yield np.stack([(x[:, rows].T @ x)[above].round(12) for x in unit])


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
