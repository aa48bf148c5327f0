"""Tables, intervals, maps and pages say what was measured, of what, and how far it can be trusted."""

import numpy as np
import pytest

from genar.evaluation import intervals


def scores_of(predicted, truth, seed=0, resamples=300):
    return intervals.resampled_scores(predicted, truth, intervals.resample_weights(len(truth), resamples, seed=seed))


@pytest.mark.parametrize(("n_spots", "ratio"), [(36, 1.0), (120, 0.8), (120, 1.0), (120, 0.3)])
def test_the_interval_of_rvd_covers_and_holds_its_value(n_spots, ratio):
    """Spread of the prediction over the truth's: at 1 the resamples lie above the value, and the value above 0."""
    random, hits = np.random.default_rng(0), 0
    for seed in range(40):
        truth, noise = random.normal(size=(2, n_spots, 40))
        predicted = np.sqrt(ratio) * (0.4 * truth + np.sqrt(1 - 0.4**2) * noise)
        value, low, high = intervals.intervals_of(scores_of(predicted, truth, seed))["rvd"]
        assert 0 <= low <= value <= high
        hits += low <= (ratio - 1) ** 2 <= high
    assert hits >= 34


def test_the_difference_of_two_rvd_is_corrected_in_the_same_way():
    random = np.random.default_rng(0)
    hits = 0
    for seed in range(40):
        truth, one, other = random.normal(size=(3, 120, 40))
        drawn = [scores_of(predicted, truth, seed) for predicted in (np.sqrt(0.8) * one, other)]
        value, low, high = intervals.paired_differences(*drawn)["rvd"]
        assert low <= value <= high
        hits += low <= 0.2**2 <= high
    assert hits >= 34


def test_every_interval_holds_its_value():
    random = np.random.default_rng(0)
    for seed in range(40):
        n_spots, n_genes = random.integers(2, 60), random.integers(1, 60)
        truth = np.log2(1 + random.poisson(random.choice([0.02, 0.3, 5]), size=(n_spots, n_genes)))
        predicted = np.log2(1 + random.poisson(truth * random.choice([0.1, 1])))
        drawn = [scores_of(one, truth, seed, 100) for one in (predicted, 0 * predicted + random.random(truth.shape))]
        for found in (*map(intervals.intervals_of, drawn), intervals.paired_differences(*drawn)):
            for value, low, high in found.values():
                assert np.isnan(value) or low <= value <= high


def test_genes_constant_in_a_resample_stay_in_the_mean():
    """40 of 50 genes are predicted 0 but for one spot, as greedy decoding does."""
    random = np.random.default_rng(1)
    truth = random.normal(size=(180, 50))
    predicted = np.zeros_like(truth)
    predicted[:, :10] = 0.8 * truth[:, :10] + 0.6 * random.normal(size=(180, 10))
    predicted[random.integers(180, size=40), np.arange(10, 50)] = 1
    predicted[:, 49] = 0  # undefined on all spots: no part of the mean
    drawn = scores_of(predicted, truth)
    for name, share in (("pcc_200", 49 / 50), ("pcc_50", 49 / 50)):
        np.testing.assert_allclose(drawn[name] * share, drawn["pcc_fixed"], atol=1e-12)
    value, low, high = intervals.intervals_of(drawn)["pcc_200"]
    assert low < value < high
    assert high - low < 0.1


def test_one_spot_has_no_interval():
    found = intervals.intervals_of(scores_of(np.array([[1.0, 2.0]]), np.array([[2.0, 4.0]])))
    assert found["mse"][0] == 2.5
    assert np.isnan(found["mse"][1:]).all()
    assert intervals.words(found["mse"]) == "2.500"
    assert intervals.words(found["pcc_200"]) == "undefined"
