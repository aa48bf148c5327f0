"""Many sections at once: those that memory should not hold are read again each time that somebody looks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from anndata import AnnData
from scipy import sparse

from genar.data import contract
from genar.data.formats import SectionRef, find_sections, options_for
from genar.data.progress import Bar, counted, no_bar
from genar.data.reading import ReadOptions

HELD_BYTES = 2**30
"""counts and images of more than this are not held at once"""


class Sections(Sequence[AnnData]):
    """The sections at ``refs`` with all their genes, one read at a time: the first whose counts and images fit
    into ``held`` bytes together stay in memory. Reading one raises ``InputError`` as ``genar.read_section`` does."""

    def __init__(self, refs: Sequence[SectionRef], options: ReadOptions, held: int = HELD_BYTES):
        self._refs, self._options, self._room = refs, options, held
        self._held: dict[int, AnnData] = {}

    def __len__(self) -> int:
        return len(self._refs)

    def __getitem__(self, place: int) -> AnnData:  # pyright: ignore
        if place in self._held:
            return self._held[place]
        section = self._refs[place].read(self._options)
        size = _n_bytes(section)
        if size <= self._room:
            self._room -= size
            self._held[place] = section
        return section


def _n_bytes(section: AnnData) -> int:
    """Of counts and images."""
    images = [image for library in contract.libraries(section) for image in library.get("images", {}).values()]
    x = section.X
    parts = [x.data, x.indices, x.indptr] if sparse.issparse(x) else [x]  # pyright: ignore
    return sum(np.asarray(part).nbytes for part in (*parts, *images))


def read_places(path: str | Path, *, bar: Bar = no_bar, **options) -> list[AnnData]:
    """Every section that ``path`` names, its N spots without genes [N, 0] and images: all that features are made of.

    ``options`` and errors as in :func:`genar.read_sections`.
    """
    refs = find_sections(path)
    read = Sections(refs, options_for(refs, **options), held=0)
    with bar("reading sections", len(refs)) as tick:
        return [contract.cut(section, []) for section in counted(read, tick, len(refs))]
