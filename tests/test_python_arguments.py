"""What a user may pass from Python is taken, or refused in a line: features, devices, folders, settings."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

import genar
from genar.errors import InputError
from genar.models import Decoding, model_class
from genar.models.checkpoint import Checkpoint
from genar.training import TrainConfig, fit, make_spots

TINY = {"model": "ridge", "n_genes": 20, "views": 1, "encoder": "genar.bench.toy:narrow_encoder", "progress": False}


@pytest.fixture
def section(tissue_sections):
    return tissue_sections[0]


@pytest.fixture
def features(section):
    return np.random.default_rng(0).normal(size=(section.n_obs, 1, 8)).astype(np.float32)


@pytest.fixture
def checkpoint(section, features):
    panel = genar.select_panel([section], n_genes=12)
    spots = make_spots(section, features, panel.genes)
    model = model_class("knn").create(8, spots, "small", {})
    fit(model, spots)
    return Checkpoint("knn", model, panel, {})


def test_spots_take_arrays_and_tensors_of_any_precision(section, features):
    wanted = make_spots(section, features).features
    for given in (torch.from_numpy(features), features.astype(np.float64)):
        torch.testing.assert_close(make_spots(section, given).features, wanted)


def test_features_of_other_spots_or_shapes_are_refused(section, features):
    for wrong in (features[:20], features[:, 0], np.concatenate([features, features])):
        with pytest.raises(InputError, match=r"features of shape .* expected \[\d+ spots, views, width\]"):
            make_spots(section, wrong)
    with pytest.raises(InputError, match="patches of 3 spots"):
        make_spots(section, features, patches=torch.zeros(3, 1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_feature_that_is_no_number_predicts_nothing(checkpoint, section, features, bad):
    """Nearest neighbours would answer with some spot's counts."""
    features[3, 0, 2] = bad
    with pytest.raises(InputError, match=f"features of spot {section.obs_names[3]} hold NaN or infinite"):
        genar.predict_section(checkpoint, section, features)


def test_a_prediction_takes_tensors_of_half_precision(checkpoint, section, features):
    half = torch.from_numpy(features).bfloat16()
    predicted = genar.predict_section(checkpoint, section, half)
    wanted = genar.predict_section(checkpoint, section, half.float())
    np.testing.assert_array_equal(predicted.X.toarray(), wanted.X.toarray())
    with pytest.raises(InputError, match=r"how is a genar\.models\.Decoding, found dict"):
        genar.predict_section(checkpoint, section, features, {"decode": "mean"})  # pyright: ignore
    assert genar.predict_section(checkpoint, section, features, batch_size=0).n_obs == section.n_obs


def test_a_model_is_fitted_by_its_own_recipe(section, features):
    panel = genar.select_panel([section], n_genes=12)
    spots = make_spots(section, features, panel.genes)

    def fitted(config):
        torch.manual_seed(0)
        model = model_class("foundation").create(8, spots, "small", {})
        fit(model, spots, config)
        return model.state_dict()

    own = TrainConfig(**model_class("foundation").train_defaults)
    for name, values in fitted(own).items():
        torch.testing.assert_close(fitted(None)[name], values, rtol=0, atol=0)


def test_training_leaves_torch_as_it_was(section, features):
    panel = genar.select_panel([section], n_genes=12)
    spots = make_spots(section, features, panel.genes)
    before = torch.are_deterministic_algorithms_enabled()
    model = model_class("st_net").create(8, spots, "small", {})
    fit(model, spots, TrainConfig(max_epochs=1))
    assert torch.are_deterministic_algorithms_enabled() == before
    assert not model.training


def test_arguments_of_train_are_as_python_has_them(tissue, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    panel = genar.select_panel(genar.read_sections(tissue)[:1], n_genes=20)
    options = {name: value for name, value in TINY.items() if name != "n_genes"}
    run = genar.train(tissue, ".", test=None, panel=panel, device=torch.device("cpu"), seed=np.int64(3), **options)
    assert (run.outputs["checkpoint"] / "model.safetensors").is_file()
    with pytest.raises(InputError, match=r"settings are a dictionary, .*found list of str"):
        genar.train(tissue, tmp_path / "other", settings=["lr=1"], **TINY)
    with pytest.raises(InputError, match=r"several processes would each run this very script"):
        genar.train(tissue, tmp_path / "other", devices=2, **TINY)


def test_all_of_a_checkpoint_is_readable_by_the_same_people(checkpoint, tmp_path):
    checkpoint.save_pretrained(tmp_path / "saved")
    modes = {path.stat().st_mode for path in (tmp_path / "saved").iterdir()}
    assert len(modes) == 1


def test_a_prediction_in_a_file_is_scored_as_one_in_memory(checkpoint, section, features, tmp_path):
    import anndata

    from genar.assess import evaluate_run

    predicted = genar.predict_section(checkpoint, section, features)
    predicted.write_h5ad(tmp_path / "p.h5ad")
    backed = anndata.read_h5ad(tmp_path / "p.h5ad", backed="r")
    found = [evaluate_run(one, section, str(tmp_path / n), resamples=0) for n, one in (("a", predicted), ("b", backed))]
    one, other = (result.scores[genar.data.contract.name(section)] for result in found)
    np.testing.assert_equal(one["prediction"].summary, other["prediction"].summary)


def test_what_was_not_used_is_neither_recorded_nor_silent(tissue_sections):
    from genar.prediction import unused_note

    section = tissue_sections[0]
    panel = genar.select_panel([section], n_genes=16)
    features = np.random.default_rng(0).normal(size=(section.n_obs, 1, 8)).astype(np.float32)
    spots = make_spots(section, features, panel.genes)
    settings = {"width": 16, "depth": 1, "heads": 2, "components": 4, "scales": (1, 4, 16)}
    model = model_class("genar").create(8, spots, "small", settings)
    fit(model, spots, TrainConfig(max_epochs=0))
    checkpoint = Checkpoint("genar", model, panel, {})
    one = Decoding(decode="mean", samples=1, seed=9, temperature=4, top_k=1)
    record = genar.predict_section(checkpoint, section, features, one).uns["genar"]["prediction"]
    assert not {"temperature", "seed", "top_k"} & set(record)
    facts = {name: value for name, value in asdict(one).items() if name in ("seed", "temperature", "top_k", "samples")}
    assert "seed, temperature, top_k" in unused_note(model, one, facts, ())
    assert unused_note(model, Decoding(samples=2, seed=9), {"samples": 2, "seed": 9}, ()) == ""
