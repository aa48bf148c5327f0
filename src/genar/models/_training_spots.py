"""What several methods ask of the training spots: scales of features, parts to leave out in turn, count classes."""

import warnings

import torch
from torch import Tensor

from genar.models._base import Spots

_N_PARTS = 5
_LEAST_SCALE = 0.05
# Classes that training counts are given without being asked for.
_MOST_AUTO = (1 << 14) - 1


def mean_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each feature of x [N, F], and the scale it is divided by, [F] each; see :func:`scale_of`."""
    if x.shape[1] == 0:  # spots that come as pixels
        return x.new_zeros(0), x.new_ones(0)
    return x.mean(dim=0), scale_of(x.std(dim=0, correction=0))


def scale_of(deviation: Tensor) -> Tensor:
    """What features of these standard deviations [F] are divided by: the deviation, but one for a constant feature and
    at least ``_LEAST_SCALE`` of the median of the others.

    A channel that is all but dead in training (non-zero in one spot of a thousand) would else speak up in a new
    section with thousands of deviations.
    """
    alive = deviation > 0
    if not alive.any():
        return torch.ones_like(deviation)
    return torch.where(alive, deviation.clamp(min=_LEAST_SCALE * deviation[alive].median()), 1.0)


def left_out_parts(spots: Spots) -> Tensor:
    """int64 [N]: parts to leave out in turn: the sections, at most ``_N_PARTS`` sets of them; strips of a single
    one."""
    sections, place = spots.section.unique(return_inverse=True)
    return place % _N_PARTS if len(sections) > 1 else strips(spots.coords_um)


def strips(coords_um: Tensor, n_strips: int = _N_PARTS) -> Tensor:
    """int64 [N]: vertical strips of one section with equal numbers of spots, the same in any order of the spots: on a
    grid a column that two strips share is cut across."""
    order = coords_um[:, 1].argsort(stable=True)
    order = order[coords_um[order, 0].argsort(stable=True)]
    rank = order.argsort(stable=True)
    return rank * min(n_strips, len(rank)) // len(rank)


def max_count_of(asked: int, counts: Tensor) -> int:
    """The largest count of a class: what was ``asked`` for, 0 for :func:`auto_max_count`. A warning tells of training
    counts [G], the largest of each gene, beyond it."""
    if not asked:
        return auto_max_count(counts)
    if beyond := int((counts > asked).sum()):
        warnings.warn(
            f"training counts of {beyond} of {counts.numel()} genes are above max_count {asked} and taken for it (the "
            f"largest is {int(counts.max()):,}); predictions never exceed it",
            stacklevel=2,
        )
    return asked


def auto_max_count(counts: Tensor) -> int:
    """The largest count, rounded up to a power of two less one, so that the classes number a power of two.

    16,383 at most; a warning says so, as larger counts are then taken for that one.
    """
    needed = 2 ** max(1, int(counts.max()).bit_length()) - 1
    if needed <= _MOST_AUTO:
        return needed
    warnings.warn(
        f"training counts up to {int(counts.max()):,} are taken for {_MOST_AUTO:,}; "
        f"set max_count={needed} for a class of each, at as much more memory and time",
        stacklevel=2,
    )
    return _MOST_AUTO
