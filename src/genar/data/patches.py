"""Read the patches of a slide ahead of who uses them: in a thread, or in worker processes.

A worker imports neither torch nor a model: torch's threads in two processes slow each other down many times. It ends
when its parent does, however that ended. Python starts workers afresh ("spawn"), so a script that asks for any must
keep its own work under ``if __name__ == "__main__"``.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from genar.data.slide import Slide, open_slide
from genar.errors import LostProcessError

CHUNK = 16
"""Patches that are read in one go."""


class Readers:
    """Readers of patches, started when first needed, stopped at the end of the ``with`` block.

    ``workers=0`` reads in a thread of this process, as an image that is held in memory always is.
    """

    def __init__(self, workers: int = 0):
        self.workers = workers
        self._thread: Executor | None = None
        self._processes: Executor | None = None

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *_) -> None:
        for executor in (self._thread, self._processes):
            if executor is not None:
                executor.shutdown(cancel_futures=True)

    def patches(
        self, slide: Slide, centers: np.ndarray, width_px: float, out_px: int, *, start: int = 0, per_step: int = CHUNK
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, patches uint8 [n, out_px, out_px, 3]) in the order of ``centers`` [N, 2], from row ``start``;
        ``per_step`` rows at a time, a multiple of 16.

        Raises ``InputError`` where the image is damaged, ``LostProcessError`` where a worker is gone.
        """
        ahead = 2 * max(1, self.workers)
        waiting: deque[Future] = deque()
        starts = iter(range(start, len(centers), CHUNK))
        for first in range(start, len(centers), per_step):
            n_chunks = -(-min(per_step, len(centers) - first) // CHUNK)
            with _workers_live():
                while len(waiting) < n_chunks + ahead and (chunk := next(starts, None)) is not None:
                    waiting.append(self._submit(slide, centers[chunk : chunk + CHUNK], width_px, out_px))
                patches = np.concatenate([waiting.popleft().result() for _ in range(n_chunks)])
            yield first, patches

    def _submit(self, slide: Slide, centers: np.ndarray, width_px: float, out_px: int) -> Future:
        if self.workers == 0 or slide.in_memory:
            self._thread = self._thread or ThreadPoolExecutor(max_workers=1)
            return self._thread.submit(_read, slide, centers, width_px, out_px)
        self._processes = self._processes or ProcessPoolExecutor(
            self.workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
        )
        return self._processes.submit(_read_in_worker, str(slide.path), centers, width_px, out_px)


@contextmanager
def _workers_live() -> Iterator[None]:
    try:
        yield
    except BrokenExecutor:
        raise LostProcessError(
            "a process that reads patches is gone (killed, perhaps for want of memory: use fewer --workers; in a "
            'script of your own, keep its work under `if __name__ == "__main__"`)'
        ) from None


def _read(slide: Slide, centers: np.ndarray, width_px: float, out_px: int) -> np.ndarray:
    return np.stack([slide.read_patch_px(center, width_px, out_px) for center in centers])


_open: dict[str, Slide] = {}  # of this worker: the slide it read last


def _read_in_worker(path: str, centers: np.ndarray, width_px: float, out_px: int) -> np.ndarray:
    if path not in _open:
        while _open:
            _open.popitem()[1].close()
        _open[path] = open_slide(path)
    return _read(_open[path], centers, width_px, out_px)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and stops its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
