"""The start of GenAR at the regressions of its tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from genar.genes import Scales
from genar.models import Decoding, Spots
from genar.models._genar_heads import log_frequencies
from genar.models._linear_start import (
    _tilted_moments,
    drawn_variance,
    find_components,
    fit_curvatures,
    fit_followers,
    interpolate,
    level,
)
from genar.models._training_spots import auto_max_count
from genar.models.genar import GenAR, small
from small_genar import make_model, make_spots
from toy_models import made


def linear_spots(n=300, n_genes=8, views=8, seed=0):
    """Counts whose logarithm is linear in two features; a third changes with the view and says nothing."""
    g = torch.Generator().manual_seed(seed)
    signal = torch.randn(n, 2, generator=g)
    rate = torch.exp(1.5 + signal @ torch.randn(2, n_genes, generator=g) * 0.4)
    spread = torch.tensor([0.1, 0.1, 3.0, 3.0, 3.0, 3.0])
    features = torch.cat([signal, torch.zeros(n, 4)], dim=1)[:, None] + torch.randn(n, views, 6, generator=g) * spread
    xy = torch.rand(n, 2, generator=g) * 2000
    return Spots(features, xy, xy / 2000, torch.arange(n), torch.arange(n) % 3, torch.poisson(rate, generator=g).long())


def share_of_signal(spots):
    """How much of the two strongest components the two features are that tell of the counts."""
    weight = find_components(spots, 2).directions.abs() * spots.features.mean(dim=1).std(dim=0)[:, None]
    return float(weight[:2].sum() / weight.sum())


def test_components_leave_out_what_turns_with_the_patch():
    assert share_of_signal(linear_spots()) > 0.9
    assert share_of_signal(linear_spots(views=1)) < 0.7  # one view tells nothing of turning


def test_views_of_a_block_are_noise_of_that_block_alone():
    spots = linear_spots()
    twice = replace(spots, features=spots.features.repeat(1, 1, 2))
    whole, apart = (find_components(replace(twice, n_blocks=n), 2).directions for n in (1, 2))
    torch.testing.assert_close(apart[:6], apart[6:], atol=1e-4, rtol=1e-3)  # the same block twice
    assert not torch.allclose(whole, apart, atol=1e-4)


@pytest.mark.parametrize("sizes", [(8,), (1, 2, 8)])
def test_untrained_model_predicts_what_ridge_expects(sizes):
    """Before training the generated expectation is the regression's, scale by scale."""
    train, test = linear_spots(seed=0), linear_spots(seed=0)
    torch.manual_seed(0)
    config = small(n_features=6, width=16, depth=1, heads=2, components=4, max_count=auto_max_count(train.counts))
    model = GenAR(config, Scales(tuple(range(8)), sizes))
    model.prepare(train)
    predicted = model.eval().predict(test.batch(), Decoding(samples=32)).layers["log1p_mean"]
    truth = torch.log1p(test.counts.float())
    explained = 1 - (predicted - truth).square().sum() / (truth - truth.mean(dim=0)).square().sum()
    x = torch.cat([test.features.mean(dim=1)[:, :2], torch.ones(len(truth), 1)], dim=1)
    best = x @ torch.linalg.lstsq(x, truth).solution
    possible = 1 - (best - truth).square().sum() / (truth - truth.mean(dim=0)).square().sum()
    assert float(explained) > 0.9 * float(possible)


def test_curvature_and_tilt_give_the_wanted_moments():
    levels = torch.log1p(torch.arange(64.0)).double()
    base = log_frequencies(torch.poisson(torch.full((200, 2), 6.0)), 63).double()
    expected = torch.linspace(0.8, 2.6, 50).double()[:, None].expand(-1, 2)
    b, means, tilts = fit_curvatures(base, levels, expected, torch.tensor([0.05, 0.2]).double())
    p = (base + interpolate(tilts, means, expected)[:, :, None] * levels - b[:, None] * levels**2 / 2).softmax(dim=2)
    mean = (p * levels).sum(dim=2)
    variance = (p * levels**2).sum(dim=2) - mean**2
    torch.testing.assert_close(mean, expected, atol=5e-3, rtol=0)
    torch.testing.assert_close(variance.mean(dim=0), torch.tensor([0.05, 0.2]).double(), atol=5e-3, rtol=0)


@pytest.mark.parametrize("wanted", [1e-9, 1e-3, 0.03, 0.1, 0.3, 1.0, 100.0])
def test_curvatures_are_those_that_halving_an_interval_finds(wanted):
    """Of sparse and of rich groups; also where the variance is out of reach."""
    random, levels = torch.Generator().manual_seed(0), torch.log1p(torch.arange(128.0)).double()
    rates = torch.tensor([0.02, 0.1, 0.5, 2.0, 8.0, 30.0])
    base = log_frequencies(torch.poisson(rates.expand(300, -1), generator=random), 127).double()
    expected = torch.log1p(rates).double() * torch.linspace(0.5, 1.5, 40).double()[:, None]
    variance = torch.full((6,), wanted).double()
    b, means, tilts = fit_curvatures(base, levels, expected, variance)
    low, high = torch.full_like(b, -1.0), 4 / variance + 4
    for _ in range(60):
        middle = (low + high) / 2
        table = _tilted_moments(base, levels, middle)
        too_wide = interpolate(table[2], table[1], interpolate(table[1], table[0], expected)).mean(dim=0) > variance
        low, high = torch.where(too_wide, middle, low), torch.where(too_wide, high, middle)
    torch.testing.assert_close(b, high, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((means, tilts), _tilted_moments(base, levels, b)[:2])


def test_a_level_between_two_counts_is_that_of_a_draw_among_them():
    means = torch.tensor([0.0, 0.3, 4.75, 100.5])
    draws = means.floor() + (torch.rand(200_000, 4, generator=torch.Generator().manual_seed(0)) < means - means.floor())
    torch.testing.assert_close(level(means), torch.log1p(draws).mean(dim=0), atol=2e-3, rtol=0)
    torch.testing.assert_close(level(means.round()), torch.log1p(means.round()))


def test_genes_follow_all_coarser_groups():
    """Genes that go with another group than their own are told by it: all that is seen of the tokens counts."""
    g = torch.Generator().manual_seed(1)
    groups = torch.rand(400, 3, generator=g) * 2
    genes = groups @ torch.tensor([[1.0, 0.0, 0.0, -1.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    exact = torch.zeros(3).double()
    follow, told, passed_on = fit_followers(groups.double(), genes.double(), torch.arange(400) % 4, exact)
    assert float(passed_on.abs().max()) == 0
    assert float((told - genes).square().mean()) < 1e-3
    torch.testing.assert_close(follow[:, 3], torch.tensor([-1.0, 0.0, 1.0]).double(), atol=0.05, rtol=0)


def test_generation_keeps_the_expectations_of_the_regressions():
    """Through sampled tokens the genes' mean level is what it is through expected ones: nothing drifts on the way."""
    spots = linear_spots(n=120)
    torch.manual_seed(0)
    config = small(n_features=6, width=16, depth=1, heads=2, components=4, max_count=auto_max_count(spots.counts))
    model = GenAR(config, Scales(tuple(range(8)), (1, 2, 4, 8)))
    model.prepare(spots)
    known, start, levels = model.condition.components(spots.batch()), model.linear_start, []
    for first, stop in ((0, 1), (1, 3), (3, 7), (7, 15)):
        place = slice(first, stop)
        expected = known @ start.slope[:, place] + start.offset[place]
        levels.append(expected + (torch.cat(levels, dim=1) @ start.follow[:first, place] if levels else 0))
    made = model.eval().predict(spots.batch(), Decoding(samples=32)).layers["log1p_mean"]
    assert float((made - levels[-1]).mean().abs()) < 0.01
    assert float((made - levels[-1]).square().mean().sqrt()) < 0.06


def sparse_spots(mean, seed, n=400, n_genes=60):
    """Counts of a few components, far below one on average."""
    r = np.random.default_rng(seed)
    features = r.standard_normal((n, 2, 8)).astype(np.float32)
    fixed = np.random.default_rng(99)
    weights, base = 0.3 * fixed.standard_normal((8, n_genes)), np.exp(0.7 * fixed.standard_normal((1, n_genes)))
    rate = mean * base * np.exp(features.mean(axis=1) @ weights + 0.4 * r.standard_normal((n, 1)))
    xy = torch.from_numpy(r.uniform(0, 2000, (n, 2)).astype(np.float32))
    section = torch.arange(n) * 3 // n
    return Spots(torch.from_numpy(features), xy, xy / 2000, torch.arange(n), section, torch.from_numpy(r.poisson(rate)))


def test_a_sparse_panel_starts_at_what_is_drawn():
    """Tokens of means far below one are drawn as 0 or 1: the start knows how wide that is, and believes them less."""
    train, test = (sparse_spots(0.05, seed) for seed in (0, 1))
    model = made("genar", train, count_basis=16)
    model.prepare(train)
    model.eval()
    with torch.no_grad():
        losses = model.loss(test.batch()).per_scale
    assert float(losses[0]) < 0.1  # was 3.5 where the variance of the draw was left out
    layers = model.predict(test.batch(), Decoding(samples=16, layers=("p_zero",))).layers
    assert float(layers["p_zero"].mean()) == pytest.approx(float((test.counts == 0).float().mean()), abs=0.02)


def test_slopes_are_those_that_err_least_on_draws():
    g = torch.Generator().manual_seed(0)
    means = torch.rand(4000, 1, generator=g).double() * 0.6  # each drawn as 0 or 1
    seen, noise = means * np.log(2), drawn_variance(means).mean(dim=0)
    y = torch.cat([2 * means, -means], dim=1)
    slope, _, passed_on = fit_followers(seen, y, torch.arange(4000) % 4, noise)
    draws = (torch.rand(200, 4000, generator=g) < means[:, 0]).double() * np.log(2)  # [draws, N]
    x = draws.flatten()[:, None]
    best = torch.linalg.lstsq(x - x.mean(), (y - y.mean(dim=0)).repeat(200, 1)).solution
    torch.testing.assert_close(slope, best, rtol=0.02, atol=0)
    assert float(passed_on[0]) == pytest.approx(float((slope[0, 0] * (draws - seen[:, 0])).square().mean()), rel=0.02)


def test_a_second_start_holds_nothing_of_the_first():
    """Of fewer spots fewer directions are found: those of the first were left in place."""
    torch.manual_seed(0)
    first = make_model(shake=0)
    torch.manual_seed(0)
    fresh = make_model(shake=0)
    few = make_spots(7, seed=5)
    first.prepare(make_spots(60, seed=4))
    first.prepare(few)
    fresh.prepare(few)
    for name, values in fresh.state_dict().items():
        torch.testing.assert_close(first.state_dict()[name], values, rtol=0, atol=0, msg=name)


def test_frequencies_of_many_classes_are_those_of_all_at_once():
    means = torch.cat([torch.rand(30, 5) * 60, torch.full((1, 5), 2500.0)])
    classes = torch.arange(4001, dtype=torch.float64)
    wide = means.double()[..., None]
    spread = torch.exp(-0.5 * (classes - wide).square() / (1 + wide))
    wanted = ((spread / spread.sum(dim=2, keepdim=True)).mean(dim=0) + 1e-6).log()
    wanted -= wanted.mean(dim=1, keepdim=True)
    torch.testing.assert_close(log_frequencies(means, 4000).double(), wanted, rtol=1e-4, atol=1e-4)
