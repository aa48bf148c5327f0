"""GenAR: counts generated scale by scale, from the mean of all genes down to each gene (the paper's model).

What is unusual about it. Genes stand in cluster order and are pooled into ever finer groups; the token of a group
*is* its rounded mean count, so there is no codebook. A scale's positions start from the tokens of the scale above
("interpolated"), see all coarser tokens ("history") and give a softmax over count classes 0..C. A token's embedding
does not depend on the pass in which it is read. Hence training is one pass over [start ; history 1..K-1 ;
interpolated 1..K] under one mask, and generation runs the very same network scale by scale on cached keys and values:
the mask of a step is a cut of the training mask. And training does not begin at nothing: the logits start at what a
linear model of the components knows of every group and its parent (``_linear_start``).

Equation and section numbers are the paper's ("GenAR: Next-Scale Autoregressive Generation for Spatial Gene Expression
Prediction"). Letters: B spots, S trajectories, G genes, K scales, M groups of a scale, L positions, D width, H heads,
F features, V classes.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as fn
from torch.utils.checkpoint import checkpoint

from genar import defaults
from genar.errors import InputError
from genar.genes import ORDERS, Scales, default_sizes, fit_scales
from genar.models._base import Batch, Card, Counts, LossOutput, Model, Spots, uniforms
from genar.models._blocks import in_blocks
from genar.models._cosine_attention import Cache, as_it_comes
from genar.models._decoding import DECODINGS, DEFAULT, Decoding, draw, quantile, refuse_distribution, summarise
from genar.models._genar_config import PRESETS, GenARConfig, config_from_dict, idle_fields, paper, released, small
from genar.models._genar_heads import CountHead, ValueHead
from genar.models._genar_layout import Layout
from genar.models._genar_parts import Block, Condition, CountTable, LinearStart, bf16_products
from genar.models._linear_start import (
    Components,
    count_followed,
    drawn_variance,
    find_components,
    fit_curvatures,
    fit_followers,
    fit_means,
    level,
)
from genar.models._training_spots import left_out_parts, max_count_of

__all__ = ["PRESETS", "GenAR", "GenARConfig", "paper", "released", "small"]

# Settings that shape the hierarchy rather than the network.
STRUCTURE = {"scales": tuple[int, ...], "order": str}
# Trajectories generated at a time, fewer where their logits were more than 256 MiB.
_TRAJECTORIES = 64
_MOST_LOGITS = 1 << 26


def network_settings(settings: Mapping) -> dict:
    """Those of ``settings`` that shape the network, which the fields of :class:`GenARConfig` are."""
    return {name: value for name, value in settings.items() if name not in STRUCTURE}


@dataclass(frozen=True)
class _Steering:
    """What the condition and the genes tell the network, made once for all scales."""

    blocks: list[tuple[Tensor, ...]]
    """of each block, see ``Block.steering``"""
    head_scale: Tensor
    """[B, 1, D], as the shift"""
    head_shift: Tensor
    film: tuple[Tensor, Tensor] | None
    """gamma and beta of every group, [sum M, D] each"""


class GenAR(Model):
    """Raw counts, generated scale by scale, from the mean of all genes down to each gene.

    ``loss`` is the training pass (eq. 4, 5), ``generate`` the scale-by-scale prediction (eq. 2).

    >>> import torch
    >>> scales = genar.fit_scales(torch.randint(9, (50, 20)).numpy(), (1, 4, 20))
    >>> model = genar.GenAR(small(n_features=8, max_count=15, components=4), scales).eval()
    >>> spots = Batch(torch.randn(5, 8), torch.rand(5, 2), torch.rand(5, 2), torch.arange(5))
    >>> counts = model.predict(spots)
    >>> counts.point.shape, counts.decode
    (torch.Size([5, 20]), 'mean')
    """

    decodings = DECODINGS
    decodes_by = ("samples", "seed", "temperature", "top_k", "top_p", "bf16")
    input_defaults: ClassVar = {"small": {"widths_um": defaults.WIDTHS_UM, "context_spots": (6,)}}
    can_stream = True
    card = Card(
        title="GenAR: Next-Scale Autoregressive Generation for Spatial Gene Expression Prediction",
        target="raw counts, as the paper; log2(1 + count) is of the predicted counts or their distribution",
        kept="genes in clusters, scales from the mean of all to each gene, rounded means as tokens, softmax over "
        "counts, the discretised Gaussian of eq. 5; presets paper and released are the published sizes, and take the "
        "spot's position",
        lost="preset small is smaller, takes no position, sees coarser scales through their interpolated positions "
        "alone, and begins at a linear model, which the paper has not (docs/accuracy.md)",
        mended="all scales are trained in one pass; a seed and a spot's name decide its draws, so that the batch "
        "changes nothing",
    )
    layout: Layout

    def __init__(self, config: GenARConfig, scales: Scales):
        super().__init__()
        if config.max_count == 0:
            raise InputError("model: max_count is 0 (auto); resolve it from the training counts first (auto_max_count)")
        self.config, self.scales, self.sizes = config, scales, scales.sizes
        self.n_features, width, n_groups = config.n_features, config.width, sum(scales.sizes)
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
        drops = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_ratio, drop) for drop in drops)
        self.head_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.head_steer = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = (CountHead if config.output == "counts" else ValueHead)(config, n_groups)
        if config.linear_start:
            self.linear_start = LinearStart(config.components, n_groups, count_followed(scales.sizes))
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
        if not self.start.is_meta:  # else it is only measured: there is nothing to lay out
            self.layout = Layout(scales, config.history, config.within)

    # -- inputs and outputs of the trunk ----------------------------------------------------------------------------

    def _history(self, k: int, table: Tensor, tokens: Tensor) -> Tensor:
        """Tokens [B, M_k] of scale k as history [B, M_k, D]; k = -1 is the start."""
        if k < 0:
            return self.start.expand(len(tokens), 1, -1)
        return fn.embedding(tokens, table) + self.history_position[self.layout.places[k]] + self.scale_embedding[k]

    def _interpolated(self, k: int, table: Tensor, parents: Tensor) -> Tensor:
        """Positions of scale k [B, M_k, D], made of the tokens of the scale above [B, M_{k-1}] (eq. 3)."""
        place = self.position[self.layout.places[k]] + self.scale_embedding[k]
        if k == 0:
            return place.expand(len(parents), -1, -1)
        parent, transition = self.layout.parent(k), self.transition[k - 1]
        if parents.numel() > len(table):  # every class once, rather than every token
            x = fn.embedding(parents.index_select(1, parent), transition(table))
        else:
            x = transition(fn.embedding(parents, table)).index_select(1, parent)
        if k == len(self.sizes) - 1 and self.config.gene_identity:
            return torch.add(place + 0.3 * self.identity, x, alpha=0.7)
        return x + place

    def _steering(self, h: Tensor) -> _Steering:
        """What a spot's condition [B, D] and the identity of the genes tell the blocks and the head, at every scale."""
        scale, shift = self.head_steer(h)[:, None].chunk(2, dim=2)
        blocks = [block.steering(h) for block in self.blocks]  # pyright: ignore
        return _Steering(blocks, 1 + scale, shift, self._film())

    def _trunk(self, x: Tensor, steering: _Steering, cuts: nn.ModuleList, caches: list[Cache] | None = None) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):  # else every sum would go back to float32
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for i, (block, steered) in enumerate(zip(self.blocks, steering.blocks, strict=True)):
            if self.config.recompute and caches is None and torch.is_grad_enabled():
                x = checkpoint(block, x, steered, cuts, use_reentrant=False)  # pyright: ignore
            else:
                x = block(x, steered, cuts, caches[i] if caches else None)
        return x

    def _film(self) -> tuple[Tensor, Tensor] | None:
        """gamma and beta of every position of every scale, [sum M, D] each."""
        if not self.config.gene_identity:
            return None
        running = fn.pad(self.identity.cumsum(dim=0), (0, 0, 1, 0))
        mean = (running[self.layout.last_gene] - running[self.layout.first_gene]) / (
            self.layout.last_gene - self.layout.first_gene
        )[:, None]
        n_coarse = len(mean) - self.scales.n_genes
        g = torch.cat([self.group_identity(mean[:n_coarse]), self.identity])
        gamma, beta = self.film(g).chunk(2, dim=1)
        return gamma, beta

    def _read_out(self, k: int, x: Tensor, steering: _Steering) -> Tensor:
        """What the head of scale k reads, float32 [B, M_k, D]: AdaLN, then FiLM."""
        x = torch.addcmul(steering.head_shift, self.head_norm(x), steering.head_scale)
        if steering.film is not None:
            gamma, beta = (part[self.layout.places[k]] for part in steering.film)
            x = torch.addcmul(beta, x, gamma)
        return x.float()

    def _start(self, k: int, known: Tensor | None, counts: list[Tensor]) -> tuple[LinearStart, Tensor] | None:
        """The linear start and the ln(1 + count) [B, M_k] that it expects, from components [B, C] and the tokens (or
        mean counts) of all coarser scales."""
        if known is None:
            return None
        with as_it_comes(known.device.type):
            return self.linear_start, self.linear_start.expected(self.layout.places[k], known, counts)

    def _known(self, batch: Batch) -> Tensor | None:
        """Components [B, C] that the linear start reads."""
        return self.condition.components(batch) if self.config.linear_start else None

    # -- training ---------------------------------------------------------------------------------------------------

    @property
    def mask_bytes(self) -> int:
        """A byte a pair of positions, some times over while they are made."""
        return 8 * sum(self.sizes) ** 2

    @property
    def spot_bytes(self) -> int:
        """Positions times width, as often as a block keeps them for the backward pass; recomputed, one block's and the
        input of each."""
        kept, depth = 18 + 2 * self.config.mlp_ratio, self.config.depth
        in_blocks = depth + kept if self.config.recompute else depth * kept
        return int(4 * self.layout.interpolated_start[-1] * self.config.width * in_blocks)

    @torch.no_grad()
    def prepare(self, spots: Spots) -> None:
        """Set constants from the training spots: the components, the frequency of each count, the linear start."""
        assert spots.counts is not None
        means = self.layout.pool(spots.counts.clamp(max=self.config.max_count))
        self.head.prepare(means)
        if self.config.components:
            found = find_components(spots, self.config.components)
            self.condition.set_components(found, len(spots))
            if self.config.linear_start:
                self._fit_linear_start(spots, means, found)

    def _fit_linear_start(self, spots: Spots, means: list[Tensor], found: Components) -> None:
        """Fit the log-linear model of every group, scale by scale: first to the true tokens of the coarser scales, then
        what these leave over to the image. Of a mean between two counts one of both is drawn in generation: groups are
        believed the less, and spread the wider, the more that does to them."""
        x = ((spots.features.mean(dim=1) - found.mean) @ found.directions).double()
        shrink, fold, start = found.shrink(len(spots)).double()[:, None], left_out_parts(spots), self.linear_start
        for kept in (start.slope, start.follow):
            kept.zero_()  # an earlier call may have had more spots
        noise = [x.new_zeros(0)]
        for k, mean in enumerate(means):
            y, place = level(mean).double(), self.layout.places[k]
            seen = start.followed(means[:k]).double() if k else x[:, :0]
            follow, told, passed_on = fit_followers(seen, y, fold, torch.cat(noise)[: seen.shape[1]])
            drawn = drawn_variance(mean).double().mean(dim=0)
            noise.append(drawn)
            rest = y - y.mean(dim=0) - (seen - seen.mean(dim=0)) @ follow
            slope, more = fit_means(x, rest, fold, found.penalty)
            expected = told + more
            if isinstance(self.head, CountHead):
                variance = ((y - expected).square().mean(dim=0) + drawn + passed_on).clamp(min=1e-4)
                base = self.head.group_bias[place].double()
                curvature, knots, tilts = fit_curvatures(base, self.head.log_classes.double(), expected, variance)
                start.curvature[place] = curvature.float()
                start.means[place], start.tilts[place] = knots.float(), tilts.float()
            start.slope[: len(slope), place] = (slope / shrink).float()
            start.follow[: len(follow), place] = follow.float()
            start.offset[place] = (y.mean(dim=0) - seen.mean(dim=0) @ follow - x.mean(dim=0) @ slope).float()

    def loss(self, batch: Batch) -> LossOutput:
        """One teacher-forced pass; each scale's loss summed over its positions, averaged over spots (nats), the K
        scales weighted by ``scale_weights``.

        The coarser tokens are the true means, rounded, or those with noise (``token_noise``).
        """
        assert batch.counts is not None
        means = self.layout.pool(batch.counts.clamp(max=self.config.max_count))
        given = self._noisy(means[:-1])
        tokens = [mean.round().long() for mean in given]
        known, steering = self._known(batch), self._steering(self.condition(batch))
        x = self._trunk(self._sequence(self.embed.rows(), tokens, len(batch.counts)), steering, self.layout.cuts)
        scales, losses = x[:, self.layout.interpolated_start[0] :].split(self.sizes, dim=1), []
        for k, mean in enumerate(means):
            read, start = self._read_out(k, scales[k], steering), self._start(k, known, given[:k])
            loss = self.head.loss if k < len(means) - 1 else self.head.final_loss
            with as_it_comes(x.device.type):
                losses.append(loss(self.layout.places[k], read, start, mean) / len(mean))
        per_scale = torch.stack(losses)
        weights = per_scale.new_tensor(self.config.scale_weights or (1.0,) * len(losses))
        return LossOutput((per_scale * weights).sum() / weights.sum(), per_scale.detach())

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

    @property
    def _at_once(self) -> int:
        """Trajectories that are generated at a time."""
        return max(1, min(_TRAJECTORIES, _MOST_LOGITS // (self.scales.n_genes * (self.config.max_count + 1))))

    def predict(self, batch: Batch, how: Decoding = DEFAULT) -> Counts:
        """See :meth:`generate`; spots go through in blocks of one shape."""
        block = max(1, self._at_once // how.trajectories)
        return in_blocks(lambda part: self.generate(part, how), batch, block)

    @torch.no_grad()
    def generate(self, batch: Batch, how: Decoding = DEFAULT, *, cache: bool = True) -> Counts:
        """Counts of B spots, free-running: each scale reads the tokens that this very call made.

        The predictive distribution of a gene is the average of the last softmaxes of the S trajectories; ``how.decode``
        makes the counts of it, ``how.layers`` are kept of it. ``greedy`` and ``sample`` follow one trajectory.
        ``cache=False`` computes every scale from scratch, to check the cache. Raises ``InputError`` where squared error
        (which gives no distribution) is asked for one.
        """
        arithmetic = bf16_products(batch.features.device.type) if how.bf16 else nullcontext()
        if self.config.final_loss == "squared_error":
            with arithmetic:
                return self._generate_values(batch, how, cache)
        s = how.trajectories
        n_draws = sum(self.sizes) if how.decode == "sample" else sum(self.sizes[:-1])
        draws: tuple[Tensor | None, ...] = (None,)  # the most likely tokens
        if how.decode == "sample" or s > 1:
            draws = uniforms(batch.spot_ids, how.seed, s, n_draws).to(batch.features.device).split(self._at_once, dim=1)
        p = logits = torch.empty(0, 0, 0)
        for part in draws:
            n, drawn = (1, None) if part is None else (part.shape[1], part.flatten(0, 1))
            with arithmetic:
                inputs = self._last_inputs(batch, how, n, drawn, cache)
                with as_it_comes(batch.features.device.type):
                    logits = self.head.logits(*inputs)  # [B n, G, V]
            if how.kept or how.decode not in ("greedy", "sample"):
                each = logits.softmax(dim=2).unflatten(0, (-1, n))
                mean = each[:, 0] if n == 1 else each.mean(dim=1)  # [B, G, V]
                p = mean if n == s else (p if len(p) else torch.zeros_like(mean)).add_(mean, alpha=n / s)
        if how.decode == "greedy":
            point = logits.max(dim=2).indices  # twice as fast as argmax
        elif how.decode == "sample":
            assert draws[0] is not None
            point = draw(logits, draws[0].flatten(0, 1)[:, self.layout.places[-1]], how)
        elif how.decode == "mean":
            point = summarise(p, ("mean",))["mean"].round().long()
        else:
            point = quantile(p, 0.5)
        layers = {name: values[:, self.layout.inverse] for name, values in summarise(p, how.kept).items()}
        return Counts(point[:, self.layout.inverse], how.decode, layers)

    def _generate_values(self, batch: Batch, how: Decoding, cache: bool) -> Counts:
        """Squared error gives a value and no distribution: one trajectory, and expectations alone."""
        refuse_distribution(how)
        how = replace(how, samples=1)
        inputs = self._last_inputs(batch, how, 1, None, cache)
        assert isinstance(self.head, ValueHead)
        with as_it_comes(batch.features.device.type):
            value = self.head.values(*inputs)[0][:, self.layout.inverse]
        value = value.clamp(0, math.log1p(self.config.max_count))  # as the other losses' counts
        known = {"log1p_mean": value, "mean": torch.expm1(value)}
        layers = {name: known[name] for name in how.kept if name in known}
        return Counts(torch.expm1(value).round().long(), how.decode, layers)

    def _last_inputs(
        self, batch: Batch, how: Decoding, n: int, draws: Tensor | None, cache: bool
    ) -> tuple[slice, Tensor, tuple[LinearStart, Tensor] | None]:
        """What the head takes at the last scale, after every coarser one: for ``n`` trajectories of
        each spot, by ``draws`` [B n, sum M], genes in cluster order."""
        h = self.condition(batch).repeat_interleave(n, dim=0)  # [B n, D]
        known = self._known(batch)
        known = None if known is None else known.repeat_interleave(n, dim=0)
        table, steering = self.embed.rows(), self._steering(h)
        caches = [Cache(self.layout.n_cached) for _ in self.blocks] if cache else None
        tokens = torch.zeros(len(h), 0, dtype=torch.long, device=h.device)
        made: list[Tensor] = []

        def inputs(k: int) -> tuple[slice, Tensor, tuple[LinearStart, Tensor] | None]:
            if caches:
                x = self._cached_pass(k, table, tokens, steering, caches)
            else:
                x = self._full_pass(k, table, made, steering, len(h))
            return self.layout.places[k], self._read_out(k, x, steering), self._start(k, known, made)

        for k in range(len(self.sizes) - 1):
            place, read, start = inputs(k)
            with as_it_comes(h.device.type):
                logits = self.head.logits(place, read, start)
            tokens = logits.max(dim=2).indices if draws is None else draw(logits, draws[:, place], how)
            made.append(tokens)
        return inputs(len(self.sizes) - 1)

    def _cached_pass(self, k: int, table: Tensor, tokens: Tensor, steering: _Steering, caches: list[Cache]) -> Tensor:
        """Trunk output [B, M_k, D] of scale k, feeding only what is new."""
        x = self._interpolated(k, table, tokens)
        if self.config.history == "tokens":
            x = torch.cat([self._history(k - 1, table, tokens), x], dim=1)
        for cache in caches:
            cache.n_keep = self.layout.n_keep[k]
        return self._trunk(x, steering, self.layout.steps[k : k + 1], caches)[:, -self.sizes[k] :]

    def _full_pass(self, k: int, table: Tensor, made: list[Tensor], steering: _Steering, n_spots: int) -> Tensor:
        """The same by the training pass, with zeros for the tokens that are not known yet (the masks hide them)."""
        zeros = [table.new_zeros(n_spots, m, dtype=torch.long) for m in self.sizes[len(made) : -1]]
        x = self._trunk(self._sequence(table, [*made, *zeros], n_spots), steering, self.layout.cuts)
        return x[:, self.layout.interpolated_start[k] : self.layout.interpolated_start[k + 1]]

    # -- making and saving ------------------------------------------------------------------------------------------

    @classmethod
    def settings_types(cls) -> dict[str, Any]:
        """The fields of :class:`GenARConfig` that the data do not decide, and the structure."""
        own = {f.name: f.type for f in fields(GenARConfig) if f.name not in ("n_features", "n_blocks")}
        return own | STRUCTURE

    @classmethod
    def check_settings(cls, preset: str, settings: Mapping, n_genes: int | None = None) -> None:
        """Settings are the fields of :class:`GenARConfig`, ``scales``: the groups at each scale, coarse to fine, and
        ``order``: ``kmeans``, ``random`` or the panel's indices in order."""
        config_from_dict(network_settings(settings), preset)
        order = settings.get("order", "kmeans")
        if isinstance(order, str) and order not in ORDERS:
            raise InputError(f"model: order must be {', '.join(ORDERS)} or a GMT file of gene sets, found {order!r}")
        if n_genes is None:
            return
        sizes = tuple(settings.get("scales", default_sizes(n_genes)))
        Scales(tuple(range(n_genes)) if isinstance(order, str) else tuple(order), sizes)
        if len(weights := settings.get("scale_weights", ())) not in (0, len(sizes)):
            raise InputError(f"model: scale_weights must be one a scale, {len(sizes)} of them, found {len(weights)}")

    @classmethod
    def idle_settings(cls, preset: str, settings: Mapping) -> dict[str, str]:
        """The widths of targets that the loss does not have, and what is of several scales or blocks."""
        idle = idle_fields(config_from_dict(network_settings(settings), preset), len(settings.get("scales", ())))
        return {name: why for name, why in idle.items() if name in settings}

    def decodes_by_of(self, how: Decoding) -> tuple[str, ...]:
        """Of squared error nothing is drawn, nor where the one trajectory takes the likeliest tokens."""
        if self.config.final_loss == "squared_error":
            return ("bf16",)
        return self.decodes_by if how.decode == "sample" or how.samples > 1 else ("samples", "bf16")

    @classmethod
    def check_decoding(cls, preset: str, settings: Mapping, how: Decoding) -> None:
        """Squared error gives a value and no distribution."""
        super().check_decoding(preset, settings, how)
        config = config_from_dict(network_settings(settings), preset)
        if config.final_loss == "squared_error":
            refuse_distribution(how)

    @classmethod
    def create(cls, n_features: int, spots: Spots, preset: str, settings: Mapping) -> "GenAR":
        """Order the genes by the training counts and size the classes for them."""
        assert spots.counts is not None
        scales = fit_scales(spots.counts.numpy(), settings.get("scales"), order=settings.get("order", "kmeans"))
        config = config_from_dict(
            {**network_settings(settings), "n_features": n_features, "n_blocks": spots.n_blocks}, preset
        )
        return cls(replace(config, max_count=max_count_of(config.max_count, spots.largest_counts())), scales)

    def facts(self) -> dict:
        """Configuration and scales."""
        return {"config": asdict(self.config), "scales": self.scales.to_dict()}

    def upgraded(self, state: dict[str, Tensor], version: int) -> dict[str, Tensor]:
        """In format 1 a group followed its parent alone."""
        if version > 1 or "linear_start.parent_slope" not in state:
            return state
        kept = dict(state)
        follow = self.linear_start.follow_of_parents(kept.pop("linear_start.parent_slope"), self.scales)
        return {**kept, "linear_start.follow": follow}

    @classmethod
    def from_facts(cls, facts: dict) -> "GenAR":
        """Inverse of :meth:`facts`."""
        return cls(config_from_dict(facts["config"]), Scales.from_dict(facts["scales"]))


MODEL = GenAR
