"""The frozen encoder with a small head: a softmax over counts for every gene (the foundation baseline of the paper).

What is unusual about it. It predicts a distribution over counts with a head of its own for each gene, so that nearly
all of its parameters lie there. To the hard cross-entropy 99 and 100 are no more alike than 0 and 100. Head and loss
run gene by gene, so that logits of all genes never exist in training.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from genar.errors import InputError
from genar.models._base import Batch, Card, Counts, LossOutput, Spots
from genar.models._count_loss import cross_entropy, summed
from genar.models._decoding import Decoding, summarise
from genar.models._spot import SpotRival
from genar.models._training_spots import max_count_of


@dataclass(frozen=True)
class FoundationConfig:
    """Size of the trunk and classes of a count; the defaults are the paper's text (two residual blocks)."""

    width: int = 512
    blocks: int = 2
    """residual blocks; the class of the released code has 1 by default, its entry point builds 0"""
    dropout: float = 0.2
    max_count: int = 2000
    """C: counts are clipped to 0..C; 0: what the training counts need"""

    def __post_init__(self):
        if self.width < 1 or self.blocks < 0 or self.max_count < 0 or not 0 <= self.dropout < 1:
            raise InputError("model foundation: width must be >= 1, blocks and max_count >= 0, dropout in [0, 1)")


class Residual(nn.Module):
    """h + Dropout(GELU(Linear(h)))."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout))

    def forward(self, h: Tensor) -> Tensor:
        """[B, H] -> [B, H]."""
        return h + self.branch(h)


class Foundation(SpotRival):
    """Frozen features, a small residual network, and a softmax over counts for every gene."""

    config = FoundationConfig
    can_stream = True
    decodings = ("greedy", "mean")
    may_be_none = ("blocks", "max_count")
    block = 16  # logits [spots, G, V] exist
    presets: ClassVar = {"small": {"width": 64, "max_count": 0}, "official": {}}
    # The paper's: Adam 1e-4, L2 1e-4, batch 64, constant rate, clip 1.0, at most 50 epochs. Few spots give few steps,
    # hence the higher rate; more epochs over-fit.
    train_defaults: ClassVar = {
        "max_epochs": 20, "batch_size": 64, "lr": 1e-3, "optimizer": "adam", "weight_decay": 1e-4,
        "schedule": "constant", "warmup_steps": 0, "ema_decay": 0.0,
    }  # fmt: skip
    card = Card(
        title="Foundation model with discrete heads (table 4 of the GenAR paper)",
        target="the raw count, clipped; greedy takes the likeliest count of each gene (as the paper), mean its "
        "expectation",
        kept="everything: trunk, one softmax a gene, hard cross-entropy. Preset small is narrower and has as many "
        "classes as the training counts need; features come standardised",
        mended="two residual blocks, as the paper says (what was shipped has none)",
    )

    def __init__(self, n_features: int, n_genes: int, config: FoundationConfig):
        super().__init__(n_features, n_genes, config)
        if config.max_count == 0:
            raise InputError("model foundation: max_count is 0 (auto); resolve it from the training counts first")
        width, self.n_classes = config.width, config.max_count + 1
        self.trunk = nn.Sequential(
            nn.Linear(n_features, width), nn.GELU(), nn.Dropout(config.dropout),
            *(Residual(width, config.dropout) for _ in range(config.blocks)),
        )  # fmt: skip
        self.head = nn.Linear(width, n_genes * self.n_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    @classmethod
    def create(cls, n_features: int, spots: Spots, preset: str, settings) -> "Foundation":
        """Sized for these spots."""
        assert spots.counts is not None
        config = cls.configure(preset, settings)
        config = replace(config, max_count=max_count_of(config.max_count, spots.largest_counts()))
        return cls(n_features, spots.counts.shape[1], config)

    def loss(self, batch: Batch) -> LossOutput:
        """Cross-entropy of the counts, mean over spots and genes (nats)."""
        assert batch.counts is not None
        h = self.trunk(self.standardised(batch.features))[:, None]
        heads = self.head.weight.unflatten(0, (self.n_genes, -1)).unbind()
        biases = self.head.bias.unflatten(0, (self.n_genes, 1, -1)).unbind()
        genes = batch.counts.split(1, dim=1)
        parts = [summed(cross_entropy, h, *one) for one in zip(heads, biases, genes, strict=True)]
        total = torch.stack(parts).sum() / batch.counts.numel()
        return LossOutput(total, total.detach()[None])

    def predict_block(self, batch: Batch, how: Decoding) -> Counts:
        """The likeliest counts (``greedy``) or the rounded expectations (``mean``)."""
        logits = self.head(self.trunk(self.standardised(batch.features))).unflatten(1, (self.n_genes, -1))
        p = logits.softmax(dim=2)
        greedy = how.decode == "greedy"
        point = logits.argmax(dim=2) if greedy else summarise(p, ("mean",))["mean"].round().long()
        return Counts(point, how.decode, summarise(p, how.kept))


MODEL = Foundation
