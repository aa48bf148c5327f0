"""The array found from coordinates alone."""

import math

import pytest
import torch

from genar.data import contract, read_section
from genar.models._lattice import Lattice, Places
from toy_models import array_spots


def array(n_columns, n_rows, pitch, *, hexagonal=False, turn=0.0, jitter=0.0):
    """Coordinates [N, 2] row by row, turned by ``turn`` radians, jittered by ``jitter`` pitches."""
    row, column = torch.meshgrid(torch.arange(n_rows).double(), torch.arange(n_columns).double(), indexing="ij")
    if hexagonal:
        column, row = column + 0.5 * (row % 2), row * math.sqrt(3) / 2
    xy = torch.stack([column, row], dim=2).reshape(-1, 2)
    xy = xy + jitter * torch.randn(xy.shape, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    c, s = math.cos(turn), math.sin(turn)
    return xy @ torch.tensor([[c, s], [-s, c]], dtype=torch.float64) * pitch + 5000


@pytest.mark.parametrize("turn", [0.0, 0.05, -0.2])
def test_square_arrays_give_back_column_and_row(turn):
    lattice = Lattice.of(array(30, 20, 200.0, turn=turn, jitter=0.07))
    assert lattice.fold == 4
    assert lattice.pitch_um == pytest.approx(200, rel=0.01)
    cells = lattice.cells()
    assert torch.equal(cells, torch.cartesian_prod(torch.arange(20), torch.arange(30)).flip(1))


@pytest.mark.parametrize("turn", [0.0, 0.1, math.pi / 2])
def test_hexagonal_arrays_have_six_neighbours_and_two_rings(turn):
    lattice = Lattice.of(array(20, 20, 100.0, hexagonal=True, turn=turn, jitter=0.03))
    assert lattice.fold == 6
    assert len(lattice.cells().unique(dim=0)) == 400
    inner = 10 * 20 + 10
    assert lattice.nearest(6, 1.3)[1][inner].all()
    index, found = lattice.window(6)
    assert found[inner].all()
    assert len(index[inner].unique()) == 19


def test_the_order_of_spots_changes_no_neighbour():
    coords = array(9, 7, 200.0)  # at the border, the fourth nearest is one of two at two pitches
    order = torch.randperm(len(coords), generator=torch.Generator().manual_seed(3))
    straight, turned = Lattice.of(coords).nearest(4, 2.0), Lattice.of(coords[order]).nearest(4, 2.0)
    assert torch.equal(order[turned[0]], straight[0][order])
    assert torch.equal(turned[1], straight[1][order])


def test_inner_spots_have_four_neighbours_and_an_isolated_one_none():
    coords = torch.cat([array(6, 6, 200.0), torch.tensor([[50_000.0, 50_000.0]]).double()])
    index, found = Lattice.of(coords).nearest(4, 2.0)
    assert found[7].all()
    assert sorted(index[7].tolist()) == [1, 6, 8, 13]
    assert not found[-1].any()
    assert index[-1].tolist() == [36] * 4
    assert found[:36].any(dim=1).all()


def test_pairs_go_both_ways_and_hold_the_spot_itself():
    coords = array(3, 1, 100.0)
    pairs = Lattice.of(coords).pairs_within(1.2)
    assert sorted(zip(*pairs.tolist(), strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]


@pytest.mark.parametrize("coords", [torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([[0.0, 0.0], [30.0, 40.0]])])
def test_degenerate_sections_have_a_lattice(coords):
    lattice = Lattice.of(coords)
    assert lattice.pitch_um > 0
    assert lattice.cells().shape == (len(coords), 2)
    index, found = lattice.window(4)
    assert found[:, 12].all()
    assert index[:, 12].tolist() == list(range(len(coords)))
    assert lattice.nearest(4, 2.0)[0].shape == (len(coords), 4)


def test_a_real_section_gives_back_its_array(shared):
    path = next(iter(sorted((shared / "data" / "her2st" / "st").glob("*.h5ad"))), None)
    if path is None:
        pytest.skip("no real sections")
    section = read_section(path)
    cells = Lattice.of(torch.from_numpy(contract.coords_um(section))).cells().double()
    known = torch.from_numpy(section.obs[["array_col", "array_row"]].to_numpy(float))
    steps = [min((cells[:, i] - known[:, j]).std(), (cells[:, i] + known[:, j]).std()) for i in (0, 1) for j in (0, 1)]
    assert sorted(float(step) for step in steps)[:2] == [0, 0]


@pytest.mark.parametrize("turn", [0.0, 0.4])
def test_far_spots_make_no_large_grid_and_no_cell_is_shared(turn):
    coords = array(400, 3, 100.0, turn=turn)
    assert len(Lattice.of(coords).close_cells().unique(dim=0)) == 1200
    here = array(12, 10, 100.0)
    far = torch.cat([here, here[:5] + 1e6])
    cells = Lattice.of(far).close_cells()
    assert len(cells.unique(dim=0)) == len(far)
    assert cells.max() < 40
    near = Lattice.of(here).close_cells()
    assert torch.equal(cells[: len(here)], near)


def test_places_beyond_the_trained_ones_are_the_last_of_them():
    places = Places(64, 8)
    places.prepare(array_spots(10, 12, 1))
    assert places.last.tolist() == [11, 9]
    wide = array_spots(20, 20, 1).coords_um
    found = places(wide).reshape(20, 20, 8)  # by column and row
    assert torch.equal(found[:, 9:], found[:, 9:10].expand(-1, 11, -1))
    assert torch.equal(found[11:], found[11:12].expand(9, -1, -1))
    assert not torch.equal(found[0], found[1])
