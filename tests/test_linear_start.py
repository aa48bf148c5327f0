import pytest
import torch

from genar.genes import Scales
from genar.models import Decoding, Spots
from genar.models._genar_heads import log_frequencies
from genar.models._linear_start import find_components, fit_curvatures, interpolate
from genar.models.genar import GenAR, auto_max_count, small


def linear_spots(n=300, n_genes=8, views=8, seed=0):
    """Counts whose logarithm is linear in two features; a third changes with the view and says nothing."""
    g = torch.Generator().manual_seed(seed)
    signal = torch.randn(n, 2, generator=g)
    rate = torch.exp(1.5 + signal @ torch.randn(2, n_genes, generator=g) * 0.4)
    spread = torch.tensor([0.1, 0.1, 3.0, 3.0, 3.0, 3.0])
    features = torch.cat([signal, torch.zeros(n, 4)], dim=1)[:, None] + torch.randn(n, views, 6, generator=g) * spread
    xy = torch.rand(n, 2, generator=g) * 2000
    return Spots(features, xy, xy / 2000, torch.arange(n), torch.arange(n) % 3, torch.poisson(rate, generator=g).long())


def test_components_leave_out_what_turns_with_the_patch():
    found = find_components(linear_spots(), 2)
    assert found.ratio > 0
    weight = found.directions.abs() * linear_spots().features.mean(dim=1).std(dim=0)[:, None]
    assert float(weight[:2].sum() / weight.sum()) > 0.9
    assert find_components(linear_spots(views=1), 2).ratio == 0  # one view tells nothing of turning


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
