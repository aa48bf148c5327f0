"""GenAR: counts generated scale by scale, from the mean of all genes down to each gene (the paper's model).

What is unusual about it. Genes stand in cluster order and are pooled into ever finer groups; the token of a group
*is* its rounded mean count, so there is no codebook. A scale's positions start from the tokens of the scale above
("interpolated"), see all coarser tokens ("history") and give a softmax over count classes 0..C. A token's embedding
does not depend on the pass in which it is read. Hence training is one pass over [start ; history 1..K-1 ;
interpolated 1..K] under one mask, and generation runs the very same network scale by scale on cached keys and values:
the mask of a step is a cut of the training mask.

Equation and section numbers are the paper's ("GenAR: Next-Scale Autoregressive Generation for Spatial Gene Expression
Prediction"). Letters: B spots, S trajectories, G genes, K scales, M groups of a scale, L positions, D width, H heads,
F features, V classes.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from genar.errors import InputError
from genar.genes import Scales, fit_scales
from genar.models._base import Batch, Counts, LossOutput, Model, Spots, uniforms
from genar.models._count_loss import count_kl, two_point_kl
from genar.models._genar_config import PRESETS, GenARConfig, config_from_dict, paper, released, small
from genar.models._genar_parts import Block, Cache, Condition, CountTable

__all__ = ["PRESETS", "GenAR", "GenARConfig", "paper", "released", "small"]

# Trajectories generated at a time.
_TRAJECTORIES = 64


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
        """See :meth:`generate`. Spots go through in blocks of one fixed shape, the last one padded.

        Matrix products round differently at other shapes, and a token near a tie might fall otherwise in another batch.
        """
        samples = 1 if decode == "greedy" else samples
        n_spots, block, parts = len(batch.features), max(1, _TRAJECTORIES // samples), []
        for start in range(0, n_spots, block):
            rows = torch.arange(start, start + block, device=batch.features.device).clamp(max=n_spots - 1)
            part = Batch(batch.features[rows], batch.coords_um[rows], batch.coords_unit[rows], batch.spot_ids[rows])
            parts.append(self.generate(part, decode=decode, samples=samples, seed=seed))
        return Counts.join(parts).first(n_spots)

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
        mean = (p * counts).sum(dim=2)  # a sum a row, and no matrix product, for the same bits in any batch
        point = p.argmax(dim=2) if decode == "greedy" else mean.round().long()
        layers = {"mean": mean, "log1p_mean": (p * torch.log1p(counts)).sum(dim=2), "p_zero": p[:, :, 0]}
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
    def check_settings(cls, preset: str, settings: Mapping, n_genes: int | None = None) -> None:
        """Settings are the fields of :class:`GenARConfig`, and ``scales``: the groups at each scale, coarse to fine."""
        config_from_dict({name: value for name, value in settings.items() if name != "scales"}, preset)
        if n_genes is not None and "scales" in settings:
            Scales(tuple(range(n_genes)), tuple(settings["scales"]))

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


MODEL = GenAR
