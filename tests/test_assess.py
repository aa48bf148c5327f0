"""``genar evaluate`` and the scores of a run: what is written, paired, told and refused."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from commands import run
from genar.assess import evaluate_run
from genar.data import contract
from genar.errors import InputError
from genar.evaluation import intervals, metrics
from genar.report import maps

GENES = [f"G{i:02d}" for i in range(12)]


def make_section(counts, genes=GENES, coords=None):
    adata = AnnData(np.asarray(counts, dtype=np.float32))
    adata.obs_names = [f"s{i:02d}" for i in range(adata.n_obs)]
    adata.var_names = genes[: adata.n_vars]
    adata.obsm["spatial"] = 100.0 * np.stack(np.divmod(np.arange(adata.n_obs), 6), axis=1)
    return contract.new_section(adata, section="S1", mpp=0.5, spot_diameter_um=55, source="test")


@pytest.fixture(autouse=True)
def _maps_in_one_test(request, monkeypatch):
    if "maps" not in request.node.name:
        monkeypatch.setattr(maps, "write_section_maps", lambda *_: None)


@pytest.fixture
def truth():
    rng = np.random.default_rng(0)
    return make_section(rng.poisson(rng.gamma(2, 10, (30, 12))))


def rival(truth, noise, seed=1):
    """A bare prediction, as another program would write it."""
    values = contract.counts(truth) + np.abs(np.random.default_rng(seed).normal(0, noise, truth.shape))
    return AnnData(values, obs=pd.DataFrame(index=truth.obs_names), var=pd.DataFrame(index=truth.var_names))


@pytest.fixture
def files(truth, tmp_path):
    """Truth and two predictions on disk, and a function that evaluates: exit code."""
    for name, adata in (("S1", truth), ("good", rival(truth, 2)), ("bad", rival(truth, 40))):
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    return tmp_path


def words(files, *more, prediction="good"):
    return [
        "evaluate",
        files / f"{prediction}.h5ad",
        files / "S1.h5ad",
        "--out",
        files / "out",
        "--resamples",
        60,
        *more,
    ]


def change(path, by):
    adata = by(anndata.read_h5ad(path))
    adata.write_h5ad(path)


def assert_one_line(capsys, *expected):
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    for text in expected:
        assert text in said


# --- what is written


def test_scores_intervals_and_maps_are_written(files, monkeypatch, capsys):
    assert run(monkeypatch, *words(files, "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    written = json.loads((files / "out" / "metrics.json").read_text())
    assert {section: list(methods) for section, methods in written.items()} == {"S1": ["prediction"]}
    assert written["S1"]["prediction"] == told["scores"]["S1"]["prediction"]
    table = pd.read_csv(files / "out" / "intervals.csv").set_index(["section", "method", "metric"])
    assert list(table.index.get_level_values("metric")) == list(intervals.METRICS)
    for metric in intervals.METRICS:
        row = table.loc["S1", "prediction", metric]
        assert row["value"] == pytest.approx(written["S1"]["prediction"][metric], rel=1e-4)
        assert row["low"] <= row["high"]
        assert told["intervals"]["prediction"][metric] == pytest.approx(
            [row["value"], row["low"], row["high"]], rel=1e-4
        )
    facts = json.loads((files / "out" / "intervals.json").read_text())["S1"]
    assert (facts["share"], facts["resamples"], facts["differences"]) == (0.95, 60, {})
    assert len(list((files / "out" / "maps").glob("S1_*.png"))) == 4


def test_differences_are_paired_and_smaller_than_either_interval(files, truth, monkeypatch, capsys):
    assert run(monkeypatch, *words(files, "--against", files / "bad.h5ad")) == 0
    assert "prediction minus against" in capsys.readouterr().out
    written = json.loads((files / "out" / "metrics.json").read_text())["S1"]
    assert list(written) == ["prediction", "against"]
    found = json.loads((files / "out" / "intervals.json").read_text())["S1"]
    value, low, high = found["differences"]["prediction minus against"]["mse"]
    assert value == pytest.approx(written["prediction"]["mse"] - written["against"]["mse"], rel=1e-5)
    assert low <= value <= high < 0  # fewer errors, beyond chance
    same = evaluate_run(rival(truth, 2), truth, files / "same", against=rival(truth, 2), resamples=60)
    assert same.differences["prediction minus against"]["pcc_200"] == (0, 0, 0)


def test_expectations_are_compared_where_there_are_some(truth, tmp_path):
    ours, other = rival(truth, 2), rival(truth, 40)
    ours.layers["log1p_mean"] = np.log1p(ours.X)
    result = evaluate_run(ours, truth, tmp_path, against=other, resamples=20)
    assert list(result.scores["S1"]) == ["prediction", "prediction_mean", "against"]
    assert list(result.differences) == ["prediction minus against", "prediction_mean minus against"]


def test_without_resamples_there_are_no_intervals(files, monkeypatch, capsys):
    assert run(monkeypatch, *words(files, "--resamples", 0)) == 0
    assert not (files / "out" / "intervals.csv").exists()


def test_what_a_prediction_says_of_its_distribution_is_scored(truth, tmp_path):
    predicted = rival(truth, 2)
    for q, factor in (("q05", 0.5), ("q25", 0.8), ("q50", 1), ("q75", 1.2), ("q95", 2)):
        predicted.layers[q] = predicted.X * factor
    predicted.layers["mean"], predicted.layers["sd"] = predicted.X, predicted.X
    predicted.layers["p_zero"] = np.full(predicted.shape, 0.02)
    result = evaluate_run(predicted, truth, tmp_path, resamples=20)
    summary = result.scores["S1"]["prediction"].summary
    assert {"coverage_50", "width_90", "crps", "nll_moments", "zero_brier", "gene_gene_pcc", "moran_pcc"} <= set(
        summary
    )
    bins = pd.read_csv(tmp_path / "zero_reliability.csv")
    assert bins["n"].tolist() == [truth.n_obs * truth.n_vars, *[0] * 9]
    assert bins["observed"][0] == pytest.approx((contract.counts(truth) == 0).mean(), rel=1e-5)


def test_fixed_lists_are_those_of_the_training_counts(truth, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "N_LISTED", 12)
    predicted = rival(truth, 20)
    predicted.var[contract.TRAINING_MEAN] = np.arange(12.0)
    scores = evaluate_run(predicted, truth, tmp_path, resamples=0).scores["S1"]["prediction"]
    assert scores.summary["pcc_top12_mean"] == pytest.approx(scores.summary["pcc_fixed"])
    assert metrics.listed_mean(scores.per_gene["pcc"].to_numpy(), np.arange(12.0), 3) == pytest.approx(
        scores.per_gene["pcc"].iloc[-3:].mean()
    )
    assert "pcc_top12_variance" not in scores.summary


# --- genes that differ


def rename(adata):
    adata.var_names = [*GENES[:10], "X1", "X2"]
    return adata


def test_other_genes_are_refused_by_name_and_common_ones_scored_on_request(files, monkeypatch, capsys):
    change(files / "good.h5ad", rename)
    assert run(monkeypatch, *words(files)) == 2
    assert_one_line(capsys, "the prediction has 12, the truth 12: 2 not in the truth (X1, X2)", "--genes common")
    assert not (files / "out").exists()
    assert run(monkeypatch, *words(files, "--genes", "common")) == 0
    said = capsys.readouterr().err
    assert "10 of the 12 genes of the truth are scored" in said
    assert "2 of 12 genes of the prediction are left out (X1, X2)" in said
    assert len(pd.read_csv(files / "out" / "metrics.csv")) == 10


def test_a_prediction_of_fewer_genes_than_the_truth_is_scored_and_said(files, monkeypatch, capsys):
    change(files / "good.h5ad", lambda adata: adata[:, GENES[:7]].copy())
    assert run(monkeypatch, *words(files)) == 0
    assert "note: 7 of the 12 genes of the truth are scored" in capsys.readouterr().err


def test_a_rival_with_another_panel_is_refused(files, monkeypatch, capsys):
    change(files / "bad.h5ad", lambda adata: adata[:, GENES[3:]].copy())
    assert run(monkeypatch, *words(files, "--against", files / "bad.h5ad")) == 2
    assert_one_line(capsys, "the prediction has 12, the other prediction 9", "G00, G01, G02")
    assert run(monkeypatch, *words(files, "--against", files / "bad.h5ad", "--genes", "common")) == 0
    table = pd.read_csv(files / "out" / "metrics.csv")
    assert table.groupby("method")["gene"].apply(list).map(lambda genes: genes == GENES[3:]).all()


def test_the_order_of_a_rivals_genes_does_not_matter(files, truth, tmp_path):
    other = rival(truth, 40)
    first = evaluate_run(rival(truth, 2), truth, tmp_path / "a", against=other, resamples=20)
    second = evaluate_run(rival(truth, 2), truth, tmp_path / "b", against=other[::-1, ::-1].copy(), resamples=20)
    ours, theirs = (result.differences["prediction minus against"] for result in (first, second))
    assert {m: pytest.approx(v) for m, v in ours.items()} == theirs


def test_a_prediction_that_differs_from_the_panel_is_refused(files, monkeypatch, capsys):
    (files / "panel.txt").write_text("\n".join([*GENES[1:], "KRT8"]))
    assert run(monkeypatch, *words(files, "--panel", files / "panel.txt")) == 2
    assert_one_line(capsys, "the panel 12: 1 not in the panel (G00), 1 of the panel not predicted (KRT8)")
    (files / "panel.txt").write_text("\n".join(GENES))
    assert run(monkeypatch, *words(files, "--panel", files / "panel.txt")) == 0


def test_no_common_gene_is_one_clear_line(files, monkeypatch, capsys):
    change(
        files / "good.h5ad",
        lambda adata: AnnData(adata.X, adata.obs, pd.DataFrame(index=[f"ENSG{i}" for i in range(12)])),
    )
    assert run(monkeypatch, *words(files, "--genes", "common")) == 2
    assert_one_line(capsys, "no gene is common to all", "ENSG0", "G00")
    assert run(monkeypatch, *words(files, "--genes", "some")) == 2
    assert_one_line(capsys, "same, common")


# --- bad input: a clear line or a defined value


def moved(adata):
    adata.obs_names = [f"other{i}" for i in range(adata.n_obs)]
    return adata


def twice(adata):
    adata.var_names = ["G00", *GENES[:11]]
    return adata


def with_value(value):
    def change_one(adata):
        adata.X[3, 4] = value
        return adata

    return change_one


@pytest.mark.filterwarnings("ignore:.*names are not unique:UserWarning")
@pytest.mark.parametrize(
    ("name", "by", "expected"),
    [
        ("good", moved, ["30 of the prediction's 30 spots are not in the truth (other0", "whose 30 are s00"]),
        ("good", lambda a: a[:20].copy(), ["10 of the truth's 30 spots have no prediction (first: s20)"]),
        ("good", lambda a: a[:0].copy(), ["the prediction has no spots"]),
        ("good", lambda a: a[:, :0].copy(), ["the prediction has no genes"]),
        ("good", twice, ["the prediction names gene 'G00' more than once"]),
        ("good", with_value(np.nan), ["the prediction's X holds NaN"]),
        ("good", with_value(-1), ["the prediction's X holds NaN, infinite or negative"]),
        ("S1", lambda a: a[:0].copy(), ["S1"]),
        ("bad", with_value(np.inf), ["--against: the prediction's X holds NaN"]),
        ("bad", lambda a: a[:20].copy(), ["--against: 10 of the truth's 30 spots"]),
    ],
)
def test_bad_input_is_one_clear_line(files, name, by, expected, monkeypatch, capsys):
    change(files / f"{name}.h5ad", by)
    assert run(monkeypatch, *words(files, "--against", files / "bad.h5ad")) == 2
    assert_one_line(capsys, *expected)
    assert not (files / "out").exists()


def test_nan_in_a_truth_is_refused(truth, tmp_path):
    truth.X[2, 3] = np.nan
    with pytest.raises(InputError, match="the truth: X holds NaN"):
        evaluate_run(rival(make_section(np.ones((30, 12))), 1), truth, tmp_path)


def assert_no_silent_nan(folder, notes):
    written = json.loads((folder / "metrics.json").read_text())["S1"]["prediction"]
    undefined = {name for name, value in written.items() if value is None and "_mean_" not in name}
    named = " ".join(notes)
    assert all(name in named for name in undefined)
    return undefined


def test_one_spot_has_errors_and_says_that_it_has_no_correlations(truth, tmp_path):
    one = truth[:1].copy()
    result = evaluate_run(rival(one, 2), one, tmp_path, resamples=20)
    assert any("one spot alone" in note for note in result.notes)
    assert {"pcc_200", "rvd", "depth_pcc", "gene_gene_pcc"} <= assert_no_silent_nan(tmp_path, result.notes)
    summary = result.scores["S1"]["prediction"].summary
    assert np.isfinite([summary["mse"], summary["count_mae"], summary["pcc_fixed"]]).all()
    assert result.intervals["prediction"]["mse"][0] == pytest.approx(summary["mse"])
    assert np.isnan(result.intervals["prediction"]["pcc_200"]).all()


def test_constant_genes_are_counted_and_named(truth, tmp_path):
    predicted = rival(truth, 2)
    predicted.X[:, 4] = 7
    result = evaluate_run(predicted, truth, tmp_path, resamples=20)
    assert result.scores["S1"]["prediction"].summary["n_undefined"] == 1
    assert any("PCC of 1 of 12 genes is undefined" in note and "(G04)" in note for note in result.notes)
    assert assert_no_silent_nan(tmp_path, result.notes) == {"zero_precision"}  # noise above zero everywhere
    predicted.X[:] = 7
    result = evaluate_run(predicted, truth, tmp_path / "all", resamples=20)
    assert "pcc_10" in assert_no_silent_nan(tmp_path / "all", result.notes)
    assert result.intervals["prediction"]["pcc_fixed"][0] == 0
