"""The parts that GenAR is built of: the condition, the transformer block, the tables of count classes."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from genar.errors import InputError
from genar.genes import Scales
from genar.models._base import Batch
from genar.models._cosine_attention import Cache, as_it_comes, cosine_attention
from genar.models._genar_config import GenARConfig
from genar.models._linear_start import KNOTS, Components, interpolate, level

_MAX_LOGIT_SCALE = math.log(100.0)
_POSITION_WAVES = 64


def bf16_products(device: str) -> torch.autocast:
    """Matrix products in bfloat16."""
    return torch.autocast(device, torch.bfloat16)


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
        self.feature_map.zero_()  # an earlier call may have found more
        self.feature_map[:, : found.directions.shape[1]] = found.directions * found.shrink(n_spots)

    def components(self, batch: Batch) -> Tensor:
        """Components of B spots [B, C], never in bfloat16: the linear start multiplies their errors."""
        with as_it_comes(batch.features.device.type):
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

    def steering(self, h: Tensor) -> tuple[Tensor, ...]:
        """gamma, 1 + scale and shift of attention and of the MLP, [B, 1, D] each, of h [B, D]; the sharpness [H]."""
        gamma1, scale1, shift1, gamma2, scale2, shift2 = self.steer(h)[:, None].chunk(6, dim=2)
        sharpness = self.log_scale.clamp(max=_MAX_LOGIT_SCALE).exp()[:, 0, 0]
        return gamma1, 1 + scale1, shift1, gamma2, 1 + scale2, shift2, sharpness

    def forward(
        self, x: Tensor, steering: tuple[Tensor, ...], cuts: nn.ModuleList, cache: Cache | None = None
    ) -> Tensor:
        """x [B, L, D], :meth:`steering` -> [B, L, D]; ``cuts`` say which positions see which."""
        gamma1, scale1, shift1, gamma2, scale2, shift2, sharpness = steering
        qkv = self.qkv(torch.addcmul(shift1, self.norm(x), scale1))
        x = torch.addcmul(x, self._keep(x, gamma1), self.out(cosine_attention(qkv, sharpness, cuts, cache)))
        widen, act, narrow = self.mlp
        y = widen(torch.addcmul(shift2, self.norm(x), scale2))
        if torch.is_grad_enabled():
            return torch.addcmul(x, self._keep(x, gamma2), narrow(act(y)))
        return x.addcmul_(self._keep(x, gamma2), narrow(torch.ops.aten.gelu_(y)))  # nobody needs x or y any more

    def _keep(self, x: Tensor, gamma: Tensor) -> Tensor:
        """Drop-path: gamma [B, 1, D] with zeros for a share of the spots, whose branch is left out."""
        if not self.training or self.drop_path == 0:
            return gamma
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return gamma * keep / (1 - self.drop_path)


class LinearStart(nn.Module):
    """Part of the logits that is known before training.

    A linear model's expectation of l = ln(1 + count) of a group, from the tokens of the coarser scales and from the
    image, becomes the mean of a distribution: the group's training frequencies f(v) times exp(a l - b l^2 / 2), with a
    from a table that gives p this mean, and b once a group (see ``fit_curvatures``).
    """

    slope: Tensor
    follow: Tensor
    offset: Tensor
    curvature: Tensor
    means: Tensor
    tilts: Tensor

    def __init__(self, n_components: int, n_groups: int, n_followed: int):
        super().__init__()
        for name, shape in (("slope", (n_components, n_groups)), ("follow", (n_followed, n_groups)),
                            ("offset", (n_groups,)), ("curvature", (n_groups,)),
                            ("means", (n_groups, KNOTS)), ("tilts", (n_groups, KNOTS))):  # fmt: skip
            self.register_buffer(name, torch.zeros(shape))

    def followed(self, counts: list[Tensor]) -> Tensor:
        """l of the groups of coarser scales that are looked at [B, n], from the tokens or means [B, M] of each."""
        return level(torch.cat(counts, dim=1)[:, : len(self.follow)].float())

    def expected(self, place: slice, components: Tensor, counts: list[Tensor]) -> Tensor:
        """Mean l [B, M] of the groups of one scale from components [B, C] and the counts of every coarser scale."""
        known = components @ self.slope[:, place] + self.offset[place]
        if not counts or not len(self.follow):
            return known
        seen = self.followed(counts)
        return known + seen @ self.follow[: seen.shape[1], place]

    def follow_of_parents(self, slope: Tensor, scales: Scales) -> Tensor:
        """``follow`` of groups that follow their parent alone, by ``slope`` [sum M]: checkpoints of format 1."""
        follow, first = slope.new_zeros(self.follow.shape), 0
        for k in range(1, scales.n_scales):
            above, first = first, first + scales.sizes[k - 1]
            if first > len(follow):
                raise InputError("a checkpoint of format 1 with so many groups cannot be read any more; train it again")
            parents = torch.from_numpy(above + scales.parent(k)).to(slope.device)
            groups = torch.arange(first, first + scales.sizes[k], device=slope.device)
            follow[parents, groups] = slope[groups]
        return follow

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

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors of x @ rows.T, for x [B, M, D]: [B, M, R] and [V, R]; R is the width or the number of bumps."""
        return (x, self.weight) if self.basis is None else (fn.linear(x, self.weight), self.basis)


def count_bumps(n_classes: int, n_basis: int) -> Tensor:
    """Triangular bumps [V, R] evenly spaced over ln(1 + count); a row sums to one."""
    place = torch.log1p(torch.arange(n_classes).double())
    place = place / place[-1].clamp(min=1e-9) * (n_basis - 1)
    return (1 - (place[:, None] - torch.arange(n_basis)).abs()).clamp(min=0).float()
