"""Metrics: plain functions on arrays [N spots, G genes]. None takes a logarithm for you: :func:`log2p1` does.

A metric per gene is undefined (NaN) where its formula divides by zero, as with one spot or a constant gene; how many
genes that concerns is always reported beside the summary. Every function of a prediction and a truth raises
``InputError`` where the two differ in shape, hold no spot, or hold NaN or infinite values. Definitions follow the paper
(section 4.1) where it has them.
"""

from collections.abc import Callable

import numpy as np
from scipy.stats import rankdata

from genar.errors import InputError

PCC_TOPS = (10, 50)
N_LISTED = 50


def pair(predicted: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [N, G]; ``InputError`` unless they have one shape, a spot at least, and finite values.

    >>> pair(np.zeros((2, 3)), np.zeros((2, 1)))
    Traceback (most recent call last):
    genar.errors.InputError: prediction and truth must have one shape [spots, genes], found (2, 3) and (2, 1)
    """
    x, y = (np.asarray(values, dtype=np.float64) for values in (predicted, truth))
    if x.shape != y.shape or x.ndim != 2:
        raise InputError(f"prediction and truth must have one shape [spots, genes], found {x.shape} and {y.shape}")
    if not x.size:
        raise InputError(f"expected at least one spot and one gene to score, found {x.shape[0]} and {x.shape[1]}")
    for values, whose in ((x, "prediction"), (y, "truth")):
        if not np.isfinite(values).all():
            at = np.argwhere(~np.isfinite(values))[0]
            raise InputError(f"the {whose} holds NaN or infinite values (first: spot {at[0]}, gene {at[1]})")
    return x, y


def log2p1(counts: np.ndarray) -> np.ndarray:
    """log2(1 + count), the space in which the paper scores.

    >>> log2p1(np.array([0, 1, 7]))
    array([0., 1., 3.])
    """
    return np.log2(1 + np.asarray(counts, dtype=np.float64))


def pcc(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Pearson correlation of each gene over the spots: [N, G], [N, G] -> [G]; NaN where either is constant.

    >>> pcc(np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]), np.array([[2.0, 1.0], [4.0, 2.0], [6.0, 0.0]]))
    array([ 1., nan])
    """
    x, y = pair(predicted, truth)
    defined = (np.ptp(x, axis=0) > 0) & (np.ptp(y, axis=0) > 0)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    norm = np.sqrt((x * x).sum(axis=0) * (y * y).sum(axis=0))
    return np.where(defined & (norm > 0), (x * y).sum(axis=0) / np.where(norm > 0, norm, 1), np.nan)


def spearman(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Spearman rank correlation of each gene, ties sharing their mean rank: [N, G], [N, G] -> [G]; NaN as in
    :func:`pcc`.

    >>> spearman(np.array([[1.0], [10.0], [100.0]]), np.array([[1.0], [2.0], [3.0]]))
    array([1.])
    """
    x, y = pair(predicted, truth)
    return pcc(rankdata(x, axis=0), rankdata(y, axis=0))


def mse(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean squared error of each gene over the spots: [N, G], [N, G] -> [G].

    >>> mse(np.array([[1.0], [3.0]]), np.array([[1.0], [1.0]]))
    array([2.])
    """
    x, y = pair(predicted, truth)
    return np.square(x - y).mean(axis=0)


def mae(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean absolute error of each gene over the spots: [N, G], [N, G] -> [G].

    >>> mae(np.array([[1.0], [3.0]]), np.array([[1.0], [1.0]]))
    array([1.])
    """
    x, y = pair(predicted, truth)
    return np.abs(x - y).mean(axis=0)


def rvd(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Relative variance difference of each gene, (var_pred - var_true)^2 / var_true^2: [N, G], [N, G] -> [G].

    NaN where the truth is constant.

    >>> rvd(np.array([[0.0], [2.0]]), np.array([[0.0], [4.0]]))
    array([0.5625])
    """
    x, y = pair(predicted, truth)
    var_predicted, var_truth = x.var(axis=0), y.var(axis=0)
    constant = np.ptp(y, axis=0) == 0  # the variance of equal numbers need not be exactly 0
    return np.where(constant, np.nan, np.square((var_predicted - var_truth) / np.where(constant, 1, var_truth)))


def top_mean(values: np.ndarray, n: int) -> float:
    """Mean of the ``n`` highest defined values; NaN where none is defined (PCC-10 and PCC-50 of the paper).

    >>> top_mean(np.array([0.1, np.nan, 0.5, 0.3]), 2)
    0.4
    """
    defined = np.sort(values[~np.isnan(values)])[::-1]
    return float(defined[:n].mean()) if len(defined) else float("nan")


def fixed_mean(values: np.ndarray) -> float:
    """Mean over the whole panel, an undefined gene counting 0: it cannot gain by giving up on genes.

    >>> fixed_mean(np.array([0.5, np.nan]))
    0.25
    """
    return float(np.nan_to_num(values, nan=0.0).mean())


def zero_recovery(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 of "this count is zero" over all spots and genes; counts [N, G].

    Without a predicted (true) zero, precision (recall) is NaN and F1 is 0; with neither, all are NaN.

    >>> zero_recovery(np.array([[0, 0, 3, 1]]), np.array([[0, 2, 0, 1]]))
    {'zero_precision': 0.5, 'zero_recall': 0.5, 'zero_f1': 0.5}
    """
    said, is_zero = (counts == 0 for counts in pair(predicted, truth))
    both, n_said, n_true = int((said & is_zero).sum()), int(said.sum()), int(is_zero.sum())
    return {
        "zero_precision": both / n_said if n_said else float("nan"),
        "zero_recall": both / n_true if n_true else float("nan"),
        "zero_f1": 2 * both / (n_said + n_true) if n_said + n_true else float("nan"),
    }


def depth_correlation(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Pearson and Spearman correlation of the panel total of a spot; counts [N, G]. NaN where a total is constant.

    >>> depth_correlation(np.array([[1, 1], [2, 2], [3, 4]]), np.array([[2, 2], [3, 3], [9, 9]]))["depth_spearman"]
    1.0
    """
    x, y = (counts.sum(axis=1, keepdims=True) for counts in pair(predicted, truth))
    return {"depth_pcc": float(pcc(x, y)[0]), "depth_spearman": float(spearman(x, y)[0])}


def by_expression(per_gene: np.ndarray, mean_count: np.ndarray, name: str = "pcc") -> dict[str, float]:
    """Mean defined value of genes by their mean true count: below 10, 10 to 100, above 100; NaN for an empty class.

    >>> by_expression(np.array([0.2, 0.4, 0.6]), np.array([1.0, 5.0, 50.0]))
    {'pcc_mean_below_10': 0.3, 'pcc_mean_10_to_100': 0.6, 'pcc_mean_above_100': nan}
    """
    classes = {
        "mean_below_10": mean_count < 10,
        "mean_10_to_100": (mean_count >= 10) & (mean_count <= 100),
        "mean_above_100": mean_count > 100,
    }
    return {f"{name}_{at}": round(top_mean(per_gene[inside], inside.sum()), 12) for at, inside in classes.items()}


def coverage(low: np.ndarray, high: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Share of each gene's true counts inside [low, high], ends included: [N, G] each -> [G].

    >>> coverage(np.array([[0], [1]]), np.array([[2], [3]]), np.array([[2], [4]]))
    array([0.5])
    """
    truth = np.asarray(truth)
    return ((np.asarray(low) <= truth) & (truth <= np.asarray(high))).mean(axis=0)


def listed_mean(values: np.ndarray, by: np.ndarray, n: int = N_LISTED) -> float:
    """Mean over the ``n`` genes of highest ``by`` (all of a smaller panel), an undefined gene counting 0; both [G].

    With ``by`` of the training sections (mean or variance of a gene's counts) the list is fixed before any result:
    unlike :func:`top_mean` it cannot choose the genes that went well. Ties go to the gene that comes first.

    >>> listed_mean(np.array([0.9, 0.5, np.nan, 0.1]), by=np.array([1.0, 7.0, 9.0, 2.0]), n=2)
    0.25
    """
    return fixed_mean(values[np.argsort(-np.asarray(by, dtype=np.float64), kind="stable")[:n]])


PER_GENE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "pcc": pcc,
    "spearman": spearman,
    "mse": mse,
    "mae": mae,
    "rvd": rvd,
}
"""Metrics of one gene, in log2(1 + count) space."""


def score_genes(predicted_log2: np.ndarray, truth_counts: np.ndarray) -> dict[str, np.ndarray]:
    """Every per-gene metric: prediction in log2(1 + count) space, true counts, both [N, G] -> arrays [G]."""
    truth = log2p1(truth_counts)
    scores = {name: metric(predicted_log2, truth) for name, metric in PER_GENE.items()}
    return {**scores, "mean_count": np.asarray(truth_counts, dtype=np.float64).mean(axis=0)}


def summarise(
    per_gene: dict[str, np.ndarray], predicted_counts: np.ndarray, truth_counts: np.ndarray
) -> dict[str, float]:
    """One number a metric. ``pcc_10``, ``pcc_50``, ``pcc_200``: mean over the 10, 50, all defined genes of highest
    PCC."""
    values = per_gene["pcc"]
    summary: dict[str, float] = {f"pcc_{n}": top_mean(values, n) for n in PCC_TOPS}
    summary |= {
        "pcc_200": top_mean(values, len(values)),
        "pcc_fixed": fixed_mean(values),
        "spearman_fixed": fixed_mean(per_gene["spearman"]),
        "mse": float(per_gene["mse"].mean()),
        "mae": float(per_gene["mae"].mean()),
        "rvd": top_mean(per_gene["rvd"], len(values)),
        "n_undefined": int(np.isnan(values).sum()),
        "n_genes": len(values),
        "n_spots": len(truth_counts),
        "count_mse": float(mse(predicted_counts, truth_counts).mean()),
        "count_mae": float(mae(predicted_counts, truth_counts).mean()),
    }
    summary |= zero_recovery(np.rint(predicted_counts), truth_counts)
    summary |= depth_correlation(predicted_counts, truth_counts)
    return summary | by_expression(values, per_gene["mean_count"])
