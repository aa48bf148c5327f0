"""Training spots that memory does not hold: features stay in their stores, counts lie in one file, and the batches of
an epoch come from windows of blocks that are read one ahead.

An epoch takes the blocks of all sections in a random order, and mixes the spots of a window of ``WINDOW`` blocks, so
that what is read lies together and memory holds two windows. Spots that fit into ``IN_MEMORY_BYTES`` are better held
(``Spots``): there any spot may meet any other in a batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from anndata import AnnData
from torch import Tensor

from genar.batches import Share
from genar.data import contract
from genar.data.files import replacing
from genar.models import Batch, Model, Spots
from genar.models._base import PREPARED_SPOTS, spread

IN_MEMORY_BYTES = 2**30
"""features of more than this are streamed, where the model can be trained so"""
BLOCK = 1024
"""spots that lie together on disk and are read in one go"""
WINDOW = 32
"""blocks whose spots are mixed"""
_Read = tuple[Batch, list[int]]  # spots of several batches, and the sizes of those


class Rows(Protocol):
    """Features of a section that may lie on disk: ``rows[a:b]``, or rising rows, are float32 [n, views, F]."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, views, F]"""
        ...

    def __getitem__(self, rows: slice | np.ndarray, /) -> np.ndarray: ...


class CountFile:
    """Counts int32 [N, G] in a file, read where they are asked for: pages mapped into memory would count as held."""

    def __init__(self, path: Path, n_genes: int):
        self.path, self.n_genes = path, n_genes

    @classmethod
    def write(cls, path: Path, sections: Iterable[AnnData], genes: Sequence[str]) -> "CountFile":
        """Of the ``genes`` of all sections, one after the other."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            for section in sections:
                contract.counts(section, list(genes)).astype(np.int32).tofile(file)
        return cls(path, len(genes))

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Those of rising ``rows``."""
        first, last = int(rows[0]), int(rows[-1]) + 1
        n_values, offset = (last - first) * self.n_genes, first * self.n_genes * 4
        values = np.fromfile(self.path, np.int32, n_values, offset=offset)
        return values.reshape(-1, self.n_genes)[rows - first]


class StoredSpots:
    """Spots of one or more sections whose features and counts are read from files, block by block."""

    def __init__(self, places: Spots, features: Sequence[Rows], counts: CountFile, kept: Tensor | None = None):
        """``places``: all but features and counts, its features [N, views, 0]; ``features`` of the sections one after
        the other, ``kept`` int64 [N], rising: the row of each spot over all of them, where some were left out."""
        self.places, self._features, self._counts = places, features, counts
        self._kept = torch.arange(len(places)) if kept is None else kept
        self._starts = np.cumsum([0, *(part.shape[0] for part in features)])
        self.section, self.coords_um = places.section, places.coords_um
        self.n_views, self.n_features = features[0].shape[1:]
        self.n_genes = counts.n_genes

    def __len__(self) -> int:
        return len(self.places)

    def rows(self, rows: Tensor) -> "StoredSpots":
        """Those spots alone, ``rows`` rising."""
        return StoredSpots(self.places.rows(rows), self._features, self._counts, self._kept[rows])

    def read(self, rows: Tensor) -> Spots:
        """Rising ``rows``, in memory, with all views."""
        features = np.empty((len(rows), self.n_views, self.n_features), np.float32)
        counts = np.empty((len(rows), self.n_genes), np.int32)
        for place, block_features, block_counts in self._blocks(rows.numpy()):
            features[place], counts[place] = block_features, block_counts
        held = self.places.rows(rows)
        return replace(held, features=torch.from_numpy(features), counts=torch.from_numpy(counts).long())

    def drawn(self, rows: Tensor, view: Tensor) -> Batch:
        """``rows`` in any order, each in its own ``view``; the counts are still int32."""
        features = np.empty((len(rows), self.n_features), np.float32)
        counts = np.empty((len(rows), self.n_genes), np.int32)
        order, views = rows.numpy().argsort(), view.numpy()
        for place, block_features, block_counts in self._blocks(rows.numpy()[order]):
            at = order[place]
            features[at] = block_features[np.arange(len(at)), views[at]]
            counts[at] = block_counts
        where = self.places.batch(rows)
        return replace(where, features=torch.from_numpy(features), counts=torch.from_numpy(counts))

    def _blocks(self, rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Of rising ``rows``, a block at a time: where it stands in ``rows``, features [n, views, F], counts [n, G]."""
        in_files = self._kept.numpy()[rows]
        section = self._starts.searchsorted(in_files, side="right") - 1
        block = (in_files - self._starts[section]) // BLOCK
        new = np.flatnonzero((np.diff(section) != 0) | (np.diff(block) != 0)) + 1
        for first, last in zip([0, *new], [*new, len(rows)], strict=True):
            if first == last:
                continue
            wanted, part = in_files[first:last], section[first]
            own = wanted - self._starts[part]
            low, high = int(own[0]), int(own[-1]) + 1
            dense = len(own) * 8 > high - low  # few rows are picked one by one
            found = self._features[part][low:high][own - low] if dense else self._features[part][own]
            yield slice(first, last), found, self._counts.read(wanted)

    def sample(self, n: int) -> Spots:
        """``n`` of the spots, in memory, spread over all sections alike; all where they are no more."""
        return self.in_memory() if len(self) <= n else replace(self.read(spread(len(self), n)), sample_of=self)

    def in_memory(self) -> Spots:
        """All of them."""
        return self.read(torch.arange(len(self)))

    def parts(self) -> Iterator[Spots]:
        """All, part by part."""
        yield from (self.read(rows) for rows in torch.arange(len(self)).split(4 * BLOCK))

    def counts_by_part(self) -> Iterator[Tensor]:
        """Counts int32 [n, G] alone."""
        yield from (torch.from_numpy(self._counts.read(rows.numpy())) for rows in self._kept.split(4 * BLOCK))

    def epoch(self, random: torch.Generator) -> Tensor:
        """int64 [N]: the order of an epoch, blocks at random and mixed within windows."""
        in_block = self._kept - torch.from_numpy(self._starts)[self._section_of()]
        key = self._section_of() * (int(in_block.max()) // BLOCK + 1) + in_block // BLOCK
        sizes = key.unique_consecutive(return_counts=True)[1]
        blocks = torch.arange(len(self)).split(sizes.tolist())
        order, window, n_mixed = [], [], 0
        for place in torch.randperm(len(blocks), generator=random).tolist():
            window.append(blocks[place])
            n_mixed += len(blocks[place])
            if n_mixed >= BLOCK * WINDOW:
                order.append(_mixed(window, random))
                window, n_mixed = [], 0
        return torch.cat([*order, _mixed(window, random)])

    def _section_of(self) -> Tensor:
        return torch.from_numpy(self._starts.searchsorted(self._kept.numpy(), side="right") - 1)


def _mixed(window: list[Tensor], random: torch.Generator) -> Tensor:
    rows = torch.cat([torch.arange(0), *window])
    return rows[torch.randperm(len(rows), generator=random)]


AnySpots = Spots | StoredSpots


def look_at(model: Model | type[Model], spots: AnySpots) -> Spots:
    """What the model's ``create`` and ``prepare`` see of the training spots: all, or of many a sample."""
    return spots.sample(PREPARED_SPOTS if model.can_stream else len(spots))


def count_moments(spots: AnySpots) -> tuple[Tensor, Tensor]:
    """Mean and variance of each gene's counts, float64 [G] each."""
    if isinstance(spots, Spots):
        assert spots.counts is not None
        counts = spots.counts.double()
        return counts.mean(dim=0), counts.var(dim=0, correction=0)
    n, total, squares = len(spots), torch.zeros(spots.n_genes).double(), torch.zeros(spots.n_genes).double()
    for counts in spots.counts_by_part():  # sums of whole numbers are exact
        total += counts.double().sum(dim=0)
        squares += counts.double().square().sum(dim=0)
    return total / n, squares / n - (total / n).square()


class StreamedLoader:
    """Batches in a random order, of each the ``n_parts`` parts of one of ``n_ranks`` processes, each spot in one of its
    views; order and views follow from the ``seed`` of the epoch alone, so that a batch is the same however many
    processes share it. It begins at batch ``start`` without reading those before."""

    def __init__(
        self,
        spots: StoredSpots,
        n_batches: int,
        n_parts: int,
        seed: Callable[[], int],
        rank: int = 0,
        n_ranks: int = 1,
        start: int = 0,
    ):
        self.spots, self.n_batches, self.n_parts, self.seed = spots, n_batches, n_parts, seed
        self.rank, self.n_ranks, self.start = rank, n_ranks, start
        self._resumed = self._n_given = 0

    def __len__(self) -> int:
        return self.n_batches * self.n_parts

    def __iter__(self) -> Iterator[Share]:
        random = torch.Generator().manual_seed(self.seed())
        order = self.spots.epoch(random)
        view = torch.randint(self.spots.n_views, (len(order),), generator=random)
        rows, views = order.tensor_split(self.n_batches), view.tensor_split(self.n_batches)  # no tiny last batch
        per_read = max(1, BLOCK * WINDOW * self.n_batches // len(order))
        start, self._resumed = self._resumed or self.start, 0
        self._n_given = start * self.n_parts
        firsts = range(start, self.n_batches, per_read)
        reads = (partial(self._read, rows[at : at + per_read], views[at : at + per_read]) for at in firsts)
        for held, sizes in _one_ahead(reads):
            for share in self._shares(held, sizes):
                self._n_given += 1
                yield share

    def state_dict(self) -> dict:
        """How many shares of this epoch were given."""
        return {"n_given": self._n_given}

    def load_state_dict(self, state: dict) -> None:
        """Begin after so many shares; training stops between whole batches alone."""
        self._resumed = state["n_given"] % len(self) // self.n_parts

    def _own(self, n: int) -> Tensor:
        """Of the ``n`` spots of a batch those of this process."""
        return torch.arange(n).tensor_split(self.n_ranks)[self.rank]

    def _read(self, rows: Sequence[Tensor], views: Sequence[Tensor]) -> _Read:
        """This process's spots of some batches, one after the other, and the sizes of the whole batches."""
        own = [self._own(len(batch)) for batch in rows]
        mine, view = (torch.cat([b[o] for b, o in zip(all_, own, strict=True)]) for all_ in (rows, views))
        return self.spots.drawn(mine, view), [len(batch) for batch in rows]

    def _shares(self, held: Batch, sizes: list[int]) -> Iterator[Share]:
        first = 0
        for size in sizes:
            n_own = len(self._own(size))
            for part in torch.arange(first, first + n_own).tensor_split(self.n_parts):
                batch = held.rows(part)  # a copy: a batch that waits somewhere keeps no window alive
                assert batch.counts is not None
                weight = len(part) * self.n_parts * self.n_ranks / size
                yield Share(replace(batch, counts=batch.counts.long()), weight)
            first += n_own


def _one_ahead(jobs: Iterable[Callable[[], _Read]]) -> Iterator[_Read]:
    """Results of the jobs; a thread does the next one while the caller is busy with the last."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting = None
        for job in jobs:
            ahead = thread.submit(job)
            if waiting is not None:
                yield waiting.result()
            waiting = ahead
        if waiting is not None:
            yield waiting.result()
