"""What a linear model knows of the training spots, from which GenAR starts: components of the features, and for every
group of every scale the regression of ln(1 + count) on them and on the group's parent.

A few hundred spots cannot tell a thousand features apart. Here they are weighted as ridge regression would weight them,
with one thing more: what changes when a patch is flipped or turned says nothing of the tissue, so that the penalty is
the identity plus ``ratio`` times the covariance of the views of one spot. Penalties are chosen by leaving out training
sections in turn (of a single one: strips).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from genar.models._base import Spots, log2p1
from genar.models.ridge import folds, mean_and_scale

RATIOS = (0.0, 1.0, 3.0, 10.0)
PENALTIES = tuple(10 ** (2 + i / 4) for i in range(13))  # 100 to 100,000
FACTORS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# What errs no more than this beyond the least is as good; of those the stiffest is taken, as in the one-standard-error
# rule: left-out sections are few, and those to come differ more.
TOLERANCE = 0.02
# Directions of the features that are looked at: all, for up to so many spots.
_MOST_DIRECTIONS = 512
_BISECTIONS = 25
KNOTS = 128
# Tilts go so far beyond those that put the mode at the first and the last level.
_FAR = 10.0


@dataclass
class Components:
    """Directions of the feature space, strongest first, in a metric where ridge's penalty is the identity."""

    mean: Tensor
    """float32 [F]"""
    directions: Tensor
    """float32 [F, C]: (features - mean) @ directions are the components of a spot, not scaled"""
    strength: Tensor
    """float32 [C]: sum of squares over the training spots"""
    penalty: float
    ratio: float

    def shrink(self, n_spots: int) -> Tensor:
        """[C]: factors after which strong components have variance one and weak ones vanish, as in ridge."""
        return ((self.strength + self.penalty) / n_spots).rsqrt()


def find_components(spots: Spots, n: int) -> Components:
    """The ``n`` strongest components, under the penalty and ratio of fewest degrees of freedom whose squared error in
    log2(1 + count) on left-out folds is as good as the least."""
    assert spots.counts is not None
    x, y, fold = spots.features.mean(dim=1).double(), log2p1(spots.counts).double(), folds(spots)
    mean, scale = mean_and_scale(x)
    x = (x - mean) / scale
    basis = torch.linalg.svd(x, full_matrices=False)[2][:_MOST_DIRECTIONS].T  # [F, Q]
    x = x @ basis
    between_views = _view_covariance(spots, mean, basis / scale[:, None])
    ratios = RATIOS if spots.features.shape[1] > 1 else RATIOS[:1]
    errors, freedom = {}, {}
    for ratio in ratios:
        whitened = x @ _whitener(between_views, ratio)
        strength = torch.linalg.svdvals(whitened).square()
        for penalty, error in zip(PENALTIES, _left_out_errors(whitened, y, fold), strict=True):
            errors[ratio, penalty] = error
            freedom[ratio, penalty] = float((strength / (strength + penalty)).sum())
    as_good = [at for at, error in errors.items() if error <= (1 + TOLERANCE) * min(errors.values())]
    ratio, penalty = min(as_good, key=lambda at: freedom[at])
    whitener = _whitener(between_views, ratio)
    _, s, vh = torch.linalg.svd(x @ whitener, full_matrices=False)
    directions = (basis @ whitener @ vh[:n].T) / scale[:, None]
    return Components(mean.float(), directions.float(), s[:n].square().float(), penalty, ratio)


def _view_covariance(spots: Spots, mean: Tensor, to_basis: Tensor) -> Tensor:
    """[Q, Q]: covariance of the views of a spot around their mean."""
    total = to_basis.new_zeros(to_basis.shape[1], to_basis.shape[1])
    for views in spots.features.unbind(1):  # one view at a time bounds the memory
        deviation = (views - spots.features.mean(dim=1)).double() @ to_basis
        total += deviation.T @ deviation
    return total / (len(spots) * spots.features.shape[1])


def _whitener(between_views: Tensor, ratio: float) -> Tensor:
    """[Q, Q]: maps rows to where the penalty I + ratio * covariance is the identity."""
    eye = torch.eye(len(between_views), dtype=between_views.dtype)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(eye + ratio * between_views), eye, upper=False).T


def _left_out_errors(x: Tensor, y: Tensor, fold: Tensor) -> list[float]:
    """Summed squared error of ridge on the left-out folds, for each of ``PENALTIES``."""
    errors = [0.0] * len(PENALTIES)
    for left_out in fold.unique():
        inside, outside = fold != left_out, fold == left_out
        x_mean, y_mean = x[inside].mean(dim=0), y[inside].mean(dim=0)
        centred = x[inside] - x_mean
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        target = vectors.T @ (centred.T @ (y[inside] - y_mean))
        seen = (x[outside] - x_mean) @ vectors
        for i, penalty in enumerate(PENALTIES):
            predicted = seen @ (target / (values + penalty)[:, None]) + y_mean
            errors[i] += float((predicted - y[outside]).square().sum())
    return errors


def fit_means(x: Tensor, y: Tensor, fold: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Ridge of the columns of y [N, M] on components x [N, C]: slopes [C, M], and predictions [N, M] of spots whose
    fold was left out. The factor of ``FACTORS`` on ``penalty`` whose predictions err least is taken."""
    best, at_best, chosen = float("inf"), y, 0.0
    for factor in FACTORS:
        predicted = torch.zeros_like(y)
        for left_out in fold.unique():
            inside, outside = fold != left_out, fold == left_out
            centre, slope = x[inside].mean(dim=0), _ridge(x[inside], y[inside], factor * penalty)
            predicted[outside] = (x[outside] - centre) @ slope + y[inside].mean(dim=0)
        error = float((predicted - y).square().sum())
        if error < best:
            best, at_best, chosen = error, predicted, factor * penalty
    return _ridge(x, y, chosen), at_best


def _ridge(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    return torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)


def fit_curvatures(
    log_frequencies: Tensor, levels: Tensor, expected: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """For every group the b, and the table of a, with which p(v) ~ f(v) exp(a l_v - b l_v^2 / 2) has wanted moments.

    ``log_frequencies`` [M, V] are log f, ``levels`` [V] the l = ln(1 + count) of every class. By bisection b is set so
    that p has ``variance`` [M] on average over the spots, when a gives it each spot's ``expected`` l [N, M]. Returns b
    [M], means [M, T] and the a [M, T] that make them, both rising. Of all distributions with such moments p is the
    nearest to f in relative entropy.
    """
    low, high = torch.full_like(variance, -1.0), 4 / variance + 4
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        means, tilts, spread = _tilted_moments(log_frequencies, levels, middle)
        at = interpolate(tilts, means, expected)
        too_wide = interpolate(spread, tilts, at).mean(dim=0) > variance
        low, high = torch.where(too_wide, middle, low), torch.where(too_wide, high, middle)
    means, tilts, _ = _tilted_moments(log_frequencies, levels, high)
    return high, means, tilts


def _tilted_moments(log_frequencies: Tensor, levels: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means, tilts and variances of l [M, T] over a range of tilts that reaches all levels."""
    steps = torch.linspace(0, 1, KNOTS, dtype=levels.dtype)
    last = curvature.clamp(min=0) * levels[-1] + _FAR
    tilts = (last[:, None] + _FAR) * steps - _FAR
    bent = log_frequencies - curvature[:, None] * levels.square() / 2
    means, squares = torch.empty_like(tilts), torch.empty_like(tilts)
    for g in range(len(tilts)):  # a group at a time bounds the memory
        p = (bent[g] + tilts[g][:, None] * levels).softmax(dim=1)
        means[g], squares[g] = p @ levels, p @ levels.square()
    return means, tilts, (squares - means.square()).clamp(min=0)


def interpolate(values: Tensor, knots: Tensor, at: Tensor) -> Tensor:
    """Piecewise linear through (knots, values) [M, T] of each group, flat beyond the ends; at [N, M] -> [N, M]."""
    place = torch.searchsorted(knots, at.T.contiguous()).clamp(1, knots.shape[1] - 1)
    left, right = knots.gather(1, place - 1), knots.gather(1, place)
    share = ((at.T - left) / (right - left).clamp(min=1e-9)).clamp(0, 1)
    return (values.gather(1, place - 1) * (1 - share) + values.gather(1, place) * share).T
