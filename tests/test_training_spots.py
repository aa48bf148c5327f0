"""Spots to train on: of which sections, counts and features they are made."""

import numpy as np
import pytest
import torch

from commands import run
from genar.data import contract, read_sections
from genar.errors import InputError
from genar.genes import fit_scales
from genar.models import model_class
from genar.models._training_spots import strips
from genar.training import make_spots, split_validation
from toy_training import panel_of, random_features, spots_of


@pytest.fixture(scope="module")
def tissue_sections(tissue):
    return read_sections(tissue)


@pytest.fixture(scope="module")
def panel(tissue_sections):
    return panel_of(tissue_sections)


def test_spots_know_their_place_and_name(tissue_sections, panel):
    section = tissue_sections[0]
    whole = make_spots(section, random_features(section), panel.genes)
    part = make_spots(section[5:9].copy(), random_features(section)[5:9], panel.genes)
    assert torch.equal(whole.spot_ids[5:9], part.spot_ids)
    assert len(set(whole.spot_ids.tolist())) == section.n_obs
    assert whole.coords_unit.min() == 0
    assert whole.coords_unit.max() == 1
    np.testing.assert_array_equal(whole.counts.numpy(), contract.counts(section, list(panel.genes)))


def test_normalised_counts_are_no_training_counts(home):
    (section,) = read_sections(home / "tissue", ["S1"])
    genes = list(section.var_names[:20])
    section.X = section.X.log1p()
    with pytest.raises(InputError, match="fractional"):
        make_spots(section, np.zeros((section.n_obs, 1, 4), np.float32), genes)
    with pytest.raises(InputError, match="raw counts"):
        fit_scales(section.X[:, :20])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_refused(tissue_sections, value):
    section = tissue_sections[0]
    features = np.ones((section.n_obs, 2, 4), np.float32)
    features[5, 1, 2] = value
    with pytest.raises(InputError, match=rf"section SIM1: the features of spot {section.obs_names[5]} hold NaN"):
        make_spots(section, features)


@pytest.fixture(scope="module")
def spots(tissue_sections):
    return spots_of(tissue_sections)


def test_validation_is_a_strip_of_each_training_section(spots):
    training, validation = split_validation(spots, 0.2)
    assert len(training) + len(validation) == len(spots)
    sections = spots.section.unique().tolist()
    assert validation.section.unique().tolist() == sections
    assert len(sections) == 2
    for section in sections:
        mine = validation.coords_um[validation.section == section, 0]
        theirs = training.coords_um[training.section == section, 0]
        inside = (theirs > mine.min()) & (theirs < mine.max())
        assert inside.float().mean() < 0.05  # no training spot between validation spots (ties at the rim aside)
    assert split_validation(spots, 0.0) == (spots, None)


def test_strips_are_even():
    sizes = strips(torch.rand(103, 2), 5).bincount()
    assert len(sizes) == 5
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(("model", "share"), [("genar", 0.25), ("genar", 0.1), ("knn", 0.25)])
def test_the_structure_is_made_of_what_is_trained_on(tissue, tissue_sections, tmp_path, monkeypatch, model, share):
    """Gene order and classes do not know the strip on which the epoch is chosen; without a choice there is no strip."""
    cls, seen = model_class(model), []
    create, prepare = cls.create, cls.prepare
    monkeypatch.setattr(cls, "create", lambda n, spots, *more: seen.append(len(spots)) or create(n, spots, *more))
    monkeypatch.setattr(cls, "prepare", lambda self, spots: seen.append(len(spots)) or prepare(self, spots))
    words = [
        "train", tissue, "--test", "SIM2", "--out", tmp_path / "run", "--n-genes", 10, "--model", model,
        "--encoder", "genar.bench.toy:narrow_encoder", "--samples", 1, "--set", f"validation_share={share}",
    ]  # fmt: skip
    if model == "genar":
        words += ["--set", "width=16", "--set", "depth=1", "--set", "heads=2", "--set", "max_epochs=1"]
    assert run(monkeypatch, *words) == 0
    assert seen[0] == seen[1]
    assert (seen[0] < tissue_sections[0].n_obs) == (model == "genar")
