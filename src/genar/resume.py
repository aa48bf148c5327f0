"""The resume file of a training run: written whole, after every epoch, every so many seconds, and when it is asked to
stop."""

import os
import signal
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, EMAWeightAveraging
from pytorch_lightning.plugins.io import TorchCheckpointIO

from genar.data.door import door
from genar.data.files import replacing
from genar.encoders.torch_files import check_torch
from genar.errors import InputError, StoppedError
from genar.training_config import RESUME_FILE

_LARGEST_SHARE = 0.05  # of the time that writing resume files may take
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class WholeFiles(TorchCheckpointIO):
    """Lightning's files, in place of the old one only when they are whole and on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """See ``TorchCheckpointIO``."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


class Averages(EMAWeightAveraging):
    """Averaged weights from ``first`` step on; until then there is no average, and the weights themselves count, in
    validation and at the end."""

    def __init__(self, decay: float, first: int):
        super().__init__(decay=decay, update_starting_at_step=first, use_buffers=False)  # buffers are constants

    def _begun(self) -> bool:
        return self._average_model is not None and bool(self._average_model.n_averaged > 0)

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        """The averages are validated, where there are some."""
        if self._begun():
            super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        """Back to the weights that are trained."""
        if self._begun():
            super().on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer, pl_module) -> None:
        """The averages stay, where there are some."""
        if self._begun():
            super().on_train_end(trainer, pl_module)


class Saver(Checkpoint):
    """Writes the resume file; ``Checkpoint`` has Lightning call it after all other callbacks.

    SIGTERM or SIGINT, of any process, ends the step (or validation) that the run is at, writes the file and raises
    ``StoppedError``. A second signal does what it does elsewhere. ``check`` raises where nothing is worth keeping: the
    file before stays.
    """

    def __init__(self, folder: Path, every_s: float, check: Callable[[], object]):
        self.path, self.every_s, self._check = folder / RESUME_FILE, every_s, check
        self._asked: int | None = None
        self._last_s = self._took_s = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen; Lightning has set handlers of its own before, and puts back the former ones at its end."""
        self._last_s = time.monotonic()
        if threading.current_thread() is not threading.main_thread():
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}

        def ask(number: int, frame) -> None:
            self._asked = number
            for one, handler in before.items():
                signal.signal(one, signal.SIG_DFL if one == signal.SIGTERM else handler)

        for number in _SIGNALS:
            signal.signal(number, ask)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        """After the last batch the epoch's end follows, and its file."""
        n_done = batch_idx + 1
        if n_done % trainer.accumulate_grad_batches or n_done >= trainer.num_training_batches:
            return
        wait_s = self.every_s and max(self.every_s, self._took_s / _LARGEST_SHARE)
        is_due = self._asked is not None or time.monotonic() - self._last_s >= wait_s
        if trainer.strategy.reduce_boolean_decision(is_due, all=False):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Always."""
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        started_s = time.monotonic()
        self._check()
        trainer.save_checkpoint(self.path)
        self._last_s = time.monotonic()
        self._took_s = self._last_s - started_s
        if trainer.strategy.reduce_boolean_decision(self._asked is not None, all=False):
            raise StoppedError(self._asked or signal.SIGTERM)


def check_whole(path: Path) -> None:
    """Raise ``InputError`` where a resume file was cut short, or holds more than tensors and plain values: nothing of
    it is run."""
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: not a whole resume file; delete it, and the same command starts anew")
    with door(path, "resume file of tensors and plain values", "delete it, and the same command starts anew"):
        check_torch(path)
