"""No order of spots changes strips, neighbours, a panel or a prediction."""

import numpy as np
import pytest
import torch

import genar
from genar.data import read_section
from genar.data.neighbours import nearest_spots
from genar.features import Inputs
from genar.genes import select_panel
from genar.models._training_spots import strips
from genar.models.checkpoint import load_checkpoint


def test_strips_of_a_grid_are_the_same_in_any_order():
    x, y = torch.meshgrid(torch.arange(7.0), torch.arange(9.0), indexing="ij")
    grid = torch.stack([x.flatten(), y.flatten()], dim=1)
    first = strips(grid, 5)
    for seed in range(5):
        order = torch.randperm(len(grid), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(strips(grid[order], 5), first[order])
    assert first.bincount().tolist() == [13, 13, 12, 13, 12]
    shared = first.unflatten(0, (7, 9))  # a column that two strips share is cut once, and not mixed
    assert int((shared.diff(dim=1) != 0).sum(dim=1).max()) == 1


@pytest.mark.parametrize("hexagonal", [False, True])
@pytest.mark.parametrize("n", [1, 3, 6, 20])
def test_the_nearest_spots_are_the_same_in_any_order(hexagonal, n):
    row, col = (part.ravel() for part in np.mgrid[:9, :12].astype(float))
    xy = np.stack([col + hexagonal * 0.5 * (row % 2), row * (np.sqrt(0.75) if hexagonal else 1)], axis=1) * 100 + 1e4
    order = np.random.default_rng(0).permutation(len(xy))
    straight, shuffled = nearest_spots(xy, n), order[nearest_spots(xy[order], n)]
    assert straight[order].tolist() == shuffled.tolist()
    apart = np.linalg.norm(xy[straight] - xy[:, None], axis=2)
    every = np.sort(np.linalg.norm(xy[:, None] - xy, axis=2), axis=1)[:, 1 : n + 1]
    np.testing.assert_allclose(apart, every, atol=1e-6)
    if n == 6:  # of four that are equally far the two that lie opposite each other: the mean lies at the spot
        inner = ((xy > xy.min(axis=0) + 200) & (xy < xy.max(axis=0) - 200)).all(axis=1)
        np.testing.assert_allclose(xy[straight[inner]].mean(axis=1), xy[inner], atol=1e-6)


def test_the_nearest_of_spots_at_one_place_are_others():
    near = nearest_spots(np.zeros((5, 2)), 3)
    assert all(spot not in row and len(set(row)) == 3 for spot, row in enumerate(near.tolist()))
    assert nearest_spots(np.zeros((1, 2)), 6).tolist() == [[0]]


def test_no_order_of_spots_changes_a_panel_or_a_prediction_on_a_grid(home):
    section = read_section(f"{home / 'tissue'}:S1")
    order = np.random.default_rng(1).permutation(section.n_obs)
    panels = [select_panel([one], recipe="moran", n_genes=15) for one in (section, section[order].copy())]
    assert panels[0].genes == panels[1].genes
    slide = genar.place_spots(home / "tissue" / "wsis" / "S2.tif", mpp=2.0, spacing_um=60)
    order = np.random.default_rng(1).permutation(slide.n_obs)
    how = {"features": home / "grid", "encoder": "genar.bench.toy:narrow_encoder", "progress": False, "samples": 2}
    checkpoint = load_checkpoint(home / "run")
    assert Inputs(**{"context_spots": tuple(checkpoint.features["context_spots"])}).context_spots == (6,)
    one, other = (genar.predict(part, checkpoint, **how) for part in (slide, slide[order].copy()))
    assert (one.X[order] != other.X).nnz == 0
