"""Decoding: trajectories, draws, quantiles and layers of GenAR's predictive distribution."""

import numpy as np
import pytest
import torch

import genar
from genar.errors import InputError
from genar.genes import Scales
from genar.models import Batch, Decoding
from genar.models._base import Counts, uniforms
from genar.models._cosine_attention import Cache
from genar.models._decoding import draw, quantile, summarise
from genar.models.genar import GenAR, small
from genar.settings import read_decoding
from small_genar import DISTRIBUTIONS, N_GENES, VARIANTS, make_model, make_spots
from toy_models import made, training
from toy_training import TINY


@pytest.fixture(params=VARIANTS)
def model(request):
    return make_model(VARIANTS[request.param])


def test_decoding_layers_are_a_distribution_s(model):
    predicted = model.generate(make_spots().batch(), Decoding("mean", 5))
    if model.config.final_loss == "squared_error":
        assert set(predicted.layers) == {"mean", "log1p_mean"}
        return
    p_zero, mean, log1p = (predicted.layers[name] for name in ("p_zero", "mean", "log1p_mean"))
    assert ((p_zero >= 0) & (p_zero <= 1)).all()
    assert (mean >= 0).all()
    assert (log1p <= torch.log1p(mean) + 1e-5).all()  # Jensen
    assert torch.equal(predicted.point, mean.round().long())


@torch.no_grad()
def test_samples_average_distributions():
    """Many trajectories approach the expectation over the coarse token that one scale defines."""
    model = make_model(sizes=(1, N_GENES))
    batch = make_spots(4).batch()
    many = model.generate(batch, Decoding("mean", 400)).layers["mean"]
    steering, table = model._steering(model.condition(batch)), model.embed.rows()
    nothing = torch.zeros(4, 0, dtype=torch.long)
    first = model._cached_pass(0, table, nothing, steering, [Cache(model.layout.n_cached) for _ in model.blocks])
    known = model._known(batch)
    inputs = (model.layout.places[0], model._read_out(0, first, steering), model._start(0, known, []))
    p = model.head.logits(*inputs).softmax(dim=2)[:, 0]
    expected = torch.zeros(4, N_GENES)
    for token in range(32):
        caches = [Cache(model.layout.n_cached) for _ in model.blocks]
        model._cached_pass(0, table, nothing, steering, caches)
        parents = torch.full((4, 1), token)
        x = model._cached_pass(1, table, parents, steering, caches)
        start = model._start(1, known, [parents])
        logits = model.head.logits(model.layout.places[1], model._read_out(1, x, steering), start)
        expected += p[:, token, None] * (logits.softmax(dim=2) @ torch.arange(32.0))
    torch.testing.assert_close(many, expected.detach()[:, model.layout.inverse], atol=0.15, rtol=0.05)


def largest_difference(a, b):
    return max(float(((a.layers[n] - b.layers[n]).abs() / (1 + b.layers[n].abs())).max()) for n in a.layers)


def test_seeds_decide_the_trajectories():
    model, batch = make_model(), make_spots().batch()
    first, again, other = (model.generate(batch, Decoding("mean", 3, s)) for s in (5, 5, 6))
    assert largest_difference(first, again) == 0
    assert largest_difference(first, other) > 0


def test_the_seed_of_a_prediction_is_its_own():
    assert read_decoding(["seed=3"]) == {"seed": 3}
    with pytest.raises(InputError, match="seed must be"):
        Decoding(seed=2**70)


def test_unknown_decoding_is_refused():
    with pytest.raises(InputError, match="greedy, mean"):
        Decoding("beam")
    for wrong in ({"samples": 0}, {"temperature": 0.0}, {"top_p": 0.0}, {"top_k": -1}, {"layers": ("q00",)}):
        with pytest.raises(InputError):
            Decoding(**wrong)
    squared = make_model(VARIANTS["squared-error"])
    with pytest.raises(InputError, match="squared error"):
        squared.generate(make_spots().batch(), Decoding("sample"))


def test_temperature_has_a_least():
    with pytest.raises(InputError, match="temperature must be at least 1e-06, found 1e-38"):
        Decoding(decode="sample", temperature=1e-38)


def test_quantiles_are_of_the_predictive_distribution():
    p = torch.tensor([[[0.5, 0.3, 0.2], [0.0, 0.04, 0.96]]])
    layers = summarise(p, ("mean", "sd", "p_zero", "q05", "q50", "q80", "q95"))
    assert layers["mean"][0].tolist() == pytest.approx([0.7, 1.96])
    assert layers["sd"][0].tolist() == pytest.approx([0.61**0.5, 0.0384**0.5], abs=1e-6)
    assert layers["q05"][0].tolist() == [0, 2]
    assert layers["q50"][0].tolist() == [0, 2]
    assert layers["q80"][0].tolist() == [1, 2]
    assert layers["q95"][0].tolist() == [2, 2]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_median_quantiles_and_mean_agree(name):
    model, batch = make_model(VARIANTS[name]), make_spots().batch()
    quantiles = model.generate(batch, Decoding("quantiles", 4))
    median = model.generate(batch, Decoding("median", 4, layers=("mean", "q50")))
    assert torch.equal(quantiles.point, median.point)
    assert torch.equal(quantiles.point, quantiles.layers["q50"].long())
    assert (quantiles.layers["q05"] <= quantiles.layers["q25"]).all()
    assert (quantiles.layers["q75"] <= quantiles.layers["q95"]).all()
    assert set(median.layers) == {"mean", "q50"}


def test_draws_follow_temperature_top_k_and_top_p():
    logits = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1])).expand(4000, 1, 4)
    uniform = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0))

    def shares(**options):
        return torch.bincount(draw(logits, uniform, Decoding("sample", **options))[:, 0], minlength=4) / 4000

    torch.testing.assert_close(shares(), torch.tensor([0.5, 0.25, 0.15, 0.1]), atol=0.02, rtol=0)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([2 / 3, 1 / 3, 0, 0]), atol=0.02, rtol=0)
    torch.testing.assert_close(shares(top_p=0.8), torch.tensor([5, 2.5, 1.5, 0]) / 9, atol=0.02, rtol=0)
    assert shares(top_p=0.3).tolist() == [1, 0, 0, 0]
    assert shares(temperature=0.1)[0] > 0.95
    assert shares(temperature=100.0).min() > 0.2


@pytest.mark.parametrize("u", [0.0, 1e-12, 5e-8, 1e-7, 0.5, 1 - 1e-12])
def test_a_count_that_was_cut_is_never_drawn(u):
    logits = torch.tensor([[[-50.0, 0.0, 3.0, -50.0]]])
    assert int(draw(logits, torch.tensor([[u]], dtype=torch.float64), Decoding("sample", top_k=1))) == 2 or u == 0.0
    p = torch.tensor([[[1e-30, 0.25, 0.75]]])
    assert int(quantile(p, torch.tensor([[u]]).double())) > 0 or u < 1e-20


def test_samples_are_draws_of_the_predictive_distribution():
    model, spots = make_model(sizes=(N_GENES,)), make_spots(1)
    many = spots.rows(torch.zeros(600, dtype=torch.long))
    many.spot_ids = torch.arange(600)
    predicted = model.generate(many.batch(), Decoding("sample", layers=("mean", "sd")))
    error = predicted.point.float().mean(dim=0) - predicted.layers["mean"][0]
    assert (error.abs() < 5 * predicted.layers["sd"][0] / 600**0.5 + 1e-3).all()
    again = model.generate(many.batch(), Decoding("sample", seed=1))
    assert not torch.equal(again.point, predicted.point)


def test_uniforms_are_uniform_and_depend_on_the_spot_alone():
    draws = uniforms(torch.arange(300), seed=0, samples=8, n=40)
    assert draws.min() > 0
    assert draws.max() < 1
    assert abs(float(draws.mean()) - 0.5) < 0.005
    assert abs(float(draws.var()) - 1 / 12) < 0.002
    assert torch.equal(draws[7:9], uniforms(torch.tensor([7, 8]), seed=0, samples=8, n=40))
    slices = (draws * 8).long().sort(dim=1).values  # one draw in each eighth
    assert (slices == torch.arange(8)[None, :, None]).all()


def test_many_trajectories_go_through_in_parts(monkeypatch):
    scales = genar.fit_scales(np.random.default_rng(0).poisson(3, (50, 20)), (1, 4, 20))
    torch.manual_seed(0)
    model = genar.GenAR(small(n_features=8, max_count=15, components=4, width=16, depth=1, heads=2), scales).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    spots = Batch(torch.randn(3, 8), torch.rand(3, 2), torch.rand(3, 2), torch.arange(3))
    how, sizes, last = Decoding(samples=50, layers=("mean", "sd", "q95")), [], model._last_inputs
    whole = model.predict(spots, how)

    def watched(batch, how, n, draws, cache):
        sizes.append(n * len(batch.features))
        return last(batch, how, n, draws, cache)

    monkeypatch.setattr("genar.models.genar._TRAJECTORIES", 16)
    monkeypatch.setattr(model, "_last_inputs", watched)
    parts = model.predict(spots, how)
    assert sizes == [16, 16, 16, 2] * 3
    for name in ("mean", "sd"):
        torch.testing.assert_close(parts.layers[name], whole.layers[name], rtol=1e-5, atol=1e-6)
    assert (parts.layers["q95"] - whole.layers["q95"]).abs().max() <= 1


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


@pytest.mark.parametrize("final_loss", ["squared_error", "gaussian_nll"])
def test_a_continuous_output_reaches_the_largest_count(final_loss):
    config = small(
        **{**TINY, "max_count": 3}, n_features=6, output="continuous", final_loss=final_loss, linear_start=False
    )
    model = GenAR(config, Scales(tuple(range(4)), (1, 4)))
    head = model.head
    torch.nn.init.constant_(head.mean, np.log1p(40.0))  # far beyond the classes
    torch.nn.init.zeros_(head.weight.weight)
    torch.nn.init.zeros_(head.weight.bias) if head.weight.bias is not None else None
    p = head.logits(slice(1, 5), torch.zeros(2, 4, 16), None).softmax(dim=2)
    assert (p.argmax(dim=2) == 3).all()
    assert (p[:, :, 3] > 0.5).all()


def test_no_count_is_beyond_an_int32():
    counts = Counts.from_log2(torch.tensor([[40.0, -1.0, 3.0]])).point
    assert counts.tolist()[0][1:] == [0, 7]
    assert 2**30 < int(counts[0, 0]) < 2**31
