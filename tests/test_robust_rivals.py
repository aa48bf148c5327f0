"""Rivals where a panel is small, a section large, an array another, or a setting strange."""

from dataclasses import replace

import pytest
import torch

from genar.batches import SectionLoader, section_turns
from genar.errors import InputError
from genar.models import Decoding, Spots, model_class
from genar.models._base import LN2, log2p1
from genar.models._diffusion import Diffusion
from genar.models._lattice import Places
from genar.models.knn import N_NEAREST
from genar.training import TrainConfig, fit, train_config_from_dict
from genar.training_loop import _Module
from toy_models import array_spots


@pytest.mark.parametrize("n_genes", [1, 3, 8])
def test_st_net_learns_few_genes(n_genes):
    train = array_spots(14, 14, n_genes, n_features=1280)
    model = model_class("st_net").create(1280, train, "small", {})
    config = train_config_from_dict({**model.train_defaults, "max_epochs": 10})
    fit(model, train, config)
    predicted = model.predict(replace(train, counts=None).batch(), Decoding("mean", layers=("log1p_mean",)))
    error = (predicted.layers["log1p_mean"] / LN2 - log2p1(train.counts)).square().mean()
    assert error < log2p1(train.counts).var(dim=0).mean()


def test_the_nearest_are_those_of_all_distances():
    train, asked = array_spots(20, 30, 5), array_spots(3, 3, 5, seed=1)
    model = model_class("knn").create(24, train, "", {})
    model.prepare(train)
    found = model.predict(asked.batch(), Decoding("mean", layers=("log1p_mean",))).layers["log1p_mean"] / LN2
    x, keys = ((one.features[:, 0] - model.feature_mean) / model.feature_scale for one in (asked, train))
    nearest = torch.cdist(x.double(), keys.double()).topk(N_NEAREST, largest=False).indices
    torch.testing.assert_close(found, log2p1(train.counts)[nearest].mean(dim=1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("m2ost", {"spots_per_step": 40}, 5),
        ("m2ost", {}, 1),
        ("triplex", {"spots_per_step": 64}, 3),
        ("hist2st", {}, 1),
    ],
)
def test_an_epoch_looks_at_each_spot_about_once(name, settings, expected):
    whole = array_spots(14, 14, 4)
    model = model_class(name).create(24, whole, "small", settings)
    assert model.section_steps(len(whole)) == expected
    config = TrainConfig(validation_share=0.0)
    module = _Module(model, whole, None, config, print)
    assert module.n_batches == expected


def test_sections_come_as_often_as_they_have_steps():
    both = Spots.join([array_spots(4, 4, 2), array_spots(8, 8, 2, seed=1)])
    turns = section_turns(both.section, lambda n: n // 16)
    assert turns.tolist() == [0, 1, 1, 1, 1]
    given = [int(share.batch.section[0]) for share in SectionLoader(both, turns, 7, lambda: 0, 0, 1)]
    assert sorted(given) == turns.tolist()
    shared = [list(SectionLoader(both, turns, 7, lambda: 0, rank, 2)) for rank in (0, 1)]
    assert [len(part) for part in shared] == [3, 3]


def test_places_beyond_the_trained_ones_are_the_last_of_them():
    places = Places(64, 8)
    places.prepare(array_spots(10, 12, 1))
    assert places.last.tolist() == [11, 9]
    wide = array_spots(20, 20, 1).coords_um
    found = places(wide).reshape(20, 20, 8)  # by column and row
    assert torch.equal(found[:, 9:], found[:, 9:10].expand(-1, 11, -1))
    assert torch.equal(found[11:], found[11:12].expand(9, -1, -1))
    assert not torch.equal(found[0], found[1])


def test_a_short_chain_ends_in_noise():
    assert Diffusion(1000).alpha_bar[-1] < 1e-4
    for n_total in (10, 50, 200):
        assert Diffusion(n_total).alpha_bar[-1] < 1e-3


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("umpire", {"depth": 24}, "depth are the rank tower's; set tower=ranks"),
        ("hist2st", {"radius": 0.1}, "radius must be 0 or at least 1 pitch"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(name, settings, message):
    with pytest.raises(InputError, match=message):
        model_class(name).check_settings("small", settings)


def test_a_radius_that_is_given_counts_on_any_array():
    x = torch.arange(12.0)
    hexagonal = torch.stack([(x[:, None] + 0.5 * (x % 2)).ravel(), (x * 3**0.5 / 2).expand(12, -1).ravel()], dim=1)
    wide = model_class("hist2st").create(24, array_spots(12, 12, 2), "small", {"neighbours": 18, "radius": 2.0})
    own = model_class("hist2st").create(24, array_spots(12, 12, 2), "small", {})
    assert wide.edges(100 * hexagonal)[1].sum(dim=1).max() == 18
    assert own.edges(100 * hexagonal)[1].sum(dim=1).max() == 6
