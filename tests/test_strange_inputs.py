"""What users' lists, counts and own code may hold: each is taken, or refused in a line."""

from dataclasses import replace

import anndata
import pytest

from commands import run
from genar.data import contract, read_section
from genar.data.reading import pitch_px
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


def test_what_a_model_of_simulated_tissue_says_of_a_slide_is_marked(fine_home, tmp_path, monkeypatch, capsys):
    out, slide = tmp_path / "p.h5ad", fine_home / "tissue" / "wsis" / "B.tif"
    assert run(monkeypatch, "predict", slide, "--model", fine_home / "run", "--out", out, "--mpp", 0.7) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "note: the model was trained on SIMULATED tissue" in said
    assert "features of" in said  # what takes long is told of before
    assert contract.simulated(anndata.read_h5ad(out))
    assert run(monkeypatch, "report", out, "--out", tmp_path / "report.html") == 0
    page = (tmp_path / "report.html").read_text()
    assert "no measured counts, by a model of SIMULATED tissue" in page
    assert "the model was trained on SIMULATED tissue" in page


@pytest.mark.parametrize(("spacing", "told"), [(110, False), (220, True)])
def test_neighbours_at_another_distance_than_in_training_are_told(fine_home, tmp_path, spacing, told):
    checkpoint = load_checkpoint(fine_home / "run")
    slide = read_section(fine_home / "tissue" / "wsis" / "B.tif", spacing_um=spacing, mpp=0.7)
    assert checkpoint.training["pitch_um"] == pytest.approx(110)
    assert not pitch_note(checkpoint, slide)  # this one looks at no neighbours
    looking = replace(checkpoint, features={**checkpoint.features, "context_spots": [6]})
    note = "neighbours 110 um away, as in its training; here are 220 um; --spacing-um 110 lays them so"
    assert (note in pitch_note(looking, slide)) == told


@pytest.mark.parametrize(("given", "pitch"), [([], 110), (["--spacing-um", 220], 220)])
def test_spots_of_a_bare_slide_lie_as_far_apart_as_in_the_training(
    fine_home, tmp_path, monkeypatch, capsys, given, pitch
):
    out, slide = tmp_path / "p.h5ad", fine_home / "tissue" / "wsis" / "B.tif"
    assert run(monkeypatch, "predict", slide, "--model", fine_home / "run", "--out", out, "--mpp", 0.7, *given) == 0
    predicted = anndata.read_h5ad(out)
    assert pitch_px(predicted.obsm["spatial"]) * 0.7 == pytest.approx(pitch)
    assert f"{predicted.n_obs} spots, {pitch} um apart" in capsys.readouterr().out


def test_spots_of_a_bare_slide_are_as_wide_as_in_the_training(fine_home):
    """What a spot of 100 um has captured is not what one of 55 um has; and patches ``stem`` are as wide as the spot."""
    checkpoint, slide = load_checkpoint(fine_home / "run"), fine_home / "tissue" / "wsis" / "B.tif"
    assert checkpoint.training["spot_diameter_um"] == 55
    wide = replace(checkpoint, training={**checkpoint.training, "spot_diameter_um": 100.0})
    store = {"features": fine_home / "features"}
    of_55, of_100 = (predict_run(slide, one, None, reading={"mpp": 0.7}, **store) for one in (checkpoint, wide))
    assert [contract.spot_diameter_px(one) * 0.7 for one in (of_55, of_100)] == pytest.approx([55, 100])
    (picture,) = of_100.uns["spatial"].values()  # what scanpy draws by
    assert picture["scalefactors"]["spot_diameter_fullres"] == pytest.approx(100 / 0.7)
    told = predict_run(slide, wide, None, reading={"mpp": 0.7, "spot_um": 70}, **store)
    assert contract.spot_diameter_px(told) * 0.7 == pytest.approx(70)


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
