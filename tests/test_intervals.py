import numpy as np
import pytest

from genar.evaluation import intervals, metrics


def arrays(n=40, g=6):
    random = np.random.default_rng(0)
    truth = random.normal(size=(n, g)) + 3
    predicted = truth + random.normal(size=(n, g))
    predicted[:, 2] = 1.0  # constant
    return predicted, truth


def test_resampled_scores_are_the_metrics_of_the_drawn_spots():
    predicted, truth = arrays()
    weights = intervals.resample_weights(len(truth), 30, seed=3)
    assert weights.shape == (31, len(truth))
    scores = intervals.resampled_scores(predicted, truth, weights)
    for r in (0, 1, 17, 30):
        drawn = np.repeat(np.arange(len(truth)), np.rint(weights[r] * len(truth)).astype(int))
        assert len(drawn) == len(truth)
        pcc = metrics.pcc(predicted[drawn], truth[drawn])
        assert scores["pcc_200"][r] == pytest.approx(np.nanmean(pcc), abs=1e-5)
        assert scores["pcc_fixed"][r] == pytest.approx(metrics.fixed_mean(pcc), abs=1e-5)
        assert scores["mse"][r] == pytest.approx(metrics.mse(predicted[drawn], truth[drawn]).mean(), rel=1e-5)
        assert scores["mae"][r] == pytest.approx(metrics.mae(predicted[drawn], truth[drawn]).mean(), rel=1e-5)


def test_intervals_cover_the_mean_as_often_as_they_say():
    random, hits = np.random.default_rng(1), 0
    for seed in range(200):
        truth = random.normal(size=(50, 1))
        weights = intervals.resample_weights(50, 300, seed=seed)
        _, low, high = intervals.interval(intervals.resampled_scores(np.zeros_like(truth), truth, weights)["mse"])
        hits += low <= 1 <= high
    assert 0.86 <= hits / 200 <= 0.98


def test_an_undefined_score_has_no_interval():
    _, truth = arrays()
    weights = intervals.resample_weights(len(truth), 5)
    scores = intervals.resampled_scores(np.ones_like(truth), truth, weights)
    assert np.isnan(intervals.interval(scores["pcc_200"])).all()
    assert intervals.interval(scores["pcc_fixed"])[0] == 0
    mean = intervals.over_sections([scores, scores])
    np.testing.assert_allclose(mean["mse"], scores["mse"])


def test_calibration_counts_what_lies_inside():
    random = np.random.default_rng(0)
    truth = random.poisson(np.array([2.0, 30.0, 300.0]), size=(4000, 3))
    low, high = (
        np.broadcast_to(np.quantile(truth, q, axis=0, method="inverted_cdf"), truth.shape) for q in (0.05, 0.95)
    )
    found = metrics.calibration(low, high, truth)
    assert found["coverage_90_mean_above_100"] == pytest.approx(0.9, abs=0.01)
    assert found["coverage_90_mean_below_10"] >= 0.9
    assert found["width_90"] == pytest.approx((high - low).mean())


def test_the_highest_genes_are_those_of_each_resample():
    random = np.random.default_rng(2)
    truth = random.normal(size=(40, 60))
    predicted = truth + random.normal(size=(40, 60)) * 2
    weights = intervals.resample_weights(40, 4)
    scores = intervals.resampled_scores(predicted, truth, weights)
    for r in range(5):
        drawn = np.repeat(np.arange(40), np.rint(weights[r] * 40).astype(int))
        pcc = metrics.pcc(predicted[drawn], truth[drawn])
        for n in (10, 50, 200):
            assert scores[f"pcc_{n}"][r] == pytest.approx(metrics.top_mean(pcc, n), abs=1e-5)
