"""The page of a run or a prediction: its matrices, scores, groups, provenance and truth."""

import base64
import json
import re
import shutil
import zlib

import anndata
import numpy as np
import pytest
from bokeh.models import ColorBar

from commands import run
from genar.data import contract, read_sections
from genar.errors import InputError
from genar.prediction import write_prediction
from genar.report.figures import PANELS, spot_maps
from genar.report.index import write_report
from genar.report.matrices import pack
from genar.report.page import page_html, write_page
from genar.report.subject import Subject, subjects


def unpack(packed, n_genes):
    values = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), dtype=packed["type"])
    return (values.reshape(n_genes, -1) * np.array(packed["step"])[:, None]).T


@pytest.mark.parametrize("values", [[[0, 70000], [3, 1]], [[0.0, 0.123], [9.75, 0.456]], [[0, 0], [0, 0]]])
def test_a_packed_matrix_holds_its_values(values):
    values = np.array(values)
    found = unpack(pack(values), values.shape[1])
    tolerance = 0 if values.dtype.kind == "i" else values.max(axis=0) / 65535
    assert (np.abs(found - values) <= tolerance).all()


def payload_of(html):
    return json.loads(re.search(r'id="payload">(.*?)</script>', html, re.S)[1])


def test_the_page_of_a_run_holds_counts_scores_groups_and_provenance(report_run, tissue):
    subject = subjects(report_run)[0]
    html = page_html(subject)
    payload = payload_of(html)
    predicted = anndata.read_h5ad(report_run / "predictions" / "SIM2.h5ad")
    (truth,) = [one for one in read_sections(tissue) if contract.name(one) == "SIM2"]
    genes = list(predicted.var_names)
    assert payload["genes"] == genes
    for name, expected in {
        "measured": contract.counts(truth, genes),
        "counts": contract.counts(predicted, genes),
        "low": predicted.layers["q05"],
        "high": predicted.layers["q95"],
    }.items():
        np.testing.assert_array_equal(unpack(payload["matrices"][name], len(genes)), expected)
    np.testing.assert_allclose(
        unpack(payload["matrices"]["mean"], len(genes)), predicted.layers["mean"], rtol=1e-4, atol=1e-2
    )
    for row in payload["groups"]:
        assert sorted(gene for group in row for gene in group) == list(range(len(genes)))
    assert [len(row) for row in payload["groups"]] == list(subject.scales.sizes)
    found = json.loads((report_run / "intervals.json").read_text())["SIM2"]
    value, low, high = found["methods"]["ridge"]["mse"]
    assert f"{value:.3f} <small>{low:.3f} to {high:.3f}</small>" in html
    for words in (
        "genar_mean minus ridge",
        "SIM1",
        "efficientnet_lite0",
        "not for clinical decisions",
        "Validation MSE",
    ):
        assert words in html
    assert "://" not in re.sub(r"<script.*?</script>", "", html, flags=re.S)  # nothing is asked of the network


def test_a_prediction_alone_has_no_truth_and_none_is_made_up(report_run, tmp_path):
    alone = shutil.copy(report_run / "predictions" / "SIM2.h5ad", tmp_path / "alone.h5ad")
    (subject,) = subjects(alone)
    payload = payload_of(page_html(subject))
    assert subject.truth is None
    assert "measured" not in payload["matrices"]
    assert set(payload["table"]) == {"mean predicted"}
    assert payload["groups"] == []


def test_truth_of_another_order_is_put_in_the_predictions_order(report_run, tissue, tmp_path):
    alone = tmp_path / "alone.h5ad"
    predicted = anndata.read_h5ad(report_run / "predictions" / "SIM2.h5ad")
    predicted[::-1].copy().write_h5ad(alone)
    (subject,) = subjects(alone, f"{tissue}:SIM2")
    assert list(subject.truth.obs_names) == list(predicted.obs_names)[::-1]
    assert subject.scores["pcc_200"] == pytest.approx(subjects(report_run)[0].scores["pcc_200"])
    assert set(subject.methods) == {"prediction", "prediction_mean"}


def test_truth_of_another_section_is_refused_or_told(report_run, tissue, tmp_path):
    moved = anndata.read_h5ad(report_run / "predictions" / "SIM2.h5ad")
    moved.obsm["spatial"] = moved.obsm["spatial"] + 1000
    moved.write_h5ad(tmp_path / "moved.h5ad")
    with pytest.raises(InputError, match="are both of the same section"):
        subjects(tmp_path / "moved.h5ad", f"{tissue}:SIM2")
    moved.obsm["spatial"] = moved.obsm["spatial"] - 1000
    moved.uns[contract.GENAR][contract.SECTION] = "OTHER"
    moved.write_h5ad(tmp_path / "moved.h5ad")
    (subject,) = subjects(tmp_path / "moved.h5ad", f"{tissue}:SIM2")
    assert "truth is of section SIM2" in subject.notes[0]


def test_a_run_whose_sections_are_gone_says_so(report_run, tmp_path):
    moved = shutil.copytree(report_run, tmp_path / "moved")
    facts = json.loads((moved / "run.json").read_text())
    facts["plan"]["sections"] = str(tmp_path / "nowhere")
    (moved / "run.json").write_text(json.dumps(facts))
    (subject,) = subjects(moved)
    assert subject.truth is None
    assert "--truth" in subject.notes[0]
    assert "--truth" in page_html(subject)


def test_names_from_files_do_nothing(report_run):
    subject = subjects(report_run)[0]
    evil = "</script><script>document.title='evil'</script>"
    subject.predicted.uns[contract.GENAR][contract.SECTION] = evil
    subject.predicted.obs_names = [evil, *subject.predicted.obs_names[1:]]
    subject = Subject(subject.predicted)
    subject.predicted.var_names = [evil, *subject.predicted.var_names[1:]]
    html = page_html(subject)
    assert evil not in html
    assert payload_of(html)["genes"][0] == evil
    nonces = set(re.findall(r'nonce="([^"]+)"', html))
    assert len(nonces) == 1
    assert f"script-src 'nonce-{nonces.pop()}'" in html


def test_colour_bars_have_titles_from_the_start(report_run):
    """Bokeh leaves no room for a title that comes later."""
    made = spot_maps(subjects(report_run)[0].predicted, PANELS)
    bars = [bar for plot in made.values() for bar in plot.below if isinstance(bar, ColorBar)]
    assert len(bars) == len(PANELS)
    assert all(bar.title for bar in bars)


def test_what_a_model_does_not_draw_is_left_out_of_how_it_decodes(report_run):
    subject = subjects(report_run)[0]
    assert "<dt>decoding</dt><dd>greedy, 2 trajectories, seed 0</dd>" in page_html(subject)
    made = subject.predicted.uns[contract.GENAR]["prediction"]
    subject.predicted.uns[contract.GENAR]["prediction"] = {"model": "ridge", "decode": "mean", "layers": made["layers"]}
    assert "<dt>decoding</dt><dd>mean</dd>" in page_html(subject)


def test_a_large_section_stays_below_15_mb(report_run, tmp_path):
    """4,000 spots and 200 genes, with every layer and the truth."""
    small = subjects(report_run)[0]
    spots = np.arange(4000) % small.predicted.n_obs
    random = np.random.default_rng(0)
    mean = random.gamma(2, 20, size=(4000, 200))
    low, high = random.poisson(mean), random.poisson(mean) + 30
    predicted = anndata.AnnData(random.poisson(mean).astype(np.float32), layers={"mean": mean, "q05": low, "q95": high})
    predicted.layers["p_zero"] = np.exp(-mean)
    predicted.obsm["spatial"] = small.predicted.obsm["spatial"][spots] + random.random((4000, 2))
    predicted.uns = small.predicted.uns
    subject = Subject(predicted, predicted.copy())
    path = write_page(subject, tmp_path / "large.html")
    assert path.stat().st_size < 15e6


@pytest.mark.parametrize("words", [["nowhere"], ["empty"], ["run", "--out", "x.txt"]])
def test_bad_input_is_told_in_a_line(words, report_run, tissue, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    places = {"nowhere": tmp_path / "nowhere", "empty": tmp_path / "empty", "run": report_run}
    words = [places.get(word, word.format(tissue=tissue)) for word in words]
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "report", *words) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.html"))


def test_a_prediction_without_positions_is_refused(tmp_path):
    anndata.AnnData(np.ones((2, 2), np.float32)).write_h5ad(tmp_path / "bare.h5ad")
    with pytest.raises(InputError, match="not a prediction"):
        write_report(tmp_path / "bare.h5ad", tmp_path / "page.html")


def test_the_page_counts_undefined_genes(ridge_home):
    (subject,) = subjects(ridge_home / "run")
    assert subject.methods["mean"]["n_undefined"] == 8
    html = page_html(subject)
    assert "n undefined" in html
    assert "<td>8</td>" in html


@pytest.mark.parametrize("named", [True, False])
def test_scores_of_a_page_are_of_the_truth_it_shows(home, tmp_path, named):
    made = tmp_path / "made"
    shutil.copytree(home, made)
    (before,) = subjects(made / "run")
    assert "ridge" in before.methods
    facts = json.loads((made / "run" / "run.json").read_text())
    facts["plan"]["sections"] = str(made / "tissue")
    (made / "run" / "run.json").write_text(json.dumps(facts))
    path = made / "tissue" / "st" / "S2.h5ad"
    other = anndata.read_h5ad(path)
    other.X = np.random.default_rng(0).poisson(5, other.shape).astype(np.float32)
    other.write_h5ad(path)
    (after,) = subjects(made / "run", f"{made / 'tissue'}:S2" if named else None)
    assert "the truth is not the one that the run scored: the scores are of the one shown here" in after.notes
    assert set(after.methods) == {"prediction", "prediction_mean"}
    assert after.methods["prediction_mean"]["pcc_200"][0] == pytest.approx(after.scores["pcc_200"])
    assert abs(after.scores["pcc_200"]) < 0.2


@pytest.fixture
def file(prediction, tmp_path):
    return write_prediction(prediction, tmp_path / "pred.h5ad")


def test_a_page_shows_the_gene_that_was_asked_for(file, prediction, tmp_path, monkeypatch, capsys):
    gene = prediction.var_names[3]
    assert run(monkeypatch, "report", file, "--out", tmp_path / "r.html", "--gene", gene) == 0
    assert f'"first":"{gene}"' in (tmp_path / "r.html").read_text()
    assert run(monkeypatch, "report", file, "--out", tmp_path / "other.html", "--gene", "NOPE") == 2
    assert not (tmp_path / "other.html").exists()


def test_a_section_is_no_prediction_to_report_on(home, tmp_path, monkeypatch, capsys):
    section = home / "tissue" / "st" / "S2.h5ad"
    assert run(monkeypatch, "report", section, "--out", tmp_path / "r.html") == 2
    assert "expected a prediction" in capsys.readouterr().err
