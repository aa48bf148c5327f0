"""Intervals by bootstrap over the spots and across sections, and paired differences between methods.

A resample is a weight per spot (how often it was drawn), so that the metrics of all resamples are a few matrix
products. Every method of a section sees the same resamples: differences are paired.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from genar.evaluation.metrics import PCC_TOPS, pair, pcc

METRICS = ("pcc_10", "pcc_50", "pcc_200", "pcc_fixed", "mse", "mae", "rvd")
_RESAMPLES_AT_ONCE = 250
_LEAST_SHARE = 1e-12  # of the largest squared deviation of a gene: a variance below is rounding

Interval = tuple[float, float, float]
"""value, low, high"""


def seed_of(section: str) -> int:
    """Seed of a section's resamples, from its id: every method, and every later run, sees the same."""
    return int(hashlib.sha256(section.encode()).hexdigest()[:8], 16)


def resample_weights(n_spots: int, n_resamples: int = 1000, *, seed: int = 0) -> np.ndarray:
    """float32 [1 + R, N]: how often each spot is drawn, over N; a row sums to one. Row 0 is the spots themselves."""
    random = np.random.default_rng(seed)
    drawn = random.multinomial(n_spots, np.full(n_spots, 1 / n_spots), size=n_resamples)
    return np.concatenate([np.ones((1, n_spots)), drawn]).astype(np.float32) / np.float32(n_spots)


def resampled_scores(predicted: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of every resample: prediction and truth [N, G] in log2 space, ``weights`` [R, N] -> ``METRICS`` -> [R].

    ``pcc_200`` leaves out genes that are constant in a resample, ``pcc_fixed`` counts them 0, ``rvd`` leaves out genes
    whose truth is constant in it. The genes of ``pcc_10`` and ``pcc_50`` are those of highest PCC over the spots
    themselves: chosen again in every resample, their mean would rise by the choice alone. Memory: a few arrays [N, G].
    """
    x, y = pair(predicted, truth)
    # correlation does not see the mean: centred values lose no digits in the sums of squares
    centred = [np.where(np.ptp(values, axis=0) > 0, values - values.mean(axis=0), 0) for values in (x, y)]
    least = [_LEAST_SHARE * np.square(values).max(axis=0) for values in centred]
    columns = [*centred, centred[0] ** 2, centred[1] ** 2, centred[0] * centred[1], (x - y) ** 2, np.abs(x - y)]
    ranked = np.argsort(-np.nan_to_num(pcc(x, y), nan=-2.0), kind="stable")
    scores: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}
    for start in range(0, len(weights), _RESAMPLES_AT_ONCE):
        w = weights[start : start + _RESAMPLES_AT_ONCE].astype(np.float64)
        w /= w.sum(axis=1, keepdims=True)  # to the last digit: a variance is a difference of two sums
        mx, my, xx, yy, xy, squared, absolute = (w @ values for values in columns)
        var_x, var_y = xx - mx**2, yy - my**2
        varies = var_y > least[1]
        defined = (var_x > least[0]) & varies
        r = np.where(defined, (xy - mx * my) / np.sqrt(np.where(defined, var_x * var_y, 1)), 0)
        ratio = np.where(varies, np.square((var_x - var_y) / np.where(varies, var_y, 1)), 0)
        for n in PCC_TOPS:
            scores[f"pcc_{n}"].append(_mean_where(r[:, ranked[:n]], defined[:, ranked[:n]]))
        scores["pcc_200"].append(_mean_where(r, defined))
        scores["pcc_fixed"].append(r.mean(axis=1))
        scores["mse"].append(squared.mean(axis=1))
        scores["mae"].append(absolute.mean(axis=1))
        scores["rvd"].append(_mean_where(ratio, varies))
    return {name: np.concatenate(parts) for name, parts in scores.items()}


def _mean_where(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Mean of each row where ``inside``; NaN where that is nowhere. ``values`` are 0 elsewhere."""
    n = inside.sum(axis=1)
    return np.where(n > 0, values.sum(axis=1) / np.maximum(n, 1), np.nan)


def told(found: Mapping[str, Interval], *names: str) -> str:
    """Differences with their intervals, in words; those that are undefined are left out.

    >>> told({"mse": (-0.031, -0.042, -0.02)}, "mse")
    'mse -0.031 (-0.042 to -0.020)'
    """
    known = [name for name in names if not np.isnan(found[name][0])]
    return ", ".join("{} {:+.3f} ({:+.3f} to {:+.3f})".format(name, *found[name]) for name in known)


def interval(resampled: np.ndarray, share: float = 0.95) -> Interval:
    """(value, low, high) of scores [1 + R] whose first is that of the spots themselves; NaN where that, or every
    resample, is undefined.

    >>> interval(np.array([0.5, *np.linspace(0, 1, 101)]), 0.9)
    (0.5, 0.05, 0.95)
    """
    if np.isnan(resampled[0]) or np.isnan(resampled[1:]).all():
        return float("nan"), float("nan"), float("nan")
    low, high = np.nanquantile(resampled[1:], [(1 - share) / 2, (1 + share) / 2])
    return float(resampled[0]), round(float(low), 12), round(float(high), 12)


def intervals_of(resampled: Mapping[str, np.ndarray]) -> dict[str, Interval]:
    """:func:`interval` of every metric of :func:`resampled_scores`."""
    return {name: interval(values) for name, values in resampled.items()}


def paired_differences(ours: Mapping[str, np.ndarray], rival: Mapping[str, np.ndarray]) -> dict[str, Interval]:
    """Ours minus the rival's, of scores of the same resamples of the same spots: metric -> (value, low, high).

    An interval without zero says that the two differ on these spots. ``pcc_10`` and ``pcc_50`` compare each method's
    own genes.
    """
    return intervals_of({name: values - rival[name] for name, values in ours.items()})


def over_sections(sections: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Mean over sections of each metric's resamples [1 + R]; each section's spots were resampled by themselves.

    The interval says what other spots of these very sections would change. A mean is NaN where a section's value is.
    """
    return {name: np.mean([section[name] for section in sections], axis=0) for name in METRICS}


def across_sections(sections: Sequence[Mapping[str, np.ndarray]], *, seed: int = 0) -> dict[str, np.ndarray]:
    """As :func:`over_sections`, the sections drawn with replacement too, each with a resample of its spots.

    The interval says what other sections would change, as far as so few can tell: with less than five it is too
    narrow. Differences are paired as there: give the differences of two methods.
    """
    n, n_scores = len(sections), len(sections[0][METRICS[0]])
    random = np.random.default_rng(seed)
    drawn = random.integers(0, n, size=(n_scores - 1, n))
    which = random.integers(1, n_scores, size=drawn.shape)  # a section drawn twice brings two resamples
    resampled = {}
    for name in METRICS:
        table = np.stack([np.asarray(section[name]) for section in sections])
        resampled[name] = np.concatenate([[table[:, 0].mean()], table[drawn, which].mean(axis=1)])
    return resampled


def compare(
    scored: Mapping[str, tuple[np.ndarray, np.ndarray]],
    pairs: Sequence[tuple[str, str]],
    section: str,
    resamples: int = 1000,
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, Interval]]]:
    """Intervals of every method of a section, and of the differences of ``pairs`` of methods, on the same resamples.

    ``scored``: method -> prediction and truth [N, G] in log2 space. Returns method -> metric -> (value, low, high) and
    "method minus rival" -> the same.
    """
    n_spots = len(next(iter(scored.values()))[1])
    weights = resample_weights(n_spots, resamples, seed=seed_of(section))
    drawn = {method: resampled_scores(log2, truth, weights) for method, (log2, truth) in scored.items()}
    found = {method: intervals_of(values) for method, values in drawn.items()}
    return found, {f"{a} minus {b}": paired_differences(drawn[a], drawn[b]) for a, b in pairs}
