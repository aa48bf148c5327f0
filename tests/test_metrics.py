"""Scores of a prediction: those of scipy, scikit-learn and the released code; what is undefined, what is refused."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import stats
from sklearn.metrics import mean_absolute_error, mean_squared_error, precision_recall_fscore_support

from genar.data import contract
from genar.errors import InputError
from genar.evaluation import metrics, score, write_scores


def make_counts(n_spots=30, n_genes=12, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.poisson(rng.gamma(1, 30, n_genes), (n_spots, n_genes))
    return rng.poisson(truth * 0.8 + 1), truth


def make_section(counts, name="S1", spots=None, genes=None):
    adata = AnnData(np.asarray(counts, dtype=np.float32))
    adata.obs_names = [f"s{i:02d}" for i in range(adata.n_obs)] if spots is None else spots
    adata.var_names = [f"G{i:02d}" for i in range(adata.n_vars)] if genes is None else genes
    adata.obsm["spatial"] = np.arange(2.0 * adata.n_obs).reshape(-1, 2)
    return contract.new_section(adata, section=name, mpp=0.5, spot_diameter_um=55, source="test")


@pytest.fixture
def pair():
    predicted, truth = make_counts()
    return make_section(predicted), make_section(truth)


# --- the released code's values


@pytest.mark.real
def test_scores_are_those_of_the_released_code(shared):
    golden = json.loads((shared / "golden" / "genar_metrics.json").read_text())
    with np.load(shared / "golden" / "genar_metrics.npz") as counts:
        summary = score(make_section(counts["pred"]), make_section(counts["true"])).summary
    for name in ("pcc_10", "pcc_50", "pcc_200", "mse", "mae", "rvd"):
        assert summary[name] == pytest.approx(golden[name], abs=1e-6), name
    assert summary["n_undefined"] == golden["undefined_pcc_genes"] == 2
    assert summary["n_genes"] - summary["n_undefined"] == golden["valid_pcc_genes"]


# --- against other implementations

tables = arrays(np.int64, array_shapes(min_dims=2, max_dims=2, min_side=3, max_side=12), elements=st.integers(0, 50))


@given(truth=tables, seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_correlations_are_scipys(truth, seed):
    predicted = np.random.default_rng(seed).permuted(truth, axis=0)
    x, y = metrics.log2p1(predicted), metrics.log2p1(truth)
    constant = np.ptp(truth, axis=0) == 0
    for ours, theirs in ((metrics.pcc, stats.pearsonr), (metrics.spearman, stats.spearmanr)):
        values = ours(x, y)
        np.testing.assert_array_equal(np.isnan(values), constant)
        expected = [theirs(a, b).statistic for a, b in zip(x.T[~constant], y.T[~constant], strict=True)]
        np.testing.assert_allclose(values[~constant], expected, atol=1e-9)


@given(truth=tables, seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_errors_are_sklearns(truth, seed):
    predicted = np.random.default_rng(seed).poisson(truth + 1)
    for ours, theirs in ((metrics.mse, mean_squared_error), (metrics.mae, mean_absolute_error)):
        expected = theirs(truth, predicted, multioutput="raw_values")
        np.testing.assert_allclose(ours(predicted, truth), expected, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_zero_recovery_is_sklearns(seed):
    rng = np.random.default_rng(seed)
    predicted, truth = rng.poisson(0.7, (2, 20, 9))
    precision, recall, f1, _ = precision_recall_fscore_support((truth == 0).ravel(), (predicted == 0).ravel())
    found = metrics.zero_recovery(predicted, truth)
    expected = {"zero_precision": precision[1], "zero_recall": recall[1], "zero_f1": f1[1]}
    assert found == pytest.approx(expected)


def test_zero_recovery_without_zeros():
    some, none = np.array([[0, 1]]), np.array([[2, 1]])
    assert metrics.zero_recovery(none, some) == pytest.approx(
        {"zero_precision": math.nan, "zero_recall": 0, "zero_f1": 0}, nan_ok=True
    )
    assert metrics.zero_recovery(some, none) == pytest.approx(
        {"zero_precision": 0, "zero_recall": math.nan, "zero_f1": 0}, nan_ok=True
    )
    assert all(math.isnan(value) for value in metrics.zero_recovery(none, none).values())


def test_depth_correlation_is_that_of_the_totals():
    predicted, truth = make_counts()
    x, y = predicted.sum(axis=1), truth.sum(axis=1)
    expected = {"depth_pcc": stats.pearsonr(x, y).statistic, "depth_spearman": stats.spearmanr(x, y).statistic}
    assert metrics.depth_correlation(predicted, truth) == pytest.approx(expected)
    constant = np.full_like(truth, 3)
    assert all(math.isnan(value) for value in metrics.depth_correlation(constant, truth).values())


def test_rvd_compares_variances():
    predicted, truth = make_counts()
    expected = (predicted.var(axis=0) - truth.var(axis=0)) ** 2 / truth.var(axis=0) ** 2
    np.testing.assert_allclose(metrics.rvd(predicted, truth), expected, rtol=1e-12)
    np.testing.assert_allclose(metrics.rvd(2 * truth, truth), 9)  # four times the variance
    np.testing.assert_array_equal(metrics.rvd(truth, truth), 0)


def test_by_expression_splits_at_10_and_100():
    values = np.array([0.1, 0.2, 0.3, 0.4, 0.5, np.nan])
    mean_count = np.array([9.99, 10, 100, 100.01, 3, 3])
    assert metrics.by_expression(values, mean_count) == pytest.approx(
        {"pcc_mean_below_10": 0.3, "pcc_mean_10_to_100": 0.25, "pcc_mean_above_100": 0.4}
    )


# --- what must always hold


@given(slope=st.floats(0.01, 100), offset=st.floats(-100, 100))
@settings(max_examples=30, deadline=None)
def test_pcc_does_not_change_under_affine_maps(slope, offset):
    x, y = map(metrics.log2p1, make_counts())
    np.testing.assert_allclose(metrics.pcc(slope * x + offset, y), metrics.pcc(x, y), atol=1e-9)
    np.testing.assert_allclose(metrics.pcc(-slope * x + offset, y), -metrics.pcc(x, y), atol=1e-9)
    np.testing.assert_allclose(metrics.pcc(y, x), metrics.pcc(x, y), atol=1e-12)


@pytest.mark.parametrize("name", metrics.PER_GENE)
def test_permuting_spots_changes_nothing_and_permuting_genes_permutes(name):
    metric = metrics.PER_GENE[name]
    x, y = map(metrics.log2p1, make_counts())
    values = metric(x, y)
    assert values.shape == (12,)
    rng = np.random.default_rng(1)
    spots, genes = rng.permutation(30), rng.permutation(12)
    np.testing.assert_allclose(metric(x[spots], y[spots]), values, rtol=1e-9)
    np.testing.assert_allclose(metric(x[:, genes], y[:, genes]), values[genes], rtol=1e-9)


@pytest.mark.parametrize("name", metrics.PER_GENE)
def test_a_perfect_prediction(name):
    _, truth = make_counts()
    perfect = 1 if name in ("pcc", "spearman") else 0
    np.testing.assert_allclose(metrics.PER_GENE[name](truth, truth), perfect, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 123])
@pytest.mark.parametrize("n_spots", [3, 10, 37, 180])
def test_a_gene_of_constant_truth_is_undefined_at_any_count_and_size(count, n_spots):
    truth = metrics.log2p1(np.full((n_spots, 1), count))
    predicted = metrics.log2p1(np.arange(n_spots)[:, None])
    for name in ("pcc", "spearman", "rvd"):
        assert np.isnan(metrics.PER_GENE[name](predicted, truth)).all(), name
    for name in ("pcc", "spearman"):
        assert np.isnan(metrics.PER_GENE[name](truth, predicted)).all(), name
    assert metrics.rvd(truth, predicted) == pytest.approx(1)  # a prediction without variance


def test_undefined_genes_are_left_out_and_counted():
    predicted, truth = make_counts()
    predicted[:, 4] = 7
    truth[:, 9] = 0
    result = score(make_section(predicted), make_section(truth))
    pcc = result.per_gene["pcc"].to_numpy()
    assert np.flatnonzero(np.isnan(pcc)).tolist() == [4, 9]
    assert result.summary["n_undefined"] == 2
    assert result.summary["n_genes"] == 12
    assert result.summary["pcc_200"] == pytest.approx(np.nanmean(pcc))
    assert result.summary["pcc_10"] == pytest.approx(np.nanmean(pcc))  # only 10 are defined
    assert result.summary["pcc_fixed"] == pytest.approx(np.nansum(pcc) / 12)
    assert result.summary["rvd"] == pytest.approx(np.nanmean(result.per_gene["rvd"]))
    assert result.summary["pcc_200"] > result.summary["pcc_fixed"]


def test_tops_are_the_highest_of_this_very_result():
    predicted, truth = make_counts(n_genes=70)
    result = score(make_section(predicted), make_section(truth))
    ranked = np.sort(result.per_gene["pcc"].dropna())[::-1]
    assert len(ranked) > 55
    for name, n in (("pcc_10", 10), ("pcc_50", 50), ("pcc_200", 70)):
        assert result.summary[name] == pytest.approx(ranked[:n].mean()), name


def test_without_a_defined_gene_the_mean_is_undefined():
    assert math.isnan(metrics.top_mean(np.full(3, np.nan), 2))
    assert metrics.fixed_mean(np.full(3, np.nan)) == 0


# --- score


def test_scores_are_in_log2_space_and_counts(pair):
    predicted, truth = (contract.counts(section) for section in pair)
    result = score(*pair)
    x, y = np.log2(1 + predicted), np.log2(1 + truth)
    assert result.summary["mse"] == pytest.approx(mean_squared_error(y, x))
    assert result.summary["mae"] == pytest.approx(mean_absolute_error(y, x))
    assert result.summary["count_mse"] == pytest.approx(mean_squared_error(truth, predicted))
    assert result.summary["count_mae"] == pytest.approx(mean_absolute_error(truth, predicted))
    assert result.summary["n_spots"] == 30
    assert list(result.per_gene.index) == list(pair[0].var_names)
    np.testing.assert_allclose(result.per_gene["pcc"], metrics.pcc(x, y))
    np.testing.assert_allclose(result.per_gene["mean_count"], truth.mean(axis=0))
    assert result.summary.items() >= metrics.depth_correlation(predicted, truth).items()
    assert result.summary.items() >= metrics.zero_recovery(predicted, truth).items()


def test_spots_and_genes_are_aligned_by_name(pair):
    predicted, truth = pair
    expected = score(predicted, truth)
    rng = np.random.default_rng(3)
    shuffled = predicted[rng.permutation(30), rng.permutation(12)].copy()
    result = score(shuffled, truth[rng.permutation(30), rng.permutation(12)].copy())
    assert result.summary == pytest.approx(expected.summary, nan_ok=True)
    assert list(result.per_gene.index) == list(shuffled.var_names)
    pd.testing.assert_frame_equal(result.per_gene.sort_index(), expected.per_gene.sort_index())


def test_only_the_predictions_genes_are_scored(pair):
    predicted, truth = pair
    result = score(predicted[:, ["G07", "G02"]].copy(), truth)
    full = score(predicted, truth)
    pd.testing.assert_frame_equal(result.per_gene, full.per_gene.loc[["G07", "G02"]])


def test_spots_and_genes_that_differ_are_named(pair):
    predicted, truth = pair
    with pytest.raises(InputError, match=r"1 of the truth's 30 spots have no prediction \(first: s07\)"):
        score(predicted[predicted.obs_names != "s07"].copy(), truth)
    with pytest.raises(InputError, match=r"1 of the prediction's 30 spots are not in the truth \(s07\)"):
        score(predicted, truth[truth.obs_names != "s07"].copy())
    with pytest.raises(InputError, match=r"2 of the prediction's 12 genes are not in the truth \(G03, G05\)"):
        score(predicted, truth[:, ~truth.var_names.isin(["G03", "G05"])].copy())


@pytest.mark.parametrize("axis", ["spot", "gene"])
@pytest.mark.filterwarnings("ignore:.*names are not unique:UserWarning")
def test_a_prediction_with_names_twice_is_refused(pair, axis):
    predicted, truth = pair
    rows, genes = (list(range(30)), list(range(12)))
    (rows if axis == "spot" else genes).append(2)
    with pytest.raises(InputError, match=f"{axis}.*02.*more than once"):
        score(predicted[rows, genes].copy(), truth)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1])
@pytest.mark.parametrize("use", ["X", "log1p_mean"])
def test_a_prediction_that_holds_no_counts_is_refused(pair, value, use):
    predicted, truth = pair
    predicted.layers["log1p_mean"] = np.log1p(predicted.X.toarray())
    layer = predicted.X.toarray() if use == "X" else predicted.layers[use].copy()
    layer[3, 4] = value
    if use == "X":
        predicted.X = layer
    else:
        predicted.layers[use] = layer
    with pytest.raises(InputError, match=f"prediction's .*{use}.* NaN, infinite or negative"):
        score(predicted, truth, use=use)


def test_the_expectation_is_scored_in_its_own_space(pair):
    predicted, truth = pair
    log1p = np.random.default_rng(5).gamma(2, 1.0, (30, 12))
    predicted.layers[contract.LOG1P_MEAN] = log1p
    result = score(predicted, truth, use=contract.LOG1P_MEAN)
    y = contract.counts(truth)
    assert result.summary["mse"] == pytest.approx(mean_squared_error(np.log2(1 + y), log1p / np.log(2)))
    assert result.summary["count_mae"] == pytest.approx(mean_absolute_error(y, np.exp(log1p) - 1))
    assert result.summary["mse"] != pytest.approx(score(predicted, truth).summary["mse"])


def test_expectation_of_known_counts_scores_as_the_counts(pair):
    predicted, truth = pair
    predicted.layers[contract.LOG1P_MEAN] = np.log1p(contract.counts(predicted).astype(float))
    by_mean, by_counts = score(predicted, truth, use=contract.LOG1P_MEAN).summary, score(predicted, truth).summary
    for summary in (by_mean, by_counts):
        del summary["depth_spearman"]  # exp(log(x)) breaks ties of the totals
    assert by_mean == pytest.approx(by_counts, nan_ok=True)


@pytest.mark.parametrize("use", ["log1p_mean", "mean", "nothing"])
def test_what_cannot_be_scored_is_refused(pair, use):
    predicted, truth = pair
    if use == "mean":  # a layer in counts must not be read as logarithms
        predicted.layers["mean"] = predicted.X.copy()
    with pytest.raises(InputError, match=use):
        score(predicted, truth, use=use)


@pytest.mark.parametrize("kind", ["dense", "fractional"])
def test_any_methods_prediction_is_scored(pair, kind):
    predicted, truth = pair
    values = predicted.X.toarray() + (0.25 if kind == "fractional" else 0)
    rival = AnnData(values, obs=predicted.obs[[]], var=predicted.var[[]])  # names alone, no slot of ours
    result = score(rival, truth)
    expected = mean_squared_error(np.log2(1 + contract.counts(truth)), np.log2(1 + values))
    assert result.summary["mse"] == pytest.approx(expected)
    if kind == "dense":
        assert result.summary == pytest.approx(score(predicted, truth).summary, nan_ok=True)


# --- files


def test_written_scores(pair, tmp_path):
    predicted, truth = pair
    flat = predicted.copy()
    flat.X = np.full((30, 12), 5.0)
    scores = {
        "S1": {"genar": score(predicted, truth), "mean": score(flat, truth)},
        "S2": {"genar": score(truth, truth)},
    }
    outputs = write_scores(tmp_path / "run", scores)
    assert outputs == {"metrics": tmp_path / "run" / "metrics.json", "per_gene": tmp_path / "run" / "metrics.csv"}

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    summary = json.loads(outputs["metrics"].read_text(), parse_constant=refuse)
    assert {section: list(methods) for section, methods in summary.items()} == {
        "S1": ["genar", "mean"],
        "S2": ["genar"],
    }
    assert summary["S1"]["mean"]["pcc_10"] is None
    assert summary["S1"]["mean"]["n_undefined"] == 12
    assert summary["S1"]["genar"]["pcc_10"] == pytest.approx(scores["S1"]["genar"].summary["pcc_10"])
    assert summary["S2"]["genar"]["pcc_200"] == pytest.approx(1)

    table = pd.read_csv(outputs["per_gene"])
    assert list(table.columns[:3]) == ["section", "method", "gene"]
    assert set(table.columns[3:]) == {*metrics.PER_GENE, "mean_count", "moran_predicted", "moran_truth"}
    assert len(table) == 3 * 12
    assert not table.duplicated(["section", "method", "gene"]).any()
    mine = table[(table["section"] == "S1") & (table["method"] == "genar")].set_index("gene")
    np.testing.assert_allclose(mine["pcc"], scores["S1"]["genar"].per_gene["pcc"], rtol=1e-5)
    assert table.loc[table["method"] == "mean", "pcc"].isna().all()


def test_a_prediction_without_x_is_refused(pair):
    bare = AnnData(obs=pair[0].obs[[]], var=pair[0].var[[]])
    with pytest.raises(InputError, match="the prediction has no X"):
        score(bare, pair[1])


# --- arrays that cannot be scored, and torchmetrics


@pytest.mark.parametrize("name", metrics.PER_GENE)
@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [
        (np.zeros((3, 2)), np.zeros((3, 1)), r"one shape \[spots, genes\], found \(3, 2\) and \(3, 1\)"),
        (np.zeros(3), np.zeros(3), "one shape"),
        (np.zeros((0, 2)), np.zeros((0, 2)), "at least one spot and one gene to score, found 0 and 2"),
        (np.array([[1.0], [np.nan]]), np.ones((2, 1)), r"prediction holds NaN .*\(first: spot 1, gene 0\)"),
        (np.ones((2, 1)), np.array([[np.inf], [1]]), "truth holds NaN or infinite"),
    ],
)
def test_arrays_that_cannot_be_scored_are_refused(name, predicted, truth, message):
    with pytest.raises(InputError, match=message):
        metrics.PER_GENE[name](predicted, truth)


def test_one_spot_has_errors_and_no_correlation():
    x, y = np.array([[1.0, 2.0]]), np.array([[1.0, 4.0]])
    for name in ("pcc", "spearman", "rvd"):
        assert np.isnan(metrics.PER_GENE[name](x, y)).all(), name
    assert metrics.mse(x, y).tolist() == [0, 4]


def test_metrics_are_those_of_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.functional")
    import torch

    predicted, truth = map(metrics.log2p1, make_counts())
    x, y = torch.tensor(predicted), torch.tensor(truth)
    np.testing.assert_allclose(metrics.pcc(predicted, truth), torchmetrics.pearson_corrcoef(x, y), atol=1e-6)
    np.testing.assert_allclose(metrics.spearman(predicted, truth), torchmetrics.spearman_corrcoef(x, y), atol=1e-4)
    expected = torchmetrics.mean_squared_error(x, y, num_outputs=x.shape[1])
    np.testing.assert_allclose(metrics.mse(predicted, truth), expected, rtol=1e-9)
    assert metrics.mae(predicted, truth).mean() == pytest.approx(float(torchmetrics.mean_absolute_error(x, y)))


def test_a_listed_mean_does_not_look_at_the_result():
    values, by = np.array([0.9, np.nan, 0.1, 0.5]), np.array([1.0, 4.0, 3.0, 3.0])
    assert metrics.listed_mean(values, by, 3) == pytest.approx(0.2)
    assert metrics.listed_mean(values, by, 2) == pytest.approx(0.05)  # ties: the first
    assert metrics.listed_mean(values, by, 99) == metrics.fixed_mean(values)
