"""GenAR: counts generated scale by scale, from the mean of all genes down to each gene (the paper's model).

What is unusual about it. Genes stand in cluster order and are pooled into ever finer groups; the token of a group *is*
its rounded mean count, so there is no codebook. A scale's positions start from the tokens of the scale above
("interpolated"),
see all coarser tokens ("history") and give a softmax over count classes 0..C. A token's embedding does not depend on
the
pass in which it is read. Hence training is one pass over [start ; history 1..K-1 ; interpolated 1..K] under one
mask, and
generation runs the very same network scale by scale on cached keys and values: the mask of a step is a cut of the
training mask.

Equation and section numbers are the paper's ("GenAR: Next-Scale Autoregressive Generation for Spatial Gene
Expression Prediction").
Letters: B spots, S trajectories, G genes, K scales, M groups of a scale, L positions, D width, H heads, F features,
V classes.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from genar.errors import InputError
from genar.genes import Scales, fit_scales
from genar.models._base import Batch, Counts, LossOutput, Model, Spots, uniforms
from genar.models._count_loss import count_kl, two_point_kl
from genar.models.ridge import choose_penalty

_MAX_LOGIT_SCALE = math.log(100.0)
_POSITION_WAVES = 64
# Trajectories generated at a time; bounds memory, changes no value beyond rounding.
_TRAJECTORIES = 512


@dataclass(frozen=True)
class GenARConfig:
    """Size and options of the network. ``paper()`` and ``released()`` are the published ones, ``small()`` the
    default."""

    n_features: int = 1280
    """F, width of the encoder's vector"""
    width: int = 128
    """D"""
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 3.0
    dropout: float = 0.1
    """in the condition and the gene-identity projection"""
    drop_path: float = 0.1
    """of the last block; rises linearly from 0"""
    max_count: int = 0
    """C: larger counts are capped in training; 0 takes the largest training count, rounded up to a power of two less
    one"""
    history: str = "queries"
    """``tokens`` (eq. 3) or ``queries``: coarser scales are seen through their interpolated positions alone"""
    within: str = "full"
    """attention among the positions of one scale: ``causal`` (paper) or ``full``"""
    coords: str = "pitch"
    """position code: ``unit`` ([0, 1] over the section, released code), ``pitch`` (100 um) or ``none``"""
    gene_identity: bool = True
    """FiLM and mixing with learned embeddings of the genes"""
    group_temperature: float = 0.0
    """widens the target of a group to this standard deviation (counts); 0 shares it between two neighbouring counts"""
    sigma_base: float = 1.0
    sigma_slope: float = 0.01
    """standard deviation of a gene's target: sigma_slope * count + sigma_base (eq. 5)"""
    components: int = 64
    """> 0: features are standardised and reduced to so many principal components, shrunk as ridge shrinks them (see
    ``Condition``); 0 feeds the features themselves through a layer norm (paper)"""
    feature_dropout: float = 0.0
    """share of the features (or components) hidden in each training step"""
    token_noise: float = 0.5
    """standard deviation, in ln(1 + count), of noise that a spot's coarser tokens share in training; each group adds
    half as much"""
    count_basis: int = 0
    """> 0: count classes are embedded and read out through so many smooth bumps over ln(1 + count); 0 gives each its
    own weights"""
    start_at_frequencies: bool = True
    """a bias per position and count, started at the frequency of each count in training"""

    def __post_init__(self):
        for name, allowed in (
            ("history", ("tokens", "queries")),
            ("within", ("causal", "full")),
            ("coords", ("unit", "pitch", "none")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"model: {name} must be one of {', '.join(allowed)}, found {getattr(self, name)!r}")
        for name in ("n_features", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise InputError(f"model: {name} must be at least 1, found {getattr(self, name)}")
        for name in ("dropout", "drop_path", "feature_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"model: {name} must be in [0, 1), found {getattr(self, name)}")
        if self.width % self.heads:
            raise InputError(f"model: width {self.width} must be a multiple of heads {self.heads}")
        if self.max_count < 0 or self.sigma_base <= 0 or self.token_noise < 0 or self.count_basis < 0:
            raise InputError(
                "model: max_count, token_noise and count_basis must not be negative, sigma_base must be > 0"
            )


def small(**changes) -> GenARConfig:
    """The default: trains on a CPU."""
    return GenARConfig(**changes)


def paper(**changes) -> GenARConfig:
    """The paper's network (appendix D) without anything that the paper does not have."""
    config = GenARConfig(
        width=768, depth=8, heads=8, max_count=2000, history="tokens", within="causal", coords="unit",
        components=0, feature_dropout=0.0, token_noise=0.0, count_basis=0, start_at_frequencies=False,
    )  # fmt: skip
    return replace(config, **changes)


def released(**changes) -> GenARConfig:
    """The size that the authors' released code trains: 512 wide."""
    return replace(paper(width=512), **changes)


PRESETS = {"small": small, "paper": paper, "released": released}


class Condition(nn.Module):
    """h [B, D] from the feature and the position of a spot (section 3).

    With ``components`` the features enter as principal components, each divided by sqrt(its variance + penalty / N),
    where
    the penalty is the one that ridge regression needs on the same spots: strong components come whitened, weak ones
    vanish. A few hundred spots cannot tell a thousand features apart, and this is how much they can.
    """

    feature_mean: Tensor
    feature_map: Tensor

    def __init__(self, config: GenARConfig):
        super().__init__()
        self.config = config
        n_inputs = config.components or config.n_features
        if config.components:
            self.register_buffer("feature_mean", torch.zeros(config.n_features))
            self.register_buffer("feature_map", torch.zeros(config.n_features, config.components))
        self.histology = nn.Sequential(
            nn.Identity() if config.components else nn.LayerNorm(n_inputs),
            nn.Dropout(config.feature_dropout), nn.Linear(n_inputs, 512), nn.GELU(), nn.Dropout(config.dropout),
            nn.Linear(512, 512), nn.LayerNorm(512),
        )  # fmt: skip
        n_position = 0 if config.coords == "none" else 256
        self.position = nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256)) if n_position else None
        self.fuse = nn.Sequential(
            nn.Linear(512 + n_position, config.width), nn.LayerNorm(config.width), nn.Dropout(config.dropout)
        )

    @torch.no_grad()
    def find_components(self, spots: Spots) -> None:
        """Set the map from features to components by the training spots."""
        x = spots.features.mean(dim=1).double()
        mean, scale = x.mean(dim=0), x.std(dim=0, correction=0).clamp(min=1e-6)
        _, s, vh = torch.linalg.svd((x - mean) / scale, full_matrices=False)
        n = min(self.config.components, len(s))
        shrink = ((s[:n].square() + choose_penalty(spots)) / len(x)).rsqrt()
        self.feature_mean.copy_(mean)
        self.feature_map[:, :n] = (vh[:n].T * shrink / scale[:, None]).float()

    def forward(self, batch: Batch) -> Tensor:
        """Batch of B spots -> h [B, D]."""
        x = batch.features
        if self.config.components:
            x = (x - self.feature_mean) @ self.feature_map
        h = self.histology(x)
        if self.position is not None:
            coords = batch.coords_unit if self.config.coords == "unit" else batch.coords_um / 100
            h = torch.cat([h, self.position(position_code(coords))], dim=1)
        return self.fuse(h)


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


class GenAR(Model):
    """The network. ``loss`` is the training pass (eq. 4, 5), ``generate`` the scale-by-scale prediction (eq. 2)."""

    decodings = ("greedy", "mean")
    mask: Tensor
    order: Tensor
    inverse: Tensor
    first_gene: Tensor
    last_gene: Tensor

    def __init__(self, config: GenARConfig, scales: Scales):
        super().__init__()
        if config.max_count == 0:
            raise InputError("model: max_count is 0 (auto); resolve it from the training counts first (auto_max_count)")
        self.config, self.scales, self.sizes = config, scales, scales.sizes
        width, n_groups = config.width, sum(scales.sizes)
        n_classes = config.max_count + 1
        self.condition = Condition(config)
        self.embed = CountTable(n_classes, width, config.count_basis, std=1.0 if config.count_basis else 0.5)
        self.start = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.scale_embedding = nn.Parameter(torch.randn(scales.n_scales, width) * 0.02)
        self.position = nn.Parameter(torch.randn(n_groups, width) * 0.02)
        self.history_position = nn.Parameter(torch.randn(n_groups - scales.n_genes, width) * 0.02)
        self.transition = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.LayerNorm(width))
            for _ in scales.sizes[1:]
        )
        drops = torch.linspace(0, config.drop_path, config.depth).tolist()
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_ratio, drop) for drop in drops)
        self.head_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.head_steer = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = CountTable(n_classes, width, config.count_basis, std=0.02)
        self.head_bias = nn.Parameter(torch.zeros(n_classes))
        if config.start_at_frequencies:
            self.position_bias = nn.Parameter(torch.zeros(n_groups, n_classes))
        if config.gene_identity:
            self.identity = nn.Parameter(torch.randn(scales.n_genes, width) * 0.02)
            self.group_identity = nn.Sequential(
                nn.Linear(width, width), nn.LayerNorm(width), nn.Dropout(config.dropout)
            )
            steer = nn.Linear(width // 2, 2 * width)
            with torch.no_grad():  # starts as the identity: gamma 1, beta 0
                steer.weight.zero_()
                steer.bias.copy_(torch.cat([torch.ones(width), torch.zeros(width)]))
            self.film = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), steer)
        self._lay_out()

    # -- the order of positions -------------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        """Number the positions of the training pass and make the one mask that says which sees which (appendix B)."""
        sizes, tokens = self.sizes, self.config.history == "tokens"
        n_history = (1, *sizes[:-1]) if tokens else ()  # start stands as history of scale "-1"
        kind = torch.cat([torch.zeros(sum(n_history)), torch.ones(sum(sizes))]).long()
        scale = torch.cat([torch.full((m,), k - 1) for k, m in enumerate(n_history)] + [torch.full((m,), k) for k, m in enumerate(sizes)])  # fmt: skip # noqa: E501
        index = torch.cat([torch.arange(m) for m in (*n_history, *sizes)])
        query_is_history, key_is_history = (kind == 0)[:, None], (kind == 0)[None]
        older, same = scale[None] < scale[:, None], scale[None] == scale[:, None]
        beside = same & ((index[None] <= index[:, None]) | (self.config.within == "full"))
        seen = torch.where(
            query_is_history,
            key_is_history & (older | same),
            (key_is_history & older) | (~key_is_history & (beside | (older & (not tokens)))),
        )
        self.register_buffer("mask", seen, persistent=False)
        self._history_start, self._interpolated_start = [0], [sum(n_history)]
        for m in n_history:
            self._history_start.append(self._history_start[-1] + m)
        for m in sizes:
            self._interpolated_start.append(self._interpolated_start[-1] + m)
        self._places = [slice(sum(sizes[:k]), sum(sizes[: k + 1])) for k in range(len(sizes))]
        for k in range(1, len(sizes)):
            self.register_buffer(f"parent_{k}", torch.from_numpy(self.scales.parent(k)).long(), persistent=False)
        edges = [torch.from_numpy(self.scales.edges(k)).long() for k in range(len(sizes))]
        self.register_buffer("first_gene", torch.cat([e[:-1] for e in edges]), persistent=False)
        self.register_buffer("last_gene", torch.cat([e[1:] for e in edges]), persistent=False)
        self.register_buffer("order", torch.tensor(self.scales.order), persistent=False)
        self.register_buffer("inverse", torch.from_numpy(self.scales.inverse).long(), persistent=False)

    def _step(self, k: int) -> tuple[Tensor, Tensor, int]:
        """Positions new at scale k, positions cached before it, and how many of the new ones stay cached."""
        new = torch.arange(self._interpolated_start[k], self._interpolated_start[k + 1])
        if self.config.history == "queries":
            return new, torch.arange(self._interpolated_start[k]), len(new)
        history = torch.arange(self._history_start[k], self._history_start[k + 1])
        return torch.cat([history, new]), torch.arange(self._history_start[k]), len(history)

    def pool(self, counts: Tensor) -> list[Tensor]:
        """Mean count of every group of every scale: int [B, G] in panel order -> K tensors float32 [B, M_k]."""
        running = fn.pad(counts[:, self.order].long().cumsum(dim=1), (1, 0))  # exact: no rounding in sums of counts
        sums = running[:, self.last_gene] - running[:, self.first_gene]
        return list((sums.float() / (self.last_gene - self.first_gene)).split(self.sizes, dim=1))

    # -- inputs and outputs of the trunk ----------------------------------------------------------------------------

    def _history(self, k: int, table: Tensor, tokens: Tensor) -> Tensor:
        """Tokens [B, M_k] of scale k as history [B, M_k, D]; k = -1 is the start."""
        if k < 0:
            return self.start.expand(len(tokens), 1, -1)
        return table[tokens] + self.history_position[self._places[k]] + self.scale_embedding[k]

    def _interpolated(self, k: int, table: Tensor, parents: Tensor) -> Tensor:
        """Positions of scale k [B, M_k, D], made of the tokens of the scale above [B, M_{k-1}] (eq. 3)."""
        place = self.position[self._places[k]] + self.scale_embedding[k]
        if k == 0:
            return place.expand(len(parents), -1, -1)
        x = self.transition[k - 1](table[parents])[:, getattr(self, f"parent_{k}")]
        if k == len(self.sizes) - 1 and self.config.gene_identity:
            x = 0.7 * x + 0.3 * self.identity
        return x + place

    def _trunk(self, x: Tensor, h: Tensor, mask: Tensor, caches: list[Cache] | None = None) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, h, mask, caches[i] if caches else None)
        return x

    def _film(self) -> tuple[Tensor, Tensor] | None:
        """gamma and beta of every position of every scale, [sum M, D] each."""
        if not self.config.gene_identity:
            return None
        running = fn.pad(self.identity.cumsum(dim=0), (0, 0, 1, 0))
        mean = (running[self.last_gene] - running[self.first_gene]) / (self.last_gene - self.first_gene)[:, None]
        n_coarse = len(mean) - self.scales.n_genes
        g = torch.cat([self.group_identity(mean[:n_coarse]), self.identity])
        gamma, beta = self.film(g).chunk(2, dim=1)
        return gamma, beta

    def _read_out(self, k: int, x: Tensor, h: Tensor, film: tuple[Tensor, Tensor] | None) -> Tensor:
        """What the classes of scale k are read from, [B, M_k, D]: AdaLN, then FiLM."""
        scale, shift = self.head_steer(h)[:, None].chunk(2, dim=2)
        x = self.head_norm(x) * (1 + scale) + shift
        return x if film is None else x * film[0][self._places[k]] + film[1][self._places[k]]

    def _bias(self, k: int) -> Tensor:
        """[1 or M_k, V]"""
        if self.config.start_at_frequencies:
            return self.head_bias + self.position_bias[self._places[k]]
        return self.head_bias[None]

    # -- training ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, spots: Spots) -> None:
        """Set constants from the training spots: feature mean and scale, and the frequency of each count."""
        assert spots.counts is not None
        if self.config.components:
            self.condition.find_components(spots)
        if self.config.start_at_frequencies:
            means = self.pool(spots.counts)
            self.position_bias.copy_(torch.cat([log_frequencies(m, self.config.max_count) for m in means]))

    def loss(self, batch: Batch) -> LossOutput:
        """One teacher-forced pass; each scale's KL summed over its positions, averaged over spots (nats), K scales
        alike.

        The coarser tokens are the true means, rounded, or those with noise (``token_noise``).
        """
        assert batch.counts is not None
        means = self.pool(batch.counts.clamp(max=self.config.max_count))
        tokens = [mean.round().long() for mean in self._noisy(means[:-1])]
        h, table, film = self.condition(batch), self.embed.rows(), self._film()
        x = self._trunk(self._sequence(table, tokens, len(h)), h, self.mask)
        head, losses = self.head.rows(), []
        for k, mean in enumerate(means):
            at = slice(self._interpolated_start[k], self._interpolated_start[k + 1])
            read = self._read_out(k, x[:, at], h, film)
            if k < len(means) - 1 and self.config.group_temperature == 0:
                kl = two_point_kl(read, head, self._bias(k), mean)
            else:
                sigma = torch.full_like(mean, self.config.group_temperature)
                if k == len(means) - 1:
                    sigma = mean * self.config.sigma_slope + self.config.sigma_base
                kl = count_kl(read, head, self._bias(k), mean, sigma)
            losses.append(kl.sum() / len(h))
        per_scale = torch.stack(losses)
        return LossOutput(per_scale.mean(), per_scale.detach())

    def _sequence(self, table: Tensor, tokens: list[Tensor], n_spots: int) -> Tensor:
        """The training pass's input [B, L, D] from the tokens of scales 1..K-1."""
        above = [table.new_zeros(n_spots, 0, dtype=torch.long), *tokens]
        parts = [self._history(k - 1, table, t) for k, t in enumerate(above)] if self.config.history == "tokens" else []
        return torch.cat([*parts, *(self._interpolated(k, table, t) for k, t in enumerate(above))], dim=1)

    def _noisy(self, means: list[Tensor]) -> list[Tensor]:
        """Group means with noise in ln(1 + count), shared by a spot and each group's own, half as wide; in training
        only.

        It teaches the fine scales to doubt the depth that they are given: at generation that is the model's own guess.
        """
        width = self.config.token_noise
        if not self.training or width == 0 or not means:
            return means
        shared = torch.randn(len(means[0]), 1, device=means[0].device)
        noise = [width * (shared + torch.randn_like(mean) / 2) for mean in means]
        return [
            torch.expm1(torch.log1p(mean) + extra).clamp(0, self.config.max_count)
            for mean, extra in zip(means, noise, strict=True)
        ]

    # -- generation -------------------------------------------------------------------------------------------------

    def predict(self, batch: Batch, *, decode: str = "mean", samples: int = 1, seed: int = 0) -> Counts:
        """See :meth:`generate`; many trajectories are generated in turns."""
        spots_at_once = max(1, _TRAJECTORIES // samples)
        parts = []
        for start in range(0, len(batch.features), spots_at_once):
            at = slice(start, start + spots_at_once)
            part = Batch(batch.features[at], batch.coords_um[at], batch.coords_unit[at], batch.spot_ids[at])
            parts.append(self.generate(part, decode=decode, samples=samples, seed=seed))
        return Counts.join(parts)

    @torch.no_grad()
    def generate(
        self, batch: Batch, *, decode: str = "greedy", samples: int = 1, seed: int = 0, cache: bool = True
    ) -> Counts:
        """Counts of B spots, free-running: each scale reads the tokens that this very call made.

        ``greedy`` (paper) takes the most likely class at every scale. ``mean`` takes the expectation at the last; with
        ``samples`` = S > 1 the coarser scales are drawn S times and the S last softmaxes averaged. Both fill the layers
        ``mean``, ``log1p_mean`` and ``p_zero``. ``cache=False`` computes every scale from scratch, to check the cache.
        Raises ``InputError`` for another ``decode``.
        """
        if decode not in self.decodings:
            raise InputError(f"decode must be one of {', '.join(self.decodings)}, found {decode!r}")
        samples = 1 if decode == "greedy" else samples
        n_coarse = sum(self.sizes[:-1])
        draws = uniforms(batch.spot_ids, seed, samples, n_coarse).flatten(0, 1) if samples > 1 else None
        h = self.condition(batch).repeat_interleave(samples, dim=0)  # [B S, D]
        logits = self._last_logits(h, None if draws is None else draws.to(h.device), cache)
        counts = torch.arange(logits.shape[2], device=h.device, dtype=torch.float32)
        p = logits.float().softmax(dim=2).unflatten(0, (-1, samples)).mean(dim=1)  # [B, G, V]
        mean = p @ counts
        point = p.argmax(dim=2) if decode == "greedy" else mean.round().long()
        layers = {"mean": mean, "log1p_mean": p @ torch.log1p(counts), "p_zero": p[:, :, 0]}
        panel_order = {name: values[:, self.inverse] for name, values in layers.items()}
        return Counts(point[:, self.inverse], decode, panel_order)

    def _last_logits(self, h: Tensor, draws: Tensor | None, cache: bool) -> Tensor:
        """Logits of the last scale [B, G, V] in cluster order, after generating every coarser one (eq. 2)."""
        table, head, film = self.embed.rows(), self.head.rows(), self._film()
        n_kept = self._step(len(self.sizes) - 1)
        caches = [Cache(len(n_kept[0]) + len(n_kept[1])) for _ in self.blocks]
        tokens = h.new_zeros(len(h), 0, dtype=torch.long)
        made: list[Tensor] = []
        for k in range(len(self.sizes)):
            x = self._cached_pass(k, table, tokens, h, caches) if cache else self._full_pass(k, table, made, h)
            logits = fn.linear(self._read_out(k, x, h, film), head) + self._bias(k)
            if k == len(self.sizes) - 1:
                return logits
            tokens = _choose(logits.float(), None if draws is None else draws[:, self._places[k]])
            made.append(tokens)
        raise AssertionError("a model has at least one scale")

    def _cached_pass(self, k: int, table: Tensor, tokens: Tensor, h: Tensor, caches: list[Cache]) -> Tensor:
        """Trunk output [B, M_k, D] of scale k, feeding only what is new."""
        new, old, n_keep = self._step(k)
        x = self._interpolated(k, table, tokens)
        if self.config.history == "tokens":
            x = torch.cat([self._history(k - 1, table, tokens), x], dim=1)
        for cache in caches:
            cache.n_keep = n_keep
        mask = self.mask[new][:, torch.cat([old, new])]
        return self._trunk(x, h, mask, caches)[:, -self.sizes[k] :]

    def _full_pass(self, k: int, table: Tensor, made: list[Tensor], h: Tensor) -> Tensor:
        """The same by the training pass, with zeros for the tokens that are not known yet (the mask hides them)."""
        zeros = [h.new_zeros(len(h), m, dtype=torch.long) for m in self.sizes[len(made) : -1]]
        x = self._trunk(self._sequence(table, [*made, *zeros], len(h)), h, self.mask)
        return x[:, self._interpolated_start[k] : self._interpolated_start[k + 1]]

    # -- making and saving ------------------------------------------------------------------------------------------

    @classmethod
    def check_settings(cls, preset: str, settings: Mapping) -> None:
        """Settings are the fields of :class:`GenARConfig`, and ``scales``: the groups at each scale, coarse to fine."""
        config_from_dict({name: value for name, value in settings.items() if name != "scales"}, preset)

    @classmethod
    def create(cls, n_features: int, spots: Spots, preset: str, settings: Mapping) -> "GenAR":
        """Order the genes by the training counts and size the classes for them."""
        assert spots.counts is not None
        scales = fit_scales(spots.counts.numpy(), settings.get("scales"))
        own = {name: value for name, value in settings.items() if name != "scales"}
        config = config_from_dict({**own, "n_features": n_features}, preset)
        if config.max_count == 0:
            config = replace(config, max_count=auto_max_count(spots.counts))
        return cls(config, scales)

    def facts(self) -> dict:
        """Configuration and scales."""
        return {"config": asdict(self.config), "scales": self.scales.to_dict()}

    @classmethod
    def from_facts(cls, facts: dict) -> "GenAR":
        """Inverse of :meth:`facts`."""
        return cls(config_from_dict(facts["config"]), Scales.from_dict(facts["scales"]))


def _choose(logits: Tensor, draws: Tensor | None) -> Tensor:
    """Tokens [B, M]: the most likely, or the quantile of each at its draw in (0, 1)."""
    if draws is None:
        return logits.argmax(dim=2)
    cumulative = logits.double().softmax(dim=2).cumsum(dim=2)
    return torch.searchsorted(cumulative, draws[:, :, None].double())[:, :, 0].clamp(max=logits.shape[2] - 1)


def log_frequencies(means: Tensor, max_count: int) -> Tensor:
    """Log of the smoothed frequency of each count at each position: means [N, M] -> [M, V], mean zero over the classes.

    Each observed value spreads over a Gaussian as wide as counting noise, (1 + m) ** 0.5, and every class keeps a
    floor.
    """
    classes = torch.arange(max_count + 1, dtype=torch.float32, device=means.device)
    frequency = torch.zeros(means.shape[1], max_count + 1, device=means.device)
    for mean in means.clamp(max=max_count):  # one spot at a time bounds the memory
        spread = torch.exp(-0.5 * (classes - mean[:, None]).square() / (1 + mean[:, None]))
        frequency += spread / spread.sum(dim=1, keepdim=True)
    frequency = frequency / len(means) + 1e-6
    return frequency.log() - frequency.log().mean(dim=1, keepdim=True)


def auto_max_count(counts: Tensor) -> int:
    """The largest count, rounded up to a power of two less one, so that the classes number a power of two."""
    return 2 ** max(1, int(counts.max()).bit_length()) - 1


def config_from_dict(facts: Mapping, preset: str = "small") -> GenARConfig:
    """A configuration from plain values over a preset; ``InputError`` naming what is not known."""
    if preset not in PRESETS:
        raise InputError(f"model: preset {preset!r} is not known; expected one of {', '.join(PRESETS)}")
    known = {f.name for f in fields(GenARConfig)}
    if unknown := sorted(set(facts) - known):
        raise InputError(f"model: unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return PRESETS[preset](**facts)


MODEL = GenAR
