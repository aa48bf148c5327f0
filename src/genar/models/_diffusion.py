"""The diffusion of denoising models: noise schedule, its strided form, posteriors, and the two terms of the loss.

Variances are learned within a range: log variance = f log beta + (1 - f) log beta~, f = (v + 1) / 2 (Nichol and
Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models").
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

_LEAST_PROBABILITY = 1e-12


class Diffusion(nn.Module):
    """Constants of T steps, linear betas from 1e-4 to 0.02 at T = 1000 and as much larger as T is smaller (so that the
    chain ends in noise), or of ``steps`` of them evenly strided.

    A strided chain keeps alpha-bar at its steps; its betas follow from those. ``at`` int64 [steps] holds the original
    step of each, which is what the network is told.
    """

    at: Tensor
    alpha_bar: Tensor
    beta: Tensor
    log_beta: Tensor
    log_posterior: Tensor
    """log beta~; at the first step, where it would be minus infinity, that of the second"""
    from_start: Tensor
    from_noisy: Tensor

    def __init__(self, n_total: int = 1000, steps: int = 0):
        super().__init__()
        steps = steps or n_total
        at = np.unique(np.linspace(0, n_total - 1, steps).round().astype(int)) if steps > 1 else np.array([n_total - 1])
        kept = np.cumprod(1 - np.minimum(np.linspace(1e-4, 0.02, n_total) * (1000 / n_total), 0.999))[at]  # float64
        before = np.append(1.0, kept[:-1])
        beta = 1 - kept / before
        posterior = beta * (1 - before) / (1 - kept)
        posterior[0] = posterior[1] if len(posterior) > 1 else beta[0]
        for name, value in (
            ("alpha_bar", kept),
            ("beta", beta),
            ("log_beta", np.log(beta)),
            ("log_posterior", np.log(posterior)),
            ("from_start", beta * np.sqrt(before) / (1 - kept)),
            ("from_noisy", (1 - before) * np.sqrt(1 - beta) / (1 - kept)),
        ):
            self.register_buffer(name, torch.from_numpy(value).float(), persistent=False)
        self.register_buffer("at", torch.from_numpy(at).long(), persistent=False)

    def __len__(self) -> int:
        return len(self.at)

    def noisy(self, start: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """x_t [B, G] of x_0 [B, G] at ``step`` int64 [B]."""
        kept = self.alpha_bar[step][:, None]
        return kept.sqrt() * start + (1 - kept).sqrt() * noise

    def posterior(self, start: Tensor, x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, G] and log variance [B, 1] of x_{t-1} given x_t and x_0."""
        mean = self.from_start[step][:, None] * start + self.from_noisy[step][:, None] * x
        return mean, self.log_posterior[step][:, None]

    def predicted(self, x: Tensor, step: Tensor, noise: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [B, G] of x_{t-1} by the network's noise and ``v``."""
        kept = self.alpha_bar[step][:, None]
        start = (x - (1 - kept).sqrt() * noise) / kept.sqrt()
        f = (v + 1) / 2
        log_variance = f * self.log_beta[step][:, None] + (1 - f) * self.log_posterior[step][:, None]
        return self.posterior(start, x, step)[0], log_variance

    def variational_bound(
        self, start: Tensor, x: Tensor, step: Tensor, noise: Tensor, v: Tensor, bins: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Bits per gene [B] of one step of the bound; the network's ``noise`` gets no gradient.

        At step 0 it is the negative log probability of the bin [B, G] (lower and upper edge) that holds x_0.
        """
        mean, log_variance = self.predicted(x, step, noise.detach(), v)
        true_mean, true_log_variance = self.posterior(start, x, step)
        bits = _kl(true_mean, true_log_variance, mean, log_variance).mean(dim=1) / math.log(2)
        deviation = (0.5 * log_variance).exp()
        low, high = (torch.special.ndtr((edge - mean) / deviation) for edge in bins)
        first = -(high - low).clamp(min=_LEAST_PROBABILITY).log2().mean(dim=1)
        return torch.where(step == 0, first, bits)


def _kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL divergence of two Gaussians, nats, elementwise."""
    apart = (mean - other_mean).square() * (-other_log_variance).exp()
    return 0.5 * (other_log_variance - log_variance + (log_variance - other_log_variance).exp() + apart - 1)


class SpotNoise:
    """Normal draws of B spots, each from a generator of its own: a batch's make-up changes none."""

    def __init__(self, spot_ids: Tensor, seed: int, samples: int, n_genes: int):
        self.shape = (samples, n_genes)
        self.generators = [np.random.Generator(np.random.Philox(key=[seed, spot])) for spot in spot_ids.tolist()]
        self.device = spot_ids.device

    def draw(self) -> Tensor:
        """The next float32 [B S, G]."""
        drawn = np.concatenate([g.standard_normal(self.shape, dtype=np.float32) for g in self.generators])
        return torch.from_numpy(drawn).to(self.device)
