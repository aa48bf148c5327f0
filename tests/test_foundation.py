"""The foundation baseline."""

import math

import pytest
import torch
from torch.nn import functional as fn

from genar.errors import InputError
from genar.models import Decoding, Spots
from genar.models.foundation import Foundation, FoundationConfig
from genar.training import fit, train_config_from_dict


def toy(n=64, genes=4):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 3, generator=random)
    rate = torch.exp(1.5 + x[:, 0, :1] * torch.linspace(-1, 1, genes))
    xy = torch.rand(n, 2, generator=random)
    return Spots(x, xy, xy, torch.arange(n), torch.zeros(n).long(), torch.poisson(rate, generator=random).long())


def ready(spots, **settings):
    torch.manual_seed(0)
    model = Foundation.create(3, spots, "small", {"width": 16, **settings})
    model.prepare(spots)
    return model.eval()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 206_352_712),
        ({"blocks": 1}, 206_090_056),
        ({"width": 256, "blocks": 0, "dropout": 0.1}, 103_113_800),
    ],
)
def test_sizes_are_the_published_ones(settings, expected):
    with torch.device("meta"):
        model = Foundation(1024, 200, FoundationConfig(**settings))
    assert sum(p.numel() for p in model.parameters()) == expected


def test_the_first_loss_is_that_of_a_blind_guess():
    spots = toy()
    model = ready(spots, max_count=2000)
    with torch.no_grad():
        model.head.weight.mul_(0.01)
        assert float(model.loss(spots.batch()).total) == pytest.approx(math.log(2001), abs=0.02)


def test_loss_and_gradient_are_those_of_plain_cross_entropy():
    spots = toy()
    model, batch = ready(spots, max_count=7), spots.batch()  # some counts lie beyond: the last class
    assert (batch.counts > 7).any()
    fused = model.loss(batch).total
    grads = torch.autograd.grad(fused, list(model.parameters()))
    logits = model.head(model.trunk(model.standardised(batch.features))).unflatten(1, (4, 8))
    plain = fn.cross_entropy(logits.flatten(0, 1), batch.counts.clamp(max=7).flatten())
    torch.testing.assert_close(fused, plain)
    for one, other in zip(grads, torch.autograd.grad(plain, list(model.parameters())), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_small_has_the_classes_that_the_counts_need():
    spots = toy()
    model = ready(spots)
    most = int(spots.counts.max())
    assert most <= model.settings.max_count <= 2 * most + 1
    assert Foundation.from_facts(model.facts()).n_classes == model.n_classes


def test_greedy_is_the_mode_and_mean_the_expectation():
    spots = toy()
    model = ready(spots)
    with torch.no_grad():
        p = model.head(model.trunk(model.standardised(spots.batch().features))).unflatten(1, (4, -1)).softmax(dim=2)
    how = Decoding("greedy", layers=("mean", "p_zero", "q50"))
    greedy, mean = model.predict(spots.batch(), how), model.predict(spots.batch(), Decoding("mean"))
    expectation = p @ torch.arange(model.n_classes).float()
    assert torch.equal(greedy.point, p.argmax(dim=2))
    assert set(greedy.layers) == {"mean", "p_zero", "q50"}
    torch.testing.assert_close(greedy.layers["mean"], expectation)
    torch.testing.assert_close(mean.point.float(), expectation, atol=0.5001, rtol=0)
    torch.testing.assert_close(greedy.layers["p_zero"], p[:, :, 0])


def test_training_learns_what_the_features_tell():
    spots = toy()
    model = ready(spots)
    own = {"max_epochs": 30, "lr": 1e-2}
    fit(model, spots, train_config_from_dict(own, own=Foundation.train_defaults))
    mean = model.predict(spots.batch()).layers["mean"]
    truth = spots.counts.float()
    assert float((mean - truth).square().mean()) < 0.5 * float((truth - truth.mean(dim=0)).square().mean())


@pytest.mark.parametrize("settings", [{"width": 0}, {"blocks": -1}, {"heads": 3}])
def test_senseless_settings_are_refused(settings):
    with pytest.raises(InputError, match="foundation"):
        Foundation.check_settings("small", settings)
