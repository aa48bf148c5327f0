"""UMPIRE-style retrieval; the look-up itself is tested with BLEEP."""

import math

import pytest
import torch

from genar.errors import InputError
from genar.models import Spots
from genar.models._base import LN2, log2p1
from genar.models.umpire import UMPIRE, RankTower, UMPIREConfig, contrast, rank_tokens
from genar.training import fit, train_config_from_dict

TINY = {"width": 16, "hidden": 32, "depth": 1, "heads": 2}


def toy(n=60, genes=6):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 5, generator=random)
    rate = torch.exp(2 + x[:, 0, :2].repeat(1, 3) * torch.linspace(-1.5, 1.5, genes))
    xy = torch.rand(n, 2, generator=random) * 1000
    counts = torch.poisson(rate, generator=random).long()
    return Spots(x, xy, xy / 1000, torch.arange(n), torch.arange(n) % 3, counts)


def ready(spots, **settings):
    torch.manual_seed(0)
    model = UMPIRE.create(5, spots, "small", {**TINY, **settings})
    model.prepare(spots)
    return model.eval()


def test_size_is_the_published_one():
    with torch.device("meta"):
        tower = RankTower(20_345, 1500, UMPIREConfig())
    assert sum(p.numel() for p in tower.parameters()) == 36_418_048
    assert sum(p.numel() for p in tower.layers.parameters()) == 25_233_408


def test_unrelated_embeddings_cost_ln_b():
    torch.manual_seed(0)
    assert float(contrast(torch.randn(128, 512), torch.randn(128, 512), 1.0)) == pytest.approx(math.log(128), abs=0.01)
    one = torch.randn(1, 8).expand(128, -1)
    assert float(contrast(one, one, 14.0)) == pytest.approx(math.log(128), abs=1e-4)
    model = ready(toy())
    assert float(model.log_sharpness.detach().exp()) == pytest.approx(1 / 0.07, rel=1e-5)


def test_a_perfect_alignment_costs_nothing():
    z = torch.eye(16)
    assert float(contrast(3 * z, 5 * z, 100.0)) == pytest.approx(0, abs=1e-5)  # length does not count


def test_ranks_are_of_counts_over_gene_means():
    mean = torch.tensor([10.0, 1.0, 2.0, 1.0])
    counts = torch.tensor([[10, 4, 4, 0], [5, 0, 0, 0], [0, 0, 0, 0]])
    expected = [[2, 3, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert rank_tokens(log2p1(counts), mean).tolist() == expected
    assert rank_tokens(log2p1(counts * 3), mean).tolist() == expected  # depth changes nothing


def test_padding_changes_nothing_and_first_genes_count():
    torch.manual_seed(0)
    tower = RankTower(7, 6, UMPIREConfig(**TINY)).eval()
    short, padded = torch.tensor([[3, 1, 2]]), torch.tensor([[3, 1, 2, 0, 0, 0]])
    torch.testing.assert_close(tower(short), tower(padded), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(tower(short), tower(torch.tensor([[4, 1, 2]])))
    assert tower(torch.zeros(2, 6, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize("tower", ["mlp", "ranks"])
def test_training_aligns_and_predicts(tower):
    spots = toy(n=90)
    model = ready(spots, tower=tower, neighbours=5)
    before = float(model.loss(spots.batch()).total.detach())
    fit(model, spots, train_config_from_dict({"lr": 5e-3, "batch_size": 30}, own=UMPIRE.train_defaults))
    assert float(model.loss(spots.batch()).total.detach()) < 0.8 * before
    predicted = model.predict(spots.batch()).layers["log1p_mean"] / LN2
    truth = log2p1(spots.counts)
    assert float((predicted - truth).square().mean()) < 0.6 * float((truth - truth.mean(dim=0)).square().mean())


@pytest.mark.parametrize(
    "settings", [{"tower": "eiffel"}, {"tower": "ranks", "width": 30, "heads": 4}, {"neighbours": 0}, {"k": 3}]
)
def test_senseless_settings_are_refused(settings):
    with pytest.raises(InputError, match="umpire"):
        UMPIRE.check_settings("small", settings)
