"""Fit a model on the spots of the training sections; what a step of it is, :mod:`genar.training_loop` has.

The epoch is chosen by free-running generation on a validation part of the *training* sections; the teacher-forced
loss says nothing of what generation makes of its own tokens.
"""

import hashlib
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from genar import machine
from genar.data import contract
from genar.errors import InputError
from genar.models import Model, Spots
from genar.models._training_spots import strips
from genar.processes import ALONE, Group
from genar.streaming import AnySpots, StoredSpots, look_at
from genar.training_config import RECIPES, FitSummary, TrainConfig, paper_recipe, train_config_from_dict

__all__ = [
    "RECIPES", "FitSummary", "TrainConfig", "fit", "make_spots", "paper_recipe", "split_validation",
    "train_config_from_dict",
]  # fmt: skip


def make_spots(
    section: AnnData,
    features: np.ndarray | Tensor,
    genes: Sequence[str] | None = None,
    *,
    n_blocks: int = 1,
    patches: Tensor | None = None,
) -> Spots:
    """The spots of a section for a model, with the counts of ``genes`` where given; ``features`` float32 [N, views, F],
    of ``n_blocks`` equal blocks; ``patches`` uint8 [N, crops, 3, px, px] for a model that takes pixels.

    A spot's random numbers follow its name and its section's, so they stay the same in any order or batch. Raises
    ``InputError`` where features are of another shape or of other spots, one is no finite number, or the section holds
    other things than raw counts.
    """
    features = torch.as_tensor(features).detach().cpu().float()
    if features.ndim != 3 or len(features) != section.n_obs:
        raise InputError(
            f"section {contract.name(section)}: features of shape {list(features.shape)}; expected "
            f"[{section.n_obs} spots, views, width], as genar.read_features gives them"
        )
    if patches is not None and len(patches) != section.n_obs:
        raise InputError(f"section {contract.name(section)}: patches of {len(patches)} spots, {section.n_obs} expected")
    check_finite(features, section.obs_names, contract.name(section))
    if genes is not None:
        contract.check_counts(section, f"section {contract.name(section)}")
    xy = contract.coords_um(section)
    extent = np.where(np.ptp(xy, axis=0) > 0, np.ptp(xy, axis=0), 1)
    ids = [zlib.crc32(f"{contract.name(section)}/{spot}".encode()) for spot in section.obs_names]
    counts = None if genes is None else torch.from_numpy(contract.counts(section, list(genes))).long()
    return Spots(
        features,
        torch.from_numpy(xy).float(),
        torch.from_numpy((xy - xy.min(axis=0)) / extent).float(),
        torch.tensor(ids),
        torch.full((len(xy),), _section_key(contract.name(section))),
        counts,
        n_blocks,
        patches,
    )


def check_finite(features: Tensor, spots: pd.Index, section: str) -> None:
    """``InputError`` naming the first of ``spots`` whose features [N, ...] are no finite numbers."""
    finite = torch.isfinite(features).flatten(1).all(dim=1)
    if not finite.all():
        raise InputError(
            f"section {section}: the features of spot {spots[int(finite.int().argmin())]} hold NaN or infinite values; "
            "make or import them again"
        )


def _section_key(name: str) -> int:
    """63 bits of the name's hash."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def fit(
    model: Model,
    spots: AnySpots,
    config: TrainConfig | None = None,
    *,
    folder: Path | None = None,
    log: Callable[[str], None] = lambda line: None,
    progress: bool = False,
    group: Group = ALONE,
    device: str = "auto",
) -> FitSummary:
    """Fit ``model`` in place on the training spots and leave it on the CPU in evaluation mode with the chosen weights.
    Without a ``config`` by the model's own recipe, as ``genar train`` does.

    ``StoredSpots`` are read from their files batch by batch; a model that cannot be trained so (``Model.can_stream``)
    takes them all into memory.

    The processes of ``group`` share every batch (Lightning's DDP), each with all spots at hand: every one of them calls
    this function and leaves it with the same weights. ``folder`` takes a resume file after every epoch and every
    ``checkpoint_every_s``; a call that finds one there goes on from that very step. The same seed, data and machine
    give the same weights, bit for bit, on a CPU, however often the run was stopped. Raises ``InputError`` where the
    processes are more than the spots of a batch or the resume file is damaged, ``LostProcessError`` where a process is
    gone, ``StoppedError`` where SIGTERM or SIGINT came, once the resume file is written.
    """
    config = config or train_config_from_dict({}, own=model.train_defaults)
    device = machine.of_models(machine.device(device))
    torch.manual_seed(config.seed)
    if isinstance(spots, StoredSpots) and not model.can_stream:
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
    from genar import training_loop  # Lightning, which is slow to import

    summary = training_loop.run(
        model, training, validation, config,
        folder=folder, log=log, progress=progress, group=group, device=device,
    )  # fmt: skip
    model.eval()
    return summary


def split_validation(spots: AnySpots, share: float) -> tuple[AnySpots, AnySpots | None]:
    """Training spots, and of each section one strip of ``share`` of its spots (``None`` at share 0).

    A strip and not scattered spots: neighbours look alike, and scattered ones would be half known.
    """
    if share == 0:
        return spots, None
    n_strips = max(2, round(1 / share))
    held = torch.zeros(len(spots), dtype=torch.bool)
    for section in spots.section.unique():
        rows = torch.nonzero(spots.section == section)[:, 0]
        if len(rows) >= n_strips:
            strip = strips(spots.coords_um[rows], n_strips)
            held[rows[strip == n_strips // 3]] = True  # not at the border of the tissue
    if not held.any():
        return spots, None
    return spots.rows(torch.nonzero(~held)[:, 0]), spots.rows(torch.nonzero(held)[:, 0])
