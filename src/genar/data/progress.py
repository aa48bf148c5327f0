"""How long work tells of itself: a bar is entered with a label and a total, and told (done, total) as it goes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

_Item = TypeVar("_Item")
Bar = Callable[[str, int], AbstractContextManager[Callable[[int, int], None]]]


def no_bar(label: str, total: int) -> AbstractContextManager[Callable[[int, int], None]]:
    """A progress bar that shows nothing."""
    return nullcontext(lambda done, total: None)


def counted(items: Iterable[_Item], tick: Callable[[int, int], None], total: int, before: int = 0) -> Iterator[_Item]:
    """One after the other; ``tick`` is told of each once it was dealt with, after ``before`` others of ``total``."""
    for done, item in enumerate(items, before + 1):
        yield item
        tick(done, total)
