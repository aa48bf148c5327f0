"""ST-Net."""

from dataclasses import replace

import pytest
import torch

from genar.errors import InputError
from genar.models import Decoding, Spots, model_class
from genar.models._base import LN2, log2p1, turned
from genar.models.st_net import STNet, STNetConfig
from genar.training import fit, train_config_from_dict
from toy_models import array_spots


@pytest.fixture(autouse=True)
def _small_patches(monkeypatch):
    monkeypatch.setattr(STNet, "crop_px", 32)


@pytest.mark.parametrize(("n_genes", "expected"), [(250, 7_210_106), (200, 7_158_856)])
def test_size_is_the_published_one(n_genes, expected):
    with torch.device("meta"):
        model = STNet(1024, n_genes, STNetConfig("patches"))
    assert sum(p.numel() for p in model.parameters()) == expected


def toy(n=48, px=0):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, 5, generator=random) * 0.1 + torch.randn(n, 1, 5, generator=random)
    rate = torch.exp(2 + x.mean(dim=1)[:, :1] * torch.linspace(-1, 1, 6))
    xy = torch.rand(n, 2, generator=random)
    counts = torch.poisson(rate, generator=random).long()
    patches = torch.randint(256, (n, 1, 3, px, px), generator=random, dtype=torch.uint8) if px else None
    return Spots(x, xy, xy, torch.arange(n), torch.zeros(n).long(), counts, patches=patches)


def ready(spots, **settings):
    torch.manual_seed(0)
    model = STNet.create(5, spots, "small", settings)
    model.prepare(spots)
    return model.eval()


@pytest.mark.parametrize("px", [0, 32])
def test_untrained_it_predicts_the_gene_means(px):
    spots = toy(n=8 if px else 48, px=px)
    model = ready(spots, input="patches" if px else "features")
    predicted = model.predict(spots.batch(slice(0, 2))).layers["log1p_mean"] / LN2
    torch.testing.assert_close(predicted, log2p1(spots.counts).mean(dim=0).expand(2, -1))


def test_the_loss_is_a_sum_over_spots():
    spots = toy()
    model = ready(spots)
    expected = (log2p1(spots.counts).mean(dim=0) - log2p1(spots.counts)).square().sum() / 200  # of few genes
    torch.testing.assert_close(model.loss(spots.batch()).total, expected)


def test_training_finds_the_linear_part():
    spots = toy()
    model = ready(spots)
    fit(model, spots, train_config_from_dict({"lr": 3e-2}, own=STNet.train_defaults))
    predicted = model.predict(spots.batch()).layers["log1p_mean"] / LN2
    truth = log2p1(spots.counts)
    assert float((predicted - truth).square().mean()) < 0.5 * float((truth - truth.mean(dim=0)).square().mean())


def test_the_eight_views_are_different_and_closed():
    x = torch.randn(3, 4, 4)
    views = [turned(x, view) for view in range(8)]
    assert sum(torch.equal(a, b) for a in views for b in views) == 8
    again = [turned(turned(x, 5), view) for view in range(8)]
    assert all(any(torch.equal(a, b) for b in views) for a in again)


def test_on_patches_turning_the_input_changes_nothing():
    spots = toy(n=4, px=32)
    model = ready(spots, input="patches")
    torch.nn.init.normal_(model.head.weight, std=0.1)
    batch = spots.batch(slice(0, 1))
    with torch.no_grad():
        straight = model(batch)
        assert not torch.allclose(straight, model.head.bias)
        batch.patches = turned(batch.patches, 6)
        torch.testing.assert_close(model(batch), straight, atol=1e-3, rtol=1e-4)


def test_on_patches_it_trains_through_the_network():
    spots = toy(n=4, px=32)
    model = ready(spots, input="patches").train()
    torch.nn.init.normal_(model.head.weight, std=0.01)
    torch.testing.assert_close(model.pixels(spots.batch()).mean(), torch.zeros(()), atol=0.02, rtol=0)
    loss = model.loss(spots.batch(slice(0, 2))).total
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_missing_patches_are_one_clear_line():
    with pytest.raises(InputError, match="came without"):
        ready(toy(), input="patches")
    with pytest.raises(InputError, match="st_net"):
        STNet.check_settings("small", {"input": "sound"})


@pytest.mark.parametrize("n_genes", [1, 3, 8])
def test_st_net_learns_few_genes(n_genes):
    train = array_spots(14, 14, n_genes, n_features=1280)
    model = model_class("st_net").create(1280, train, "small", {})
    config = train_config_from_dict({**model.train_defaults, "max_epochs": 10})
    fit(model, train, config)
    predicted = model.predict(replace(train, counts=None).batch(), Decoding("mean", layers=("log1p_mean",)))
    error = (predicted.layers["log1p_mean"] / LN2 - log2p1(train.counts)).square().mean()
    assert error < log2p1(train.counts).var(dim=0).mean()
