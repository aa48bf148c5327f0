"""Blocks of one fixed shape, in which sums round alike whatever the batch."""

from collections.abc import Callable
from dataclasses import replace

import torch

from genar.models._base import Batch, Counts

# Spots that go through at a time in a prediction.
BLOCK = 64


def in_blocks(function: Callable[[Batch], Counts], batch: Batch, n_rows: int = BLOCK) -> Counts:
    """``function`` of blocks of one fixed shape, the last one padded; the counts are withheld.

    Matrix products round differently at other shapes, and a near tie might fall otherwise in another batch.
    """
    n_spots, parts = len(batch.features), []
    for start in range(0, n_spots, n_rows):
        rows = torch.arange(start, start + n_rows, device=batch.features.device).clamp(max=n_spots - 1)
        parts.append(function(replace(batch.rows(rows), counts=None)))
    return Counts.join(parts).first(n_spots)
