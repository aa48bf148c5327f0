"""BLEEP: image and expression in one space, and expression looked up instead of regressed.

What is unusual about it. Nothing is predicted from the image: its embedding only chooses 50 training spots, whose
expression is averaged. And the contrastive targets are soft: spots whose images or expression resemble each other count
as partners, too. An embedding leaves a layer norm with a squared length near its width, so that at temperature 1 the
soft targets are all but hard.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from genar.errors import InputError
from genar.models._base import Batch, Card, LossOutput, log2p1
from genar.models._retrieval import RetrievalRival

WEIGHTINGS = ("average", "distance")


@dataclass(frozen=True)
class BLEEPConfig:
    """Sizes of the two heads, the loss and the look-up; the defaults are the published ones."""

    width: int = 256
    """D of the common space"""
    dropout: float = 0.1
    tau: float = 1.0
    """temperature of similarities and of the soft targets"""
    neighbours: int = 50
    """training spots that are averaged; 1 is the original's ``simple``"""
    weighting: str = "average"
    """``average``: all alike; ``distance``: by exp(-squared distance) of the embeddings, which leaves little but the
    nearest"""

    def __post_init__(self):
        if self.weighting not in WEIGHTINGS:
            raise InputError(f"model bleep: weighting must be one of {', '.join(WEIGHTINGS)}, found {self.weighting!r}")
        if self.width < 1 or self.neighbours < 1 or not self.tau > 0 or not 0 <= self.dropout < 1:
            raise InputError("model bleep: width and neighbours must be >= 1, tau > 0, dropout in [0, 1)")


class ProjectionHead(nn.Module):
    """p = Linear(x), then LN(p + Linear(GELU(p))): [B, n_inputs] -> [B, D]."""

    def __init__(self, n_inputs: int, width: int, dropout: float):
        super().__init__()
        self.project = nn.Linear(n_inputs, width)
        self.refine = nn.Sequential(nn.GELU(), nn.Linear(width, width), nn.Dropout(dropout))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Project and refine."""
        p = self.project(x)
        return self.norm(p + self.refine(p))


def soft_contrast(image: Tensor, expression: Tensor, tau: float = 1.0) -> Tensor:
    """Mean over the batch of the two cross-entropies with soft targets, from embeddings [B, D] each.

    The targets are softmax(mean of both similarities within their kind); their transpose, which the second term
    takes, does not sum to one over a row: so does the original.
    """
    logits = expression @ image.T / tau  # rows: expression
    likeness = (image @ image.T + expression @ expression.T) / 2
    target = (likeness / tau).softmax(dim=1)
    by_expression = -(target * logits.log_softmax(dim=1)).sum(dim=1)
    by_image = -(target.T * logits.T.log_softmax(dim=1)).sum(dim=1)
    return (by_expression + by_image).mean() / 2


class BLEEP(RetrievalRival):
    """Image and expression embedded by a soft contrastive loss; predicts the mean of the 50 nearest training spots."""

    config = BLEEPConfig
    presets: ClassVar = {"small": {}, "official": {}}
    # Published: AdamW 1e-3, decay 1e-3, batch 256, no schedule, no clipping, 4 epochs of 9,000 spots (140 steps).
    # A few hundred spots need more epochs for as many steps.
    train_defaults: ClassVar = {
        "max_epochs": 60, "batch_size": 256, "lr": 1e-3, "weight_decay": 1e-3, "schedule": "constant",
        "warmup_steps": 0, "clip": 0.0, "ema_decay": 0.0,
    }  # fmt: skip
    card = Card(
        title="BLEEP (Xie et al. 2023, Spatially Resolved Gene Expression Prediction from H&E Histology Images via "
        "Bi-modal Contrastive Learning)",
        target="the original averages ln(1 + normalised count) after Harmony; here log2(1 + count) of the training "
        "spots is embedded and averaged",
        kept="both projection heads, the loss with soft targets, the look-up by cosine",
        lost="the ResNet-50 that is trained along: the image head reads standardised features of a frozen encoder; "
        "with a panel of 200 genes (3,467 in the original) the expression head sees less to tell spots apart by",
        mended="genes and batch correction never see the held-out section; keys are never of the query's own section "
        "(with a single training section: of its strip); gene names keep to their genes where one is undefined",
    )

    def __init__(self, n_features: int, n_genes: int, config: BLEEPConfig, *, n_keys: int = 0):
        super().__init__(n_features, n_genes, config, n_keys=n_keys)
        self.image = ProjectionHead(n_features, config.width, config.dropout)
        self.expression = ProjectionHead(n_genes, config.width, config.dropout)

    def embed_image(self, features: Tensor) -> Tensor:
        """Standardised features [B, F] -> [B, D]."""
        return self.image(features)

    def embed_expression(self, log2_counts: Tensor) -> Tensor:
        """log2(1 + count) [B, G] -> [B, D]."""
        return self.expression(log2_counts)

    def loss(self, batch: Batch) -> LossOutput:
        """See :func:`soft_contrast`; nats."""
        assert batch.counts is not None
        image = self.embed_image(self.standardised(batch.features))
        total = soft_contrast(image, self.embed_expression(log2p1(batch.counts)), self.settings.tau)
        return LossOutput(total, total.detach()[None])

    def weights(self, queries: Tensor, nearest: Tensor, there: Tensor) -> Tensor:
        """All alike, or exp(least squared distance - squared distance)."""
        if self.settings.weighting == "average":
            return super().weights(queries, nearest, there)
        apart = (nearest - queries[:, None]).square().sum(dim=2)
        apart = apart.masked_fill(~there, torch.finfo(apart.dtype).max)
        return torch.exp(apart.min(dim=1, keepdim=True).values - apart)


MODEL = BLEEP
