"""Intervals of scores, of their differences, of shares, and across sections."""

import numpy as np
import pytest

from genar.evaluation import calibration, intervals, metrics
from genar.report.figures import wilson


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
    found = calibration.interval_scores(low, high, truth)
    assert found["coverage_90_mean_above_100"] == pytest.approx(0.9, abs=0.01)
    assert found["coverage_90_mean_below_10"] >= 0.9
    assert found["width_90"] == pytest.approx((high - low).mean())


def test_rvd_and_the_tops_are_those_of_the_drawn_spots():
    random = np.random.default_rng(0)
    truth = random.normal(size=(40, 60)) + 3
    predicted = truth + random.normal(size=truth.shape) * np.linspace(0.2, 4, 60)
    weights = intervals.resample_weights(40, 20, seed=1)
    scores = intervals.resampled_scores(predicted, truth, weights)
    chosen = np.argsort(-metrics.pcc(predicted, truth))
    for r in (0, 5, 20):
        drawn = np.repeat(np.arange(40), np.rint(weights[r] * 40).astype(int))
        pcc = metrics.pcc(predicted[drawn], truth[drawn])
        for n in (10, 50):
            assert scores[f"pcc_{n}"][r] == pytest.approx(pcc[chosen[:n]].mean(), abs=1e-5)
        assert scores["rvd"][r] == pytest.approx(metrics.rvd(predicted[drawn], truth[drawn]).mean(), rel=1e-4)
    assert scores["pcc_10"][0] == pytest.approx(metrics.top_mean(metrics.pcc(predicted, truth), 10))
    low, high = intervals.interval(scores["pcc_10"])[1:]
    assert low < scores["pcc_10"][0] < high  # chosen anew in each resample, the low end would lie above


def test_a_gene_that_varies_in_spots_that_were_not_drawn_is_constant():
    truth = np.random.default_rng(0).normal(size=(50, 2)) + 5
    truth[:, 1] = 0.0
    truth[7, 1] = 3.0
    predicted = truth + np.random.default_rng(1).normal(size=truth.shape)
    weights = intervals.resample_weights(50, 200)
    scores = intervals.resampled_scores(predicted, truth, weights)
    without = np.flatnonzero(weights[:, 7] == 0)
    assert len(without) > 30
    for r in without[:20]:
        drawn = np.repeat(np.arange(50), np.rint(weights[r] * 50).astype(int))
        one = metrics.pcc(predicted[drawn], truth[drawn])[0]
        assert scores["pcc_200"][r] == pytest.approx(one / 2, abs=1e-5)  # it counts 0, the same two genes everywhere
    # however small a gene's values are, it is not taken for constant
    small = intervals.resampled_scores(1e-9 * predicted, 1e-9 * truth, weights)
    np.testing.assert_allclose(small["pcc_200"], scores["pcc_200"], atol=1e-6)


def test_paired_differences_are_narrower_than_the_methods_intervals():
    random = np.random.default_rng(0)
    truth = random.normal(size=(60, 5)) * 3
    shared = random.normal(size=truth.shape)
    weights = intervals.resample_weights(60, 400)
    ours, rival = (
        intervals.resampled_scores(truth + shared + s * random.normal(size=truth.shape), truth, weights)
        for s in (0.1, 0.4)
    )
    value, low, high = intervals.paired_differences(ours, rival)["mse"]
    assert value == pytest.approx(ours["mse"][0] - rival["mse"][0])
    assert low < value < high < 0
    _, alone_low, alone_high = intervals.interval(ours["mse"])
    assert high - low < alone_high - alone_low


def test_across_sections_is_wider_where_sections_differ():
    sections = []
    for seed in range(6):
        random = np.random.default_rng(seed)
        truth = random.normal(size=(80, 4))
        predicted = truth + (0.2 + 0.3 * seed) * random.normal(size=truth.shape)
        sections.append(intervals.resampled_scores(predicted, truth, intervals.resample_weights(80, 500, seed=seed)))
    within, across = intervals.over_sections(sections), intervals.across_sections(sections)
    for name in ("mse", "pcc_200"):
        (value, low, high), (same, wide_low, wide_high) = (intervals.interval(s[name]) for s in (within, across))
        assert same == pytest.approx(value)
        assert wide_high - wide_low > 2 * (high - low)
    # the spread over sections: that of a mean of six draws from them
    spread = np.std([section["mse"][0] for section in sections]) / np.sqrt(6)
    assert np.std(across["mse"][1:]) == pytest.approx(spread, rel=0.25)
    one = intervals.across_sections(sections[:1])
    assert set(one["mse"][1:]) <= set(sections[0]["mse"][1:])
    np.testing.assert_array_equal(intervals.across_sections(sections)["mse"], across["mse"])


def test_seeds_of_sections_repeat_and_differ():
    assert intervals.seed_of("SPA148") == intervals.seed_of("SPA148") != intervals.seed_of("SPA149")


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
    assert intervals.interval_in_words(found["mse"]) == "2.500"
    assert intervals.interval_in_words(found["pcc_200"]) == "undefined"


def test_intervals_of_shares_have_a_width_at_their_ends():
    low, high = wilson(np.array([0.0, 1.0]), np.array([5, 5]))
    assert low[0] == 0 < 0.3 < high[0]
    assert high[1] == 1 > 0.7 > low[1]


def drawn_sections(n_patients, each, *, name="pcc_200", value=lambda random: random.normal(0.5, 0.1), seed=0):
    """Resamples of sections that are alike within a patient, and whose patients they are."""
    random = np.random.default_rng(seed)
    sections, patients = [], []
    for patient in range(n_patients):
        mean = value(random)
        for _ in range(each):
            own = mean + random.normal(0, 0.02)
            values = np.concatenate([[own], own + random.normal(0, 0.02, 300)])
            sections.append(dict.fromkeys(intervals.METRICS, values))
            patients.append(f"P{patient}")
    return sections, patients


def covers(truth, of, patients, name="pcc_200"):
    found = intervals.intervals_of(intervals.across_sections(of, patients), unbiased=True)[name]
    return found[1] <= truth <= found[2]


def test_sections_of_one_patient_count_as_what_they_are():
    """Six sections of each of five patients: taken for thirty, the interval would hold the truth half of the time."""
    made = [drawn_sections(5, 6, seed=seed) for seed in range(120)]
    known = np.mean([covers(0.5, sections, patients) for sections, patients in made])
    unknown = np.mean([covers(0.5, sections, ()) for sections, _ in made])
    assert known > 0.82
    assert unknown < 0.65


def test_patients_of_one_section_each_are_drawn_as_sections_are():
    sections, patients = drawn_sections(6, 1)
    for name, values in intervals.across_sections(sections).items():
        np.testing.assert_array_equal(intervals.across_sections(sections, patients)[name], values)
    alone, of_one = drawn_sections(1, 6)  # then its sections are drawn, as before
    assert intervals.across_sections(alone, of_one)["mse"][1:].std() > 0
    assert intervals.sections_of(["A", "", "A", ""]) == [[0, 2], [1], [3]]


def test_patients_of_unlike_many_sections_keep_the_mean_over_sections():
    sections, patients = drawn_sections(4, 3)
    drawn = intervals.across_sections(sections[2:], patients[2:])
    assert drawn["mse"][0] == pytest.approx(np.mean([s["mse"][0] for s in sections[2:]]))
    assert np.mean(drawn["mse"][1:]) == pytest.approx(drawn["mse"][0], abs=0.03)


def test_skewness_over_sections_is_no_bias():
    """Of few sections with a large value among them, the median of means is below the mean: no reason to shift."""
    random = np.random.default_rng(0)
    level = np.array([0.1, 0.12, 0.15, 0.2, 0.3, 1.4])
    sections = [
        dict.fromkeys(intervals.METRICS, np.concatenate([[v], v + 0.02 + random.normal(0, 0.01, 500)])) for v in level
    ]
    drawn = intervals.across_sections(sections)["rvd"]
    assert drawn[1:].mean() == pytest.approx(level.mean() - 0.02, abs=0.02)  # what drawing spots adds, twice
    value, low, high = intervals.intervals_of({"rvd": drawn}, unbiased=True)["rvd"]
    assert value == pytest.approx(level.mean())
    means = random.choice(level, (2000, 6)).mean(axis=1)
    assert [low, high] == pytest.approx(list(np.quantile(means, [0.025, 0.975])), abs=0.05)
