"""What a linear model knows of the training spots, from which GenAR starts: components of the features, and for every
group of every scale the regression of ln(1 + count) on them and on the group's parent.

A few hundred spots cannot tell a thousand features apart. Here they are weighted as ridge regression would weight them,
with one thing more: what changes when a patch is flipped or turned says nothing of the tissue, so that the penalty is
the identity plus ``RATIO`` times the covariance of the views of one spot. Penalties are chosen by leaving out training
sections in turn (of a single one: strips).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from genar.errors import InputError
from genar.models._base import Spots, log2p1
from genar.models._training_spots import left_out_parts, mean_and_scale

RATIO = 3.0
PENALTIES = tuple(10 ** (2 + i / 4) for i in range(13))  # 100 to 100,000
FACTORS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1000.0)
FOLLOW_PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
# What errs no more than this beyond the least is as good; of those the stiffest is taken, as in the one-standard-error
# rule: left-out sections are few, and those to come differ more.
TOLERANCE = 0.01
# Directions of the features that are looked at: all, for up to so many spots.
_MOST_DIRECTIONS = 512
# Groups of coarser scales that a finer one is regressed on: whole scales, from the coarsest on.
_MOST_FOLLOWED = 1024
# Steps towards a variance (five do), and the share of it that may be missing.
_MOST_STEPS = 30
_CLOSE = 1e-6
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

    def shrink(self, n_spots: int) -> Tensor:
        """[C]: factors after which strong components have variance one and weak ones vanish, as in ridge."""
        return ((self.strength + self.penalty) / n_spots).rsqrt()


def find_components(spots: Spots, n: int) -> Components:
    """The ``n`` strongest components, under the stiffest penalty whose squared error in log2(1 + count) on left-out
    folds is about as little as any."""
    assert spots.counts is not None
    if len(spots) < 2:
        raise InputError("components are of two training spots at least; set components=0 and linear_start=false")
    x, y, fold = spots.features.mean(dim=1).double(), log2p1(spots.counts).double(), left_out_parts(spots)
    mean, scale = mean_and_scale(x)
    whiteners = [_whitener(noise) for noise in _view_covariances(spots, scale)]
    parts = ((x - mean) / scale).split(len(whiteners[0]), dim=1)
    x = torch.cat([part @ whitener for part, whitener in zip(parts, whiteners, strict=True)], dim=1)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    penalty = PENALTIES[stiffest(_left_out_errors((u * s)[:, :_MOST_DIRECTIONS], y, fold))]
    parts = vh[:n].split(len(whiteners[0]), dim=1)
    directions = torch.cat([whitener @ part.T for part, whitener in zip(parts, whiteners, strict=True)])
    return Components(mean.float(), (directions / scale[:, None]).float(), s[:n].square().float(), penalty)


def _view_covariances(spots: Spots, scale: Tensor) -> list[Tensor]:
    """[F, F] for each block of the features: covariance of the views of a spot around their mean, in units of
    ``scale``. Blocks are taken each by itself: shared by a patch and a wider one, noise would hide what they differ
    in."""
    mean = spots.features.mean(dim=1)
    n_block = spots.features.shape[2] // spots.n_blocks
    total = [scale.new_zeros(n_block, n_block) for _ in range(spots.n_blocks)]
    for views in spots.features.unbind(1):  # one view at a time bounds the memory
        deviation = (views - mean).double() / scale
        for block, part in zip(total, deviation.split(n_block, dim=1), strict=True):
            block += part.T @ part
    return [block / (len(spots) * spots.features.shape[1]) for block in total]


def _whitener(noise: Tensor) -> Tensor:
    """[F, F]: maps rows to where the penalty I + RATIO * covariance is the identity."""
    eye = torch.eye(len(noise), dtype=noise.dtype)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(eye + RATIO * noise), eye, upper=False).T


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


def level(counts: Tensor) -> Tensor:
    """l = ln(1 + count); of a mean between two counts the expectation of l, where one of both is drawn in its place.

    >>> torch.allclose(level(torch.tensor([3.0, 0.25])), torch.tensor([4.0, 2.0]).log() * torch.tensor([1.0, 0.25]))
    True
    """
    below = counts.floor()
    return torch.log1p(below) + (counts - below) * torch.log1p(1 / (1 + below))


def drawn_variance(counts: Tensor) -> Tensor:
    """Variance of l where one of the two counts beside a mean is drawn in its place (see :func:`level`).

    >>> drawn_variance(torch.tensor([3.0, 0.5])).div(torch.tensor(2.0).log() ** 2)
    tensor([0.0000, 0.2500])
    """
    below = counts.floor()
    share = counts - below
    return share * (1 - share) * torch.log1p(1 / (1 + below)).square()


def count_followed(sizes: tuple[int, ...]) -> int:
    """How many groups of the scales before the last a finer scale is regressed on.

    >>> count_followed((1, 4, 8, 40, 100, 200)), count_followed((1, 4, 200, 1000, 2500, 5000))
    (153, 205)
    """
    n = 0
    for size in sizes[:-1]:
        if n + size > _MOST_FOLLOWED:
            break
        n += size
    return n


def fit_followers(seen: Tensor, y: Tensor, fold: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ridge of the columns of y [N, M] on l of the groups of coarser scales, ``seen`` [N, n], of which generation sees
    a draw with the variance ``noise`` [n] around it.

    Returns slopes [n, M], predictions [N, M] of spots whose fold was left out, under the one of ``FOLLOW_PENALTIES``
    that errs least there, and the variance [M] that the draws give what follows them. Slopes are those which err least
    on draws: a group of a mean near a half is drawn as 0 or 1, and tells next to nothing.
    """

    def fitted(penalty: float) -> tuple[Tensor, Tensor, Tensor]:
        slope = _ridge(seen, y, penalty + len(seen) * noise)
        return slope, _left_out(seen, y, fold, penalty, noise), noise @ slope.square()

    def error(penalty: float) -> float:
        _, left_out, drawn = fitted(penalty)
        return float((left_out - y).square().sum() + len(y) * drawn.sum())

    return fitted(min(FOLLOW_PENALTIES, key=error))


def _left_out(x: Tensor, y: Tensor, fold: Tensor, penalty: float, noise: Tensor | float = 0.0) -> Tensor:
    """Predictions of ridge [N, M] for the spots of each fold, fitted to the others; ``noise`` is a penalty a spot."""
    predicted = torch.zeros_like(y)
    for left_out in fold.unique():
        inside, outside = fold != left_out, fold == left_out
        centre, slope = x[inside].mean(dim=0), _ridge(x[inside], y[inside], penalty + int(inside.sum()) * noise)
        predicted[outside] = (x[outside] - centre) @ slope + y[inside].mean(dim=0)
    return predicted


def fit_means(x: Tensor, y: Tensor, fold: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Ridge of the columns of y [N, M] on components x [N, C]: slopes [C, M], and predictions [N, M] of spots whose
    fold was left out, under the stiffest of ``FACTORS`` times ``penalty`` that errs about as little as any."""
    penalties = [factor * penalty for factor in FACTORS]
    # made again for the best: all of them at once would be 14 times y
    best = penalties[stiffest([float((_left_out(x, y, fold, one) - y).square().sum()) for one in penalties])]
    return _ridge(x, y, best), _left_out(x, y, fold, best)


def stiffest(errors: list[float]) -> int:
    """The last of the penalties, from soft to stiff, whose error is as good as the least."""
    return max(i for i, error in enumerate(errors) if error <= (1 + TOLERANCE) * min(errors))


def _ridge(x: Tensor, y: Tensor, penalty: Tensor | float) -> Tensor:
    """Slopes [n, M]; ``penalty`` of all columns of x, or of each [n]."""
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    return torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)


def fit_curvatures(
    log_frequencies: Tensor, levels: Tensor, expected: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """For every group the b, and the table of a, with which p(v) ~ f(v) exp(a l_v - b l_v^2 / 2) has wanted moments.

    ``log_frequencies`` [M, V] are log f, ``levels`` [V] the l = ln(1 + count) of every class. b is set so that p has
    ``variance`` [M] on average over the spots, when a gives it each spot's ``expected`` l [N, M]. Returns b [M], means
    [M, T] and the a [M, T] that make them, both rising. Of all distributions with such moments p is the nearest to f
    in relative entropy.
    """
    wanted, every = 1 / variance, torch.arange(len(variance))

    def sharpness(groups: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """By how much 1 / variance, next to linear in b, is beyond the wanted, and the tables; far beyond, no more."""
        means, tilts, spread = _tilted_moments(log_frequencies[groups], levels, b)
        got = interpolate(spread, tilts, interpolate(tilts, means, expected[:, groups])).mean(dim=0)
        return 1 / got.maximum(variance[groups] / 8) - wanted[groups], means, tilts

    ends = torch.stack([torch.full_like(variance, -1.0), 4 * wanted + 4])  # [2, M]: too wide, too narrow
    first, last = (sharpness(every, end) for end in ends)
    values, moved = torch.stack([first[0], last[0]]), torch.full_like(every, -1)
    # where both ends are on one side, the nearer is as good as it gets
    beyond = values[0] >= 0
    b = torch.where(beyond, *ends)
    means, tilts = (torch.where(beyond[:, None], *pair) for pair in zip(first[1:], last[1:], strict=True))
    going = every[~beyond & (values[1] > 0)]
    for _ in range(_MOST_STEPS):  # false position; an end that stays a second time counts half (Illinois)
        if not len(going):
            break
        at = (ends[0] * values[1] - ends[1] * values[0])[going] / (values[1] - values[0])[going]
        value, means[going], tilts[going] = sharpness(going, at)
        b[going], side = at, (value > 0).long()
        values[1 - side, going] *= torch.where(moved[going] == side, 0.5, 1.0).to(value.dtype)
        ends[side, going], values[side, going], moved[going] = at, value, side
        going = going[value.abs() > _CLOSE * wanted[going]]
    return b, means, tilts


def _tilted_moments(log_frequencies: Tensor, levels: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means, tilts and variances of l [M, T] over a range of tilts that reaches all levels."""
    steps = torch.linspace(0, 1, KNOTS, dtype=levels.dtype)
    last = curvature.clamp(min=0) * levels[-1] + _FAR
    tilts = (last[:, None] + _FAR) * steps - _FAR
    bent = log_frequencies - curvature[:, None] * levels.square() / 2
    powers = torch.stack([torch.ones_like(levels), levels, levels.square()], dim=1)
    sums, p = levels.new_empty(len(tilts), KNOTS, 3), levels.new_empty(KNOTS, len(levels))
    for g in range(len(tilts)):  # a group at a time bounds the memory
        torch.addr(bent[g].expand_as(p), tilts[g], levels, out=p)
        torch.mm(p.sub_(p.amax(dim=1, keepdim=True)).exp_(), powers, out=sums[g])
    means, squares = (sums[:, :, 1:] / sums[:, :, :1]).unbind(2)
    return means.contiguous(), tilts, (squares - means.square()).clamp(min=0)


def interpolate(values: Tensor, knots: Tensor, at: Tensor) -> Tensor:
    """Piecewise linear through (knots, values) [M, T] of each group, flat beyond the ends; at [N, M] -> [N, M]."""
    place = torch.searchsorted(knots, at.T.contiguous()).clamp(1, knots.shape[1] - 1)
    left, right = knots.gather(1, place - 1), knots.gather(1, place)
    share = ((at.T - left) / (right - left).clamp(min=1e-9)).clamp(0, 1)
    return (values.gather(1, place - 1) * (1 - share) + values.gather(1, place) * share).T
