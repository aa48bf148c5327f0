"""What comes out of GenAR's trunk: a softmax over counts (the paper's), or a value of ln(1 + count) (its ablation).

Both start at what is known before training: the linear start's expectation where there is one, else the training
frequencies or means of each group. Letters as in ``genar.py``.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from genar.models._count_loss import (
    count_kl,
    cross_entropy,
    gaussian_nll,
    gaussian_table,
    summed,
    table_kl,
    two_point_kl,
)
from genar.models._genar_config import GenARConfig
from genar.models._genar_parts import CountTable, LinearStart

_SMALLEST_SD = 1e-3
# Classes up to which the targets of all counts are made at once: 16 MiB.
_LARGEST_TABLE = 2048


class CountHead(nn.Module):
    """Logits over the count classes 0..C of every group."""

    log_classes: Tensor

    def __init__(self, config: GenARConfig, n_groups: int):
        super().__init__()
        self.config = config
        n_classes = config.max_count + 1
        self.table = CountTable(n_classes, config.width, config.count_basis, std=0.0 if config.linear_start else 0.02)
        self.class_bias = nn.Parameter(torch.zeros(n_classes))
        if config.start_at_frequencies:
            self.group_bias = nn.Parameter(torch.zeros(n_groups, n_classes))
        self.register_buffer("log_classes", torch.log1p(torch.arange(n_classes).float()), persistent=False)

    @torch.no_grad()
    def prepare(self, means: list[Tensor]) -> None:
        """Start the bias at the frequency of each count, of the means [N, M_k] of every scale."""
        if self.config.start_at_frequencies:
            self.group_bias.copy_(torch.cat([log_frequencies(mean, self.config.max_count) for mean in means]))

    def loss(self, place: slice, read: Tensor, start: "tuple[LinearStart, Tensor] | None", mean: Tensor) -> Tensor:
        """Loss of the groups of a coarser scale, nats, summed; ``mean`` [B, M] the true mean counts (eq. 4)."""
        inputs = self._inputs(place, read, start)
        if self.config.group_temperature == 0:
            return summed(two_point_kl, *inputs, mean)
        return summed(count_kl, *inputs, mean, torch.full_like(mean, self.config.group_temperature))

    def final_loss(
        self, place: slice, read: Tensor, start: "tuple[LinearStart, Tensor] | None", count: Tensor
    ) -> Tensor:
        """Loss of the genes, nats, summed (eq. 5, or as ``final_loss`` says)."""
        inputs = self._inputs(place, read, start)
        if self.config.final_loss == "cross_entropy":
            return summed(cross_entropy, *inputs, count)
        base, slope = self.config.sigma_base, self.config.sigma_slope
        if self.config.final_loss == "gaussian" and len(self.log_classes) <= _LARGEST_TABLE:
            table = gaussian_table(len(self.log_classes), base, slope, self.log_classes)
            return summed(partial(table_kl, table=table), *inputs, count)
        sigma = count * slope + base
        return summed(count_kl if self.config.final_loss == "gaussian" else gaussian_nll, *inputs, count, sigma)

    def logits(self, place: slice, read: Tensor, start: "tuple[LinearStart, Tensor] | None") -> Tensor:
        """[B, M, V]"""
        read, table, bias = self._inputs(place, read, start)
        return fn.linear(read, table).add_(bias)

    def _inputs(self, place: slice, read: Tensor, start) -> tuple[Tensor, Tensor, Tensor]:
        """Columns [B, M, R], weights [V, R] and bias [1 or M, V] of the logits; a linear start's tilt is a column."""
        bias = self.class_bias[None]
        if self.config.start_at_frequencies:
            bias = bias + self.group_bias[place]
        columns, table = self.table.factors(read)
        if start is None:
            return columns, table, bias
        linear, expected = start
        bias = bias - linear.curvature[place][:, None] * self.log_classes.square() / 2
        tilt = linear.tilt(place, expected)[:, :, None].to(columns.dtype)
        return torch.cat([columns, tilt], dim=2), torch.cat([table, self.log_classes[:, None]], dim=1), bias


class ValueHead(nn.Module):
    """A value of ln(1 + count) for every group, and a standard deviation: regression with the same trunk."""

    edges: Tensor

    def __init__(self, config: GenARConfig, n_groups: int):
        super().__init__()
        self.config = config
        self.weight = nn.Linear(config.width, 2)
        nn.init.zeros_(self.weight.weight)
        nn.init.zeros_(self.weight.bias)
        if not config.linear_start:
            self.mean = nn.Parameter(torch.zeros(n_groups))
        if config.final_loss != "squared_error":
            self.log_sd = nn.Parameter(torch.zeros(n_groups))
        edges = torch.log(torch.arange(config.max_count + 2) - 0.5 + 1)
        edges[0], edges[-1] = -torch.inf, torch.inf
        self.register_buffer("edges", edges, persistent=False)

    @torch.no_grad()
    def prepare(self, means: list[Tensor]) -> None:
        """Start at mean and standard deviation of each group in training."""
        logs = torch.log1p(torch.cat(means, dim=1))
        if self.config.final_loss != "squared_error":
            self.log_sd.copy_(logs.std(dim=0, correction=0).clamp(min=0.1).log())
        if self.config.start_at_frequencies and not self.config.linear_start:
            self.mean.copy_(logs.mean(dim=0))

    def loss(self, place: slice, read: Tensor, start: "tuple[LinearStart, Tensor] | None", mean: Tensor) -> Tensor:
        """Squared error, or Gaussian negative log likelihood, of ln(1 + mean count), summed over positions."""
        value, log_sd = self.values(place, read, start)
        error = value - torch.log1p(mean)
        if self.config.final_loss == "squared_error":
            return error.square().sum()
        return (0.5 * (error / log_sd.exp()).square() + log_sd + 0.5 * math.log(2 * math.pi)).sum()

    final_loss = loss

    def values(self, place: slice, read: Tensor, start: "tuple[LinearStart, Tensor] | None") -> tuple[Tensor, Tensor]:
        """Value and log standard deviation [B, M] each, of ln(1 + count)."""
        value, spread = self.weight(read).float().unbind(dim=2)
        known = self.mean[place] if start is None else start[1]
        if self.config.final_loss == "squared_error":
            return value + known, torch.full_like(value, math.log(_SMALLEST_SD))
        return value + known, (spread + self.log_sd[place]).clamp(min=math.log(_SMALLEST_SD))

    def logits(self, place: slice, read: Tensor, start: "tuple[LinearStart, Tensor] | None") -> Tensor:
        """Log probability of every count [B, M, V]: the Gaussian over ln(1 + count), cut half-way between counts.

        With squared error there is no spread: all of it goes to the nearest count.
        """
        value, log_sd = self.values(place, read, start)
        within = value.clamp(0, math.log1p(self.config.max_count))  # else all classes were out of reach
        cumulative = torch.special.ndtr(((self.edges - within[:, :, None]) / log_sd.exp()[:, :, None]).double())
        return cumulative.diff(dim=2).clamp(min=1e-30).log().float()


_FEW_CLASSES = 512
_FAR = 15  # standard deviations: the density is 0 there in float32


def log_frequencies(means: Tensor, max_count: int) -> Tensor:
    """Log of the smoothed frequency of each count at each position: means [N, M] -> [M, V], mean zero over the classes.

    Each observed value spreads over a Gaussian as wide as counting noise, (1 + m) ** 0.5, and every class keeps a
    floor.
    """
    classes = torch.arange(max_count + 1, dtype=torch.float32, device=means.device)
    frequency = torch.zeros(means.shape[1], max_count + 1, device=means.device)
    for mean in means.clamp(max=max_count):  # one spot at a time bounds the memory
        top = float(mean.max())  # classes far above every mean of the spot get nothing
        n = max(_FEW_CLASSES, 2 ** math.ceil(math.log2(2 + top + _FAR * math.sqrt(1 + top))))
        spread = torch.exp(-0.5 * (classes[:n] - mean[:, None]).square() / (1 + mean[:, None]))
        frequency[:, :n] += spread / spread.sum(dim=1, keepdim=True)
    frequency = frequency / len(means) + 1e-6
    return frequency.log() - frequency.log().mean(dim=1, keepdim=True)
