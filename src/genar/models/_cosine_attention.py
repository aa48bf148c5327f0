"""Cosine attention of the positions of a spot: which position sees which, cached keys and values, and the products.

Queries and keys have length one, but for a learned sharpness a head. Letters: B spots, H heads, L positions, D width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

_SHORTEST = 1e-12
# Weights at a time in training, so that they stay near the processor: 4 MiB in bfloat16.
_CHUNK_WEIGHTS = 1 << 21
# A spot's weights of one block are kept for the backward pass up to this number, and made again beyond it.
_MOST_KEPT = 1 << 20


def as_it_comes(device: str) -> torch.autocast:
    """Every product in the numbers that it gets, whatever is set around."""
    return torch.autocast(device, enabled=False)


class Cut(nn.Module):
    """A run of queries that attend together: the rows of a mask [queries, keys], True where a key is seen."""

    mask: Tensor | None

    def __init__(self, mask: Tensor):
        super().__init__()
        edges = torch.diff(fn.pad(mask.any(dim=0).int(), (1, 1))).nonzero()[:, 0].tolist()
        self.n_queries = len(mask)
        self.keys = tuple(slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True))
        mask = join(mask, self.keys, dim=1)
        self.register_buffer("mask", None if mask.all() else mask, persistent=False)


def join(x: Tensor, runs: tuple[slice, ...], dim: int = 2) -> Tensor:
    """The ``runs`` of positions of x."""
    parts = [x.narrow(dim, run.start, run.stop - run.start) for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


class Cache:
    """Keys and values of one block at the positions that later scales see, preallocated: [B, L, H, D / H] each."""

    def __init__(self, n_positions: int):
        self.n_positions, self.length, self.n_keep = n_positions, 0, 0
        self.kept: tuple[Tensor, Tensor] | None = None

    def extend(self, k: Tensor, factors: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (times ``factors``) and values seen by this step: those kept so far and the new ones, of which the first
        ``n_keep`` stay."""
        if self.kept is None:
            shape = (len(k), self.n_positions, *k.shape[2:])
            self.kept = k.new_empty(shape), v.new_empty(shape)
        keys, values = self.kept
        stop = self.length + k.shape[1]
        torch.mul(k, factors, out=keys[:, self.length : stop])
        values[:, self.length : stop] = v
        self.length += self.n_keep  # what lies beyond is overwritten by the next step
        return keys[:, :stop], values[:, :stop]


def cosine_attention(qkv: Tensor, sharpness: Tensor, cuts: nn.ModuleList, cache: Cache | None = None) -> Tensor:
    """Queries, keys and values side by side [B, L, 3 D], ``sharpness`` [H] -> [B, L, D]; ``cuts`` say which see which.

    Training on a CPU has a backward pass of its own (``_Fused``, in bfloat16 ``_Written``).
    """
    runs: list[Cut] = list(cuts)  # pyright: ignore
    trains = cache is None and torch.is_grad_enabled() and qkv.requires_grad
    if trains and qkv.device.type == "cpu" and not torch.compiler.is_compiling():
        if qkv.dtype == torch.bfloat16:
            return _Written.apply(qkv, sharpness, runs)  # pyright: ignore
        if qkv.dtype == torch.float32:
            return _Fused.apply(qkv, sharpness, runs)  # pyright: ignore
    qk, v = qkv.unflatten(2, (3, len(sharpness), -1)).split((2, 1), dim=2)  # [B, L, 2 and 1, H, D / H]
    factors, v = _factors(qk, sharpness[:, None]), v[:, :, 0]
    if cache is None:
        q, k = (qk * factors).unbind(dim=2)
    else:
        q = qk[:, :, 0] * factors[:, :, 0]
        k, v = cache.extend(qk[:, :, 1], factors[:, :, 1], v)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [B, H, L, D / H] each
    seen = [
        fn.scaled_dot_product_attention(part, join(k, run.keys), join(v, run.keys), attn_mask=run.mask, scale=1.0)
        for part, run in zip(q.split([run.n_queries for run in runs], dim=2), runs, strict=True)
    ]
    return _side_by_side(seen)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """What runs of queries saw, [B, H, n, D / H] each -> [B, L, D]."""
    parts = [part.transpose(1, 2) for part in parts]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).flatten(2)


def _factors(qk: Tensor, sharpness: Tensor) -> Tensor:
    """What queries and keys [B, L, 2, H, D / H] are multiplied by, [B, L, 2, H, 1]; ``sharpness`` [H, 1]."""
    length = torch.linalg.vector_norm(qk, dim=-1, keepdim=True).clamp(min=_SHORTEST)
    return (torch.stack([sharpness, torch.ones_like(sharpness)]) / length).to(qk.dtype)


def _through_length(y: Tensor, dy: Tensor, factors: Tensor, sharpness: Tensor) -> Tensor:
    """Back through y = sharpness x / |x|, of which sharpness / |x| are the ``factors``: the slope of x replaces that of
    y, all [B, L, 2, H, D / H], queries first. Returns the slope of ``sharpness`` [H].
    """
    along = (y * dy).sum(dim=-1, keepdim=True)  # [B, L, 2, H, 1]
    d_sharpness = along[:, :, 0].sum(dim=(0, 1, 3), dtype=torch.float32) / sharpness
    along[:, :, 0] /= sharpness.square()[:, None]
    dy.addcmul_(y, along, value=-1).mul_(factors)
    return d_sharpness


class _Fused(torch.autograd.Function):
    """:func:`cosine_attention` by the library's CPU kernels, whose slopes go where they belong in one place.

    An automatic backward pass makes a tensor of zeros and a sum for each run's part of the keys and values.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, sharpness: Tensor, cuts: list[Cut]) -> Tensor:
        parts = qkv.unflatten(2, (3, len(sharpness), -1))
        factors = _factors(parts[:, :, :2], sharpness[:, None])
        qk = parts[:, :, :2] * factors
        found = [
            _KERNEL(*inputs, attn_mask=_bias(cut), scale=1.0) for cut, _, *inputs in _runs(qk, parts[:, :, 2], cuts)
        ]
        ctx.save_for_backward(qkv, qk, factors, sharpness, *(part for both in found for part in both))
        ctx.cuts = cuts
        return _side_by_side([out for out, _ in found])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope: Tensor):  # pyright: ignore
        qkv, qk, factors, sharpness, *found = ctx.saved_tensors
        slope = slope.unflatten(2, (len(sharpness), -1)).transpose(1, 2)
        slopes = qkv.new_empty(*qkv.shape[:2], 3, *qk.shape[3:])
        slopes[:, :, 1:] = 0
        dq, dk, dv = (slopes[:, :, i].transpose(1, 2) for i in range(3))
        v = qkv.unflatten(2, (3, len(sharpness), -1))[:, :, 2]
        for (cut, queries, *inputs), out, total in zip(_runs(qk, v, ctx.cuts), found[::2], found[1::2], strict=True):
            above = slope[:, :, queries]
            parts = _KERNEL_BACKWARD(above, *inputs, out, total, 0.0, False, attn_mask=_bias(cut), scale=1.0)
            dq[:, :, queries] = parts[0]
            _add(dk, cut, parts[1])
            _add(dv, cut, parts[2])
        d_sharpness = _through_length(qk, slopes[:, :, :2], factors, sharpness)
        return slopes.flatten(2), d_sharpness, None


_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _runs(qk: Tensor, v: Tensor, cuts: list[Cut]) -> Iterator[tuple[Cut, slice, Tensor, Tensor, Tensor]]:
    """Each cut, its place among the queries, and its queries, keys and values [B, H, n, D / H]."""
    q, k = qk.permute(2, 0, 3, 1, 4)
    v, first = v.transpose(1, 2), 0
    for cut in cuts:
        queries = slice(first, first + cut.n_queries)
        first = queries.stop
        yield cut, queries, q[:, :, queries], join(k, cut.keys), join(v, cut.keys)


def _bias(cut: Cut) -> Tensor | None:
    """The mask of a cut as something to add."""
    return None if cut.mask is None else torch.zeros(cut.mask.shape).masked_fill_(~cut.mask, -torch.inf)


class _Written(torch.autograd.Function):
    """:func:`cosine_attention` in products of our own.

    In bfloat16 on a CPU the fused kernel's backward pass takes longer than plain products do, and the many small sums
    and paddings of an automatic one as long as the products.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, sharpness: Tensor, cuts: list[Cut]) -> Tensor:
        n_spots, length, width = qkv.shape
        heads = len(sharpness)
        with as_it_comes("cpu"):
            parts = qkv.view(n_spots, length, 3, heads, -1)
            factors = _factors(parts[:, :, :2], sharpness[:, None]).permute(2, 0, 3, 1, 4).contiguous()
            laid = parts.permute(2, 0, 3, 1, 4).clone(memory_format=torch.contiguous_format)  # [3, B, H, L, D / H]
            laid[:2] *= factors
            q, k, v = laid.flatten(1, 2)  # [B H, L, D / H] each
            out, kept, first = torch.empty_like(q), [], 0
            keeps = heads * sum(cut.n_queries * n_keys(cut) for cut in cuts) <= _MOST_KEPT
            for cut in cuts:
                queries = slice(first, first + cut.n_queries)
                first = queries.stop
                keys, values = join(k, cut.keys, dim=1), join(v, cut.keys, dim=1)
                weights = q.new_empty(len(q), cut.n_queries, keys.shape[1]) if keeps else None
                for rows in _chunks(len(q), cut):
                    w = _weights(q[rows, queries], keys[rows], cut.mask, None if weights is None else weights[rows])
                    out[rows, queries] = w @ values[rows]
                if weights is not None:
                    kept.append(weights)
        ctx.save_for_backward(laid, factors, sharpness, *kept)
        ctx.cuts = cuts
        return out.view(n_spots, heads, length, -1).transpose(1, 2).reshape(n_spots, length, width // 3)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope: Tensor):  # pyright: ignore
        laid, factors, sharpness, *kept = ctx.saved_tensors
        _, n_spots, heads, length, _ = laid.shape
        with as_it_comes("cpu"):
            q, k, v = laid.flatten(1, 2)
            slope = slope.view(n_spots, length, heads, -1).transpose(1, 2).reshape(q.shape)
            slopes = torch.zeros_like(laid)
            dq, dk, dv = slopes.flatten(1, 2)
            first = 0
            for i, cut in enumerate(ctx.cuts):
                queries = slice(first, first + cut.n_queries)
                first = queries.stop
                keys, values = join(k, cut.keys, dim=1), join(v, cut.keys, dim=1)
                for rows in _chunks(len(q), cut):
                    here, above = q[rows, queries], slope[rows, queries]
                    w = kept[i][rows] if kept else _weights(here, keys[rows], cut.mask)
                    _add(dv[rows], cut, w.transpose(1, 2) @ above)
                    dw = above @ values[rows].transpose(1, 2)
                    ds = torch.ops.aten._softmax_backward_data(dw, w, 2, w.dtype)
                    dq[rows, queries] = ds @ keys[rows]
                    _add(dk[rows], cut, ds.transpose(1, 2) @ here)
            spots_first = (1, 3, 0, 2, 4)
            y, dy, factors = (x.permute(spots_first) for x in (laid[:2], slopes[:2], factors))
            d_sharpness = _through_length(y, dy, factors, sharpness)
            return slopes.permute(spots_first).reshape(n_spots, length, -1), d_sharpness, None


def n_keys(cut: Cut) -> int:
    """How many keys the queries of a cut see together."""
    return sum(run.stop - run.start for run in cut.keys)


def _chunks(n: int, cut: Cut) -> list[slice]:
    size = max(1, _CHUNK_WEIGHTS // (cut.n_queries * n_keys(cut)))
    return [slice(start, start + size) for start in range(0, n, size)]


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, out: Tensor | None = None) -> Tensor:
    """softmax(q k^T) [N, queries, keys]."""
    scores = q @ k.transpose(1, 2)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    return torch.softmax(scores, 2) if out is None else torch.softmax(scores, 2, out=out)


def _add(to: Tensor, cut: Cut, part: Tensor) -> None:
    """Add ``part`` [..., keys, D / H] where the keys of ``cut`` stand."""
    first = 0
    for run in cut.keys:
        to[..., run, :] += part[..., first : first + run.stop - run.start, :]
        first += run.stop - run.start
