"""Tables, intervals, maps and pages say what was measured, of what, and how far it can be trusted."""

import json
import shutil

import anndata
import numpy as np
import pytest

from genar.assess import evaluate_run
from genar.data import contract, read_section
from genar.evaluation import intervals
from genar.report import maps
from genar.report.figures import wilson
from genar.report.index import write_report
from genar.report.page import page_html
from genar.report.subject import subjects
from genar.runs import train_run
from genar.train_plan import TrainPlan


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


@pytest.fixture
def pair(ridge_home):
    """A prediction of one gene, and the truth, in which that gene has another name."""

    def named(gene, section="B"):
        predicted = anndata.read_h5ad(ridge_home / "run/predictions/B.h5ad")[:, :1].copy()
        truth = read_section(f"{ridge_home / 'tissue'}:B")
        truth.var_names = [gene if name == predicted.var_names[0] else name for name in truth.var_names]
        predicted.var_names = [gene]
        truth.uns[contract.GENAR][contract.SECTION] = section
        return predicted, truth

    return named


@pytest.mark.parametrize(
    "gene", ["../../../outside", "HLA-DRB3/4", "A" * 300, "µ" * 90, "a$b$c", r"$\frac$", "x\ny", ".."]
)
def test_a_genes_name_is_no_path_and_no_formula(gene, pair, tmp_path):
    predicted, truth = pair(gene, section=r"$\section$")
    evaluate_run(predicted, truth, tmp_path / "deep/er/out", resamples=0)
    made = sorted(tmp_path.rglob("*.png"))
    assert len(made) == 4
    assert {path.parent for path in made} == {tmp_path / "deep/er/out/maps"}


def test_long_names_of_methods_stay_within_their_map(pair, tmp_path, monkeypatch):
    predicted, truth = pair("G" * 60)
    figures = []
    monkeypatch.setattr(maps, "_save", lambda figure, path: figures.append(figure))
    names = ["GenAR, default of this package, as it was trained for all of that", "50 nearest spots on GenAR's inputs"]
    maps.write_method_maps(truth, dict.fromkeys(names, predicted), [("G" * 60, "")], tmp_path / "x.png")
    figures[0].canvas.draw()
    for axis in figures[0].axes[:3]:
        width = axis.title.get_window_extent().width
        assert width < figures[0].bbox.width / 3
        assert max(map(len, axis.get_title().splitlines())) <= 40


def test_scores_are_written_before_a_picture_can_fail(ridge_home, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no picture")

    monkeypatch.setattr(maps, "write_section_maps", fail)
    plan = TrainPlan(
        ridge_home / "tissue",
        ("B",),
        tmp_path / "run",
        "ridge",
        n_genes=8,
        views=1,
        features=ridge_home / "store",
        beside=(),
    )
    with pytest.raises(RuntimeError, match="no picture"):
        train_run(plan, say=lambda line: None)
    assert {"metrics.json", "intervals.json"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_fractional_predictions_are_shown_as_they_are_scored(pair):
    predicted, _ = pair("X")
    values = np.linspace(0.1, 0.45, predicted.n_obs, dtype=np.float32)[:, None]
    predicted = anndata.AnnData(values, predicted.obs, predicted.var, uns=predicted.uns, obsm=dict(predicted.obsm))
    np.testing.assert_allclose(contract.expected_log2(predicted, ["X"])[:, 0], np.log2(1 + values[:, 0]), rtol=1e-6)


def test_a_fractional_prediction_keeps_its_values_on_its_page(ridge_home, tmp_path):
    predicted = anndata.read_h5ad(ridge_home / "run/predictions/B.h5ad")
    values = np.random.default_rng(0).random(predicted.shape).astype(np.float32)
    bare = anndata.AnnData(values, predicted.obs, predicted.var, uns=predicted.uns, obsm=dict(predicted.obsm))
    bare.write_h5ad(tmp_path / "bare.h5ad")
    (subject,) = subjects(tmp_path / "bare.h5ad", f"{ridge_home / 'tissue'}:B")
    payload = json.loads(page_html(subject).split('id="payload">')[1].split("</script>")[0])
    assert payload["table"]["mean predicted"] == pytest.approx(values.mean(axis=0).tolist(), rel=1e-3)
    assert min(payload["matrices"]["counts"]["step"]) < 1e-4


def test_the_page_counts_undefined_genes(ridge_home):
    (subject,) = subjects(ridge_home / "run")
    assert subject.methods["mean"]["n_undefined"] == 8
    html = page_html(subject)
    assert "n undefined" in html
    assert "<td>8</td>" in html


def test_pages_of_names_that_are_plain_alike_stay_apart(ridge_home, tmp_path):
    names = ["run_1", "run-1", "RUN 1", "第一", "第二"]
    for name in names:
        shutil.copytree(ridge_home / "run", tmp_path / "runs" / name)
    made = write_report(tmp_path / "runs", tmp_path / "all.html")
    assert len({path.name.lower() for path in made.values()}) == 1 + len(names)
    for name in names:
        assert (tmp_path / made[f"{name} B"].name).is_file()
    html = (tmp_path / "all.html").read_text()
    assert all(html.count(f'href="{path.name}"') == 1 for name, path in made.items() if name != "index")


def test_a_prediction_without_the_gene_keeps_its_card(ridge_home, tmp_path):
    for name in ("whole", "cut"):
        shutil.copytree(ridge_home / "run", tmp_path / "runs" / name)
    path = tmp_path / "runs/cut/predictions/B.h5ad"
    predicted = anndata.read_h5ad(path)
    predicted[:, 1:].copy().write_h5ad(path)
    gene = str(predicted.var_names[0])
    write_report(tmp_path / "runs", tmp_path / "all.html", gene=gene)
    html = (tmp_path / "all.html").read_text()
    assert f"{gene} is not in its panel" in html
    assert 'href="all_cut_B.html"' in html
    assert "it flatters" not in html
    assert "linear-gradient(to right, #440154" in html


def test_the_index_says_that_pcc_chose_where_it_did(ridge_home, tmp_path):
    shutil.copytree(ridge_home / "run", tmp_path / "runs/one")
    write_report(tmp_path / "runs", tmp_path / "all.html")
    assert "it flatters" in (tmp_path / "all.html").read_text()
    facts = json.loads((tmp_path / "runs/one/run.json").read_text())
    facts["plan"]["sections"] = str(tmp_path / "gone")
    (tmp_path / "runs/one/run.json").write_text(json.dumps(facts))
    write_report(tmp_path / "runs", tmp_path / "all.html")
    assert "it flatters" not in (tmp_path / "all.html").read_text()


def test_intervals_of_shares_have_a_width_at_their_ends():
    low, high = wilson(np.array([0.0, 1.0]), np.array([5, 5]))
    assert low[0] == 0 < 0.3 < high[0]
    assert high[1] == 1 > 0.7 > low[1]
