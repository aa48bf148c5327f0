"""Hist2ST: its sizes, its graph, its likelihood."""

import pytest
import torch

from genar.models import Spots, model_class
from genar.models.hist2st import GraphLayer, Hist2ST, zinb_loss
from toy_models import array_spots

N_FEATURES, N_GENES = 6, 5
TINY = {"width": 16, "heads": 2, "head_width": 8, "hidden": 16}


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_published_sizes():
    network = Hist2ST(1024, 785, Hist2ST.configure("official", {"input": "patches"}))
    assert count(network) == 75_789_833
    assert count(network) - count(network.zinb) - count(network.score) == 72_325_333
    assert count(network.token.mixers) == 5_824
    assert count(network.token.narrow) == 132
    assert count(network.trunk.blocks) == 50_388_992
    assert count(network.trunk.graph) == 4_194_304
    assert count(network.trunk.read) == 16_793_600


def section(n_columns=7, n_rows=6, views=4):
    torch.manual_seed(0)
    coords = torch.cartesian_prod(torch.arange(n_columns).float(), torch.arange(n_rows).float()) * 200
    n = len(coords)
    x = torch.randn(n, views, N_FEATURES)
    counts = torch.poisson(torch.exp(1 + x[:, 0, :N_GENES])).long()
    return Spots(x, coords, coords / coords.max(), torch.arange(n), torch.ones(n).long(), counts)


def model(spots, **settings):
    torch.manual_seed(1)
    made = Hist2ST.create(N_FEATURES, spots, "small", {**TINY, **settings})
    made.prepare(spots)
    return made.eval()


def test_inner_spots_have_four_neighbours_and_no_loop():
    spots = section()
    index, found = model(spots).edges(spots.coords_um)
    inner = 2 * 6 + 2
    assert found[inner].all()
    assert sorted(index[inner].tolist()) == [inner - 6, inner - 1, inner + 1, inner + 6]
    assert (index != torch.arange(len(spots))[:, None])[found].all()


def test_a_graph_layer_is_the_mean_of_the_neighbours():
    layer = GraphLayer(3)
    x, index = torch.rand(4, 3), torch.tensor([[1, 2], [0, 0], [3, 0], [3, 3]])
    found = torch.tensor([[True, True], [True, False], [True, True], [False, False]])
    means = torch.stack([(x[1] + x[2]) / 2, x[0], (x[3] + x[0]) / 2, x[3]])  # the last has none but itself
    expected = torch.relu(means @ layer.linear.weight.T)
    torch.testing.assert_close(layer(x, index, found), torch.nn.functional.normalize(expected, dim=1))


def test_an_isolated_spot_leaves_the_section_finite():
    spots = section()
    spots.coords_um[5] += 100_000
    made = model(spots)
    assert not made.edges(spots.coords_um)[1][5].any()
    assert torch.isfinite(made(spots.batch())).all()
    assert torch.isfinite(made.train().loss(spots.batch()).total)


def test_the_likelihood_is_that_of_a_zero_inflated_negative_binomial():
    from scipy.stats import nbinom

    counts = torch.tensor([[0.0, 1.0, 7.0]])
    mean, theta, pi = torch.tensor([[2.0, 3.0, 4.0]]), torch.tensor([[1.5, 0.7, 9.0]]), torch.tensor([[0.2, 0.1, 0.4]])
    p = nbinom.pmf(counts.numpy(), theta.numpy(), (theta / (theta + mean)).numpy())
    likelihood = (counts == 0) * pi + (1 - pi) * torch.from_numpy(p)
    torch.testing.assert_close(zinb_loss(counts, mean, theta, pi), -likelihood.log().mean().float())


def test_no_prediction_uses_the_likelihoods_heads():
    spots = section()
    made = model(spots)
    before = made(spots.batch())
    for head in made.zinb.values():
        torch.nn.init.normal_(head.weight, std=100)
    assert torch.equal(made(spots.batch()), before)
    assert torch.isfinite(made.loss(spots.batch()).total)


def test_copies_are_other_views_and_without_any_the_distillation_is_silent():
    spots = section()
    made = model(spots)  # in evaluation mode: no dropout
    torch.manual_seed(0)
    altered = made._altered(spots.batch(view=None))
    assert all((spots.features[i] == altered.features[i]).all(dim=1).any() for i in range(len(spots)))
    assert made.loss(spots.batch()).per_scale[2] > 0
    one_view = section(views=1)
    assert model(one_view).loss(one_view.batch()).per_scale[2] == pytest.approx(0, abs=1e-8)


def test_a_spot_without_counts_has_a_finite_loss():
    spots = section()
    spots.counts[3] = 0
    made = model(spots)
    assert torch.isfinite(made.loss(spots.batch()).total)
    spots.counts[:] = 0
    assert torch.isfinite(made.loss(spots.batch()).total)


def test_the_network_on_pixels_trains_and_predicts():
    spots = section(2, 2)
    spots.patches = torch.randint(0, 256, (4, 1, 3, 112, 112), dtype=torch.uint8)
    made = model(spots, input="patches", copies=1)
    made.train().loss(spots.batch()).total.backward()
    assert made.token.stem.weight.grad.abs().sum() > 0
    assert made.eval()(spots.batch()).shape == (4, N_GENES)


def test_a_radius_that_is_given_counts_on_any_array():
    x = torch.arange(12.0)
    hexagonal = torch.stack([(x[:, None] + 0.5 * (x % 2)).ravel(), (x * 3**0.5 / 2).expand(12, -1).ravel()], dim=1)
    wide = model_class("hist2st").create(24, array_spots(12, 12, 2), "small", {"neighbours": 18, "radius": 2.0})
    own = model_class("hist2st").create(24, array_spots(12, 12, 2), "small", {})
    assert wide.edges(100 * hexagonal)[1].sum(dim=1).max() == 18
    assert own.edges(100 * hexagonal)[1].sum(dim=1).max() == 6
