"""The parts that GenAR is built of: the condition, the transformer block and its cache, the tables of count classes."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from genar.models._base import Batch
from genar.models._genar_config import GenARConfig
from genar.models._linear_start import KNOTS, Components, interpolate

_MAX_LOGIT_SCALE = math.log(100.0)
_POSITION_WAVES = 64


class Condition(nn.Module):
    """h [B, D] from the feature and the position of a spot (section 3).

    Each block of the features (patch widths, neighbours' means) has a histology block of its own. With ``components``
    all of them enter together as few components, weighted as ridge regression on the same spots would
    weight them (see ``_linear_start``): strong ones come with variance one, weak ones vanish.
    """

    feature_mean: Tensor
    feature_map: Tensor

    def __init__(self, config: GenARConfig):
        super().__init__()
        self.config = config
        if config.components:
            self.register_buffer("feature_mean", torch.zeros(config.n_features))
            self.register_buffer("feature_map", torch.zeros(config.n_features, config.components))
        self.histology = nn.ModuleList(
            nn.Sequential(
                nn.Identity() if config.components else nn.LayerNorm(n_inputs),
                nn.Dropout(config.feature_dropout), nn.Linear(n_inputs, 512), nn.GELU(), nn.Dropout(config.dropout),
                nn.Linear(512, 512), nn.LayerNorm(512),
            )
            for n_inputs in config.histology_inputs
        )  # fmt: skip
        n_position = 0 if config.coords == "none" else 256
        self.position = nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256)) if n_position else None
        n_joined = 512 * len(self.histology) + n_position
        self.fuse = nn.Sequential(
            nn.Linear(n_joined, config.width), nn.LayerNorm(config.width), nn.Dropout(config.dropout)
        )

    @torch.no_grad()
    def set_components(self, found: Components, n_spots: int) -> None:
        """Set the map from features to components."""
        self.feature_mean.copy_(found.mean)
        self.feature_map[:, : found.directions.shape[1]] = found.directions * found.shrink(n_spots)

    def components(self, batch: Batch) -> Tensor:
        """Components of B spots [B, C]."""
        return (batch.features - self.feature_mean) @ self.feature_map

    def forward(self, batch: Batch) -> Tensor:
        """Batch of B spots -> h [B, D]."""
        inputs = self.components(batch) if self.config.components else batch.features
        parts = inputs.split(self.config.histology_inputs, dim=1)
        joined = [block(part) for block, part in zip(self.histology, parts, strict=True)]
        if self.position is not None:
            coords = batch.coords_unit if self.config.coords == "unit" else batch.coords_um / 100
            joined.append(self.position(position_code(coords)))
        return self.fuse(torch.cat(joined, dim=1))


def position_code(coords: Tensor) -> Tensor:
    """Sines and cosines of 64 frequencies 10000^(-i/64) for x and for y: [B, 2] -> [B, 256]."""
    waves = torch.exp(-math.log(10_000.0) * torch.arange(_POSITION_WAVES, device=coords.device) / _POSITION_WAVES)
    angles = coords.float()[:, :, None] * waves  # [B, 2, 64]
    return torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)


class Block(nn.Module):
    """Transformer block steered by the condition (AdaLN), with cosine attention."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.heads, self.drop_path = heads, drop_path
        self.steer = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.log_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(4.0)))
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, h: Tensor, mask: Tensor, cache: "Cache | None" = None) -> Tensor:
        """x [B, L, D], h [B, D], mask [L, keys] (True where seen) -> [B, L, D]."""
        gamma1, scale1, shift1, gamma2, scale2, shift2 = self.steer(h)[:, None].chunk(6, dim=2)  # each [B, 1, D]
        x = x + self._drop(gamma1 * self._attend(self.norm(x) * (1 + scale1) + shift1, mask, cache))
        return x + self._drop(gamma2 * self.mlp(self.norm(x) * (1 + scale2) + shift2))

    def _attend(self, x: Tensor, mask: Tensor, cache: "Cache | None") -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, L, D / H]
        q = fn.normalize(q, dim=-1) * self.log_scale.clamp(max=_MAX_LOGIT_SCALE).exp()
        k = fn.normalize(k, dim=-1)
        if cache is not None:
            k, v = cache.extend(k, v)
        x = fn.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask, scale=1.0)
        return self.out(x.transpose(1, 2).flatten(2))

    def _drop(self, x: Tensor) -> Tensor:
        """Drop-path: the branch is left out for a share of the spots."""
        if not self.training or self.drop_path == 0:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * keep / (1 - self.drop_path)


class Cache:
    """Keys and values of one block at the positions that later scales see, preallocated: [B, H, L, D / H] each."""

    def __init__(self, n_positions: int):
        self.n_positions, self.length, self.n_keep = n_positions, 0, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values seen by this step: those kept so far and the new ones, of which the first ``n_keep`` stay."""
        if self.keys is None or self.values is None:
            shape = (*k.shape[:2], self.n_positions, k.shape[3])
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        stop = self.length + k.shape[2]
        self.keys[:, :, self.length : stop], self.values[:, :, self.length : stop] = k, v
        self.length += self.n_keep  # what lies beyond is overwritten by the next step
        return self.keys[:, :, :stop], self.values[:, :, :stop]


class LinearStart(nn.Module):
    """Part of the logits that is known before training.

    What ridge expects of l = ln(1 + count) of a group from the image, moved by how far the parent's token lies from
    what ridge expected of the parent, becomes the mean of a distribution: the group's training frequencies f(v) times
    exp(a l - b l^2 / 2), with a from a table that gives p this mean, and b once a group (see ``fit_curvatures``).
    """

    slope: Tensor
    parent_slope: Tensor
    offset: Tensor
    curvature: Tensor
    means: Tensor
    tilts: Tensor

    def __init__(self, n_components: int, n_groups: int):
        super().__init__()
        for name, shape in (("slope", (n_components, n_groups)), ("parent_slope", (n_groups,)),
                            ("offset", (n_groups,)), ("curvature", (n_groups,)),
                            ("means", (n_groups, KNOTS)), ("tilts", (n_groups, KNOTS))):  # fmt: skip
            self.register_buffer(name, torch.zeros(shape))

    def expected(self, place: slice, components: Tensor, parents: Tensor) -> Tensor:
        """Mean l [B, M] of the groups of one scale from components [B, C] and the parents' counts [B, M]."""
        known = components @ self.slope[:, place] + self.offset[place]
        return known + self.parent_slope[place] * torch.log1p(parents)

    def tilt(self, place: slice, expected: Tensor) -> Tensor:
        """a [B, M], from the ``expected`` l [B, M]."""
        return interpolate(self.tilts[place], self.means[place], expected)


class CountTable(nn.Module):
    """A weight row per count class, [V, D]: free, or a mixture of smooth bumps over ln(1 + count)."""

    basis: Tensor | None

    def __init__(self, n_classes: int, width: int, n_basis: int, std: float):
        super().__init__()
        self.register_buffer("basis", count_bumps(n_classes, n_basis) if n_basis else None, persistent=False)
        self.weight = nn.Parameter(torch.randn(n_basis or n_classes, width) * std)

    def rows(self) -> Tensor:
        """The table [V, D]."""
        return self.weight if self.basis is None else self.basis @ self.weight


def count_bumps(n_classes: int, n_basis: int) -> Tensor:
    """Triangular bumps [V, R] evenly spaced over ln(1 + count); a row sums to one."""
    place = torch.log1p(torch.arange(n_classes).double())
    place = place / place[-1].clamp(min=1e-9) * (n_basis - 1)
    return (1 - (place[:, None] - torch.arange(n_basis)).abs()).clamp(min=0).float()
