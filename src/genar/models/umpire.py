"""UMPIRE, its style: image and expression aligned by contrast, expression read as a ranking of genes.

What is unusual about it. The original's expression tower sees no counts, only which genes stand first when each count
is measured against the gene's mean over a corpus; and both towers come from pre-training on millions of spots, which is
its contribution and is **not** part of this. Against BLEEP: embeddings of unit length, a learned temperature, hard
targets, linear projections.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from genar.errors import InputError
from genar.models._base import Batch, Card, LossOutput, Spots, log2p1
from genar.models._retrieval import RetrievalRival
from genar.models._training_spots import mean_and_scale

TOWERS = ("mlp", "ranks")
_FIRST_SHARPNESS = math.log(1 / 0.07)
_MOST_SHARPNESS = math.log(100.0)
# Tokens of the ranking: 0 pads, gene g is g + 1.
_PAD = 0


@dataclass(frozen=True)
class UMPIREConfig:
    """Sizes of towers and common space, and the look-up; the defaults are the published ones."""

    width: int = 512
    """of the common space, and of the rank tower"""
    tower: str = "ranks"
    """how expression is read: ``ranks``, a transformer over the genes in the order of count over mean count; ``mlp``:
    two layers on standardised log2 counts"""
    depth: int = 12
    """of the rank tower"""
    heads: int = 16
    """of the rank tower"""
    hidden: int = 1024
    """of the tower's feed-forward layers"""
    neighbours: int = 50
    """training spots that are averaged; the original does not say how many, this is BLEEP's number"""

    def __post_init__(self):
        if self.tower not in TOWERS:
            raise InputError(f"model umpire: tower must be one of {', '.join(TOWERS)}, found {self.tower!r}")
        if min(self.width, self.depth, self.heads, self.hidden, self.neighbours) < 1:
            raise InputError("model umpire: width, depth, heads, hidden and neighbours must be >= 1")
        if self.tower == "ranks" and self.width % self.heads:
            raise InputError(f"model umpire: width {self.width} is no multiple of heads {self.heads}")


class RankTower(nn.Module):
    """Ranked gene tokens int64 [B, L] -> [B, D]: the mean over all that are no padding.

    The published one has a vocabulary of 20,345 and a context of 1,500 (36.4 M parameters in use).
    """

    def __init__(self, vocabulary: int, context: int, config: UMPIREConfig):
        super().__init__()
        self.token = nn.Embedding(vocabulary, config.width)
        self.position = nn.Parameter(torch.randn(context, config.width) * 0.02)
        nn.init.normal_(self.token.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            config.width, config.heads, config.hidden, dropout=0.0, batch_first=True, layer_norm_eps=1e-12
        )
        self.layers = nn.TransformerEncoder(layer, config.depth, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed rankings; one without any gene is read as its padding."""
        padding = tokens == _PAD
        padding = padding & ~padding.all(dim=1, keepdim=True)
        x = self.layers(self.token(tokens) + self.position[: tokens.shape[1]], src_key_padding_mask=padding)
        kept = (~padding)[:, :, None]
        return (x * kept).sum(dim=1) / kept.sum(dim=1)


def rank_tokens(log2_counts: Tensor, gene_mean: Tensor) -> Tensor:
    """Genes int64 [B, G] in falling order of count over ``gene_mean`` [G], as g + 1; genes without a count pad the end.

    A spot's depth changes nothing of it.

    >>> rank_tokens(torch.log2(1 + torch.tensor([[4.0, 0.0, 3.0]])), torch.tensor([4.0, 1.0, 1.0]))
    tensor([[3, 1, 0]])
    """
    counts = (torch.exp2(log2_counts) - 1).round()
    order = (counts / gene_mean).argsort(dim=1, descending=True, stable=True)
    return torch.where(counts.gather(1, order) > 0, order + 1, _PAD)


class UMPIRE(RetrievalRival):
    """UMPIRE-style, without pre-training: contrastive alignment of features and expression; predicts the mean of the 50
    nearest training spots."""

    config = UMPIREConfig
    presets: ClassVar = {"small": {"width": 256, "tower": "mlp", "hidden": 512}, "official": {}}
    # Published: AdamW 1e-4, decay 1e-3, batch 128, cosine over 1,226,446 steps, warm-up 1 step. Here some hundred steps
    # at a higher rate.
    train_defaults: ClassVar = {
        "max_epochs": 40, "batch_size": 128, "lr": 5e-4, "weight_decay": 1e-3, "schedule": "cosine",
        "warmup_steps": 1, "clip": 0.0, "ema_decay": 0.0,
    }  # fmt: skip
    card = Card(
        title="UMPIRE-style, without pre-training (after Han et al. 2024, UMPIRE)",
        target="the original aligns gene ranks and regresses nothing; here log2(1 + count) of the nearest training "
        "spots is averaged",
        kept="contrastive alignment with a learned temperature, linear projection of the image, look-up by cosine; the "
        "tower over gene ranks with preset official",
        lost="both pre-trainings (millions of expression profiles, hundreds of thousands of pairs), which are its "
        "contribution; the image tower stays frozen; preset small reads log2 counts by two layers in place of ranks; "
        "gene means are those of the training spots, not of a corpus",
        mended="padding is left out of the mean over tokens, and the three genes that rank first are not; keys are "
        "never of the query's own section (with a single training section: of its strip)",
    )
    gene_mean: Tensor
    log2_mean: Tensor
    log2_scale: Tensor

    def __init__(self, n_features: int, n_genes: int, config: UMPIREConfig, *, n_keys: int = 0):
        super().__init__(n_features, n_genes, config, n_keys=n_keys)
        for name in ("gene_mean", "log2_mean", "log2_scale"):
            self.register_buffer(name, torch.ones(n_genes))
        width = config.width
        self.image = nn.Linear(n_features, width)
        self.tower = (
            RankTower(n_genes + 1, n_genes, config)
            if config.tower == "ranks"
            else nn.Sequential(nn.Linear(n_genes, config.hidden), nn.GELU(), nn.Linear(config.hidden, width))
        )
        self.expression = nn.Linear(width, width)
        self.log_sharpness = nn.Parameter(torch.tensor(_FIRST_SHARPNESS))

    @classmethod
    def check_settings(cls, preset: str, settings: Mapping, n_genes: int | None = None) -> None:
        """Two layers have neither depth nor heads."""
        super().check_settings(preset, settings, n_genes)
        unused = [name for name in ("depth", "heads") if name in settings]
        if unused and cls.configure(preset, settings).tower == "mlp":
            raise InputError(f"model umpire: {' and '.join(unused)} are the rank tower's; set tower=ranks, too")

    @torch.no_grad()
    def prepare(self, spots: Spots) -> None:
        """Keep the training spots; set the genes' means and scales."""
        assert spots.counts is not None
        super().prepare(spots)
        mean = spots.counts.double().mean(dim=0).float()
        self.gene_mean.copy_(torch.where(mean > 0, mean, torch.ones_like(mean)))
        for buffer, value in zip((self.log2_mean, self.log2_scale), mean_and_scale(log2p1(spots.counts)), strict=True):
            buffer.copy_(value)

    def embed_image(self, features: Tensor) -> Tensor:
        """Standardised features [B, F] -> [B, D]."""
        return self.image(features)

    def embed_expression(self, log2_counts: Tensor) -> Tensor:
        """log2(1 + count) [B, G] -> [B, D], by ranks or values."""
        if self.settings.tower == "ranks":
            return self.expression(self.tower(rank_tokens(log2_counts, self.gene_mean)))
        return self.expression(self.tower((log2_counts - self.log2_mean) / self.log2_scale))

    def loss(self, batch: Batch) -> LossOutput:
        """See :func:`contrast`; nats."""
        assert batch.counts is not None
        image = self.embed_image(self.standardised(batch.features))
        expression = self.embed_expression(log2p1(batch.counts))
        total = contrast(image, expression, self.log_sharpness.clamp(max=_MOST_SHARPNESS).exp())
        return LossOutput(total, total.detach()[None])


def contrast(image: Tensor, expression: Tensor, sharpness: Tensor | float) -> Tensor:
    """Mean of both cross-entropies of finding the partner among the batch, by cosine; ln B where all are alike."""
    logits = sharpness * fn.normalize(image, dim=1) @ fn.normalize(expression, dim=1).T
    partner = torch.arange(len(logits), device=logits.device)
    return (fn.cross_entropy(logits, partner) + fn.cross_entropy(logits.T, partner)) / 2


MODEL = UMPIRE
