"""M2OST: three magnifications of one spot, which attend within themselves, to each other, and gate each other.

What is unusual: what the streams say to each other replaces their tokens (no residual there), and a gate computed from
the means of all three scales their channels. With features, a stream has one token beside its CLS token: the spot's
own feature, the mean over the spots within one pitch, and the mean within two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from genar.errors import InputError
from genar.models._attention import Attention
from genar.models._base import Batch, Card, LossOutput, log2p1
from genar.models._lattice import Lattice
from genar.models._rival import check_input
from genar.models._section import SectionRival

N_STREAMS = 3
_RADII = (1.2, 2.12)
"""pitches within which the features of streams 2 and 3 are averaged: one and two, halfway to the next places"""
_PATCHES = ((16, 576), (8, 288), (4, 144))
"""side of a token's square in px and hidden width, of the three embeddings"""
_PIXELS_AT_ONCE = 48
"""spots in a part of a prediction from pixels: 589 tokens each"""


@dataclass(frozen=True)
class M2OSTConfig:
    """Sizes of the network."""

    width: int = 96
    """D of a token"""
    depth: int = 2
    heads: int = 3
    hidden: int = 64
    """of the shared MLP"""
    gate_hidden: int = 192
    """of the gate"""
    spots_per_step: int = 550
    """of a section, drawn at random, that a training step takes"""
    input: str = "features"
    """``features``, or ``patches``: three crops of each spot, 1, 2 and 4 times its width, of 224 px each"""

    def __post_init__(self):
        check_input("m2ost", self.input)
        if self.width % self.heads:
            raise InputError(f"model m2ost: width {self.width} must be a multiple of heads {self.heads}")
        if self.spots_per_step < 1:
            raise InputError(f"model m2ost: spots_per_step must be at least 1, found {self.spots_per_step}")


class Embedding(nn.Module):
    """Tokens from an image cut into squares of ``patch`` px."""

    def __init__(self, patch: int, hidden: int, width: int):
        super().__init__()
        self.patch = patch
        inputs = 3 * patch * patch
        self.layers = nn.Sequential(
            nn.LayerNorm(inputs), nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, width), nn.LayerNorm(width)
        )

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, px, px] -> [B, (px / patch)^2, D]."""
        return self.layers(fn.unfold(image, self.patch, stride=self.patch).transpose(1, 2))


class Pixels(nn.Module):
    """Tokens of three crops: the wider a crop, the finer its middle, which is what the narrower crops show."""

    lengths = (196, 392, 588)

    def __init__(self, width: int):
        super().__init__()
        self.embeddings = nn.ModuleList(Embedding(patch, hidden, width) for patch, hidden in _PATCHES)

    def forward(self, crops: Tensor) -> list[Tensor]:
        """[B, 3, 3, 224, 224] -> three of [B, L, D]."""
        coarse, fine, finest = self.embeddings
        first, second, third = crops.unbind(1)
        return [
            coarse(first),
            torch.cat([fine(_middle(second, 2)), coarse(second)], dim=1),
            torch.cat([finest(_middle(third, 4)), fine(_middle(third, 2)), coarse(third)], dim=1),
        ]


def _middle(image: Tensor, part: int) -> Tensor:
    """The middle 1 / part of an image [B, 3, px, px] (the official code cuts a quarter at 3/8 to 3/4, and fails)."""
    side = image.shape[-1] // part
    start = (image.shape[-1] - side) // 2
    return image[:, :, start : start + side, start : start + side]


class Layer(nn.Module):
    """Attention within each stream, a shared MLP, attention across streams, a gate over their channels."""

    def __init__(self, config: M2OSTConfig):
        super().__init__()
        width, hidden = config.width, config.hidden
        self.heads = config.heads
        self.within = nn.ModuleList(Attention(width, config.heads) for _ in range(N_STREAMS))
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width), nn.GELU())
        self.across_norm = nn.LayerNorm(width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(N_STREAMS))
        self.across = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(N_STREAMS))
        joined = N_STREAMS * width
        self.gate = nn.Sequential(
            nn.LayerNorm(joined), nn.Linear(joined, config.gate_hidden), nn.GELU(),
            nn.Linear(config.gate_hidden, joined), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, streams: Sequence[Tensor]) -> list[Tensor]:
        """Three of [B, L, D]."""
        streams = [x + attend(x) for x, attend in zip(streams, self.within, strict=True)]
        streams = [x + self.mlp(self.norm(x)) for x in streams]
        streams = self._cross(streams)
        gates = self.gate(torch.cat([x.mean(dim=1) for x in streams], dim=1)).chunk(N_STREAMS, dim=1)
        return [x * (1 + gate[:, None]) for x, gate in zip(streams, gates, strict=True)]

    def _cross(self, streams: Sequence[Tensor]) -> list[Tensor]:
        """Each stream's queries to the two others, one after the other; nothing of the stream's own tokens stays."""
        split = [
            qkv(self.across_norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            for x, qkv in zip(streams, self.qkv, strict=True)
        ]
        said = []
        for s, join in enumerate(self.across):
            others = [split[other] for other in range(N_STREAMS) if other != s]
            seen = [fn.scaled_dot_product_attention(split[s][0], k, v) for _, k, v in others]
            said.append(join(torch.cat([x.transpose(1, 2).flatten(2) for x in seen], dim=2)))
        return said


class Network(nn.Module):
    """Three token sequences to one vector of G values."""

    def __init__(self, config: M2OSTConfig, lengths: Sequence[int], n_genes: int):
        super().__init__()
        width = config.width
        self.cls = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.ParameterList(nn.Parameter(torch.randn(1, 1 + length, width) * 0.02) for length in lengths)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(N_STREAMS * width, n_genes)

    def forward(self, streams: Sequence[Tensor]) -> Tensor:
        """Three of [B, L, D] -> [B, G]."""
        cls = self.cls.expand(len(streams[0]), -1, -1)
        streams = [torch.cat([cls, x], dim=1) + p for x, p in zip(streams, self.positions, strict=True)]
        for layer in self.layers:
            streams = layer(streams)
        return self.head(torch.cat([self.norm(x[:, 0]) for x in streams], dim=1))


class M2OST(SectionRival):
    """Three magnifications of a spot, one transformer each, which attend to each other."""

    config = M2OSTConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "official": {
            "width": 192, "depth": 4, "heads": 3, "hidden": 128, "gate_hidden": 384, "spots_per_step": 48,
        },
    }  # fmt: skip
    # published: Adam 1e-4, batches of 48 spots, 200 epochs, a constant rate. A step here takes up to 550 spots of a
    # section, so there are fewer of them, at a higher rate that falls
    train_defaults: ClassVar[Mapping[str, Any]] = {
        "max_epochs": 80, "lr": 1e-3, "optimizer": "adam", "weight_decay": 0.0, "warmup_steps": 10, "ema_decay": 0.0,
    }  # fmt: skip
    inputs = ("features", "patches")
    patch_settings: ClassVar[Mapping[str, Any]] = {"spots_per_step": 48}
    crops = (1.0, 2.0, 4.0)
    card = Card(
        title="M2OST (Wang et al., AAAI 2025)",
        target="Originally ln(1 + counts per million of the selected genes). Here log2(1 + count), not divided by the "
        "library, as a difference from the training mean.",
        kept="Three streams, attention within and across them without the residual, the shared MLP, the channel gate, "
        "the three CLS tokens as read-out.",
        lost="No wider crop was embedded: streams 2 and 3 are the mean features of the spots within one and two "
        "pitches. With one token a stream, attention within it has little to do, and the squares of three sizes are "
        "gone (input=patches has them).",
        mended="The middle quarter is cut at 3/8 to 5/8, so that the network runs; the three crops are turned alike "
        "and anew in every step; norms that were declared and not used are left out; the test set chooses no epoch, "
        "and correlation is per gene, not per spot.",
    )

    def __init__(self, n_features: int, n_genes: int, config: M2OSTConfig):
        super().__init__(n_features, n_genes, config)
        if self.takes_patches:
            self.embed, lengths = Pixels(config.width), Pixels.lengths
        else:
            layers = (nn.Linear(n_features, config.width) for _ in range(N_STREAMS))
            self.embed, lengths = nn.ModuleList(layers), (1, 1, 1)
        self.network = Network(config, lengths, n_genes)

    def streams(self, batch: Batch) -> list[Tensor]:
        """The features [N, F] of the three streams: each spot's, and the means within one and two pitches."""
        x = self.standardised(batch.features)
        lattice = Lattice.of(batch.coords_um)
        return [x, *(_mean_over(x, lattice.pairs_within(radius).to(x.device)) for radius in _RADII)]

    def _outputs(self, batch: Batch, rows: Tensor) -> Tensor:
        """log2(1 + count) [n, G] of some ``rows`` [n] of a section."""
        if self.takes_patches:
            return self.gene_mean + self.network(self.embed(self.pixels(batch, rows)))
        layers = list(self.embed)  # pyright: ignore
        tokens = [layer(x[rows])[:, None] for layer, x in zip(layers, self.streams(batch), strict=True)]
        return self.gene_mean + self.network(tokens)

    def forward(self, batch: Batch) -> Tensor:
        """Every spot of the section."""
        rows = torch.arange(len(batch.features), device=batch.features.device)
        parts = rows.split(_PIXELS_AT_ONCE) if self.takes_patches else [rows]
        return torch.cat([self._outputs(batch, part) for part in parts])

    def loss(self, batch: Batch) -> LossOutput:
        """Mean squared error of some spots of the section."""
        assert batch.counts is not None
        rows = torch.randperm(len(batch.features))[: self.settings.spots_per_step].to(batch.features.device)
        total = fn.mse_loss(self._outputs(batch, rows), log2p1(batch.counts[rows]))
        return LossOutput(total, total.detach()[None])


def _mean_over(x: Tensor, pairs: Tensor) -> Tensor:
    """Of each row of x [N, F], the mean over the rows that ``pairs`` [2, E] join it to."""
    joined = torch.sparse_coo_tensor(
        pairs, torch.ones_like(pairs[0], dtype=x.dtype), (len(x), len(x)), check_invariants=True
    )
    return (joined @ x) / pairs[0].bincount(minlength=len(x))[:, None]


MODEL = M2OST
