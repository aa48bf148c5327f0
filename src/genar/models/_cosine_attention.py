"""Cosine attention of the positions of a spot: which position sees which, cached keys and values, and the products.

Queries and keys have length one, but for a learned sharpness a head. Letters: B spots, H heads, L positions, D width.
"""

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


def cosine_attention(qkv: Tensor, sharpness: Tensor, cuts: nn.ModuleList, cache: Cache | None = None) -> Tensor:
    """Queries, keys and values side by side [B, L, 3 D], ``sharpness`` [H] -> [B, L, D]; ``cuts`` say which see which.

    Training in bfloat16 on a CPU runs products of our own (``_Attention``), everything else the fused kernel.
    """
    runs: list[Cut] = list(cuts)  # pyright: ignore
    trains = cache is None and torch.is_grad_enabled() and qkv.requires_grad
    if trains and qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
        return _Attention.apply(qkv, sharpness, runs)  # pyright: ignore
    qk, v = qkv.unflatten(2, (3, len(sharpness), -1)).split((2, 1), dim=2)  # [B, L, 2 and 1, H, D / H]
    qk = qk * _factors(qk, sharpness[:, None])
    q, k = qk.permute(2, 0, 3, 1, 4)  # [B, H, L, D / H] each
    v = v[:, :, 0].transpose(1, 2)
    if cache is not None:
        k, v = cache.extend(k, v)
    seen = [
        fn.scaled_dot_product_attention(part, join(k, run.keys), join(v, run.keys), attn_mask=run.mask, scale=1.0)
        for part, run in zip(q.split([run.n_queries for run in runs], dim=2), runs, strict=True)
    ]
    return torch.cat(seen, dim=2).transpose(1, 2).flatten(2)


def _factors(qk: Tensor, sharpness: Tensor) -> Tensor:
    """What queries and keys [B, L, 2, H, D / H] are multiplied by, [B, L, 2, H, 1]; ``sharpness`` [H, 1]."""
    length = torch.linalg.vector_norm(qk, dim=-1, keepdim=True).clamp(min=_SHORTEST)
    return (torch.stack([sharpness, torch.ones_like(sharpness)]) / length).to(qk.dtype)


class _Attention(torch.autograd.Function):
    """:func:`cosine_attention` with a backward pass of its own.

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
            laid = parts.permute(2, 0, 3, 1, 4).contiguous()  # [3, B, H, L, D / H]
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
            # back through y = sharpness x / |x|, of which sharpness / |x| are the factors
            y, dy = laid[:2], slopes[:2]
            along = (y * dy).sum(dim=-1, keepdim=True)  # [2, B, H, L, 1]
            d_sharpness = along[0].sum(dim=(0, 2, 3), dtype=torch.float32) / sharpness
            along[0] /= sharpness.square()[:, None, None]
            dy.addcmul_(y, along, value=-1).mul_(factors)
            return slopes.permute(1, 3, 0, 2, 4).reshape(n_spots, length, -1), d_sharpness, None


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
    """Add ``part`` [N, keys, D / H] where the keys of ``cut`` stand."""
    first = 0
    for run in cut.keys:
        to[:, run] += part[:, first : first + run.stop - run.start]
        first += run.stop - run.start
