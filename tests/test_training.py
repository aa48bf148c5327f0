"""Training: batches, epochs, validation and averages, and what every trained model predicts."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from genar.data import contract, read_sections
from genar.errors import InputError
from genar.models import Decoding, model_class, model_names
from genar.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from genar.prediction import predict_section
from genar.training import TrainConfig, fit, make_spots, paper_recipe, train_config_from_dict
from genar.training_loop import _Module
from toy_models import made, training
from toy_training import N_FEATURES, QUICK, TINY, few_spots, new_model, panel_of, random_features, spots_of

STEPS = {"lr": 1e-2, "optimizer": "sgd", "weight_decay": 0.0, "schedule": "constant", "warmup_steps": 0, "clip": 0.0,
         "ema_decay": 0.0, "max_epochs": 2}  # fmt: skip


@pytest.fixture(scope="module")
def tissue_sections(tissue):
    return read_sections(tissue)


@pytest.fixture(scope="module")
def panel(tissue_sections):
    return panel_of(tissue_sections)


@pytest.fixture(scope="module")
def spots(tissue_sections):
    return spots_of(tissue_sections)


@pytest.fixture(scope="module", params=model_names())
def fitted(request, spots, panel):
    model = new_model(request.param, spots)
    fit(model, spots, QUICK)
    return Checkpoint(request.param, model, panel, {"encoder": "none"})


# -- every model of the registry ------------------------------------------------------------------------------------


def test_predictions_are_counts_of_the_panel(fitted, tissue_sections):
    section = tissue_sections[1]
    predicted = predict_section(fitted, section, random_features(section), Decoding(samples=2))
    assert predicted.shape == (section.n_obs, 20)
    assert list(predicted.var_names) == list(fitted.panel.genes)
    assert list(predicted.obs_names) == list(section.obs_names)
    values = predicted.X.toarray()
    assert (values >= 0).all()
    assert (values == np.rint(values)).all()
    np.testing.assert_array_equal(predicted.obsm["spatial"], section.obsm["spatial"])
    assert np.isfinite(predicted.layers["log1p_mean"]).all()
    assert predicted.uns["genar"]["prediction"]["model"] == fitted.name


def test_permuting_spots_permutes_predictions(fitted, tissue_sections):
    section = tissue_sections[1]
    features = random_features(section)
    order = np.random.default_rng(0).permutation(section.n_obs)
    straight = predict_section(fitted, section, features, Decoding(samples=2))
    permuted = predict_section(fitted, section[order].copy(), features[order], Decoding(samples=2), batch_size=7)
    assert (straight.X[order] != permuted.X).nnz == 0
    for name in contract.layer_names(straight):
        if fitted.model.unit == "spot":
            np.testing.assert_array_equal(straight.layers[name][order], permuted.layers[name])
        else:  # the sums over a section run in another order
            np.testing.assert_allclose(straight.layers[name][order], permuted.layers[name], atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_the_batch_size_changes_no_byte(fitted, tissue_sections, batch_size):
    section = tissue_sections[1]
    features = random_features(section)
    one, other = (
        predict_section(fitted, section, features, Decoding(samples=2), batch_size=n) for n in (64, batch_size)
    )
    assert (one.X != other.X).nnz == 0
    for name in contract.layer_names(one):
        np.testing.assert_array_equal(one.layers[name], other.layers[name])


def test_checkpoints_come_back_bit_equal(fitted, tissue_sections, tmp_path):
    save_checkpoint(tmp_path / "model", fitted)
    loaded = load_checkpoint(tmp_path / "model")
    assert loaded.panel == fitted.panel
    for name, tensor in fitted.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name
    features = random_features(tissue_sections[0])
    one, two = (predict_section(c, tissue_sections[0], features, Decoding(samples=2)) for c in (fitted, loaded))
    assert (one.X != two.X).nnz == 0
    # the weights lie elsewhere in memory, and sums may round differently there
    np.testing.assert_allclose(one.layers["log1p_mean"], two.layers["log1p_mean"], atol=1e-5)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_section_of_one_spot_works(fitted, tissue_sections):
    one = tissue_sections[0][:1].copy()
    assert predict_section(fitted, one, random_features(one)).shape == (1, 20)


def test_unknown_model_and_decoding_are_refused(fitted, tissue_sections):
    with pytest.raises(InputError, match="ridge"):
        model_class("magic")
    with pytest.raises(InputError, match="beam"):
        Decoding("beam")
    if fitted.name != "genar":
        with pytest.raises(InputError, match="not by 'sample'"):
            predict_section(fitted, tissue_sections[0], random_features(tissue_sections[0]), Decoding("sample"))


# -- training -------------------------------------------------------------------------------------------------------


def test_a_batch_in_parts_trains_to_the_same_weights(spots):
    fitted, said = [], []
    for memory_gib in (4.0, 5e-4):
        torch.manual_seed(0)
        settings = {**TINY, "dropout": 0.0, "drop_path": 0.0, "feature_dropout": 0.0, "linear_start": False}
        model = model_class("genar").create(N_FEATURES, spots, "small", settings)
        fit(model, spots, TrainConfig(max_epochs=2, batch_size=16, memory_gib=memory_gib), log=said.append)
        fitted.append(model.state_dict())
    assert sum("parts" in line for line in said) == 1
    for name, whole in fitted[0].items():
        torch.testing.assert_close(fitted[1][name], whole, atol=2e-4, rtol=2e-3)


def test_a_seed_repeats_weights_bit_for_bit(spots):
    states = []
    for seed in (1, 1, 2):
        model = new_model("genar", spots)
        fit(model, spots, train_config_from_dict({**vars(QUICK), "seed": seed}))
        states.append(model.state_dict())
    same = [torch.equal(states[0][name], states[1][name]) for name in states[0]]
    other = [torch.equal(states[0][name], states[2][name]) for name in states[0]]
    assert all(same)
    assert not all(other)


def test_an_interrupted_fit_goes_on_to_the_same_weights(spots, tmp_path):
    """Stopped after the first epoch and started again, training ends where an undisturbed one ends."""
    undisturbed = new_model("genar", spots)
    summary = fit(undisturbed, spots, QUICK)

    class StoppedError(Exception):
        pass

    def stop_after_first(line):
        if line.startswith("epoch 2/"):
            raise StoppedError

    with pytest.raises(StoppedError):
        fit(new_model("genar", spots), spots, QUICK, folder=tmp_path, log=stop_after_first)
    assert (tmp_path / "last.ckpt").exists()
    resumed = new_model("genar", spots)
    again = fit(resumed, spots, QUICK, folder=tmp_path)
    assert [entry["epoch"] for entry in again.history] == [1, 2]
    assert again.history[0] == summary.history[0]
    for name, tensor in undisturbed.state_dict().items():
        torch.testing.assert_close(tensor, resumed.state_dict()[name], atol=1e-6, rtol=1e-5)


def test_a_fit_that_was_killed_after_its_end_has_the_same_weights(spots, tmp_path):
    """The resume file then holds the last epoch: the averages are taken, not what they average."""
    config = train_config_from_dict({**vars(QUICK), "validation_share": 0.0})
    states = []
    for folder in (tmp_path, tmp_path):
        model = new_model("genar", spots)
        fit(model, spots, config, folder=folder)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_training_keeps_the_best_epoch(spots):
    config = train_config_from_dict({**vars(QUICK), "max_epochs": 6, "lr": 0.05, "patience": 2})
    summary = fit(new_model("genar", spots), spots, config)
    best = min(summary.history, key=lambda entry: entry["val_mse"])
    assert summary.best_epoch == best["epoch"]
    last = summary.history[-1]["epoch"]
    assert last == 6 or last == best["epoch"] + 2


def test_training_without_validation_runs_all_epochs(spots):
    config = train_config_from_dict({**vars(QUICK), "validation_share": 0.0})
    summary = fit(new_model("genar", spots), spots, config)
    assert (summary.best_epoch, summary.history) == (2, [])


def test_paper_recipe():
    recipe = paper_recipe()
    assert (recipe.lr, recipe.weight_decay, recipe.batch_size, recipe.max_epochs) == (1e-4, 1e-4, 64, 50)
    assert (recipe.optimizer, recipe.schedule, recipe.ema_decay) == ("adam", "constant", 0.0)


@pytest.mark.parametrize("facts", [{"max_epochs": -1}, {"optimizer": "lbfgs"}, {"lr": 0.0}, {"epochs": 3}])
def test_senseless_training_is_refused(facts):
    with pytest.raises(InputError):
        train_config_from_dict(facts)


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_bf16_that_this_cpu_is_slow_at_is_said(tissue_sections, panel, gain, monkeypatch, recwarn):
    monkeypatch.setattr("genar.machine.bf16_gain", lambda: gain)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spots = make_spots(tissue_sections[0], random_features(tissue_sections[0]), panel.genes)
    model = model_class("genar").create(N_FEATURES, spots, "small", TINY)
    fit(model, spots, replace(QUICK, max_epochs=1, precision="bf16"))
    assert any("0.5 times the speed" in str(w.message) for w in recwarn) == (gain < 1)


def trained(model="genar", settings=None, spots=None, **config):
    spots = few_spots() if spots is None else spots
    torch.manual_seed(1)
    made = model_class(model).create(6, spots, "small", TINY if settings is None else settings)
    return made, fit(made, spots, TrainConfig(**{"batch_size": 16, "lr": 1e-2, **config}))


@pytest.mark.parametrize("config", [{}, {"max_epochs": 1}, {"max_epochs": 1, "batch_size": 64}, {"ema_decay": 0}])
def test_a_short_training_is_one(config):
    """Fewer steps than the warm-up, up to a single one: the weights are not those of the start."""
    start = trained(max_epochs=0)[0].state_dict()
    end = trained(**config)[0].state_dict()
    assert any(not torch.equal(start[name], end[name]) for name in start)


def test_validation_before_the_averages_sees_the_weights():
    _, summary = trained(max_epochs=3, validate_every=1, validation_share=0.2, warmup_steps=100, ema_decay=0.9)
    scores = [entry["val_mse"] for entry in summary.history]
    assert len(set(scores)) == 3


@pytest.mark.parametrize(("epochs", "every", "validated"), [(2, 3, [2]), (5, 3, [3, 5]), (6, 3, [3, 6])])
def test_the_last_epoch_is_validated(epochs, every, validated):
    _, summary = trained(max_epochs=epochs, validate_every=every, validation_share=0.2)
    assert [entry["epoch"] for entry in summary.history] == validated


def test_a_loss_that_is_no_number_is_told():
    with pytest.raises(InputError, match="the loss is nan in epoch"):
        trained(lr=1e30, ema_decay=0)


def test_accumulate_is_refused_where_a_section_is_a_step():
    with pytest.raises(InputError, match="takes a section a step"):
        trained("histogene", {}, accumulate=2)


def test_one_training_spot_is_refused_in_words():
    with pytest.raises(InputError, match="linear_start=false"):
        trained(spots=few_spots(1, n_sections=1))
    trained(settings={**TINY, "linear_start": False, "components": 0}, spots=few_spots(1, n_sections=1), max_epochs=1)


@pytest.mark.parametrize(
    "config", [{"seed": -1}, {"seed": 2**32}, {"weight_decay": -1}, {"clip": -1.0}, {"warmup_steps": -1}]
)
def test_settings_of_training_that_make_no_sense(config):
    with pytest.raises(InputError, match=f"train:.*{next(iter(config))}"):
        TrainConfig(**config)


def test_a_summed_loss_is_that_of_the_whole_batch_however_it_is_cut():
    spots, weights = training(), []
    for cut in ({"batch_size": 60}, {"batch_size": 30, "accumulate": 2}, {"batch_size": 20, "accumulate": 3}):
        model = made("st_net", spots)
        fit(model, spots, TrainConfig(**STEPS, **cut), device="cpu")
        weights.append(model.head.weight.detach().clone())
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-4, atol=1e-7)


def test_the_averages_do_not_copy_the_spots():
    spots = training()
    module = _Module(made("genar", spots), spots, spots, TrainConfig(), print)
    other = copy.deepcopy(module)
    assert other._training is module._training
    assert other._validation is module._validation
    for mine, its in zip(module.parameters(), other.parameters(), strict=True):
        assert mine.data_ptr() != its.data_ptr()
        torch.testing.assert_close(mine, its)
