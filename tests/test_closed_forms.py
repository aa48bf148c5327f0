"""Models that are fitted at once: mean, ridge and the nearest spots."""

import numpy as np
import pytest
import torch

from genar.data import read_sections
from genar.models import Decoding, Spots, model_class
from genar.models._base import LN2, log2p1
from genar.models.knn import N_NEAREST
from genar.models.ridge import PENALTIES, Ridge
from genar.training import fit
from toy_models import array_spots
from toy_training import QUICK, new_model, spots_of


@pytest.fixture(scope="module")
def spots(tissue):
    return spots_of(read_sections(tissue))


def test_mean_predicts_the_training_mean(spots):
    model = new_model("mean", spots)
    fit(model, spots, QUICK)
    predicted = model.predict(spots.batch()).layers["log1p_mean"] / np.log(2)
    torch.testing.assert_close(predicted[3], log2p1(spots.counts).mean(dim=0))


def test_ridge_equals_sklearn_at_its_penalty(spots):
    from sklearn.linear_model import Ridge as Reference
    from sklearn.preprocessing import StandardScaler

    model = new_model("ridge", spots)
    fit(model, spots, QUICK)
    x, y = spots.features.mean(dim=1).double().numpy(), log2p1(spots.counts).double().numpy()
    reference = Reference(alpha=float(model.penalty)).fit(StandardScaler().fit_transform(x), y)
    expected = reference.predict(StandardScaler().fit(x).transform(x)).clip(min=0)
    predicted = model.predict(spots.batch()).layers["log1p_mean"].numpy() / np.log(2)
    np.testing.assert_allclose(predicted, expected, atol=1e-4)
    assert float(model.penalty) in [pytest.approx(p) for p in PENALTIES]


def test_ridge_takes_a_small_penalty_for_signal_and_a_large_one_for_noise():
    torch.manual_seed(0)
    x = torch.randn(200, 1, 6)
    base = Spots(x, torch.rand(200, 2), torch.rand(200, 2), torch.arange(200), torch.arange(200) % 4)
    penalties = []
    for scale in (2.0, 0.0):
        counts = torch.poisson(torch.exp(2 + scale * x[:, 0, :3])).long()
        model = Ridge(6, 3)
        model.prepare(Spots(**{**vars(base), "counts": counts}))
        penalties.append(float(model.penalty))
    assert penalties[0] < penalties[1]


def test_the_nearest_are_those_of_all_distances():
    train, asked = array_spots(20, 30, 5), array_spots(3, 3, 5, seed=1)
    model = model_class("knn").create(24, train, "", {})
    model.prepare(train)
    found = model.predict(asked.batch(), Decoding("mean", layers=("log1p_mean",))).layers["log1p_mean"] / LN2
    x, keys = ((one.features[:, 0] - model.feature_mean) / model.feature_scale for one in (asked, train))
    nearest = torch.cdist(x.double(), keys.double()).topk(N_NEAREST, largest=False).indices
    torch.testing.assert_close(found, log2p1(train.counts)[nearest].mean(dim=1), atol=1e-4, rtol=1e-4)
