"""Whether a predicted distribution of counts is as wide as it says: intervals, CRPS, likelihood, probability of zero.

All are in counts, and lower is better for CRPS, negative log likelihood and Brier score. What a prediction holds of its
distribution decides what can be said: quantiles (layers ``q05`` … ``q95``), mean and standard deviation, the
probability of zero, or, within a program, the whole probability mass function.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import gammaln, xlogy

from genar.errors import InputError
from genar.evaluation.metrics import by_expression, coverage, pair

INTERVALS = {90: ("q05", "q95"), 50: ("q25", "q75")}
"""Nominal share in % -> layers with the ends of the interval."""
CRPS_LAYERS = ("q05", "q25", "q50", "q75", "q95")
LEAST_MEAN = 1e-3
"""A predicted mean below this (counts) is raised to it in likelihoods: nothing is impossible."""


def interval_scores(low: np.ndarray, high: np.ndarray, truth: np.ndarray, nominal: int = 90) -> dict[str, float]:
    """Coverage of intervals of ``nominal`` %, over all and by mean true count, and their mean width in counts; [N, G].

    Counts are whole: the interval of a gene that is mostly zero cannot hold less than its zeros, and covers more.
    Raises ``InputError`` where a lower end lies above its upper end.

    >>> found = interval_scores(np.array([[0], [1]]), np.array([[2], [3]]), np.array([[2], [4]]))
    >>> found["coverage_90"], found["width_90"]
    (0.5, 2.0)
    """
    pair(low, truth)
    low, high = pair(low, high)
    if (low > high).any():
        raise InputError(f"{int((low > high).sum())} of {low.size} intervals of {nominal} % end below their start")
    per_gene, mean_count = coverage(low, high, truth), np.asarray(truth, dtype=np.float64).mean(axis=0)
    levels = by_expression(per_gene, mean_count, name=f"coverage_{nominal}")
    return {f"coverage_{nominal}": float(per_gene.mean()), **levels, f"width_{nominal}": float((high - low).mean())}


def pinball(quantile: np.ndarray, truth: np.ndarray, level: float) -> np.ndarray:
    """Pinball loss of each gene, mean of max(q (y - x), (q - 1) (y - x)) for the quantile x of level q; [N, G] -> [G].

    >>> pinball(np.array([[1.0], [1.0]]), np.array([[3.0], [0.0]]), 0.9)
    array([0.95])
    """
    x, y = pair(quantile, truth)
    return np.maximum(level * (y - x), (level - 1) * (y - x)).mean(axis=0)


def crps_of_quantiles(quantiles: Sequence[np.ndarray], levels: Sequence[float], truth: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of each gene from quantiles [N, G] at rising ``levels`` -> [G], in counts.

    CRPS is twice the integral of the pinball loss over the levels from 0 to 1; here each level stands for what lies
    nearer to it than to another. Compare methods by the same levels alone: a score by five is rougher than by fifty.

    >>> crps_of_quantiles([np.array([[2.0]])], [0.5], np.array([[5.0]]))
    array([3.])
    """
    if not levels or len(quantiles) != len(levels) or (np.diff([0, *levels, 1]) <= 0).any():
        raise InputError(f"expected rising levels in (0, 1), one a quantile, found {list(levels)}")
    middles = np.add(levels[1:], levels[:-1]) / 2
    widths = np.diff([0, *middles, 1])
    return np.sum([2 * w * pinball(x, truth, q) for w, x, q in zip(widths, quantiles, levels, strict=True)], axis=0)


def crps_of_pmf(pmf: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Ranked probability score of each gene, mean over spots of the sum over v of (P(count <= v) - [truth <= v])^2.

    ``pmf`` [N, G, V] over the counts 0 … V - 1, ``truth`` [N, G] -> [G]. A true count beyond V - 1 adds its distance.

    >>> crps_of_pmf(np.array([[[0.5, 0.5]]]), np.array([[0]]))
    array([0.25])
    """
    p, y = _pmf(pmf, truth)
    reached = np.arange(p.shape[2]) >= y[:, :, None]
    score = np.square(p.cumsum(axis=2) - reached).sum(axis=2) + np.maximum(y - p.shape[2], 0)
    return score.mean(axis=0)


def nll_of_pmf(pmf: np.ndarray, truth: np.ndarray, least: float = 1e-12) -> np.ndarray:
    """Negative log likelihood of the true count of each gene, mean over spots, nats; [N, G, V], [N, G] -> [G].

    A probability below ``least``, or of a count beyond V - 1, counts as ``least``.

    >>> nll_of_pmf(np.array([[[0.5, 0.5]]]), np.array([[1]])).round(4)
    array([0.6931])
    """
    p, y = _pmf(pmf, truth)
    at = np.minimum(y, p.shape[2] - 1).astype(np.int64)
    likelihood = np.where(y < p.shape[2], np.take_along_axis(p, at[:, :, None], axis=2)[:, :, 0], 0)
    return -np.log(np.maximum(likelihood, least)).mean(axis=0)


def nll_of_moments(mean: np.ndarray, sd: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Negative log likelihood of the true count under the negative binomial of that mean and standard deviation.

    [N, G] each -> [G], nats, mean over spots. It makes methods comparable that give no more than two moments; where the
    variance is not above the mean it is the Poisson distribution of the mean. A mean below ``LEAST_MEAN`` is raised.

    >>> nll_of_moments(np.array([[2.0]]), np.array([[0.0]]), np.array([[0]]))
    array([2.])
    """
    m, y = pair(mean, truth)
    m = np.maximum(m, LEAST_MEAN)
    excess = np.square(pair(sd, truth)[0]) - m
    broad = excess > 1e-6 * m
    r = np.square(m) / np.where(broad, excess, 1)
    binomial = gammaln(y + r) - gammaln(r) + r * np.log(r / (r + m)) + xlogy(y, m / (r + m))
    poisson = xlogy(y, m) - m
    return (gammaln(y + 1) - np.where(broad, binomial, poisson)).mean(axis=0)


def zero_reliability(p_zero: np.ndarray, truth: np.ndarray, n_bins: int = 10) -> dict[str, np.ndarray]:
    """How often counts are zero by the predicted probability of it: [N, G] each -> arrays [n_bins].

    ``low``, ``high``: ends of the bin; ``n``: spots and genes in it; ``predicted``: mean probability, ``observed``:
    share of true zeros, both NaN in an empty bin. Raises ``InputError`` for probabilities outside [0, 1].

    >>> found = zero_reliability(np.array([[0.1, 0.1, 0.9, 1.0]]), np.array([[3, 0, 0, 0]]), n_bins=2)
    >>> found["n"].tolist(), found["observed"].tolist()
    ([2, 2], [0.5, 1.0])
    """
    p, y = pair(p_zero, truth)
    if (p < 0).any() or (p > 1 + 1e-6).any():
        raise InputError(f"probabilities of zero must lie in [0, 1], found {p.min():g} to {p.max():g}")
    place = np.minimum((p * n_bins).astype(np.int64), n_bins - 1).ravel()
    n = np.bincount(place, minlength=n_bins)
    sums = [np.bincount(place, values.ravel(), minlength=n_bins) for values in (p, (y == 0).astype(np.float64))]
    predicted, observed = (np.where(n > 0, total / np.maximum(n, 1), np.nan) for total in sums)
    ends = np.linspace(0, 1, n_bins + 1)
    return {"low": ends[:-1], "high": ends[1:], "n": n, "predicted": predicted, "observed": observed}


def zero_scores(p_zero: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Brier score of the probability of zero, and its calibration error: ``|predicted - observed|`` of the ten bins of
    :func:`zero_reliability`, weighted by their size; [N, G] each.

    >>> zero_scores(np.array([[0.25, 0.25]]), np.array([[0, 2]]))
    {'zero_brier': 0.3125, 'zero_calibration_error': 0.25}
    """
    bins = zero_reliability(p_zero, truth)
    p, y = pair(p_zero, truth)
    gap = np.abs(np.nan_to_num(bins["predicted"] - bins["observed"], nan=0.0))  # an empty bin weighs nothing
    return {
        "zero_brier": float(np.square(p - (y == 0)).mean()),
        "zero_calibration_error": float((gap * bins["n"]).sum() / bins["n"].sum()),
    }


def calibration(layers: Mapping[str, np.ndarray], truth: np.ndarray) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """All that can be said from the layers at hand ([N, G] each): metric -> value, and metric -> values of genes [G].

    50 % and 90 % intervals from ``q25``, ``q75`` and ``q05``, ``q95``; ``crps`` from the five quantiles
    ``CRPS_LAYERS``; ``nll_moments`` from ``mean`` and ``sd``; the probability of zero from ``p_zero``.
    """
    summary: dict[str, float] = {}
    per_gene: dict[str, np.ndarray] = {}
    for nominal, ends in INTERVALS.items():
        if all(name in layers for name in ends):
            low, high = (layers[name] for name in ends)
            summary |= interval_scores(low, high, truth, nominal)
            per_gene[f"coverage_{nominal}"] = coverage(low, high, truth)
    if all(name in layers for name in CRPS_LAYERS):
        levels = [int(name[1:]) / 100 for name in CRPS_LAYERS]
        per_gene["crps"] = crps_of_quantiles([layers[name] for name in CRPS_LAYERS], levels, truth)
    if "mean" in layers and "sd" in layers:
        per_gene["nll_moments"] = nll_of_moments(layers["mean"], layers["sd"], truth)
    summary |= {name: float(per_gene[name].mean()) for name in ("crps", "nll_moments") if name in per_gene}
    if "p_zero" in layers:
        summary |= zero_scores(layers["p_zero"], truth)
    return summary, per_gene


def _pmf(pmf: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p, y = np.asarray(pmf, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if p.ndim != 3 or p.shape[:2] != y.shape or not p.size:
        raise InputError(f"expected probabilities [spots, genes, counts] of the truth's {y.shape}, found {p.shape}")
    if not (p >= 0).all() or np.abs(p.sum(axis=2) - 1).max() > 1e-4:
        raise InputError("the probabilities of a spot's counts must be >= 0 and sum to one")
    return p, y
