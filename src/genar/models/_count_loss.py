"""Losses over count classes that never build a B x G x V tensor: neither logits nor targets of a whole batch exist.

Head and loss run together on chunks of spots small enough for a processor's cache. Where a gradient is wanted it is
taken in the same go, chunk by chunk, so that nothing is computed twice.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as fn

# Logits at a time: 4 MiB in float32.
_CHUNK_LOGITS = 1 << 20


def two_point_kl(logits: Tensor, mean: Tensor) -> Tensor:
    """KL(target || softmax) per position, nats: the mean count is shared between floor(m) and floor(m) + 1 (eq. 4).

    ``logits`` [B, M, V], ``mean`` [B, M]. Returns [B, M], as all of these.
    """
    low = mean.floor().clamp(max=logits.shape[-1] - 1)
    weight = mean - low
    at = torch.stack([low, low + 1], dim=-1).long().clamp(max=logits.shape[-1] - 1)
    target = torch.stack([1 - weight, weight], dim=-1)
    entropy = torch.special.entr(target).sum(dim=-1)
    return logits.logsumexp(dim=-1) - (target * logits.gather(-1, at)).sum(dim=-1) - entropy


def count_kl(logits: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """KL(target || softmax) per position, nats: a Gaussian around ``mean`` with ``sigma`` [B, M], renormalised on
    0..C (eq. 5)."""
    classes = torch.arange(logits.shape[-1], device=logits.device, dtype=logits.dtype)
    log_target = (-0.5 * ((classes - mean[..., None]) / sigma[..., None]).square()).log_softmax(dim=-1)
    return logits.logsumexp(dim=-1) + (log_target.exp() * (log_target - logits)).sum(dim=-1)


def gaussian_table(n_classes: int, base: float, slope: float, like: Tensor) -> Tensor:
    """Targets [V, V + 1] of every count (eq. 5), sigma = slope * count + base, each with its negative entropy behind
    it; on the device of ``like``."""
    counts = torch.arange(n_classes, device=like.device, dtype=torch.float32)[:, None]
    log_target = (-0.5 * ((counts.T - counts) / (slope * counts + base)).square()).log_softmax(dim=1)
    return torch.cat([log_target.exp(), (log_target.exp() * log_target).sum(dim=1, keepdim=True)], dim=1)


def table_kl(logits: Tensor, count: Tensor, table: Tensor) -> Tensor:
    """:func:`count_kl` at whole counts [B, M], whose targets are looked up in a :func:`gaussian_table`."""
    target, negative_entropy = table[count.long()].split((logits.shape[-1], 1), dim=-1)
    return logits.logsumexp(dim=-1) - (target * logits).sum(dim=-1) + negative_entropy[..., 0]


def gaussian_nll(logits: Tensor, count: Tensor, sigma: Tensor) -> Tensor:
    """Negative log density of ``count`` under a Gaussian around the softmax's expectation with ``sigma`` [B, M],
    nats."""
    classes = torch.arange(logits.shape[-1], device=logits.device, dtype=logits.dtype)
    expected = logits.softmax(dim=-1) @ classes
    return 0.5 * ((count - expected) / sigma).square() + sigma.log() + 0.5 * math.log(2 * math.pi)


def cross_entropy(logits: Tensor, count: Tensor) -> Tensor:
    """Negative log probability of the class of ``count`` [B, M], nats."""
    at = count.round().long().clamp(max=logits.shape[-1] - 1)
    return logits.logsumexp(dim=-1) - logits.gather(-1, at[..., None])[..., 0]


def summed(loss: Callable[..., Tensor], read: Tensor, head: Tensor, bias: Tensor, *targets: Tensor) -> Tensor:
    """Sum over all positions of ``loss(logits, *targets)``, with logits = read @ head.T + bias.

    ``read`` [B, M, D], ``head`` [V, D], ``bias`` [1 or M, V], each of ``targets`` [B, M]; they get no gradient.
    """
    return _Summed.apply(loss, read, head, bias, *targets)  # pyright: ignore


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, read: Tensor, head: Tensor, bias: Tensor, *targets: Tensor) -> Tensor:
        n_rows = max(1, _CHUNK_LOGITS // (read.shape[1] * len(head)))
        wanted = ctx.needs_input_grad[1:4]
        total = read.new_zeros((), dtype=torch.float32)
        read_grads, head_grad, bias_grad = [], torch.zeros_like(head), torch.zeros_like(bias)
        for rows, *parts in zip(read.split(n_rows), *(t.split(n_rows) for t in targets), strict=True):
            logits = fn.linear(rows, head) + bias
            if not any(wanted):
                total += loss(logits, *parts).sum()
                continue
            with torch.enable_grad():
                part = loss(logits.requires_grad_(), *parts).sum()
            (slope,) = torch.autograd.grad(part, logits)
            total += part.detach()
            if wanted[0]:
                read_grads.append((slope.to(head.dtype) @ head).to(read.dtype))
            if wanted[1]:
                head_grad += slope.flatten(0, 1).to(rows.dtype).T @ rows.flatten(0, 1)
            if wanted[2]:
                bias_grad += slope.sum(dim=(0, 1) if len(bias) == 1 else 0)
        ctx.save_for_backward(torch.cat(read_grads) if read_grads else None, head_grad, bias_grad)
        return total

    @staticmethod
    def backward(ctx, slope: Tensor):  # pyright: ignore
        grads = (None if grad is None else slope * grad for grad in ctx.saved_tensors)
        wanted = ctx.needs_input_grad
        return None, *(g if w else None for g, w in zip(grads, wanted[1:4], strict=True)), *(None,) * (len(wanted) - 4)
