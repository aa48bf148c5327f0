"""TRIPLEX: its sizes, its loss, and what its neighbours may change."""

from dataclasses import replace

import pytest
import torch

from genar.errors import InputError
from genar.models import Spots
from genar.models._lattice import Lattice
from genar.models.triplex import Triplex, TriplexConfig, distillation_loss

TINY = {"width": 16, "heads": (2, 2, 2), "spots_per_step": 32}
N_FEATURES, N_GENES = 6, 5


def grid(n_columns=8, n_rows=6, pitch=200.0, hexagonal=False):
    """Coordinates of an array [N, 2], um."""
    y, x = torch.meshgrid(torch.arange(n_rows).float(), torch.arange(n_columns).float(), indexing="ij")
    if hexagonal:
        x, y = x + 0.5 * (y % 2), y * 3**0.5 / 2
    return torch.stack([x, y], dim=2).reshape(-1, 2) * pitch


def section(coords):
    torch.manual_seed(0)
    n = len(coords)
    x = torch.randn(n, 1, N_FEATURES)
    counts = torch.poisson(torch.exp(1 + x[:, 0, :N_GENES])).long()
    return Spots(x, coords, coords / coords.max(), torch.arange(n), torch.ones(n).long(), counts)


def model(spots, **settings):
    torch.manual_seed(1)
    made = Triplex.create(N_FEATURES, spots, "small", {**TINY, **settings})
    made.prepare(spots)
    return made.eval()


@pytest.mark.parametrize(
    ("preset", "changes", "width", "n_genes", "n_parameters"),
    [
        ("official", {}, 512, 250, 29_294_296),
        ("official_st", {}, 512, 250, 40_320_840),
        ("official", {"depths": (2, 2, 4), "heads": (8, 16, 16), "mlp_ratios": (4, 1, 1)}, 512, 250, 27_722_344),
        ("official_visium", {}, 1024, 300, 54_933_008),
    ],
)
def test_published_sizes(preset, changes, width, n_genes, n_parameters):
    config = Triplex.configure(preset, {**changes, "input": "patches"})
    network = Triplex(width, n_genes, config)
    assert sum(p.numel() for p in network.parameters()) == n_parameters
    assert sum(p.numel() for p in network.own.trunk.parameters()) == 11_176_512


def test_where_all_heads_agree_the_loss_is_three_and_a_bit_squared_errors():
    truth, predicted = torch.randn(9, 4), torch.randn(9, 4)
    terms = distillation_loss(predicted, [predicted] * 3, truth, TriplexConfig())
    assert len(terms) == 7
    torch.testing.assert_close(terms.sum(), 3.1 * (predicted - truth).square().mean())


def test_negative_outputs_still_learn():
    below = torch.full((3, 2), -1.0, requires_grad=True)
    distillation_loss(below, [below] * 3, torch.ones(3, 2), TriplexConfig()).sum().backward()
    assert (below.grad != 0).all()


def test_what_stands_at_an_absent_neighbours_place_changes_nothing():
    spots = section(grid())
    made = model(spots)
    x, found = torch.randn(4, 25, 16), torch.rand(4, 25) < 0.7
    found[:, 12] = True
    other = torch.where(found[:, :, None], x, torch.randn_like(x) * 100)
    query, own = torch.randn(4, 16), torch.randn(4, 1, 16)
    one, two = (made.fuse(query, own, made.surroundings(tokens, found), found) for tokens in (x, other))
    torch.testing.assert_close(one, two)
    changed = made.fuse(query, own, made.surroundings(torch.randn_like(x), found), found)
    assert (changed - one).abs().max() > 1e-3


def test_present_neighbours_reach_the_own_surroundings_alone():
    """Without the global view, a spot sees its 5 x 5 window and nothing further."""
    spots = section(grid())
    made, batch = model(spots), spots.batch()
    lattice, rows = Lattice.of(batch.coords_um), torch.arange(len(spots))
    far, near, own = 45, 21, 10  # (5, 5), (5, 2) -> (2, 1): 3 columns off; and itself
    whole = torch.zeros(len(spots), 16)

    def of_spot(place):
        x = batch.features.clone()
        x[place] += 1
        changed = replace(batch, features=x)
        return made.views(changed, rows, whole, made._around(changed, lattice))["around"][own]

    base = made.views(batch, rows, whole, made._around(batch, lattice))["around"][own]
    torch.testing.assert_close(of_spot(far), base)
    torch.testing.assert_close(of_spot(near), base)
    assert (of_spot(11) - base).abs().max() > 1e-4


def test_a_prediction_drops_nothing_and_the_section_makes_its_own_grid():
    small, large = section(grid(4, 4)), section(grid(9, 7))
    made = model(small)
    first = made(small.batch())
    assert made(large.batch()).shape == (63, N_GENES)
    assert torch.equal(made(small.batch()), first)


def test_a_hexagonal_array_has_two_rings():
    spots = section(grid(10, 10, 100.0, hexagonal=True))
    made = model(spots)
    assert made.fold == 6
    index, found = Lattice.of(spots.coords_um).window(6)
    assert index.shape == (100, 19)
    assert found[44].all()
    distance = (spots.coords_um[index[44]] - spots.coords_um[44]).norm(dim=1)
    assert distance.max() < 201
    assert torch.isfinite(made(spots.batch())).all()


def test_the_network_on_pixels_trains_and_predicts():
    spots = section(grid(2, 2))
    spots.patches = torch.randint(0, 256, (4, 1, 3, 64, 64), dtype=torch.uint8)
    made = model(spots, input="patches")
    made.crop_px = 64  # a toy
    made.train().loss(spots.batch()).total.backward()
    assert made.own.trunk.conv1.weight.grad.abs().sum() > 0
    assert made.eval()(spots.batch()).shape == (4, N_GENES)
    with pytest.raises(InputError, match="patches"):
        model(section(grid(2, 2)), input="patches")


@pytest.mark.parametrize("facts", [{"input": "text"}, {"depths": (1, 2)}, {"width": 30}])
def test_senseless_settings_are_refused(facts):
    with pytest.raises(InputError):
        Triplex.configure("small", facts)
