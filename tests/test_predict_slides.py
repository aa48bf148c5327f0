"""From a bare slide to a prediction."""

import json
import shutil
from dataclasses import replace

import anndata
import numpy as np
import pytest
from PIL import Image

from commands import run, sets
from genar.data import contract
from genar.data.reading import pitch_px
from genar.inference import predict_run
from genar.models.checkpoint import load_checkpoint

TINY = ["width=16", "depth=1", "heads=2", "components=4", "max_epochs=1", "batch_size=16"]
SET = sets(*TINY)


@pytest.fixture(scope="module")
def model(two, tmp_path_factory):
    out, store = tmp_path_factory.mktemp("run") / "run", tmp_path_factory.mktemp("features")
    words = ["train", two, "--out", out, "--features", store, "--n-genes", "20", "--views", "1", *SET]
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *words) == 0
    return out


def test_predict_takes_a_bare_slide(model, two, tmp_path, monkeypatch, capsys):
    slide = shutil.copy(two / "wsis" / "B.tif", tmp_path / "scan.tif")
    out = tmp_path / "out" / "pred.h5ad"
    words = ["predict", slide, "--model", model, "--out", out, "--spacing-um", "150", "--samples", "2", "--json"]
    assert run(monkeypatch, *words) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    predicted = anndata.read_h5ad(out)
    assert predicted.shape == (told["n_spots"], 20)
    assert predicted.n_obs > 10
    assert (predicted.X.data == np.rint(predicted.X.data)).all()
    assert predicted.uns["genar"]["source"] == "slide"
    assert (np.diff(np.unique(predicted.obsm["spatial"][:, 0])) * 0.7).min() == pytest.approx(150, rel=1e-3)
    with Image.open(tmp_path / "out" / "pred_tissue.png") as overlay:
        assert min(overlay.size) > 400


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: Image.new("RGB", (300, 300), "white").save(p), "--mpp"),
        (lambda p: p.write_bytes(b"no image"), "not a readable image"),
    ],
)
def test_predict_refuses_slides_it_cannot_use(make, says, model, tmp_path, monkeypatch, capsys):
    make(tmp_path / "scan.png")
    out = tmp_path / "out" / "pred.h5ad"
    assert run(monkeypatch, "predict", tmp_path / "scan.png", "--model", model, "--out", out) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert says in errors[0]
    assert not out.parent.exists()


def test_slides_without_counts_cannot_be_trained_on(two, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "train", two / "wsis", "--test", "B", "--out", tmp_path / "run") == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint").exists()


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
