"""Fit a model on the spots of the training sections: the Lightning loop, the choice of an epoch.

The epoch is chosen by free-running generation on a validation part of the *training* sections; the teacher-forced
loss says nothing of what generation makes of its own tokens.
"""

import copy
import hashlib
import logging
import math
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from anndata import AnnData
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.plugins.environments import LightningEnvironment  # pyright: ignore
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from genar import machine
from genar.batches import Loader, SectionLoader, Share, SpotLoader, epoch_seed, step_seed
from genar.data import contract
from genar.errors import InputError, LostProcessError
from genar.models import Batch, Counts, Decoding, Model, Spots
from genar.models._base import LN2, log2p1
from genar.models.ridge import blocks
from genar.processes import ALONE, Group, srun_environment
from genar.resume import RESUME_FILE, Averages, Saver, WholeFiles, check_whole
from genar.streaming import AnySpots, StoredSpots, StreamedLoader, look_at
from genar.training_config import OPTIMIZERS, PRECISIONS, RECIPES, TrainConfig, paper_recipe, train_config_from_dict

__all__ = [
    "RECIPES", "FitSummary", "TrainConfig", "count_parts", "fit", "make_spots", "paper_recipe", "predict_sections",
    "split_validation", "train_config_from_dict",
]  # fmt: skip


def make_spots(
    section: AnnData,
    features: np.ndarray,
    genes: Sequence[str] | None = None,
    *,
    n_blocks: int = 1,
    patches: Tensor | None = None,
) -> Spots:
    """The spots of a section for a model, with the counts of ``genes`` where given; ``features`` float32 [N, views, F],
    of ``n_blocks`` equal blocks; ``patches`` uint8 [N, crops, 3, px, px] for a model that takes pixels.

    A spot's random numbers follow its name and its section's, so they stay the same in any order or batch. Raises
    ``InputError`` where a feature is no finite number.
    """
    if not np.isfinite(features).all():
        spot = section.obs_names[int(np.argmin(np.isfinite(features).reshape(len(features), -1).all(axis=1)))]
        raise InputError(
            f"section {contract.name(section)}: the features of spot {spot} hold NaN or infinite values; "
            "make or import them again"
        )
    xy = contract.coords_um(section)
    extent = np.where(np.ptp(xy, axis=0) > 0, np.ptp(xy, axis=0), 1)
    ids = [zlib.crc32(f"{contract.name(section)}/{spot}".encode()) for spot in section.obs_names]
    counts = None if genes is None else torch.from_numpy(contract.counts(section, list(genes))).long()
    return Spots(
        torch.from_numpy(features),
        torch.from_numpy(xy).float(),
        torch.from_numpy((xy - xy.min(axis=0)) / extent).float(),
        torch.tensor(ids),
        torch.full((len(xy),), _section_key(contract.name(section))),
        counts,
        n_blocks,
        patches,
    )


def _section_key(name: str) -> int:
    """63 bits of the name's hash."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


@dataclass
class FitSummary:
    """What training did: the history by epoch and the epoch that was kept."""

    best_epoch: int = 0
    history: list[dict] = field(default_factory=list)
    """a dict per validation: epoch, train_loss (nats per spot), val_mse and val_pcc (log2 space, free-running)"""


def fit(
    model: Model,
    spots: AnySpots,
    config: TrainConfig,
    *,
    folder: Path | None = None,
    log: Callable[[str], None] = lambda line: None,
    progress: bool = False,
    group: Group = ALONE,
    device: str = "auto",
) -> FitSummary:
    """Fit ``model`` in place on the training spots and leave it on the CPU in evaluation mode with the chosen weights.

    ``StoredSpots`` are read from their files batch by batch; a model that cannot be trained so (``Model.sampled``)
    takes them all into memory.

    The processes of ``group`` share every batch (Lightning's DDP), each with all spots at hand: every one of them calls
    this function and leaves it with the same weights. ``folder`` takes a resume file after every epoch and every
    ``checkpoint_every_s``; a call that finds one there goes on from that very step. The same seed, data and machine
    give the same weights, bit for bit, on a CPU, however often the run was stopped. Raises ``InputError`` where the
    processes are more than the spots of a batch or the resume file is damaged, ``LostProcessError`` where a process is
    gone, ``StoppedError`` where SIGTERM or SIGINT came, once the resume file is written.
    """
    device = machine.of_models(machine.device(device))
    pl.seed_everything(config.seed, verbose=False)
    if isinstance(spots, StoredSpots) and not model.sampled:
        spots = spots.in_memory()
    if not model.gradient:
        model.prepare(look_at(model, spots))
        model.eval()
        return FitSummary()
    if model.unit == "section" and config.accumulate > 1:
        raise InputError("train: accumulate adds batches of spots; this model takes a section a step, leave it at 1")
    if config.precision == "bf16" and device == "cpu" and (gain := machine.bf16_gain()) < 1:
        warnings.warn(
            f"bf16 will be slower than fp32: this CPU multiplies matrices in it at {gain:.2g} times the speed",
            stacklevel=2,
        )
    training, validation = split_validation(spots, config.validation_share)
    model.prepare(look_at(model, training))  # the validation strip must not be known from here either
    validation = None if validation is None else look_at(model, validation)
    if config.max_epochs == 0:
        model.eval()
        return FitSummary()
    module = _Module(model, training, validation, config, log, group.size)
    if module.n_parts > 1:
        log(f"a batch goes through in {module.n_parts} parts, to stay within {config.memory_gib:g} GiB of activations")
    _quiet_lightning()
    resume = folder / RESUME_FILE if folder and (folder / RESUME_FILE).is_file() else None
    if resume:
        check_whole(resume)
    trainer = _trainer(config, module, folder, progress, group, device)
    try:
        trainer.fit(module, ckpt_path=resume, weights_only=True if resume else None)
    except RuntimeError as error:
        if group.size > 1 and _is_lost(error):
            raise LostProcessError(
                f"one of the {group.size} processes is gone ({str(error).splitlines()[0]})"
            ) from error
        raise
    if resume and not module.started:  # it was trained to its end: Lightning does nothing, not even take the averages
        module.load_state_dict(torch.load(resume, map_location="cpu", weights_only=True)["state_dict"])
    module.restore_best()
    model.eval()
    return module.summary


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
        callbacks=_callbacks(config, config.max_epochs * module.n_batches, folder, progress),
        default_root_dir=folder,
    )


def _environments(group: Group) -> list:
    """Who started the processes; Lightning finds torchrun by itself."""
    if group.by == "srun":
        return [srun_environment()]
    return [] if group.by else [LightningEnvironment()]


def split_validation(spots: AnySpots, share: float) -> tuple[AnySpots, AnySpots | None]:
    """Training spots, and of each section one strip of ``share`` of its spots (``None`` at share 0).

    A strip and not scattered spots: neighbours look alike, and scattered ones would be half known.
    """
    if share == 0:
        return spots, None
    n_blocks = max(2, round(1 / share))
    held = torch.zeros(len(spots), dtype=torch.bool)
    for section in spots.section.unique():
        rows = torch.nonzero(spots.section == section)[:, 0]
        if len(rows) >= n_blocks:
            strip = blocks(spots.coords_um[rows], n_blocks)
            held[rows[strip == n_blocks // 3]] = True  # not at the border of the tissue
    if not held.any():
        return spots, None
    return spots.rows(torch.nonzero(~held)[:, 0]), spots.rows(torch.nonzero(held)[:, 0])


def predict_sections(model: Model, batch: Batch, how: Decoding) -> Counts:
    """Counts of spots of one or more sections, each section by itself where that is the model's unit."""
    if model.unit == "spot":
        return model.predict(batch, how)
    return Counts.join([model.predict(section, how) for section in batch.sections()])


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
        self.n_batches = math.ceil((len(training.section.unique()) if whole else len(training)) / n_together)
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
        if self.model.unit == "section":
            return SectionLoader(self._training, config.seed, lambda: self.current_epoch, rank, self.n_ranks)
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

    def _mean_loss(self) -> float:
        """Of the spots since the last call, over all processes."""
        total = torch.stack(self._losses).sum(dim=0) if self._losses else torch.zeros(2, device=self.device)
        self._losses = []
        loss, n_spots = self._summed(total).tolist()
        if not math.isfinite(loss):
            raise InputError(
                f"training: the loss is {loss} in epoch {self.current_epoch + 1}; a lower lr (now {self.config.lr:g}) "
                "or other settings of the model may help"
            )
        return loss / max(n_spots, 1)

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
            expected[mine] = predict_sections(self.model, batch.rows(mine), how).layers["log1p_mean"].float()
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


def _callbacks(config: TrainConfig, n_steps: int, folder: Path | None, progress: bool) -> list[Callback]:
    callbacks: list[Callback] = [RichProgressBar(leave=False)] if progress else []
    if config.ema_decay:  # of a short training the warm-up may be all
        callbacks.append(Averages(config.ema_decay, min(config.warmup_steps, 2 * n_steps // 3)))
    if folder is not None:
        callbacks.append(Saver(folder, config.checkpoint_every_s))
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
