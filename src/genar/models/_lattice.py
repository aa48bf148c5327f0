"""The array that a section's spots lie on, found from their coordinates: pitch, square or hexagonal, direction.

Files name the places on the array in different ways or not at all; coordinates they all have. Real arrays are a little
turned, stretched and jittered (7 % of the pitch on HER2ST), so nothing here asks for exact places.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor, nn

from genar.models._base import Spots

_SPARE = 12
"""nearest spots looked at beyond those asked for, to order equally near ones in a way that no order of spots changes"""
_CATCH = 0.45
"""how far from a place of the array, in pitches, its spot may lie"""


@dataclass(frozen=True)
class Lattice:
    """The array under the N spots of one section."""

    xy: np.ndarray = field(repr=False)
    """float64 [N, 2]: the spots in pitches along the array's axes"""
    pitch_um: float
    fold: int
    """neighbours of an inner spot: 4 on a square array, 6 on a hexagonal one"""

    @classmethod
    def of(cls, coords_um: Tensor) -> "Lattice":
        """The array under spots at ``coords_um`` [N, 2]; one spot has pitch 1 um."""
        xy = coords_um.detach().cpu().double().numpy()
        near = _nearest_distance(xy)
        ends = KDTree(xy).query_pairs(1.25 * near, output_type="ndarray")
        steps = xy[ends[:, 1]] - xy[ends[:, 0]]
        steps = steps[np.hypot(*steps.T) > 0]
        if len(steps) == 0:
            return cls((xy - xy.min(axis=0)) / near, near, 4)
        neighbours = np.bincount(ends.ravel(), minlength=len(xy))
        fold = 6 if np.quantile(neighbours, 0.75) > 4.5 else 4
        around = np.exp(1j * fold * np.arctan2(steps[:, 1], steps[:, 0])).mean()
        angle = float(np.angle(around)) / fold if abs(around) > 0.5 else 0.0  # 0 where there is no array to see
        if angle < -0.8 * math.pi / fold:  # a section halfway between two directions always takes the same one
            angle += 2 * math.pi / fold
        turned = xy @ np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        pitch = _pitch(turned, float(np.hypot(*steps.T).mean()), fold)
        return cls((turned - turned.min(axis=0)) / pitch, pitch, fold)

    def close_cells(self) -> Tensor:
        """int64 [N, 2]: column and row of each spot in whole pitches, of empty ones between them one alone: neighbours
        stay neighbours, and a spot far out makes no grid of millions of cells."""
        cells = self.cells()
        if self.fold == 6:
            cells[:, 0] //= 2
        for place in cells.T:
            taken, which = place.unique(return_inverse=True)
            place.copy_(taken.diff(prepend=taken[:1]).clamp(max=2).cumsum(0)[which])
        return cells

    def cells(self) -> Tensor:
        """int64 [N, 2]: column and row of each spot, from 0. Columns of a hexagonal array count half pitches, as
        Visium's files do."""
        column, row = self.xy.T / np.array(_spacing(self.fold))[:, None]
        column, row = (np.rint(v - _phase(v)).astype(np.int64) for v in (column, row))
        return torch.from_numpy(np.stack([column - column.min(), row - row.min()], axis=1))

    def nearest(self, k: int, radius: float) -> tuple[Tensor, Tensor]:
        """The at most ``k`` nearest other spots within ``radius`` pitches: int64 [N, k], and bool [N, k] where there
        is one (elsewhere the spot itself stands)."""
        n = len(self.xy)
        index, found = np.repeat(np.arange(n)[:, None], k, axis=1), np.zeros((n, k), bool)
        asked = min(n, k + 1 + _SPARE)
        if asked < 2:
            return torch.from_numpy(index), torch.from_numpy(found)
        distance, who = KDTree(self.xy).query(self.xy, k=asked)
        # itself last; equally near ones in the order of their direction
        distance = np.where(who == np.arange(n)[:, None], np.inf, np.round(distance, 3))
        away = np.round(self.xy[who] - self.xy[:, None], 3)
        order = np.lexsort((away[..., 0], away[..., 1], distance), axis=1)[:, :k]
        who, distance = (np.take_along_axis(table, order, axis=1) for table in (who, distance))
        near = distance <= radius
        found[:, : near.shape[1]] = near
        index[:, : near.shape[1]] = np.where(near, who, index[:, : near.shape[1]])
        return torch.from_numpy(index), torch.from_numpy(found)

    def window(self, fold: int) -> tuple[Tensor, Tensor]:
        """The spot at each place of :func:`window_places` around each spot: int64 [N, W], and bool [N, W] where there
        is one (elsewhere 0 stands)."""
        places = window_places(fold) * np.array(_spacing(fold))
        near = KDTree(self.xy).query(self.xy[:, None] + places, distance_upper_bound=_CATCH)
        found, who = np.isfinite(near[0]), np.asarray(near[1])
        centre = np.flatnonzero((window_places(fold) == 0).all(axis=1))[0]
        found[:, centre], who[:, centre] = True, np.arange(len(who))  # of two spots at one place, each is its own
        return torch.from_numpy(np.where(found, who, 0)), torch.from_numpy(found)

    def pairs_within(self, radius: float) -> Tensor:
        """int64 [2, E]: every pair of spots at most ``radius`` pitches apart, both ways, and each spot with itself."""
        ends = KDTree(self.xy).query_pairs(radius, output_type="ndarray").T
        own = np.tile(np.arange(len(self.xy)), (2, 1))
        return torch.from_numpy(np.concatenate([own, ends, ends[::-1]], axis=1).astype(np.int64))


def window_places(fold: int) -> np.ndarray:
    """int [W, 2]: the places of a spot's surroundings in steps of the array: 5 x 5 on a square one, the spot and two
    rings (19) on a hexagonal one, whose columns count half pitches."""
    if fold == 4:
        return np.array([(x, y) for y in range(-2, 3) for x in range(-2, 3)])
    return np.array([(x, y) for y in range(-2, 3) for x in range(abs(y) - 4, 5 - abs(y), 2)])


def _spacing(fold: int) -> tuple[float, float]:
    """One step of column and row in pitches."""
    return (1.0, 1.0) if fold == 4 else (0.5, math.sqrt(3) / 2)


def _nearest_distance(xy: np.ndarray) -> float:
    """Median distance to the nearest spot elsewhere, 1 without one."""
    if len(xy) < 2:
        return 1.0
    distance = KDTree(xy).query(xy, k=2)[0][:, 1]
    return float(np.median(distance[distance > 0])) if (distance > 0).any() else 1.0


def _pitch(xy: np.ndarray, start: float, fold: int) -> float:
    """The pitch near ``start`` that most spots agree on: from one end of the array to the other, an error of 2 % would
    come to a whole step."""
    tried = start * np.linspace(0.94, 1.06, 121)
    rows = xy[:, 1] / _spacing(fold)[1], xy[:, 0] / _spacing(fold)[0]
    agreement = [sum(abs(np.exp(2j * np.pi * v / pitch).mean()) for v in rows) for pitch in tried]
    best = int(np.argmax(agreement))
    return float(tried[best]) if agreement[best] > 1 else start


def _phase(steps: np.ndarray) -> float:
    """How far, in steps, the array is shifted against whole numbers."""
    return float(np.angle(np.exp(2j * np.pi * steps).mean())) / (2 * np.pi)


class Places(nn.Module):
    """A learned vector for each column and each row of the array; those beyond what was trained share its last."""

    last: Tensor

    def __init__(self, n_positions: int, width: int):
        super().__init__()
        self.column, self.row = nn.Embedding(n_positions, width), nn.Embedding(n_positions, width)
        self.register_buffer("last", torch.full((2,), n_positions - 1))

    def prepare(self, spots: Spots) -> None:
        """Keep how far the training sections go."""
        seen = [Lattice.of(spots.coords_um[spots.section == one]).cells().amax(dim=0) for one in spots.section.unique()]
        self.last.copy_(torch.minimum(torch.stack(seen).amax(dim=0).to(self.last), self.last))

    def forward(self, coords_um: Tensor) -> Tensor:
        """[N, 2] -> [N, D]."""
        cells = torch.minimum(Lattice.of(coords_um).cells().to(coords_um.device), self.last)
        return self.column(cells[:, 0]) + self.row(cells[:, 1])
