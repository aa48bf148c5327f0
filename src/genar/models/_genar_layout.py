"""The order of GenAR's positions: where each scale stands, which position sees which, and which genes a group holds.

Letters as in ``genar.py``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from genar.genes import Scales
from genar.models._cosine_attention import Cut


class Layout(nn.Module):
    """The positions of the training pass, numbered, and the one mask that says which sees which (appendix B).

    ``cuts`` are the rows of that mask, run by run of the training pass; ``steps`` the same for the positions that each
    scale adds in generation, over the keys that are kept by then.
    """

    order: Tensor
    inverse: Tensor
    first_gene: Tensor
    last_gene: Tensor

    def __init__(self, scales: Scales, history: str, within: str):
        super().__init__()
        self.sizes, self._history = scales.sizes, history
        sizes = scales.sizes
        n_history = (1, *sizes[:-1]) if history == "tokens" else ()  # start stands as history of scale "-1"
        self._history_start, self.interpolated_start = [0], [sum(n_history)]
        for m in n_history:
            self._history_start.append(self._history_start[-1] + m)
        for m in sizes:
            self.interpolated_start.append(self.interpolated_start[-1] + m)
        self.places = [slice(sum(sizes[:k]), sum(sizes[: k + 1])) for k in range(len(sizes))]
        seen = self._seen(n_history, within)
        # the positions of a scale see the same ones and need no mask, unless each sees those before it alone
        runs = (*n_history, *sizes) if within == "full" else (len(seen) - sizes[-1], sizes[-1])
        self.cuts = nn.ModuleList(Cut(rows) for rows in seen.split(runs) if len(rows))
        steps = [self._step(k) for k in range(len(sizes))]
        self.steps = nn.ModuleList(Cut(seen[new][:, torch.cat([old, new])]) for new, old, _ in steps)
        self.n_keep = [n_keep for _, _, n_keep in steps]
        new, old, _ = steps[-1]
        self.n_cached = len(old) + len(new)
        for k in range(1, len(sizes)):
            self.register_buffer(f"parent_{k}", torch.from_numpy(scales.parent(k)).long(), persistent=False)
        edges = [torch.from_numpy(scales.edges(k)).long() for k in range(len(sizes))]
        self.register_buffer("first_gene", torch.cat([e[:-1] for e in edges]), persistent=False)
        self.register_buffer("last_gene", torch.cat([e[1:] for e in edges]), persistent=False)
        self.register_buffer("order", torch.tensor(scales.order), persistent=False)
        self.register_buffer("inverse", torch.from_numpy(scales.inverse).long(), persistent=False)

    def _seen(self, n_history: tuple[int, ...], within: str) -> Tensor:
        """The mask of the training pass [L, L], True where the row's position sees the column's."""
        sizes = self.sizes
        kind = torch.cat([torch.zeros(sum(n_history)), torch.ones(sum(sizes))]).long()
        scale = torch.cat([torch.full((m,), k - 1) for k, m in enumerate(n_history)] + [torch.full((m,), k) for k, m in enumerate(sizes)])  # fmt: skip # noqa: E501
        index = torch.cat([torch.arange(m) for m in (*n_history, *sizes)])
        query_is_history, key_is_history = (kind == 0)[:, None], (kind == 0)[None]
        older, same = scale[None] < scale[:, None], scale[None] == scale[:, None]
        beside = same & ((index[None] <= index[:, None]) | (within == "full"))
        return torch.where(
            query_is_history,
            key_is_history & (older | same),
            (key_is_history & older) | (~key_is_history & (beside | (older & (self._history == "queries")))),
        )

    def _step(self, k: int) -> tuple[Tensor, Tensor, int]:
        """Positions new at scale k, positions cached before it, and how many of the new ones stay cached."""
        new = torch.arange(self.interpolated_start[k], self.interpolated_start[k + 1])
        if self._history == "queries":
            return new, torch.arange(self.interpolated_start[k]), len(new)
        history = torch.arange(self._history_start[k], self._history_start[k + 1])
        return torch.cat([history, new]), torch.arange(self._history_start[k]), len(history)

    def parent(self, k: int) -> Tensor:
        """The group of scale k - 1 that each group of scale k stands under, int [M_k]."""
        return getattr(self, f"parent_{k}")

    def pool(self, counts: Tensor) -> list[Tensor]:
        """Mean count of every group of every scale: int [B, G] in panel order -> K tensors float32 [B, M_k]."""
        running = fn.pad(counts[:, self.order].long().cumsum(dim=1), (1, 0))  # exact: no rounding in sums of counts
        sums = running[:, self.last_gene] - running[:, self.first_gene]
        return list((sums.float() / (self.last_gene - self.first_gene)).split(self.sizes, dim=1))
