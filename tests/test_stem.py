"""STEM and its diffusion."""

import math

import pytest
import torch

from genar.errors import InputError
from genar.models import Decoding, Spots
from genar.models._base import LN2, log2p1
from genar.models._diffusion import Diffusion, SpotNoise
from genar.models.stem import STEM, Denoiser, STEMConfig, time_code
from genar.training import TrainConfig, fit
from toy_models import made, training

TINY = {"width": 16, "depth": 2, "heads": 2}


@pytest.mark.parametrize(("n_features", "expected"), [(1536, 35_639_042), (1024, 34_131_202)])
def test_size_is_the_published_one(n_features, expected):
    with torch.device("meta"):
        denoiser = Denoiser(n_features, 200, STEMConfig())
    assert sum(p.numel() for p in denoiser.parameters()) == expected


def test_the_chain_ends_in_noise():
    chain = Diffusion(1000)
    assert len(chain) == 1000
    assert float(chain.alpha_bar[-1]) == pytest.approx(4.04e-5, rel=2e-3)
    assert float(chain.beta[0]) == pytest.approx(1e-4, rel=1e-4)
    assert float(chain.beta[-1]) == pytest.approx(0.02, rel=1e-4)


def test_a_strided_chain_keeps_alpha_bar_at_its_steps():
    whole, strided = Diffusion(1000), Diffusion(1000, 50)
    assert len(strided) == 50
    assert (int(strided.at[0]), int(strided.at[-1])) == (0, 999)
    torch.testing.assert_close(strided.alpha_bar, whole.alpha_bar[strided.at])
    torch.testing.assert_close((1 - strided.beta).cumprod(0), strided.alpha_bar, rtol=1e-4, atol=1e-6)
    assert torch.equal(Diffusion(1000, 1000).beta, whole.beta)


@pytest.mark.parametrize("steps", [0, 7, 1])
def test_a_perfect_denoiser_finds_the_start(steps):
    """One that knows x_0 gets there exactly: the last posterior's mean is x_0."""
    chain, start, x = Diffusion(100, steps), torch.randn(3, 5), torch.randn(3, 5)
    for i in range(len(chain) - 1, -1, -1):
        step, kept = torch.full((3,), i), chain.alpha_bar[i]
        noise = (x - kept.sqrt() * start) / (1 - kept).sqrt()
        mean, log_variance = chain.predicted(x, step, noise, torch.zeros_like(x))
        x = mean if i == 0 else mean + (0.5 * log_variance).exp() * torch.randn_like(x)
    torch.testing.assert_close(x, start, atol=1e-3, rtol=1e-3)


def test_the_bound_is_zero_at_the_true_posterior():
    chain = Diffusion(1000)
    start, noise = torch.randn(4, 5), torch.randn(4, 5)
    step = torch.tensor([5, 40, 500, 999])
    x = chain.noisy(start, step, noise)
    bins = start - 1, start + 1
    exact = chain.variational_bound(start, x, step, noise, -torch.ones(4, 5), bins)
    torch.testing.assert_close(exact, torch.zeros(4), atol=1e-4, rtol=0)
    wide = chain.variational_bound(start, x, step, noise, torch.ones(4, 5), bins)
    assert (wide >= -1e-6).all()
    assert float(wide[0]) > 1e-3
    first = chain.variational_bound(start, x, torch.zeros(4, dtype=torch.long), noise, torch.ones(4, 5), bins)
    assert (first >= 0).all()


def toy(n=64, genes=6):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 2, generator=random).repeat(1, 1, 32)  # a wide condition, as encoders give
    rate = torch.exp(3 + x[:, 0, :1] * torch.linspace(-1, 1, genes))
    xy = torch.rand(n, 2, generator=random)
    counts = torch.poisson(rate, generator=random).long()
    return Spots(x, xy, xy, torch.arange(n), torch.arange(n) % 2, counts)


def ready(spots, preset="small", **settings):
    torch.manual_seed(0)
    model = STEM.create(spots.features.shape[2], spots, preset, {**TINY, **settings})
    model.prepare(spots)
    return model.eval()


def test_the_untrained_output_is_zero():
    spots = toy()
    model = ready(spots, "official")
    step = torch.randint(1000, (64,))
    image = model.denoiser.image(model.standardised(spots.batch().features))
    noise, v = model.denoiser(torch.randn(64, 6), step, image)
    assert not noise.any()
    assert not v.any()
    torch.manual_seed(0)
    error, bound = torch.stack([model.loss(spots.batch()).per_scale for _ in range(20)]).mean(dim=0).tolist()
    assert error == pytest.approx(1, abs=0.03)  # the noise's variance
    assert math.isfinite(bound)
    assert bound > 0


def stirred(model):
    """Weights away from the zeros that they start at."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    return model


def test_permuting_genes_with_their_embeddings_permutes_the_output():
    model = stirred(ready(toy()))
    x, step, image = torch.randn(3, 6), torch.tensor([1, 50, 900]), torch.randn(3, 16)
    order = torch.randperm(6)
    straight = model.denoiser(x, step, image)
    with torch.no_grad():
        model.denoiser.gene.copy_(model.denoiser.gene[order].clone())
    for one, other in zip(straight, model.denoiser(x[:, order], step, image), strict=True):
        torch.testing.assert_close(one[:, order], other, atol=1e-5, rtol=1e-5)


def test_time_code_is_cosines_first():
    code = time_code(torch.tensor([0, 3]))
    assert code.shape == (2, 256)
    assert torch.equal(code[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    assert float(code[1, 128]) == pytest.approx(math.sin(3))


def test_standardising_is_undone():
    spots = toy()
    model = ready(spots)
    x = model.scaled(spots.counts)
    torch.testing.assert_close(x.mean(dim=0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(x * model.gene_scale + model.gene_mean, log2p1(spots.counts))
    torch.testing.assert_close(ready(spots, "official").scaled(spots.counts), log2p1(spots.counts))


def test_training_learns_what_the_features_tell():
    spots = toy(n=128)
    model, batch = ready(spots, depth=1).train(), spots.batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 150)
        optimizer.zero_grad()
        model.loss(batch).total.backward()
        optimizer.step()
    predicted = model.eval().predict(batch, Decoding(samples=5, steps=20)).layers["log1p_mean"] / LN2
    truth = log2p1(spots.counts)
    error, spread = (predicted - truth).square().mean(), (truth - truth.mean(dim=0)).square().mean()
    assert float(error) < 0.5 * float(spread)


def test_hardly_trained_it_stays_within_what_was_seen():
    """Without a guess of the noise the chain blows it up 160-fold."""
    spots = toy()
    model = ready(spots, predicts="noise")
    assert float(model.draw(spots.batch(), Decoding(samples=1)).max()) > 100
    predicted = model.predict(spots.batch(), Decoding(samples=1))
    assert (predicted.point >= 0).all()
    assert (predicted.point <= spots.counts.amax(dim=0)).all()


def test_untrained_a_predicted_start_is_the_training_mean():
    spots = toy()
    truth = log2p1(spots.counts)
    predicted = ready(spots).predict(spots.batch(), Decoding(samples=20)).layers["log1p_mean"] / LN2
    torch.testing.assert_close(predicted, truth.mean(dim=0).expand_as(predicted), atol=0.05, rtol=0)


def test_a_start_and_a_noise_that_mean_the_same_are_one_prediction():
    spots = toy()
    by_start, by_noise = ready(spots), ready(spots, predicts="noise")
    start, noise, v = torch.randn(64, 6), torch.randn(64, 6), torch.rand(64, 6)
    step = torch.randint(1000, (64,))
    x = by_start.diffusion.noisy(start, step, noise)
    for one, other in zip(
        by_start._noise_and_v(start, v, x, step), by_noise._noise_and_v(noise, v, x, step), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


# -- drawing --------------------------------------------------------------------------------------------------------


def test_draws_follow_the_spot_and_the_seed_alone():
    spots = toy()
    model = stirred(ready(spots))
    how = Decoding(samples=2, steps=5)
    whole = model.predict(spots.batch(), how)
    part = model.predict(spots.batch(slice(40, 47)), how)
    torch.testing.assert_close(whole.layers["log1p_mean"][40:47], part.layers["log1p_mean"], atol=1e-5, rtol=1e-5)
    other = model.predict(spots.batch(), Decoding(samples=2, steps=5, seed=1))
    assert not torch.allclose(whole.layers["log1p_mean"], other.layers["log1p_mean"])


def test_noise_is_normal_and_of_each_spot():
    noise = SpotNoise(torch.arange(50), 0, 4, 30)
    first, second = noise.draw(), noise.draw()
    assert first.shape == (200, 30)
    assert not torch.equal(first, second)
    assert float(torch.cat([first, second]).mean()) == pytest.approx(0, abs=0.05)
    assert float(torch.cat([first, second]).std()) == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(SpotNoise(torch.tensor([7]), 0, 4, 30).draw(), first[28:32])


def test_cost_is_told_before():
    model = ready(toy())
    told = model.cost(100, Decoding(samples=20, steps=1000))
    assert "20 samples of 100 spots in 1000 steps: 2,240,000 evaluations" in told
    assert "50 steps" in model.cost(10, Decoding())


def test_too_many_steps_are_refused():
    spots = toy()
    with pytest.raises(InputError, match="at most 1000, found 2000"):
        ready(spots).predict(spots.batch(), Decoding(steps=2000))
    with pytest.raises(InputError, match="steps"):
        Decoding(steps=-1)


@pytest.mark.parametrize("settings", [{"width": 30, "heads": 4}, {"n_total": 1}, {"classes": 3}, {"predicts": "v"}])
def test_senseless_settings_are_refused(settings):
    with pytest.raises(InputError, match="stem"):
        STEM.check_settings("small", settings)


def test_a_short_chain_ends_in_noise():
    assert Diffusion(1000).alpha_bar[-1] < 1e-4
    for n_total in (10, 50, 200):
        assert Diffusion(n_total).alpha_bar[-1] < 1e-3


def test_one_step_of_denoising_starts_at_the_noise():
    from genar.models._diffusion import Diffusion

    assert Diffusion(1000, 1).at.tolist() == [999]
    spots = training()
    model = made("stem", spots)
    fit(model, spots, TrainConfig(max_epochs=30, lr=3e-3, batch_size=16, weight_decay=0.0), device="cpu")
    truth = torch.log1p(spots.counts.float())
    one, ten = (model.predict(spots.batch(), Decoding(samples=5, steps=n)).layers["log1p_mean"] for n in (1, 10))
    assert float((one - truth).square().mean()) < 2 * float((ten - truth).square().mean())
