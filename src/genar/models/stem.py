"""STEM: the expression of a spot is drawn from a diffusion model that the image conditions.

What is unusual about it. The prediction is the mean of several drawn expression vectors. A vector is a sequence of
genes to the network: a token is a gene's embedding plus its noisy value, with no position else, so that genes attend to
each other at every denoising step. All steering layers start at zero, and so does the output. The t = 0 term of the
bound is the probability of the *count's* bin; the original's is made for pixel values.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from genar.errors import InputError
from genar.models._base import Batch, Card, Counts, LossOutput, Spots, duration, log2p1
from genar.models._decoding import Decoding
from genar.models._diffusion import Diffusion, SpotNoise
from genar.models._spot import SpotRival
from genar.models._training_spots import mean_and_scale

STEPS = 50
_TIME_WAVES = 128


@dataclass(frozen=True)
class STEMConfig:
    """Size of the denoiser; the defaults are the published ones."""

    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    n_total: int = 1000
    """steps T of the noising chain"""
    standardise: bool = False
    """features and log2 counts with mean 0 and variance 1 over the training spots; the original takes both as they
    are"""
    predicts: str = "noise"
    """what the network is trained for by squared error: the ``noise`` as published, or the ``start``, the values
    without noise. To the error in the noise an image matters at the last steps alone, and there by a factor alpha-bar:
    it is learned after hundreds of thousands of steps. To the error in the start it matters at once."""

    def __post_init__(self):
        if min(self.width, self.depth, self.heads) < 1 or self.n_total < 2 or not self.mlp_ratio > 0:
            raise InputError("model stem: width, depth and heads must be >= 1, n_total >= 2, mlp_ratio > 0")
        if self.predicts not in ("noise", "start"):
            raise InputError(f"model stem: predicts must be noise or start, found {self.predicts!r}")
        if self.width % self.heads:
            raise InputError(f"model stem: width {self.width} is no multiple of heads {self.heads}")


class Steered(nn.Module):
    """Layer norm scaled and shifted by the condition, in ``n_parts`` parts; starts at scale 1, shift 0, gate 0."""

    def __init__(self, width: int, n_parts: int):
        super().__init__()
        self.n_parts = n_parts
        self.linear = nn.Linear(width, n_parts * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """[B, D] -> ``n_parts`` of [B, 1, D]."""
        return self.linear(fn.silu(condition))[:, None].chunk(self.n_parts, dim=2)


def steer(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x)(1 + scale) + shift: x [B, G, D], shift and scale [B, 1, D]."""
    return torch.addcmul(shift, fn.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class Block(nn.Module):
    """Attention over genes and an MLP, each gated by the condition (adaLN-zero)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.heads = heads
        self.steering = Steered(width, 6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        for layer in (self.qkv, self.out, self.mlp[0], self.mlp[2]):
            _xavier(layer)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, G, D], condition [B, D] -> [B, G, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.steering(condition)
        q, k, v = self.qkv(steer(x, shift1, scale1)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = fn.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = torch.addcmul(x, gate1, self.out(seen))
        return torch.addcmul(x, gate2, self.mlp(steer(x, shift2, scale2)))


class Denoiser(nn.Module):
    """Noise and v [B, G] each from noisy values [B, G], the step and the condition (35.6 M parameters as published)."""

    def __init__(self, n_features: int, n_genes: int, config: STEMConfig):
        super().__init__()
        width = config.width
        self.gene = nn.Parameter(torch.empty(n_genes, width))
        nn.init.kaiming_uniform_(self.gene, a=math.sqrt(5))
        self.value = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.time = nn.Sequential(nn.Linear(2 * _TIME_WAVES, width), nn.SiLU(), nn.Linear(width, width))
        self.image = nn.Sequential(nn.Linear(n_features, n_features), nn.SiLU(), nn.Linear(n_features, width))
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.final_steering = Steered(width, 2)
        self.read_out = nn.Linear(width, 2)
        for layer in (self.value[0], self.value[2]):
            _xavier(layer)
        for layer in (self.time[0], self.time[2], self.image[0], self.image[2]):
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.read_out.weight)
        nn.init.zeros_(self.read_out.bias)

    def forward(self, x: Tensor, step: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, G], original step int64 [B], embedded image [B, D] (see ``image``)."""
        condition = self.time(time_code(step)) + image
        tokens = self.gene + self.value(x[:, :, None])
        for block in self.blocks:
            tokens = block(tokens, condition)
        noise, v = self.read_out(steer(tokens, *self.final_steering(condition))).unbind(dim=2)
        return noise, v


def time_code(step: Tensor) -> Tensor:
    """Cosines and sines of the step int64 [B] at periods up to 10,000: [B, 256]."""
    waves = torch.exp(-math.log(10_000.0) * torch.arange(_TIME_WAVES, device=step.device) / _TIME_WAVES)
    angles = step.float()[:, None] * waves
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _xavier(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Linear)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)


class STEM(SpotRival):
    """Diffusion over the vector of gene values, conditioned on the features; predicts the mean of drawn vectors."""

    config = STEMConfig
    can_stream = True
    presets: ClassVar = {
        "small": {"width": 32, "depth": 2, "heads": 1, "mlp_ratio": 2.0, "standardise": True, "predicts": "start"},
        "official": {},
    }
    # Published: AdamW 1e-4, no decay, batch 256, constant rate, no clipping, averaging 0.9999, 300,000 steps. Here a
    # narrow denoiser takes a few hundred steps at a higher rate, averaged over as much of its shorter course.
    train_defaults: ClassVar = {
        "max_epochs": 20, "batch_size": 32, "lr": 3e-3, "weight_decay": 0.0, "schedule": "cosine",
        "warmup_steps": 20, "clip": 1.0, "ema_decay": 0.99,
    }  # fmt: skip
    decoding_defaults: ClassVar = {"samples": 5}
    decodes_by = ("samples", "seed", "steps")
    card = Card(
        title="STEM (Zhu et al. 2025, Diffusion Generative Modeling for Spatially Resolved Gene Expression Inference "
        "from Histology Images)",
        target="log2(1 + count), as here; preset small takes it with mean 0 and variance 1 per gene",
        kept="the denoiser over genes, the noise schedule, learned variances, averaged weights, the mean of samples; "
        f"samples take {STEPS} strided steps and there are 5 (the original: 1000 steps, 20 samples: steps=1000, "
        "samples=20)",
        lost="the second encoder (the original joins UNI and CONCH); preset small is narrower, trained for hundreds of "
        "steps, not 300,000, and for that predicts the values without noise, not the noise",
        mended="the t = 0 likelihood is of a count's bin, not of a pixel value's; draws follow a spot's name, so that "
        "the batch changes nothing; the mean of a gene's draws is cut at its largest training value",
    )
    block = 16  # samples and genes of so many spots still fit a processor's cache
    gene_mean: Tensor
    gene_scale: Tensor
    gene_most: Tensor

    def __init__(self, n_features: int, n_genes: int, config: STEMConfig):
        super().__init__(n_features, n_genes, config)
        self.register_buffer("gene_mean", torch.zeros(n_genes))
        self.register_buffer("gene_scale", torch.ones(n_genes))
        self.register_buffer("gene_most", torch.zeros(n_genes))
        self.diffusion = Diffusion(config.n_total)
        self.denoiser = Denoiser(n_features, n_genes, config)

    @property
    def spot_bytes(self) -> int:
        """Gene tokens times width, as often as a block keeps them for the backward pass."""
        config = self.settings
        return int(4 * self.n_genes * config.width * config.depth * (14 + 3 * config.mlp_ratio))

    @torch.no_grad()
    def prepare(self, spots: Spots) -> None:
        """Set each gene's largest value, and means and scales of features and genes, if they are to be standardised."""
        assert spots.counts is not None
        target = log2p1(spots.counts)
        self.gene_most.copy_(log2p1(spots.largest_counts()))
        if self.settings.standardise:
            super().prepare(spots)
            for buffer, value in zip((self.gene_mean, self.gene_scale), mean_and_scale(target), strict=True):
                buffer.copy_(value)

    def scaled(self, counts: Tensor) -> Tensor:
        """x_0 [B, G] of counts [B, G], which may be fractional."""
        return (torch.log2(1 + counts.float()) - self.gene_mean) / self.gene_scale

    def loss(self, batch: Batch) -> LossOutput:
        """Squared error of the noise (or the start) at a random step, and the variational bound; parts: both.

        The bound is in bits per gene.
        """
        assert batch.counts is not None
        start = self.scaled(batch.counts)
        step = torch.randint(len(self.diffusion), (len(start),), device=start.device)
        noise = torch.randn_like(start)
        x = self.diffusion.noisy(start, step, noise)
        image = self.denoiser.image(self.standardised(batch.features))
        guess, v = self.denoiser(x, step, image)
        bins = self.scaled(batch.counts - 0.5), self.scaled(batch.counts + 0.5)
        bound = self.diffusion.variational_bound(start, x, step, *self._noise_and_v(guess, v, x, step), bins).mean()
        error = fn.mse_loss(guess, noise if self.settings.predicts == "noise" else start)
        return LossOutput(error + bound, torch.stack([error, bound]).detach())

    def _noise_and_v(self, guess: Tensor, v: Tensor, x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and v [B, G] in noisy values x [B, G] at original step int64 [B], by what the network predicts.

        An error in the start weighs more than all noise at the first steps; v, which would tell of it by variances far
        beyond beta, is held in its range.
        """
        if self.settings.predicts == "noise":
            return guess, v
        kept = self.diffusion.alpha_bar[step][:, None]
        return (x - kept.sqrt() * guess) / (1 - kept).sqrt(), v.clamp(-1, 1)

    @classmethod
    def check_decoding(cls, preset: str, settings: Mapping, how: Decoding) -> None:
        """There are no more steps than those of the noising chain."""
        super().check_decoding(preset, settings, how)
        _refuse_steps(how.steps, cls.configure(preset, settings).n_total)

    def chain(self, how: Decoding) -> Diffusion:
        """The steps of a prediction. Raises ``InputError`` where there are more than the model was trained on."""
        steps = how.steps or min(STEPS, self.settings.n_total)
        _refuse_steps(steps, self.settings.n_total)
        return Diffusion(self.settings.n_total, steps).to(self.gene_mean.device)

    def predict_block(self, batch: Batch, how: Decoding) -> Counts:
        """The mean of ``how.samples`` drawn vectors of log2(1 + count), at most the gene's largest training value.

        Hardly trained, the chain blows its noise up by 1 / sqrt(alpha-bar), which no integer could hold.
        """
        drawn = self.draw(batch, how)
        mean = sum(drawn.unbind(1)[1:], drawn[:, 0]) / drawn.shape[1]
        return Counts.from_log2(mean.minimum(self.gene_most))

    @torch.no_grad()
    def draw(self, batch: Batch, how: Decoding) -> Tensor:
        """Vectors of log2(1 + count) [B, S, G] from the conditional distribution; some values may lie below zero."""
        samples, chain = how.trajectories, self.chain(how)
        image = self.denoiser.image(self.standardised(batch.features)).repeat_interleave(samples, dim=0)
        noise = SpotNoise(batch.spot_ids, how.seed, samples, self.n_genes)
        x = noise.draw()
        for i in range(len(chain) - 1, -1, -1):
            step = torch.full((len(x),), i, device=x.device)
            guess, v = self.denoiser(x, chain.at[step], image)
            mean, log_variance = chain.predicted(x, step, *self._noise_and_v(guess, v, x, chain.at[step]))
            x = mean if i == 0 else mean + (0.5 * log_variance).exp() * noise.draw()
        return (x * self.gene_scale + self.gene_mean).unflatten(0, (-1, samples))

    def cost(self, n_spots: int, how: Decoding) -> str:
        """Evaluations of the denoiser, and the time by a few that are measured."""
        steps, samples = len(self.chain(how)), how.trajectories
        n = math.ceil(n_spots / self.block) * self.block * samples * steps  # in whole blocks, as they are evaluated
        return (
            f"stem draws {samples} samples of {n_spots} spots in {steps} steps: {n:,} evaluations of its denoiser, "
            f"about {duration(self._seconds(self.block) / self.block * n)} here (fewer steps or samples take less)"
        )

    @torch.no_grad()
    def _seconds(self, n_rows: int, repeats: int = 3) -> float:
        """The least time of an evaluation of ``n_rows``."""
        x = torch.zeros(n_rows, self.n_genes, device=self.gene_mean.device)
        step, image = torch.zeros_like(x[:, 0]).long(), x.new_zeros(n_rows, self.settings.width)
        taken = []
        for _ in range(repeats):
            started = time.perf_counter()
            self.denoiser(x, step, image)
            taken.append(time.perf_counter() - started)
        return min(taken)


def _refuse_steps(steps: int, most: int) -> None:
    if steps > most:
        raise InputError(f"model stem: steps must be at most {most}, found {steps}")


MODEL = STEM
