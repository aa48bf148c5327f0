"""Scores of predictive distributions: pinball, CRPS, likelihoods, coverage."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import brier_score_loss, d2_pinball_score, mean_pinball_loss

from genar.errors import InputError
from genar.evaluation import calibration


@pytest.fixture
def negative_binomial():
    """True counts [300, 3], and the very distribution that they were drawn from: scipy's, [300, 3]."""
    random = np.random.default_rng(0)
    mean, size = random.gamma(2, [1.0, 5.0, 20.0], (300, 3)) + 0.05, np.array([0.5, 2.0, 10.0])
    law = stats.nbinom(np.broadcast_to(size, mean.shape), size / (size + mean))
    return law.rvs(random_state=random), law


def pmf_of(law, n=400):
    pmf = np.stack([law.pmf(v) for v in range(n)], axis=2)
    return pmf / pmf.sum(axis=2, keepdims=True)


def test_pinball_is_sklearns(negative_binomial):
    truth, law = negative_binomial
    x = law.ppf(0.7)
    ours = calibration.pinball(x, truth, 0.7)
    assert ours == pytest.approx(mean_pinball_loss(truth, x, alpha=0.7, multioutput="raw_values"))
    assert 0 < d2_pinball_score(truth, x, alpha=0.7) <= 1  # the law itself beats a constant


def test_crps_of_a_pmf_is_that_of_its_samples(negative_binomial):
    """E|X - y| - E|X - X'| / 2, by enumeration."""
    truth, law = negative_binomial
    pmf = pmf_of(law)[:20]
    v = np.arange(pmf.shape[2])
    apart = np.abs(v[:, None] - v[None, :])
    expected = (pmf * np.abs(v - truth[:20, :, None])).sum(2) - np.einsum("ngv,vw,ngw->ng", pmf, apart, pmf) / 2
    np.testing.assert_allclose(calibration.crps_of_pmf(pmf, truth[:20]), expected.mean(axis=0), rtol=1e-9)


def test_crps_of_many_quantiles_is_that_of_the_pmf(negative_binomial):
    truth, law = negative_binomial
    levels = (np.arange(199) + 1) / 200
    exact = calibration.crps_of_pmf(pmf_of(law), truth)
    many = calibration.crps_of_quantiles([law.ppf(q) for q in levels], list(levels), truth)
    np.testing.assert_allclose(many, exact, rtol=0.02)
    five = calibration.crps_of_quantiles(
        [law.ppf(q) for q in (0.05, 0.25, 0.5, 0.75, 0.95)], [0.05, 0.25, 0.5, 0.75, 0.95], truth
    )
    np.testing.assert_allclose(five, exact, rtol=0.12)


def test_a_count_beyond_the_pmf_costs_its_distance_and_not_infinity():
    pmf = np.array([[[0.0, 1.0]]])
    assert calibration.crps_of_pmf(pmf, np.array([[5]])) == pytest.approx(4)
    assert calibration.nll_of_pmf(pmf, np.array([[5]])) == pytest.approx(-np.log(1e-12))
    assert calibration.nll_of_pmf(pmf, np.array([[0]])) == pytest.approx(-np.log(1e-12))


def test_likelihoods_are_scipys(negative_binomial):
    truth, law = negative_binomial
    expected = -law.logpmf(truth).mean(axis=0)
    np.testing.assert_allclose(calibration.nll_of_pmf(pmf_of(law), truth), expected, rtol=1e-6)
    np.testing.assert_allclose(calibration.nll_of_moments(law.mean(), law.std(), truth), expected, rtol=1e-9)
    poisson = -stats.poisson.logpmf(truth, law.mean()).mean(axis=0)
    for sd in (np.sqrt(law.mean()), 0 * law.mean()):  # a variance not above the mean
        np.testing.assert_allclose(calibration.nll_of_moments(law.mean(), sd, truth), poisson, rtol=1e-5)


def test_likelihood_of_a_mean_of_zero_is_finite():
    zero = np.zeros((1, 1))
    assert calibration.nll_of_moments(zero, zero, np.array([[0]])) == pytest.approx(calibration.LEAST_MEAN)
    assert 6 < calibration.nll_of_moments(zero, zero, np.array([[1]]))[0] < 8


@pytest.mark.parametrize("wrong", ["wider", "narrower", "shifted"])
def test_the_true_distribution_scores_best(negative_binomial, wrong):
    truth, law = negative_binomial
    truth = np.concatenate([law.rvs(random_state=seed) for seed in range(8)])
    factor, shift = {"wider": (2.0, 1.0), "narrower": (0.4, 1.0), "shifted": (1.0, 1.4)}[wrong]
    mean, sd = (np.tile(values, (8, 1)) for values in (law.mean(), law.std()))
    right = calibration.nll_of_moments(mean, sd, truth)
    assert (right < calibration.nll_of_moments(mean * shift, sd * factor, truth)).all()


def test_coverage_of_the_true_distribution_is_as_named(negative_binomial):
    _, law = negative_binomial
    truth = np.concatenate([law.rvs(random_state=seed) for seed in range(8)])
    layers = {f"q{q:02d}": np.tile(law.ppf(q / 100), (8, 1)) for q in (5, 25, 50, 75, 95)}
    layers |= {"mean": np.tile(law.mean(), (8, 1)), "sd": np.tile(law.std(), (8, 1))}
    layers["p_zero"] = np.tile(law.pmf(0), (8, 1))
    summary, per_gene = calibration.calibration(layers, truth)
    # whole counts: never less than named, and closer for genes of many counts
    assert 0.9 <= summary["coverage_90"] < 0.96
    assert per_gene["coverage_90"][2] == pytest.approx(0.9, abs=0.03)
    assert per_gene["coverage_50"][2] == pytest.approx(0.5, abs=0.05)
    assert summary["width_50"] < summary["width_90"]
    assert summary["zero_calibration_error"] < 0.02
    assert summary["zero_brier"] == pytest.approx(
        brier_score_loss((truth == 0).ravel(), layers["p_zero"].ravel().clip(0, 1))
    )
    assert summary["crps"] == pytest.approx(per_gene["crps"].mean())
    assert summary["nll_moments"] == pytest.approx(per_gene["nll_moments"].mean())


def test_only_what_the_layers_allow_is_said():
    truth, one = np.array([[0], [2]]), np.array([[1.0], [1.0]])
    assert calibration.calibration({"mean": one}, truth) == ({}, {})
    assert set(calibration.calibration({"p_zero": one / 2}, truth)[0]) == {"zero_brier", "zero_calibration_error"}
    assert "coverage_50" not in calibration.calibration({"q05": 0 * one, "q95": one}, truth)[0]


def test_zero_reliability_counts_bins():
    random = np.random.default_rng(1)
    p = random.random((400, 30))
    truth = (random.random(p.shape) > p).astype(int)
    found = calibration.zero_reliability(p, truth)
    assert found["n"].sum() == p.size
    np.testing.assert_allclose(found["observed"], found["predicted"], atol=0.04)
    assert calibration.zero_scores(1 - p, truth)["zero_calibration_error"] > 0.4
    empty = calibration.zero_reliability(np.full((2, 2), 0.05), np.zeros((2, 2)))
    assert np.isnan(empty["observed"][1:]).all()
    assert empty["observed"][0] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y: calibration.interval_scores(y + 1, y, y), "4 of 4 intervals of 90 % end below their start"),
        (lambda y: calibration.zero_reliability(y + 1.5, y), r"must lie in \[0, 1\]"),
        (lambda y: calibration.crps_of_quantiles([y, y], [0.5, 0.5], y), "rising levels"),
        (lambda y: calibration.crps_of_quantiles([], [], y), "rising levels"),
        (lambda y: calibration.crps_of_pmf(np.ones((2, 2, 3)), y), "sum to one"),
        (lambda y: calibration.nll_of_pmf(np.ones((2, 1, 1)), y), "expected probabilities"),
        (lambda y: calibration.nll_of_pmf(np.full((2, 2, 1), np.nan), y), "sum to one"),
        (lambda y: calibration.nll_of_moments(y * np.nan, y, y), "prediction holds NaN"),
    ],
)
def test_what_is_no_distribution_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(np.zeros((2, 2)))
