"""The Lightning loop of a gradient model. Imported where one is trained: Lightning is slow to import."""

import copy
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.plugins.environments import LightningEnvironment  # pyright: ignore
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from genar.batches import Loader, SectionLoader, Share, SpotLoader, epoch_seed, section_turns, step_seed
from genar.errors import InputError, LostProcessError
from genar.models import Batch, Decoding, Model, Spots
from genar.models._base import LN2, duration, log2p1
from genar.processes import Group, srun_environment
from genar.resume import Averages, Saver, WholeFiles, check_whole
from genar.streaming import AnySpots, StoredSpots, StreamedLoader
from genar.training_config import OPTIMIZERS, PRECISIONS, RESUME_FILE, FitSummary, TrainConfig

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def run(
    model: Model,
    training: AnySpots,
    validation: Spots | None,
    config: TrainConfig,
    *,
    folder: Path | None,
    log: Callable[[str], None],
    progress: bool,
    group: Group,
    device: str,
) -> FitSummary:
    """Train ``model`` in place, from the resume file in ``folder`` where there is one; see
    :func:`genar.training.fit`."""
    module = _Module(model, training, validation, config, log, group.size)
    if module.n_parts > 1:
        log(f"a batch goes through in {module.n_parts} parts, to stay within {config.memory_gib:g} GiB of activations")
    _quiet_lightning()
    resume = folder / RESUME_FILE if folder and (folder / RESUME_FILE).is_file() else None
    if resume:
        check_whole(resume)
    try:
        with _torch_as_it_was():
            trainer = _trainer(config, module, folder, progress, group, device)
            trainer.fit(module, ckpt_path=resume, weights_only=True if resume else None)
    except SystemExit as error:  # Lightning's, of a key of the user's
        model.eval()
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    except RuntimeError as error:
        if group.size > 1 and _is_lost(error):
            raise LostProcessError(
                f"one of the {group.size} processes is gone ({str(error).splitlines()[0]})"
            ) from error
        raise
    if resume and not module.started:  # it was trained to its end: Lightning does nothing, not even take the averages
        module.load_state_dict(torch.load(resume, map_location="cpu", weights_only=True)["state_dict"])
    module.restore_best()
    return module.summary


@contextmanager
def _torch_as_it_was() -> Iterator[None]:
    """What a trainer sets for the whole process holds inside alone."""
    exact, workspace = torch.are_deterministic_algorithms_enabled(), os.environ.get(_WORKSPACE)
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(exact, warn_only=warn_only)
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)


def _trainer(
    config: TrainConfig, module: "_Module", folder: Path | None, progress: bool, group: Group, device: str
) -> pl.Trainer:
    kind, _, number = device.partition(":")
    return pl.Trainer(
        max_epochs=config.max_epochs,
        accelerator=kind,
        devices=[int(number)] if number and group.size == 1 else group.devices,
        num_nodes=group.num_nodes,
        strategy=DDPStrategy(find_unused_parameters=True) if group.size > 1 else "auto",
        plugins=[WholeFiles(), *_environments(group)],
        use_distributed_sampler=False,  # our loaders share out each batch
        precision=PRECISIONS[config.precision],  # pyright: ignore
        gradient_clip_val=config.clip,
        accumulate_grad_batches=module.n_parts,
        deterministic="warn",  # on a CPU everything is; some CUDA kernels have no deterministic form
        logger=False,
        enable_checkpointing=folder is not None,
        enable_model_summary=False,
        enable_progress_bar=progress,
        num_sanity_val_steps=0,
        callbacks=_callbacks(config, module, folder, progress),
        default_root_dir=folder,
    )


def _environments(group: Group) -> list:
    """Who started the processes; Lightning finds torchrun by itself."""
    if group.by == "srun":
        return [srun_environment()]
    return [] if group.by else [LightningEnvironment()]


def count_parts(model: Model, n_spots: int, memory_gib: float) -> int:
    """Into how many parts a batch of ``n_spots`` goes so that a part's activations take at most ``memory_gib``."""
    return min(n_spots, max(1, math.ceil(model.spot_bytes * n_spots / (memory_gib * 2**30))))


class _Module(pl.LightningModule):
    """Joins a model to Lightning's loop."""

    def __init__(
        self,
        model: Model,
        training: AnySpots,
        validation: Spots | None,
        config: TrainConfig,
        log,
        n_ranks: int = 1,
    ):
        super().__init__()
        self.model, self.config = model, config
        self._training, self._validation, self._say = training, validation, log
        self.summary, self._best, self._losses = FitSummary(), {}, []
        self.started, self.n_ranks = False, n_ranks
        whole = model.unit == "section"
        n_together = n_ranks if whole else config.batch_size * config.accumulate
        self._turns = section_turns(training.section, model.section_steps) if whole else None
        self.n_batches = math.ceil(len(training if self._turns is None else self._turns) / n_together)
        n_rows = len(training) // self.n_batches // n_ranks  # of the smallest batch
        if n_rows < 1:
            raise InputError(
                f"train: {n_ranks} processes share batches of {n_rows * n_ranks + 1} spots or less; use fewer"
            )
        least = min(n_rows, config.accumulate)
        self.n_parts = 1 if whole else max(least, count_parts(model, n_rows, config.memory_gib))

    def __deepcopy__(self, memo: dict) -> "_Module":
        """For the averages: the weights once more, the spots, which nobody changes, the same."""
        for spots in (self._training, self._validation):
            memo[id(spots)] = spots
        memo[id(self)] = made = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    def train_dataloader(self) -> Loader | StreamedLoader:
        config, rank = self.config, self.global_rank
        if isinstance(self._training, StoredSpots):
            return StreamedLoader(
                self._training, self.n_batches, self.n_parts, lambda: epoch_seed(config.seed, self.current_epoch),
                rank, self.n_ranks,
            )  # fmt: skip
        if self._turns is not None:
            return SectionLoader(
                self._training, self._turns, config.seed, lambda: self.current_epoch, rank, self.n_ranks
            )
        return SpotLoader(
            self._training, self.n_batches, self.n_parts, config.seed, lambda: self.current_epoch, rank, self.n_ranks
        )

    def on_train_start(self) -> None:
        if self.trainer.global_step:
            self._say(f"going on after step {self.trainer.global_step} of {self.config.max_epochs * self.n_batches}")

    def on_train_batch_start(self, batch: Share, batch_idx: int) -> None:
        self.started = True
        # of dropout and token noise: every step its own, so that a resumed run draws what an undisturbed one draws
        torch.manual_seed(step_seed(self.config.seed, self.current_epoch, batch_idx, self.global_rank))

    def val_dataloader(self):
        whole = [] if self._validation is None else [self._validation.batch()]
        return DataLoader(whole, batch_size=None)  # pyright: ignore

    def transfer_batch_to_device(self, batch: Share | Batch, device, dataloader_idx):
        return Share(batch.batch.to(device), batch.weight) if isinstance(batch, Share) else batch.to(device)

    def training_step(self, batch: Share, batch_idx: int) -> Tensor:
        loss, weight = self.model.loss(batch.batch).total, batch.weight
        n_spots = len(batch.batch.features)
        if self.model.sums:  # Lightning takes the mean over parts and processes
            loss, weight = loss / n_spots, self.n_parts * self.n_ranks * n_spots
        self._losses.append(torch.stack([loss.detach() * n_spots, loss.new_tensor(n_spots)]))
        self.log("loss", loss, prog_bar=True, batch_size=n_spots)
        return loss * weight

    def loss_so_far(self) -> float:
        """Of the spots since the last line of an epoch, over all processes, which ask together. ``InputError`` where it
        is no finite number."""
        total = torch.stack(self._losses).sum(dim=0) if self._losses else torch.zeros(2, device=self.device)
        loss, n_spots = self._summed(total).tolist()
        if not math.isfinite(loss):
            raise InputError(
                f"training: the loss is {loss} in epoch {self.current_epoch + 1}; a lower lr (now {self.config.lr:g}) "
                "or other settings of the model may help"
            )
        return loss / max(n_spots, 1)

    def _mean_loss(self) -> float:
        """The same, counted anew from here."""
        loss = self.loss_so_far()
        self._losses = []
        return loss

    def tell_step(self, seconds_a_step: float) -> None:
        """Where the training is; the loss is this process's own."""
        loss, n_spots = torch.stack(self._losses).sum(dim=0).tolist()
        step, n_steps = self.trainer.global_step, self.config.max_epochs * self.n_batches
        left = duration(seconds_a_step * (n_steps - step))
        self._say(f"step {step} of {n_steps}: loss {loss / n_spots:.1f} nats, about {left} to go")

    def _summed(self, values: Tensor) -> Tensor:
        """Over all processes."""
        return values if self.n_ranks == 1 else self.trainer.strategy.reduce(values, reduce_op="sum")  # pyright: ignore

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if (self.current_epoch + 1) % self.config.validate_every and self.current_epoch + 1 < self.config.max_epochs:
            return
        how = Decoding(samples=self.config.validation_samples, seed=self.config.seed)
        mine = self._own_rows(batch)
        assert batch.counts is not None
        expected = torch.zeros(batch.counts.shape, device=self.device)
        if len(mine):
            expected[mine] = self.model.predict_sections(batch.rows(mine), how).layers["log1p_mean"].float()
        mse, pcc = _log2_scores(self._summed(expected) / LN2, batch.counts)
        epoch, loss = self.current_epoch + 1, self._mean_loss()
        self.summary.history.append({"epoch": epoch, "train_loss": loss, "val_mse": mse, "val_pcc": pcc})
        best = min(self.summary.history, key=lambda entry: entry["val_mse"])
        if best["epoch"] == epoch:
            self.summary.best_epoch = epoch
            self._best = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        self.trainer.should_stop = self._is_patience_over()
        self._say(
            f"epoch {epoch}/{self.config.max_epochs}: loss {loss:.1f} nats, validation mse {mse:.3f} pcc {pcc:.3f}"
        )

    def _is_patience_over(self) -> bool:
        scores = [entry["val_mse"] for entry in self.summary.history]
        return bool(scores) and len(scores) - 1 - scores.index(min(scores)) >= self.config.patience

    def _own_rows(self, batch: Batch) -> Tensor:
        """Of the validation spots those that this process predicts: every ``n_ranks``-th spot, or section."""
        if self.model.unit == "spot":
            place = torch.arange(len(batch.features), device=batch.features.device)
        else:
            place = torch.unique(batch.section, return_inverse=True)[1]
        return torch.nonzero(place % self.n_ranks == self.global_rank)[:, 0]

    def on_train_epoch_end(self) -> None:
        if self._validation is None:
            loss = self._mean_loss()
            self._say(f"epoch {self.current_epoch + 1}/{self.config.max_epochs}: loss {loss:.1f} nats")

    def restore_best(self) -> None:
        """Load the weights of the best validation; without one, those of the end stay."""
        if self._best:
            self.model.load_state_dict(self._best)
        else:
            self.summary.best_epoch = self.config.max_epochs

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Of all processes, as each has losses of its own."""
        losses = torch.zeros(self.n_ranks, 0, 2)
        if self._losses:
            gathered: Tensor = self.all_gather(torch.stack(self._losses))  # pyright: ignore
            losses = gathered.reshape(self.n_ranks, len(self._losses), 2)
        checkpoint["genar"] = {
            "best": self._best,
            "best_epoch": self.summary.best_epoch,
            "history": self.summary.history,
            "losses": losses,
            "steps": self._steps(),
        }

    def _steps(self) -> list[int]:
        """What a step of another number of processes may differ in."""
        return [self.n_batches, self.n_parts]

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        kept = checkpoint["genar"]
        if kept.get("steps") not in (None, self._steps()):
            (n, parts), (mine, my_parts) = kept["steps"], self._steps()
            raise InputError(
                f"the unfinished run has {n} batches an epoch in {parts} parts each, this one {mine} in {my_parts}; "
                "start it with as many processes as before"
            )
        self._best, self.summary = kept["best"], FitSummary(kept["best_epoch"], kept["history"])
        losses = kept["losses"].to(self.device)
        known = self.global_rank < len(losses)  # torchrun may have started more this time
        self._losses = list(losses[self.global_rank] if known else torch.zeros_like(losses[0]))
        self.trainer.should_stop = self._is_patience_over()  # it may have been killed between that and its end

    def configure_optimizers(self):  # pyright: ignore
        config = self.config
        decayed = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Linear)}
        groups = [
            {"params": [p for p in self.model.parameters() if id(p) in decayed], "weight_decay": config.weight_decay},
            {"params": [p for p in self.model.parameters() if id(p) not in decayed], "weight_decay": 0.0},
        ]
        optimizer = OPTIMIZERS[config.optimizer](groups, lr=config.lr)
        n_steps = config.max_epochs * self.n_batches

        def rate(step: int) -> float:
            warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
            if config.schedule == "constant":
                return warm
            return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / n_steps))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _log2_scores(predicted: Tensor, counts: Tensor | None) -> tuple[float, float]:
    """Mean squared error over spots and genes, and mean PCC over genes (an undefined one counts 0), log2(1 + count)
    space."""
    assert counts is not None
    truth = log2p1(counts)
    x, y = predicted - predicted.mean(dim=0), truth - truth.mean(dim=0)
    spread = x.norm(dim=0) * y.norm(dim=0)
    pcc = torch.where(spread > 1e-8, (x * y).sum(dim=0) / spread.clamp(min=1e-8), 0.0)
    return float((predicted - truth).square().mean()), float(pcc.mean())


class Lines(Callback):
    """Tells of long epochs where no bar does: after a minute, two, four and eight, then every ten."""

    def __init__(self, tell: Callable[[float], None]):
        """``tell`` is given the seconds of a step."""
        self._tell = tell

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Time counts from here."""
        self._first, self._wait_s = trainer.global_step, 60.0
        self._start_s = self._last_s = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        """After the last batch the epoch's own line follows."""
        now, n_steps = time.monotonic(), trainer.global_step - self._first
        if now - self._last_s >= self._wait_s and n_steps and batch_idx + 1 < trainer.num_training_batches:
            self._tell((now - self._start_s) / n_steps)
            self._last_s, self._wait_s = now, min(600, 2 * self._wait_s)


def _callbacks(config: TrainConfig, module: _Module, folder: Path | None, progress: bool) -> list[Callback]:
    callbacks: list[Callback] = [RichProgressBar(leave=False) if progress else Lines(module.tell_step)]
    if config.ema_decay:  # of a short training the warm-up may be all
        n_steps = config.max_epochs * module.n_batches
        callbacks.append(Averages(config.ema_decay, min(config.warmup_steps, 2 * n_steps // 3)))
    if folder is not None:
        callbacks.append(Saver(folder, config.checkpoint_every_s, module.loss_so_far))
    return callbacks


def _is_lost(error: RuntimeError) -> bool:
    """Whether it says that a collective operation found nobody at the other end."""
    words = ("connection closed", "connection reset", "broken pipe", "timed out", "timeout", "nccl", "gloo")
    return any(word in str(error).lower() for word in words)


def _quiet_lightning() -> None:
    """Lightning's notes on devices and data loaders are for its developers, not for our users."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"pytorch_lightning.*")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
