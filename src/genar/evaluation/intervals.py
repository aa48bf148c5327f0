"""Intervals by bootstrap over the spots and across sections, and paired differences between methods.

A resample is a weight per spot (how often it was drawn), so that the metrics of all resamples are a few matrix
products. Every method of a section sees the same resamples: differences are paired.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from genar import defaults
from genar.evaluation.metrics import PCC_TOPS, pair, pcc
from genar.evaluation.scoring import Aligned

METRICS = ("pcc_10", "pcc_50", "pcc_200", "pcc_fixed", "mse", "mae", "rvd")
_RESAMPLES_AT_ONCE = 250
BIASED = ("rvd",)
"""Metrics that rise by being resampled: a squared deviation of variances takes theirs as its own."""
_LEAST_SHARE = 1e-12  # of the largest squared deviation of a gene: a variance below is rounding

Interval = tuple[float, float, float]
"""value, low, high"""


def seed_of(section: str) -> int:
    """Seed of a section's resamples, from its id: every method, and every later run, sees the same."""
    return int(hashlib.sha256(section.encode()).hexdigest()[:8], 16)


def resample_weights(n_spots: int, n_resamples: int = defaults.RESAMPLES, *, seed: int = 0) -> np.ndarray:
    """float32 [1 + R, N]: how often each spot is drawn, over N; a row sums to one. Row 0 is the spots themselves."""
    random = np.random.default_rng(seed)
    weights = np.ones((1 + n_resamples, n_spots), dtype=np.float32)
    for first in range(1, 1 + n_resamples, _RESAMPLES_AT_ONCE):  # counted as int64
        part = weights[first : first + _RESAMPLES_AT_ONCE]
        part[:] = random.multinomial(n_spots, np.full(n_spots, 1 / n_spots), size=len(part))
    return weights / np.float32(n_spots)


def resampled_scores(predicted: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of every resample: prediction and truth [N, G] in log2 space, ``weights`` [R, N] -> ``METRICS`` -> [R].

    The genes of ``pcc_10``, ``pcc_50`` and ``pcc_200`` are those of the spots themselves: chosen again in every
    resample, their mean would rise by the choice alone. One that is constant in a resample counts 0 there, as in
    ``pcc_fixed``; ``rvd`` leaves out genes whose truth is constant in it. One spot cannot be drawn in another way: its
    resamples are NaN. Memory: a few arrays [N, G].
    """
    x, y = pair(predicted, truth)
    # correlation does not see the mean: centred values lose no digits in the sums of squares
    centred = [np.where(np.ptp(values, axis=0) > 0, values - values.mean(axis=0), 0) for values in (x, y)]
    least = [_LEAST_SHARE * np.square(values).max(axis=0) for values in centred]
    columns = [*centred, centred[0] ** 2, centred[1] ** 2, centred[0] * centred[1], (x - y) ** 2, np.abs(x - y)]
    ranked = np.argsort(-np.nan_to_num(pcc(x, y), nan=-2.0), kind="stable")
    known = np.all([np.square(v).mean(axis=0) > low for v, low in zip(centred, least, strict=True)], axis=0)
    scores: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}
    for start in range(0, len(weights), _RESAMPLES_AT_ONCE):
        w = weights[start : start + _RESAMPLES_AT_ONCE].astype(np.float64)
        w /= w.sum(axis=1, keepdims=True)  # to the last digit: a variance is a difference of two sums
        mx, my, xx, yy, xy, squared, absolute = (w @ values for values in columns)
        var_x, var_y = xx - mx**2, yy - my**2
        varies = var_y > least[1]
        defined = (var_x > least[0]) & varies
        r = np.where(defined, (xy - mx * my) / np.sqrt(np.where(defined, var_x * var_y, 1)), 0)
        inside = np.broadcast_to(known, r.shape)
        ratio = np.where(varies, np.square((var_x - var_y) / np.where(varies, var_y, 1)), 0)
        for n in PCC_TOPS:
            scores[f"pcc_{n}"].append(_mean_where(r[:, ranked[:n]], inside[:, ranked[:n]]))
        scores["pcc_200"].append(_mean_where(r, inside))
        scores["pcc_fixed"].append(r.mean(axis=1))
        scores["mse"].append(squared.mean(axis=1))
        scores["mae"].append(absolute.mean(axis=1))
        scores["rvd"].append(_mean_where(ratio, varies))
    joined = {name: np.concatenate(parts) for name, parts in scores.items()}
    if weights.shape[1] == 1:
        for values in joined.values():
            values[1:] = np.nan
    return joined


def _mean_where(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Mean of each row where ``inside``; NaN where that is nowhere. ``values`` are 0 elsewhere."""
    n = inside.sum(axis=1)
    return np.where(n > 0, values.sum(axis=1) / np.maximum(n, 1), np.nan)


def interval_in_words(found: Interval, sign: str = "") -> str:
    """A value with its interval, where it has one; ``sign`` as in a format.

    >>> interval_in_words((0.5, 0.25, 0.75)), interval_in_words((0.5, float("nan"), float("nan")), "+")
    ('0.500 (0.250 to 0.750)', '+0.500')
    """
    value, low, high = found
    if np.isnan(value):
        return "undefined"
    return f"{value:{sign}.3f}" + ("" if np.isnan(low) else f" ({low:{sign}.3f} to {high:{sign}.3f})")


def differences_in_words(found: Mapping[str, Interval], *names: str) -> str:
    """Differences with their intervals, in words; those that are undefined are left out.

    >>> differences_in_words({"mse": (-0.031, -0.042, -0.02)}, "mse")
    'mse -0.031 (-0.042 to -0.020)'
    """
    known = [name for name in names if not np.isnan(found[name][0])]
    return ", ".join(f"{name} {interval_in_words(found[name], '+')}" for name in known)


def interval(resampled: np.ndarray, share: float = 0.95, *, biased: bool = False) -> Interval:
    """(value, low, high) of scores [1 + R] whose first is that of the spots themselves: quantiles of the resamples,
    stretched to hold the value. NaN where the value, ends that are NaN where every resample is undefined.

    Where the metric is ``biased`` upward by resampling, the value is as far above the truth as the resamples are above
    the value: both steps are taken back.

    >>> interval(np.array([0.5, *np.linspace(0, 1, 101)]), 0.9)
    (0.5, 0.05, 0.95)
    >>> interval(np.array([0.5, *np.linspace(0.1, 1.1, 101)]), 0.9, biased=True)
    (0.5, -0.05, 0.85)
    """
    value = float(resampled[0])
    if np.isnan(value) or np.isnan(resampled[1:]).all():
        return value, float("nan"), float("nan")
    quantiles = np.nanquantile(resampled[1:], [(1 - share) / 2, 0.5, (1 + share) / 2])
    shift = 2 * (quantiles[1] - value) if biased else 0.0
    low, high = (round(float(q - shift), 12) for q in quantiles[[0, 2]])
    return value, min(low, value), max(high, value)


def intervals_of(
    resampled: Mapping[str, np.ndarray], *, differences: bool = False, unbiased: bool = False
) -> dict[str, Interval]:
    """:func:`interval` of every metric of :func:`resampled_scores`, or of their differences, which may fall below 0;
    ``unbiased`` where their bias was taken back, as :func:`across_sections` does."""
    found = {name: interval(values, biased=name in BIASED and not unbiased) for name, values in resampled.items()}
    if differences:
        return found
    return {n: (v, max(low, 0.0), high) if n in BIASED else (v, low, high) for n, (v, low, high) in found.items()}


def paired_differences(ours: Mapping[str, np.ndarray], rival: Mapping[str, np.ndarray]) -> dict[str, Interval]:
    """Ours minus the rival's, of scores of the same resamples of the same spots: metric -> (value, low, high).

    An interval without zero says that the two differ on these spots. ``pcc_10`` and ``pcc_50`` compare each method's
    own genes.
    """
    return intervals_of({name: values - rival[name] for name, values in ours.items()}, differences=True)


def over_sections(sections: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Mean over sections of each metric's resamples [1 + R]; each section's spots were resampled by themselves.

    The interval says what other spots of these very sections would change. A mean is NaN where a section's value is.
    """
    return {name: np.mean([section[name] for section in sections], axis=0) for name in METRICS}


def across_sections(
    sections: Sequence[Mapping[str, np.ndarray]], patients: Sequence[str] = (), *, seed: int = 0
) -> dict[str, np.ndarray]:
    """As :func:`over_sections`, the sections drawn with replacement too, each with a resample of its spots. Of
    ``patients`` (each section's, "" where not known) those are drawn first, then as many sections as each has: sections
    of one patient are alike.

    The interval says what other patients, or sections where patients are not known, would change, as far as so few can
    tell: with less than five it is too narrow. Differences are paired as there: give the differences of two methods.
    What resampling its spots adds to a biased metric is taken back in each section: its intervals are ``unbiased``.
    """
    n_scores, random = len(sections[0][METRICS[0]]), np.random.default_rng(seed)
    drawn, n_drawn = _drawn_sections(sections_of(patients or [""] * len(sections)), n_scores - 1, random)
    which = random.integers(1, n_scores, size=drawn.shape)  # a section drawn twice brings two resamples
    resampled = {}
    for name in METRICS:
        table = np.stack([np.asarray(section[name], np.float64) for section in sections])
        each = table - 2 * (_median(table) - table[:, :1]) if name in BIASED else table  # see interval
        values = np.where(drawn < 0, 0, each[drawn, which])
        resampled[name] = np.concatenate([[table[:, 0].mean()], values.sum(axis=1) / n_drawn])
    return resampled


def sections_of(patients: Sequence[str]) -> list[list[int]]:
    """The rows of each patient; one whose patient is not known ("") is a patient by itself.

    >>> sections_of(["Ann", "", "Ann", ""])
    [[0, 2], [1], [3]]
    """
    found: dict[str | int, list[int]] = {}
    for row, patient in enumerate(patients):
        found.setdefault(patient or row, []).append(row)
    return list(found.values())


def _drawn_sections(
    groups: list[list[int]], n_draws: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Rows [R, P * largest], -1 for none: of as many groups as there are, drawn with replacement, as many of its rows;
    and how many each draw has [R]."""
    sizes = np.array([len(group) for group in groups])
    rows = np.full((len(groups), sizes.max()), -1)
    for place, group in zip(rows, groups, strict=True):
        place[: len(group)] = group
    chosen = random.integers(0, len(groups), size=(n_draws, len(groups)))
    slot = np.broadcast_to(np.arange(sizes.max()), (*chosen.shape, sizes.max()))
    within = slot
    if sizes.max() > 1:
        within = (random.random(slot.shape) * sizes[chosen][..., None]).astype(np.int64)
    drawn = np.where(slot < sizes[chosen][..., None], rows[chosen[..., None], within], -1)
    return drawn.reshape(n_draws, -1), sizes[chosen].sum(axis=1)


def _median(table: np.ndarray) -> np.ndarray:
    """[S, 1], of the resamples [S, 1 + R]; NaN where all are."""
    known = ~np.isnan(table[:, 1:]).all(axis=1)
    found = np.full((len(table), 1), np.nan)
    found[known, 0] = np.nanmedian(table[known, 1:], axis=1)
    return found


def compare(
    aligned: Mapping[str, Aligned],
    pairs: Sequence[tuple[str, str]],
    section: str,
    resamples: int = defaults.RESAMPLES,
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, Interval]]]:
    """Intervals of every method of a section, and of the differences of ``pairs`` of methods, on the same resamples.

    ``aligned``: method -> prediction and truth. Returns method -> metric -> (value, low, high) and "method minus rival"
    -> the same.
    """
    n_spots = len(next(iter(aligned.values())).truth)
    weights = resample_weights(n_spots, resamples, seed=seed_of(section))
    drawn = {method: resampled_scores(one.log2, one.truth_log2, weights) for method, one in aligned.items()}
    found = {method: intervals_of(values) for method, values in drawn.items()}
    return found, {f"{a} minus {b}": paired_differences(drawn[a], drawn[b]) for a, b in pairs}
