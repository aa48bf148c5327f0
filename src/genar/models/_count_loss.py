"""Kullback-Leibler losses over count classes that never build a B x G x V target, nor keep the logits of a batch.

Head and loss run together on chunks of positions and are computed again in the backward pass, so that at any moment
only one chunk's logits exist. The Gaussian target lives in a window of +- 6 sigma; the mass outside is 2e-9.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as fn
from torch.utils.checkpoint import checkpoint

_WINDOW_SIGMAS = 6.0
# Logits at a time: 64 MiB in float32.
_CHUNK_LOGITS = 1 << 24


def two_point_kl(read: Tensor, head: Tensor, bias: Tensor, mean: Tensor) -> Tensor:
    """KL(target || softmax) per position, nats: the mean count is shared between floor(m) and floor(m) + 1 (eq. 4).

    ``read`` [B, M, D] times ``head`` [V, D] plus ``bias`` [1 or M, V] are the logits; ``mean`` [B, M]. Returns
    float32 [B, M].
    """

    def kl(logits: Tensor, mean: Tensor) -> Tensor:
        low = mean.floor().clamp(max=logits.shape[-1] - 1)
        weight = mean - low
        at = torch.stack([low, low + 1], dim=-1).long().clamp(max=logits.shape[-1] - 1)
        target = torch.stack([1 - weight, weight], dim=-1)
        return _kl(logits, at, target)

    return _in_chunks(kl, read, head, bias, (mean,))


def count_kl(read: Tensor, head: Tensor, bias: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """KL(target || softmax) per position, nats: a Gaussian around ``mean`` with ``sigma`` [B, M], renormalised on
    0..C (eq. 5).

    Shapes as in :func:`two_point_kl`.
    """
    reach = int(torch.ceil(sigma.max() * _WINDOW_SIGMAS).item()) + 1

    def kl(logits: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
        last = logits.shape[-1] - 1
        width = min(2 * reach + 1, last + 1)
        first = (mean.round().long() - reach).clamp(min=0, max=last + 1 - width)
        at = first[..., None] + torch.arange(width, device=mean.device)
        z = (at - mean[..., None]) / sigma[..., None]
        target = (-0.5 * z.square()).softmax(dim=-1)
        return _kl(logits, at, target)

    return _in_chunks(kl, read, head, bias, (mean, sigma))


def gaussian_nll(read: Tensor, head: Tensor, bias: Tensor, count: Tensor, sigma: Tensor) -> Tensor:
    """Negative log density of ``count`` under a Gaussian around the softmax's expectation with ``sigma`` [B, M], nats.

    Shapes as in :func:`two_point_kl`.
    """

    def nll(logits: Tensor, count: Tensor, sigma: Tensor) -> Tensor:
        classes = torch.arange(logits.shape[-1], device=logits.device, dtype=logits.dtype)
        expected = logits.softmax(dim=-1) @ classes
        return 0.5 * ((count - expected) / sigma).square() + sigma.log() + 0.5 * math.log(2 * math.pi)

    return _in_chunks(nll, read, head, bias, (count, sigma))


def cross_entropy(read: Tensor, head: Tensor, bias: Tensor, count: Tensor) -> Tensor:
    """Negative log probability of the class of ``count`` [B, M], nats. Shapes as in :func:`two_point_kl`."""

    def entropy(logits: Tensor, count: Tensor) -> Tensor:
        at = count.round().long().clamp(max=logits.shape[-1] - 1)
        return logits.logsumexp(dim=-1) - logits.gather(-1, at[..., None])[..., 0]

    return _in_chunks(entropy, read, head, bias, (count,))


def _kl(logits: Tensor, at: Tensor, target: Tensor) -> Tensor:
    """Negative entropy of ``target`` plus its cross entropy; ``target`` lives at the classes ``at`` and sums to one."""
    entropy = -torch.special.entr(target).sum(dim=-1)
    return entropy + logits.logsumexp(dim=-1) - (target * logits.gather(-1, at)).sum(dim=-1)


def _in_chunks(
    kl: Callable[..., Tensor], read: Tensor, head: Tensor, bias: Tensor, targets: tuple[Tensor, ...]
) -> Tensor:
    n_rows = max(1, _CHUNK_LOGITS // (read.shape[1] * len(head)))

    def chunk(read: Tensor, head: Tensor, bias: Tensor, *targets: Tensor) -> Tensor:
        return kl(fn.linear(read, head).float() + bias, *targets)

    return torch.cat(
        [
            checkpoint(chunk, rows, head, bias, *parts, use_reentrant=False)  # pyright: ignore
            for rows, *parts in zip(read.split(n_rows), *(t.split(n_rows) for t in targets), strict=True)
        ]
    )
