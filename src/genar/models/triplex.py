"""TRIPLEX: a spot seen at three distances, and every distance must predict by itself, too.

What is unusual: the global view, one token for every spot of the section, is the query; the spot's own tokens and those
of its 5 x 5 surroundings are what it looks at, through the same cross-attention. All four heads are trained on the
counts, and the three single views on the fused prediction besides.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from genar.errors import InputError
from genar.models._attention import Block
from genar.models._base import Batch, Card, LossOutput, Spots, log2p1
from genar.models._lattice import Lattice, window_places
from genar.models._rival import check_input
from genar.models._section import SectionRival

_SPOTS_AT_ONCE = 512
"""in a prediction; their surroundings take 25 times the memory of the spots"""
_PATCHES_AT_ONCE = 64


@dataclass(frozen=True)
class TriplexConfig:
    """Sizes, in the order fusion, global, neighbours where there are three."""

    width: int = 128
    """E of all tokens"""
    depths: tuple[int, int, int] = (1, 2, 1)
    heads: tuple[int, int, int] = (4, 4, 4)
    mlp_ratios: tuple[int, int, int] = (2, 2, 2)
    dropouts: tuple[float, float, float] = (0.2, 0.1, 0.3)
    """of weights, outputs and MLPs of the attention, in training alone"""
    alpha: float = 0.3
    """share of the fused prediction, against the counts, in what the single views learn from"""
    spots_per_step: int = 256
    """of a section, drawn at random, whose surroundings a training step sees; all spots enter the global view"""
    input: str = "features"
    """``features``, or ``patches``: the spot's own tokens from a ResNet-18 that is trained along"""

    def __post_init__(self):
        check_input("triplex", self.input)
        for name in ("depths", "heads", "mlp_ratios", "dropouts"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if len(values) != 3:
                raise InputError(f"model triplex: {name} must be three numbers, found {len(values)}")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"model triplex: alpha must be in [0, 1], found {self.alpha}")
        if min(self.heads) > 0 and any(self.width % heads for heads in self.heads):
            raise InputError(f"model triplex: width {self.width} must be a multiple of heads {self.heads}")

    def block(self, view: int) -> Block:
        """A block of the fusion (0), the global view (1) or the neighbours (2)."""
        hidden, dropout = self.width * self.mlp_ratios[view], self.dropouts[view]
        return Block(self.width, self.heads[view], hidden, dropout=dropout, weight_dropout=dropout)

    def blocks(self, view: int) -> nn.ModuleList:
        """All blocks of a view."""
        return nn.ModuleList(self.block(view) for _ in range(self.depths[view]))


class Surroundings(nn.Module):
    """Tokens at the places of a window, which know how far apart they lie: a bias per head and absolute offset."""

    places: Tensor

    def __init__(self, config: TriplexConfig, fold: int):
        super().__init__()
        apart = np.abs(window_places(fold)[:, None] - window_places(fold))  # [W, W, 2]
        offsets, place = np.unique(apart.reshape(-1, 2), axis=0, return_inverse=True)
        self.register_buffer("places", torch.from_numpy(place.reshape(apart.shape[:2])), persistent=False)
        self.blocks = config.blocks(2)
        heads, depth = config.heads[2], config.depths[2]
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(heads, len(offsets))) for _ in range(depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, found: Tensor) -> Tensor:
        """x [B, W, E], ``found`` bool [B, W] -> [B, W, E]; what is not found is attended to by none."""
        closed = torch.zeros(found.shape, device=x.device).masked_fill(~found, -torch.inf)[:, None, None]
        for block, bias in zip(self.blocks, self.biases, strict=True):
            x = block(x, mask=bias[:, self.places] + closed)
        return self.norm(x)


class Whole(nn.Module):
    """All spots of a section attend to each other; after the first layer a convolution over the array tells each one
    what lies around it."""

    def __init__(self, config: TriplexConfig):
        super().__init__()
        self.blocks = config.blocks(1)
        self.around = nn.Conv2d(config.width, config.width, 3, padding=1, groups=config.width)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, cells: Tensor) -> Tensor:
        """x [N, E] at ``cells`` int64 [N, 2] -> [N, E]."""
        for i, block in enumerate(self.blocks):
            x = block(x[None])[0]
            if i == 0:
                x = self._convolve(x, cells)
        return self.norm(x)

    def _convolve(self, x: Tensor, cells: Tensor) -> Tensor:
        n_columns, n_rows = (cells.max(dim=0).values + 1).tolist()
        cell = cells[:, 1] * n_columns + cells[:, 0]
        filled = x.new_zeros(n_rows * n_columns).index_add(0, cell, torch.ones_like(x[:, 0]))
        grid = x.new_zeros(len(filled), x.shape[1]).index_add(0, cell, x) / filled.clamp(min=1)[:, None]
        grid = grid.T.reshape(1, -1, n_rows, n_columns)
        return self.around(grid)[0].flatten(1).T[cell]


class Pixels(nn.Module):
    """49 tokens from a patch of 224 px: a ResNet-18 without its end."""

    n_outputs = 512

    def __init__(self, width: int):
        super().__init__()
        import timm  # where patches are taken alone

        self.trunk = timm.create_model("resnet18", pretrained=False, num_classes=0, global_pool="")
        self.token = nn.Linear(self.n_outputs, width)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, 1, 3, 224, 224] -> [B, 49, E]."""
        return self.token(self.trunk(patches[:, 0]).flatten(2).transpose(1, 2))

    @torch.no_grad()
    def pooled(self, patches: Tensor) -> Tensor:
        """[B, 1, 3, 224, 224] -> [B, 512] of the network as it stands, which learns nothing from it."""
        training = self.trunk.training
        self.trunk.eval()
        pooled = self.trunk(patches[:, 0]).mean(dim=(2, 3))
        self.trunk.train(training)
        return pooled


class Triplex(SectionRival):
    """The spot, its surroundings and the whole section, fused by cross-attention; each also predicts by itself."""

    config = TriplexConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "official": {
            "width": 512, "depths": (1, 3, 3), "heads": (4, 16, 16), "mlp_ratios": (4, 4, 1), "spots_per_step": 128,
        },
        "official_st": {
            "width": 512, "depths": (3, 3, 4), "heads": (16, 8, 8), "mlp_ratios": (4, 2, 4),
            "dropouts": (0.4, 0.1, 0.3), "spots_per_step": 128,
        },
        "official_visium": {
            "width": 1024, "depths": (1, 2, 2), "heads": (8, 16, 16), "dropouts": (0.15, 0.1, 0.1),
            "spots_per_step": 128,
        },
    }  # fmt: skip
    # published: AdamW, 1e-4 cut tenfold on a plateau, up to 1000 epochs of many steps. A step here takes up
    # to 256 spots of a section, so there are fewer of them, and the rate falls on a cosine
    train_defaults: ClassVar[Mapping[str, Any]] = {
        "max_epochs": 60, "lr": 5e-4, "optimizer": "adamw", "weight_decay": 0.01, "warmup_steps": 10, "ema_decay": 0.0,
    }  # fmt: skip
    inputs = ("features", "patches")
    patch_settings: ClassVar[Mapping[str, Any]] = {"spots_per_step": 48}
    card = Card(
        title="TRIPLEX (Chung et al., CVPR 2024)",
        target="Originally ln(1 + counts per 10,000 of the selected genes), for ST sections smoothed over 3 x 3 "
        "spots. Here log2(1 + count), neither divided by the library nor smoothed, as a difference from the training "
        "mean.",
        kept="Three views, the neighbours' offset bias, the convolution over the array, fusion with the global token "
        "as query, four heads and their distillation (3.1 times the squared error where all agree).",
        lost="The spot's own token is its feature, not 49 tokens of a trained ResNet-18 (input=patches has them, and "
        "its own ResNet-18, learning nothing from it, stands for the encoder of the wider views); the surroundings "
        "are measured spots (5 x 5, or two rings on a hexagonal array), not tiles cut everywhere.",
        mended="Attention drops nothing in a prediction; a section's own extent makes its grid, not the first "
        "section's; empty cells do not count as filled; the neighbours' mean is over those present; outputs are not "
        "clamped before the loss; labels are not smoothed; no test section chooses the epoch.",
    )

    def __init__(self, n_features: int, n_genes: int, config: TriplexConfig, fold: int = 4):
        super().__init__(n_features, n_genes, config, fold=fold)
        width = config.width
        self.fold = fold
        self.own = Pixels(width) if self.takes_patches else nn.Linear(n_features, width)
        n_seen = n_features or Pixels.n_outputs
        same = n_seen == width  # then as published, without a projection
        self.to_around = nn.Identity() if same else nn.Linear(n_seen, width)
        self.to_whole = nn.Identity() if same else nn.Linear(n_seen, width)
        self.surroundings, self.whole = Surroundings(config, fold), Whole(config)
        self.fusion, self.fusion_norm = config.blocks(0), nn.LayerNorm(width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, n_genes) for name in ("fused", "own", "around", "whole")})

    @classmethod
    def sizes(cls, spots: Spots, config: TriplexConfig) -> dict[str, int]:
        """Neighbours of an inner spot of the first training section: they decide the window."""
        return {"fold": Lattice.of(spots.coords_um[spots.section == spots.section[0]]).fold}

    def standardised(self, features: Tensor) -> Tensor:
        """Features [N, F] with mean 0 and standard deviation 1; those of :meth:`seen` as they are."""
        return super().standardised(features) if self.n_features else features

    def seen(self, batch: Batch) -> Batch:
        """The batch with features for the two wider views: where there are patches alone, what the spot's own network
        makes of them."""
        if self.n_features:
            return batch
        assert isinstance(self.own, Pixels)
        parts = torch.arange(len(batch.features)).split(_PATCHES_AT_ONCE)
        return replace(batch, features=torch.cat([self.own.pooled(self.pixels(batch, rows)) for rows in parts]))

    def views(self, batch: Batch, rows: Tensor, whole: Tensor, seen: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """log2(1 + count) [n, G] by each head for some ``rows`` [n] of a section whose global tokens are ``whole``
        [N, E] and of which :meth:`_around` has ``seen`` the rest."""
        x, near, index, found = seen
        index, found = index[rows], found[rows]
        own = self.own(self.pixels(batch, rows) if self.takes_patches else x[rows][:, None])
        around = self.surroundings(near[index] * found[:, :, None], found)
        present = found[:, :, None].float()
        tokens = {
            "fused": self.fuse(whole[rows], own, around, found),
            "own": own.mean(dim=1),
            "around": (around * present).sum(dim=1) / present.sum(dim=1),
            "whole": whole[rows],
        }
        return {name: self.gene_mean + self.heads[name](token) for name, token in tokens.items()}

    def fuse(self, query: Tensor, own: Tensor, around: Tensor, found: Tensor) -> Tensor:
        """The global token [n, E] looks at the spot [n, L, E] and, by the same weights, at what surrounds it
        [n, W, E]: the normalised sum of both [n, E]."""
        to_own, to_around = query[:, None], query[:, None]
        for block in self.fusion:
            to_own = block(to_own, own)
            to_around = block(to_around, around, found[:, None, None])
        return self.fusion_norm(to_own + to_around)[:, 0]

    def _around(self, batch: Batch, lattice: Lattice) -> tuple[Tensor, ...]:
        """What the windows of all spots are made of: features [N, F], their tokens [N, E], and of each spot's window
        the spots and which are there [N, W]."""
        x = self.standardised(batch.features)
        return x, self.to_around(x), *(part.to(x.device) for part in lattice.window(self.fold))

    def _global(self, x: Tensor, lattice: Lattice) -> Tensor:
        return self.whole(self.to_whole(x), lattice.close_cells().to(x.device))

    def forward(self, batch: Batch) -> Tensor:
        """The fused head for every spot."""
        lattice, batch = Lattice.of(batch.coords_um), self.seen(batch)
        seen = self._around(batch, lattice)
        whole = self._global(seen[0], lattice)
        n_at_once = _PATCHES_AT_ONCE if self.takes_patches else _SPOTS_AT_ONCE
        parts = torch.arange(len(whole), device=whole.device).split(n_at_once)
        return torch.cat([self.views(batch, rows, whole, seen)["fused"] for rows in parts])

    def loss(self, batch: Batch) -> LossOutput:
        """The seven terms of :func:`distillation_loss` on some spots of the section."""
        assert batch.counts is not None
        n, counts = len(batch.features), batch.counts
        lattice, batch = Lattice.of(batch.coords_um), self.seen(batch)
        rows = torch.randperm(n)[: self.settings.spots_per_step].to(batch.features.device)
        seen = self._around(batch, lattice)
        views = self.views(batch, rows, self._global(seen[0], lattice), seen)
        terms = distillation_loss(views.pop("fused"), list(views.values()), log2p1(counts[rows]), self.settings)
        return LossOutput(terms.sum(), terms.detach())


def distillation_loss(fused: Tensor, single: list[Tensor], truth: Tensor, config: TriplexConfig) -> Tensor:
    """[7]: the squared error of the fused prediction, and of each single view to the truth (weight 1 - alpha) and to
    the fused one (weight alpha). No gradient is stopped."""
    to_truth = [(1 - config.alpha) * fn.mse_loss(view, truth) for view in single]
    to_fused = [config.alpha * fn.mse_loss(view, fused) for view in single]
    return torch.stack([fn.mse_loss(fused, truth), *to_truth, *to_fused])


MODEL = Triplex
