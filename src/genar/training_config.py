"""How a model is trained: the configuration, its named recipes, and what came of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from types import MappingProxyType

import torch

from genar.errors import InputError

RESUME_FILE = "last.ckpt"  # of an unfinished training, in its folder
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. The defaults were chosen on validation sections (docs/accuracy.md); ``paper_recipe()``
    is the paper's."""

    max_epochs: int = 6
    """0 leaves the model at its start"""
    batch_size: int = 64
    """spots a step, over all processes; a model whose unit is the section takes one section a step and process"""
    accumulate: int = 1
    """batches of spots whose gradients are added before a step"""
    lr: float = 3e-4
    """rate after the warm-up"""
    optimizer: str = "adamw"
    """``adamw``, ``adam`` with the decay as an L2 term (paper), or ``sgd`` with momentum 0.9"""
    weight_decay: float = 0.05
    """on the weights of linear layers"""
    schedule: str = "cosine"
    """``cosine`` after a linear warm-up, or ``constant``"""
    warmup_steps: int = 20
    """steps over which the rate rises to ``lr``"""
    clip: float = 1.0
    """largest gradient norm"""
    ema_decay: float = 0.98
    """of the averaged weights, per step, from the end of the warm-up or two thirds of a short training on; 0 keeps the
    last weights"""
    validation_share: float = 0.0
    """share of each training section's spots, in one strip, on which the epoch is chosen: below a half, and the
    nearest of a half, a third, a quarter, …; 0 trains on all for max_epochs: a few epochs from a calibrated start leave
    nothing to choose, and the spots are worth more"""
    validate_every: int = 3
    """epochs between validations; the last is one, too"""
    patience: int = 4
    """validations without a better one before training stops"""
    validation_samples: int = 4
    """trajectories a spot in validation"""
    precision: str = "fp32"
    """``fp32`` or ``bf16`` (mixed)"""
    memory_gib: float = 4.0
    """what the activations of a step may take, by estimate; a batch of more goes through in parts whose gradients are
    added"""
    checkpoint_every_s: float = 60.0
    """seconds between resume files, beside the one after every epoch; 0: after every step. Where writing one takes
    long they are further apart, so that it takes at most a twentieth of the time"""
    seed: int = 2021
    """of the first weights, and of all that training draws"""

    def __post_init__(self):
        for name, allowed in (
            ("optimizer", tuple(OPTIMIZERS)),
            ("schedule", ("cosine", "constant")),
            ("precision", tuple(PRECISIONS)),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"train: {name} must be one of {', '.join(allowed)}, found {getattr(self, name)!r}")
        if self.max_epochs < 0:
            raise InputError(f"train: max_epochs must be at least 0, found {self.max_epochs}")
        for name in ("batch_size", "accumulate", "validate_every", "patience", "validation_samples"):
            if getattr(self, name) < 1:
                raise InputError(f"train: {name} must be at least 1, found {getattr(self, name)}")
        if not self.checkpoint_every_s >= 0:
            raise InputError(f"train: checkpoint_every_s must be at least 0, found {self.checkpoint_every_s}")
        if not self.memory_gib > 0:
            raise InputError(f"train: memory_gib must be > 0, found {self.memory_gib}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"train: seed must be at least 0 and below 2**32, found {self.seed}")
        if not (self.weight_decay >= 0 and self.clip >= 0 and self.warmup_steps >= 0):
            raise InputError("train: weight_decay, clip and warmup_steps must not be negative")
        if not (self.lr > 0 and 0 <= self.ema_decay < 1 and 0 <= self.validation_share < 0.5):
            raise InputError("train: lr must be > 0, ema_decay in [0, 1), validation_share in [0, 0.5)")


@dataclass
class FitSummary:
    """What training did: the history by epoch and the epoch that was kept."""

    best_epoch: int = 0
    history: list[dict] = field(default_factory=list)
    """a dict per validation: epoch, train_loss (nats per spot), val_mse and val_pcc (log2 space, free-running)"""


def paper_recipe(**changes) -> TrainConfig:
    """Section 4.2 and appendix D: Adam, 1e-4, L2 1e-4, batch 64, constant rate, at most 50 epochs."""
    own = {
        "max_epochs": 50, "lr": 1e-4, "optimizer": "adam", "weight_decay": 1e-4, "schedule": "constant",
        "warmup_steps": 0, "ema_decay": 0.0, "validation_share": 0.1,
        "validation_samples": 1,
    }  # fmt: skip
    return TrainConfig(**{**own, **changes})


RECIPES: dict[str, Callable[..., TrainConfig]] = {"default": TrainConfig, "paper": paper_recipe}


def train_config_from_dict(facts: Mapping, recipe: str = "default", own: Mapping = MappingProxyType({})) -> TrainConfig:
    """A configuration from plain values over a recipe; ``own`` is what recipe ``default`` means for the model.

    Raises ``InputError`` naming keys that are not known.
    """
    known = {f.name for f in fields(TrainConfig)}
    if unknown := sorted(set(facts) - known):
        raise InputError(f"train: unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    if recipe not in RECIPES:
        raise InputError(f"train: recipe {recipe!r} is not known; expected one of {', '.join(RECIPES)}")
    return RECIPES[recipe](**{**(own if recipe == "default" else {}), **facts})
