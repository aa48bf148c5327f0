"""Training: batches, epochs, validation and averages, and what every trained model predicts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from genar.data import contract, read_sections
from genar.errors import InputError
from genar.models import Decoding, Spots, model_class, model_names
from genar.models._base import log2p1
from genar.models._training_spots import strips
from genar.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from genar.models.ridge import PENALTIES, Ridge
from genar.prediction import predict_section
from genar.training import TrainConfig, fit, make_spots, paper_recipe, split_validation, train_config_from_dict
from toy_training import N_FEATURES, QUICK, TINY, new_model, panel_of, random_features, spots_of


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


def test_spots_know_their_place_and_name(tissue_sections, panel):
    section = tissue_sections[0]
    whole = make_spots(section, random_features(section), panel.genes)
    part = make_spots(section[5:9].copy(), random_features(section)[5:9], panel.genes)
    assert torch.equal(whole.spot_ids[5:9], part.spot_ids)
    assert len(set(whole.spot_ids.tolist())) == section.n_obs
    assert whole.coords_unit.min() == 0
    assert whole.coords_unit.max() == 1
    np.testing.assert_array_equal(whole.counts.numpy(), contract.counts(section, list(panel.genes)))


# -- the baselines --------------------------------------------------------------------------------------------------


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


def test_strips_are_even():
    sizes = strips(torch.rand(103, 2), 5).bincount()
    assert len(sizes) == 5
    assert sizes.max() - sizes.min() <= 1


@pytest.fixture
def saved(spots, panel, tmp_path):
    model = new_model("mean", spots)
    fit(model, spots, QUICK)
    return save_checkpoint(tmp_path / "model", Checkpoint("mean", model, panel, {}))


def test_a_wrong_shape_is_one_clear_line(saved):
    from safetensors.torch import save_file

    save_file({"gene_mean": torch.zeros(7)}, saved / "model.safetensors")
    with pytest.raises(InputError, match=r"gene_mean has shape \[7\].*expects \[20\]"):
        load_checkpoint(saved)


def test_altered_weights_are_refused(saved):
    from safetensors.torch import save_file

    save_file({"gene_mean": torch.zeros(20)}, saved / "model.safetensors")
    with pytest.raises(InputError, match="altered"):
        load_checkpoint(saved)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 99}', '{"format": 1, "name": "mean"}'])
def test_damaged_configs_are_refused(saved, damage):
    (saved / "config.json").write_text(damage)
    with pytest.raises(InputError, match=r"config\.json"):
        load_checkpoint(saved)


def test_cut_weights_and_missing_folders_are_refused(saved, tmp_path):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="safetensors"):
        load_checkpoint(saved)
    with pytest.raises(InputError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_bf16_that_this_cpu_is_slow_at_is_said(tissue_sections, panel, gain, monkeypatch, recwarn):
    monkeypatch.setattr("genar.machine.bf16_gain", lambda: gain)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spots = make_spots(tissue_sections[0], random_features(tissue_sections[0]), panel.genes)
    model = model_class("genar").create(N_FEATURES, spots, "small", TINY)
    fit(model, spots, replace(QUICK, max_epochs=1, precision="bf16"))
    assert any("0.5 times the speed" in str(w.message) for w in recwarn) == (gain < 1)
