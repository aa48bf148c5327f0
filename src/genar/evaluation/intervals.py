"""Intervals by bootstrap over the spots, and paired differences between methods scored on the same spots.

A resample is a weight per spot (how often it was drawn), so that the metrics of all resamples are a few matrix
products. Every method of a section sees the same resamples: differences are paired.
"""

from collections.abc import Mapping, Sequence

import numpy as np

METRICS = ("pcc_10", "pcc_50", "pcc_200", "pcc_fixed", "mse", "mae")
_TOP = {"pcc_10": 10, "pcc_50": 50, "pcc_200": 200}
_RESAMPLES_AT_ONCE = 250


def resample_weights(n_spots: int, n_resamples: int = 1000, *, seed: int = 0) -> np.ndarray:
    """float32 [1 + R, N]: how often each spot is drawn, over N; a row sums to one. Row 0 is the spots themselves."""
    random = np.random.default_rng(seed)
    drawn = random.multinomial(n_spots, np.full(n_spots, 1 / n_spots), size=n_resamples)
    return np.concatenate([np.ones((1, n_spots)), drawn]).astype(np.float32) / np.float32(n_spots)


def resampled_scores(predicted: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of every resample: prediction and truth [N, G] in log2 space, ``weights`` [R, N] -> ``METRICS`` -> [R].

    ``pcc_10``, ``pcc_50`` and ``pcc_200`` are over the genes of highest PCC in that resample and leave out genes that
    are constant in it, ``pcc_fixed`` counts them 0.
    """
    x, y = (np.asarray(values, dtype=np.float64) for values in (predicted, truth))
    # correlation does not see the mean: centred values lose no digits in the sums of squares
    centred = [values - values.mean(axis=0) for values in (x, y)]
    columns = [*centred, centred[0] ** 2, centred[1] ** 2, centred[0] * centred[1], (x - y) ** 2, np.abs(x - y)]
    scores: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}
    for start in range(0, len(weights), _RESAMPLES_AT_ONCE):
        w = weights[start : start + _RESAMPLES_AT_ONCE].astype(np.float64)
        mx, my, xx, yy, xy, squared, absolute = (w @ values for values in columns)
        spread = (xx - mx**2) * (yy - my**2)
        defined = (xx - mx**2 > 1e-12) & (yy - my**2 > 1e-12)
        pcc = np.where(defined, (xy - mx * my) / np.sqrt(np.where(defined, spread, 1)), 0)
        highest, n_defined = -np.sort(-np.where(defined, pcc, -np.inf), axis=1), defined.sum(axis=1)
        for name, n in _TOP.items():
            top = highest[:, :n]
            total = np.where(np.isfinite(top), top, 0).sum(axis=1)
            scores[name].append(np.where(n_defined > 0, total / np.clip(n_defined, 1, n), np.nan))
        scores["pcc_fixed"].append(pcc.mean(axis=1))
        scores["mse"].append(squared.mean(axis=1))
        scores["mae"].append(absolute.mean(axis=1))
    return {name: np.concatenate(parts) for name, parts in scores.items()}


def interval(resampled: np.ndarray, share: float = 0.95) -> tuple[float, float, float]:
    """(value, low, high) of scores [1 + R] whose first is that of the spots themselves; NaN where that is undefined.

    >>> interval(np.array([0.5, *np.linspace(0, 1, 101)]), 0.9)
    (0.5, 0.05, 0.95)
    """
    if np.isnan(resampled[0]):
        return float("nan"), float("nan"), float("nan")
    low, high = np.nanquantile(resampled[1:], [(1 - share) / 2, (1 + share) / 2])
    return float(resampled[0]), round(float(low), 12), round(float(high), 12)


def over_sections(sections: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Mean over sections of each metric's resamples [1 + R]; each section's spots were resampled by themselves."""
    return {name: np.mean([section[name] for section in sections], axis=0) for name in METRICS}
