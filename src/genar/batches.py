"""The batches of a training run: what each process gets in each step follows from seed, epoch and step alone.

No generator outlives an epoch, so that a run that is stopped in the middle of one goes on with the very same batches.
"""

import abc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from genar.models import Batch, Spots

_RANK_SEEDS = 15_485_863  # between the seeds of two processes
_STEP_SEEDS = 32_452_843  # between those of two steps
_N_SEEDS = 2**63


@dataclass
class Share:
    """Part of a batch; ``weight`` makes the mean over all parts and processes that over the batch's spots."""

    batch: Batch
    weight: float = 1.0


class Loader(abc.ABC):
    """The shares of one of ``n_ranks`` processes, epoch after epoch. By ``state_dict`` and ``load_state_dict``, which
    Lightning calls, the next epoch begins where the stored one stopped."""

    def __init__(self, spots: Spots, seed: int, epoch: Callable[[], int], rank: int, n_ranks: int):
        self.spots, self.seed, self.epoch, self.rank, self.n_ranks = spots, seed, epoch, rank, n_ranks
        self._start = self._n_given = 0

    @abc.abstractmethod
    def __len__(self) -> int:
        """Shares an epoch."""

    @abc.abstractmethod
    def _picks(self, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Rows, view of each, and weight of the shares of an epoch."""

    def __iter__(self) -> Iterator[Share]:
        start, self._start = self._start, 0
        self._n_given = start
        random = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch()))
        for number, (rows, view, weight) in enumerate(self._picks(random)):
            if number >= start:
                self._n_given += 1
                yield Share(self.spots.batch(rows, view), weight)

    def state_dict(self) -> dict:
        """How many shares of this epoch were given."""
        return {"n_given": self._n_given}

    def load_state_dict(self, state: dict) -> None:
        """Begin after so many shares."""
        self._start = state["n_given"] % len(self)


class SpotLoader(Loader):
    """Batches in a random order, of each the ``n_parts`` parts of one process, each spot in one of its views."""

    def __init__(
        self, spots: Spots, n_batches: int, n_parts: int, seed: int, epoch: Callable[[], int], rank: int, n_ranks: int
    ):
        super().__init__(spots, seed, epoch, rank, n_ranks)
        self.n_batches, self.n_parts = n_batches, n_parts

    def __len__(self) -> int:
        return self.n_batches * self.n_parts

    def _picks(self, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor, float]]:
        order = torch.randperm(len(self.spots), generator=random)
        for rows in order.tensor_split(self.n_batches):  # equal parts: no tiny last batch
            view = torch.randint(self.spots.features.shape[1], (len(rows),), generator=random)
            mine = torch.arange(len(rows)).tensor_split(self.n_ranks)[self.rank]
            for part in mine.tensor_split(self.n_parts):
                yield rows[part], view[part], len(part) * self.n_parts * self.n_ranks / len(rows)


class SectionLoader(Loader):
    """The sections in a random order, each whole, as often as ``turns`` (of :func:`section_turns`) says, each spot in
    one of its views. The processes take turns; where the last one is short of sections, the first come once more."""

    def __init__(self, spots: Spots, turns: Tensor, seed: int, epoch: Callable[[], int], rank: int, n_ranks: int):
        super().__init__(spots, seed, epoch, rank, n_ranks)
        self.turns = turns

    def __len__(self) -> int:
        return math.ceil(len(self.turns) / self.n_ranks)

    def _picks(self, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor, float]]:
        order = self.turns[torch.randperm(len(self.turns), generator=random)]
        for turn, section in enumerate(order.repeat(self.n_ranks)[: len(self) * self.n_ranks]):
            rows = torch.nonzero(self.spots.section == section)[:, 0]
            view = torch.randint(self.spots.features.shape[1], (len(rows),), generator=random)
            if turn % self.n_ranks == self.rank:
                yield rows, view, 1.0


def section_turns(section: Tensor, steps: Callable[[int], int]) -> Tensor:
    """The section of every step of an epoch, int64, of the ``section`` [N] of every spot: each as often as ``steps``
    says of its number of spots."""
    sections, n_spots = section.unique(return_counts=True)
    return sections.repeat_interleave(torch.tensor([steps(n) for n in n_spots.tolist()]))


def step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Seed of what a process draws within one step of training; the first of an epoch is the epoch's."""
    return (epoch_seed(seed, epoch) + _STEP_SEEDS * step + _RANK_SEEDS * rank) % _N_SEEDS


def epoch_seed(seed: int, epoch: int) -> int:
    """Seed of the order and the views of an epoch."""
    return seed * 100_003 + epoch
