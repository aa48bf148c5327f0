"""What a prediction and its scores tell of sections and spots unlike those of the training or the truth."""

from dataclasses import replace

import anndata
import pytest

import genar
from commands import run
from genar.assess import evaluate_run
from genar.data import contract, read_section, read_sections
from genar.errors import InputError
from genar.inference import pitch_note, predict_run
from genar.models.checkpoint import load_checkpoint


@pytest.mark.parametrize(("section", "told"), [("A", True), ("B", False)])
def test_scores_on_a_section_of_the_training_say_so(section, told, fine_home, tmp_path, monkeypatch, capsys):
    out = tmp_path / "p.h5ad"
    assert (
        run(monkeypatch, "predict", f"{fine_home / 'tissue'}:{section}", "--model", fine_home / "run", "--out", out)
        == 0
    )
    said = [capsys.readouterr()]
    truth = fine_home / "tissue" / "st" / f"{section}.h5ad"
    assert run(monkeypatch, "evaluate", out, truth, "--out", tmp_path / "scores", "--resamples", "10") == 0
    said.append(capsys.readouterr())
    assert run(monkeypatch, "report", out, "--truth", truth, "--out", tmp_path / "report.html") == 0
    note = f"the model was trained on section {section}"
    for one in said:
        assert (note in " ".join((one.out + one.err).split())) == told
    assert (note in (tmp_path / "report.html").read_text()) == told


@pytest.mark.parametrize(("spacing", "told"), [(110, False), (220, True)])
def test_neighbours_at_another_distance_than_in_training_are_told(fine_home, tmp_path, spacing, told):
    checkpoint = load_checkpoint(fine_home / "run")
    slide = read_section(fine_home / "tissue" / "wsis" / "B.tif", spacing_um=spacing, mpp=0.7)
    assert checkpoint.training["pitch_um"] == pytest.approx(110)
    assert not pitch_note(checkpoint, slide)  # this one looks at no neighbours
    looking = replace(checkpoint, features={**checkpoint.features, "context_spots": [6]})
    note = "neighbours 110 um away, as in its training; here are 220 um; --spacing-um 110 lays them so"
    assert (note in pitch_note(looking, slide)) == told


def test_a_model_of_whole_sections_tells_of_another_distance(home):
    checkpoint = load_checkpoint(home / "run")
    checkpoint.features["context_spots"] = []
    slide = genar.place_spots(home / "tissue" / "wsis" / "S2.tif", mpp=2.0, spacing_um=60)
    assert not pitch_note(checkpoint, slide)
    checkpoint.model.unit = "section"
    assert "looks at neighbours 110 um away" in pitch_note(checkpoint, slide)


@pytest.mark.parametrize(("width", "told"), [(55, False), (60, False), (100, True), (0, False)])
def test_spots_of_another_width_than_in_training_are_told(fine_home, width, told):
    checkpoint, section = load_checkpoint(fine_home / "run"), read_section(fine_home / "tissue" / "st" / "B.h5ad")
    section.uns[contract.GENAR][contract.SPOT_DIAMETER_UM] = float(width)
    said: list[str] = []
    predict_run(section, checkpoint, None, features=fine_home / "features", say=said.append)
    note = f"note: counts are of spots 55 um wide, as in the model's training; here they are {width} um wide"
    assert (note in said) == told


@pytest.mark.parametrize("told", [0, -5, "far", None, float("inf"), float("nan")])
def test_a_distance_of_spots_that_is_none_is_not_used(fine_home, told):
    checkpoint = load_checkpoint(fine_home / "run")
    lengths = {"pitch_um": told, "spot_diameter_um": told}
    strange = replace(checkpoint, training={**checkpoint.training, **lengths})
    assert (strange.pitch_um, strange.spot_um) == (0, 0)


def test_a_truth_whose_spots_lie_elsewhere_is_refused(fine_home, tmp_path, monkeypatch, capsys):
    """Though its names are the same."""
    out = tmp_path / "p.h5ad"
    assert run(monkeypatch, "predict", f"{fine_home / 'tissue'}:B", "--model", fine_home / "run", "--out", out) == 0
    predicted = anndata.read_h5ad(out)
    predicted.obsm[contract.SPATIAL] = predicted.obsm[contract.SPATIAL] + 3000
    predicted.uns[contract.GENAR][contract.SECTION] = "C"
    predicted.write_h5ad(out)
    truth = fine_home / "tissue" / "st" / "B.h5ad"
    assert run(monkeypatch, "evaluate", out, truth, "--out", tmp_path / "scores") == 2
    assert "um from where the prediction of C has it; are both of the same section, with one --mpp" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_truth_of_the_same_name_that_lies_elsewhere_is_refused(home, tmp_path, monkeypatch, capsys):
    predicted = anndata.read_h5ad(home / "run" / "predictions" / "S2.h5ad")
    truth = read_section(f"{home / 'tissue'}:S2")
    truth.obsm["spatial"] = truth.obsm["spatial"][:, ::-1] + 5000
    with pytest.raises(InputError, match="um from where the prediction of S2 has it"):
        genar.score(predicted, truth)


@pytest.fixture(scope="module")
def sections(tissue):
    return read_sections(tissue)


def test_evaluation_tells_of_another_section(prediction, sections, tmp_path):
    truth = sections[0][: prediction.n_obs].copy()
    other = prediction[: truth.n_obs].copy()
    other.obs_names = truth.obs_names
    result = evaluate_run(other, truth, tmp_path / "scores", resamples=0)
    assert "the truth is of section SIM1, the prediction of SIM2" in result.notes


def test_a_prediction_records_what_was_used_and_tells_what_was_not(lite0, held_out, capsys, monkeypatch, tmp_path):
    out = tmp_path / "p.h5ad"
    words = [
        "predict",
        f"{lite0 / 'tissue'}:B",
        "--model",
        lite0 / "ridge",
        "--out",
        out,
        "--features",
        lite0 / "store",
    ]
    assert (
        run(monkeypatch, *words, "--samples", "9", "--set", "temperature=0.2", "--set", "layers=[log1p_mean,sd]") == 0
    )
    assert "does not use, or have, temperature, samples, layer sd" in capsys.readouterr().out
    made = anndata.read_h5ad(out).uns["genar"]["prediction"]
    assert list(made["layers"]) == ["log1p_mean"]
    assert not {"samples", "temperature", "seed"} & set(made)
    made = genar.predict(held_out, lite0 / "run", features=lite0 / "store", samples=2, progress=False)
    told = made.uns["genar"]["prediction"]
    assert (told["samples"], set(told["layers"])) == (2, set(contract.layer_names(made)))
