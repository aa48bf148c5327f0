"""Models at the ends of what they may be given: sparse panels, huge counts, one position, one step, odd settings."""

import copy
import warnings

import numpy as np
import pytest
import torch

from commands import run
from genar.errors import InputError
from genar.models import Decoding, Spots, model_class
from genar.models._decoding import draw, quantile
from genar.models._linear_start import drawn_variance, fit_followers
from genar.settings import read_settings
from genar.training import TrainConfig, fit, make_spots
from genar.training_loop import _Module
from toy_models import GRADIENT, made, training

STEPS = {"lr": 1e-2, "optimizer": "sgd", "weight_decay": 0.0, "schedule": "constant", "warmup_steps": 0, "clip": 0.0,
         "ema_decay": 0.0, "max_epochs": 2}  # fmt: skip


@pytest.mark.filterwarnings("ignore:bf16 will be slower")
@pytest.mark.parametrize("name", GRADIENT)
def test_every_model_trains_in_bf16(name):
    model = made(name, training())
    fit(model, training(), TrainConfig(max_epochs=1, batch_size=16, precision="bf16"), device="cpu")
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values() if tensor.is_floating_point())


def test_one_position_and_one_spot_a_step_train_in_bf16():
    spots = training()
    spots = Spots(
        spots.features, spots.coords_um, spots.coords_unit, spots.spot_ids, spots.section, spots.counts[:, :1]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "bf16 will be slower")
        fit(made("genar", spots), spots, TrainConfig(max_epochs=1, batch_size=1, precision="bf16"), device="cpu")


def sparse_spots(mean, seed, n=400, n_genes=60):
    """Counts of a few components, far below one on average."""
    r = np.random.default_rng(seed)
    features = r.standard_normal((n, 2, 8)).astype(np.float32)
    fixed = np.random.default_rng(99)
    weights, base = 0.3 * fixed.standard_normal((8, n_genes)), np.exp(0.7 * fixed.standard_normal((1, n_genes)))
    rate = mean * base * np.exp(features.mean(axis=1) @ weights + 0.4 * r.standard_normal((n, 1)))
    xy = torch.from_numpy(r.uniform(0, 2000, (n, 2)).astype(np.float32))
    section = torch.arange(n) * 3 // n
    return Spots(torch.from_numpy(features), xy, xy / 2000, torch.arange(n), section, torch.from_numpy(r.poisson(rate)))


# -- sparse panels --------------------------------------------------------------------------------------------------


def test_a_sparse_panel_starts_at_what_is_drawn():
    """Tokens of means far below one are drawn as 0 or 1: the start knows how wide that is, and believes them less."""
    train, test = (sparse_spots(0.05, seed) for seed in (0, 1))
    model = made("genar", train, count_basis=16)
    model.prepare(train)
    model.eval()
    with torch.no_grad():
        losses = model.loss(test.batch()).per_scale
    assert float(losses[0]) < 0.1  # was 3.5 where the variance of the draw was left out
    layers = model.predict(test.batch(), Decoding(samples=16, layers=("p_zero",))).layers
    assert float(layers["p_zero"].mean()) == pytest.approx(float((test.counts == 0).float().mean()), abs=0.02)


def test_slopes_are_those_that_err_least_on_draws():
    g = torch.Generator().manual_seed(0)
    means = torch.rand(4000, 1, generator=g).double() * 0.6  # each drawn as 0 or 1
    seen, noise = means * np.log(2), drawn_variance(means).mean(dim=0)
    y = torch.cat([2 * means, -means], dim=1)
    slope, _, passed_on = fit_followers(seen, y, torch.arange(4000) % 4, noise)
    draws = (torch.rand(200, 4000, generator=g) < means[:, 0]).double() * np.log(2)  # [draws, N]
    x = draws.flatten()[:, None]
    best = torch.linalg.lstsq(x - x.mean(), (y - y.mean(dim=0)).repeat(200, 1)).solution
    torch.testing.assert_close(slope, best, rtol=0.02, atol=0)
    assert float(passed_on[0]) == pytest.approx(float((slope[0, 0] * (draws - seen[:, 0])).square().mean()), rel=0.02)


# -- huge counts ----------------------------------------------------------------------------------------------------


def test_one_huge_count_does_not_make_a_class_of_each():
    spots = training()
    counts = spots.counts.clone()
    counts[3, 2] = 5_000_000
    spots = Spots(spots.features, spots.coords_um, spots.coords_unit, spots.spot_ids, spots.section, counts)
    with pytest.warns(UserWarning, match=r"counts up to 5,000,000 are taken for 16,383; set max_count=8388607"):
        model = made("genar", spots)
    assert model.config.max_count == 16383
    fit(model, spots, TrainConfig(max_epochs=1), device="cpu")
    assert int(model.predict(spots.batch()).point.max()) <= 16383


def test_many_classes_are_decoded_a_few_spots_at_a_time(monkeypatch):
    spots = training()
    model = made("genar", spots, max_count=63)
    model.prepare(spots)
    model.eval()
    how, sizes = Decoding(samples=2, layers=("log1p_mean",)), []
    whole = model.predict(spots.batch(), how)
    generate = model.generate
    monkeypatch.setattr("genar.models.genar._MOST_LOGITS", 8 * 64 * 10)
    monkeypatch.setattr(model, "generate", lambda part, how: sizes.append(len(part.features)) or generate(part, how))
    parts = model.predict(spots.batch(), how)
    assert set(sizes) == {5}
    torch.testing.assert_close(parts.layers["log1p_mean"], whole.layers["log1p_mean"], atol=1e-3, rtol=1e-3)


def test_a_regressed_value_never_leaves_the_counts():
    spots = training()
    model = made("genar", spots, output="continuous", final_loss="squared_error", max_count=63)
    fit(model, spots, TrainConfig(max_epochs=1), device="cpu")
    far = Spots(spots.features * 1000, spots.coords_um, spots.coords_unit, spots.spot_ids, spots.section)
    counts = model.predict(far.batch())
    assert 0 <= int(counts.point.min()) <= int(counts.point.max()) == 63


# -- draws and steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("u", [0.0, 1e-12, 5e-8, 1e-7, 0.5, 1 - 1e-12])
def test_a_count_that_was_cut_is_never_drawn(u):
    logits = torch.tensor([[[-50.0, 0.0, 3.0, -50.0]]])
    assert int(draw(logits, torch.tensor([[u]], dtype=torch.float64), Decoding("sample", top_k=1))) == 2 or u == 0.0
    p = torch.tensor([[[1e-30, 0.25, 0.75]]])
    assert int(quantile(p, torch.tensor([[u]]).double())) > 0 or u < 1e-20


def test_one_step_of_denoising_starts_at_the_noise():
    from genar.models._diffusion import Diffusion

    assert Diffusion(1000, 1).at.tolist() == [999]
    spots = training()
    model = made("stem", spots)
    fit(model, spots, TrainConfig(max_epochs=30, lr=3e-3, batch_size=16, weight_decay=0.0), device="cpu")
    truth = torch.log1p(spots.counts.float())
    one, ten = (model.predict(spots.batch(), Decoding(samples=5, steps=n)).layers["log1p_mean"] for n in (1, 10))
    assert float((one - truth).square().mean()) < 2 * float((ten - truth).square().mean())


def test_a_summed_loss_is_that_of_the_whole_batch_however_it_is_cut():
    spots, weights = training(), []
    for cut in ({"batch_size": 60}, {"batch_size": 30, "accumulate": 2}, {"batch_size": 20, "accumulate": 3}):
        model = made("st_net", spots)
        fit(model, spots, TrainConfig(**STEPS, **cut), device="cpu")
        weights.append(model.head.weight.detach().clone())
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-4, atol=1e-7)


# -- what is kept, copied, known ------------------------------------------------------------------------------------


def test_the_averages_do_not_copy_the_spots():
    spots = training()
    module = _Module(made("genar", spots), spots, spots, TrainConfig(), print)
    other = copy.deepcopy(module)
    assert other._training is module._training
    assert other._validation is module._validation
    for mine, its in zip(module.parameters(), other.parameters(), strict=True):
        assert mine.data_ptr() != its.data_ptr()
        torch.testing.assert_close(mine, its)


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


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_refused(tissue_sections, value):
    section = tissue_sections[0]
    features = np.ones((section.n_obs, 2, 4), np.float32)
    features[5, 1, 2] = value
    with pytest.raises(InputError, match=rf"section SIM1: the features of spot {section.obs_names[5]} hold NaN"):
        make_spots(section, features)


def test_keys_that_nobody_may_see_take_no_weight():
    model = made("bleep", training(), weighting="distance")
    queries, nearest = torch.zeros(1, 2), torch.tensor([[[0.1, 0.0], [30.0, 0.0], [31.0, 0.0]]])
    weights = model.weights(queries, nearest, torch.tensor([[False, True, True]]))
    assert float(weights[0, 1]) == pytest.approx(1.0)


# -- settings of the published methods ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "setting"),
    [("triplex", "dropouts=[0.4, 0.1, 0.3]"), ("foundation", "max_count=0"), ("foundation", "blocks=0"),
     ("egn", "refinements=0"), ("hist2st", "copies=0"), ("hist2st", "neighbours=0")],
)  # fmt: skip
def test_what_the_pages_offer_is_taken(model, setting):
    given = read_settings(None, [setting], model)
    model_class(model).check_settings("small", given.model)


@pytest.mark.parametrize(
    ("model", "setting", "told"),
    [("triplex", "heads=[0, 4, 4]", "heads must be at least 1"), ("triplex", "depths=[-1, 2, 1]", "depths must be at"),
     ("triplex", "dropouts=[1.0, 0, 0]", r"dropouts must be in \[0, 1\)"), ("triplex", "alpha=2", r"alpha must be in"),
     ("hist2st", "neighbours=-1", "neighbours must be at least 0"), ("hist2st", "radius=-1", "radius must be at least"),
     ("hist2st", "zinb_weight=-1", "zinb_weight must be at least 0"), ("egn", "exemplars=0", "exemplars must be at")],
)  # fmt: skip
def test_what_cannot_be_is_told(model, setting, told):
    with pytest.raises(InputError, match=told):
        model_class(model).check_settings("small", read_settings(None, [setting], model).model)
