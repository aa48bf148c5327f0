"""``--image``, ``--mpp``, ``--bin-um``: what formats must be told, and where telling does nothing."""

import json
import shutil

import anndata
import numpy as np
import pytest
import tifffile

from commands import run, told
from genar.data import contract
from genar.data.truth import read_truth
from section_files import write_hd, write_spatialdata, write_visium
from toy_bench import write_recipe

RIDGE = ("--model", "ridge", "--panel", "highest_mean", "--n-genes", "3", "--views", "1")
NARROW = ("--encoder", "genar.bench.toy:narrow_encoder")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_image(path, size_px=(2000, 1800)):
    path.parent.mkdir(exist_ok=True)
    squares = np.random.default_rng(0).integers(0, 255, (size_px[1] // 50, size_px[0] // 50, 3), dtype=np.uint8)
    pixels = squares.repeat(50, axis=0).repeat(50, axis=1)  # finer noise shows nothing at an encoder's scale
    tifffile.imwrite(path, pixels, photometric="rgb")


@pytest.fixture
def visium(tmp_path):
    """Two Space Ranger outputs, and their images apart."""
    for section in ("P1", "P2"):
        write_visium(tmp_path / "visium" / section / "outs")
        write_image(tmp_path / "images" / f"{section}.tif")
    return tmp_path / "visium"


def test_train_asks_for_the_image_before_it_selects_a_panel(visium, monkeypatch, capsys):
    words = ("train", visium, "--test", "P2", "--out", "run", *RIDGE, *NARROW)
    assert run(monkeypatch, *words) == 2
    told = capsys.readouterr()
    assert "selecting" not in told.out
    assert "section P1: no slide image for its features; pass --image FILE, or --image FOLDER that holds P1.tif" in (
        told.err
    )
    assert "wsis" not in told.err
    assert run(monkeypatch, *words, "--image", "images") == 0


def test_imported_features_need_no_image(visium, tmp_path, monkeypatch, capsys):
    (tmp_path / "made").mkdir()
    for section in ("P1", "P2"):
        np.save(tmp_path / "made" / f"{section}.npy", np.random.default_rng(0).normal(size=(30, 5)).astype("f4"))
    words = ("train", visium, "--test", "P2", "--out", "run", *RIDGE, "--features", "store", "--encoder", "import:mine")
    assert run(monkeypatch, *words) == 2
    told = capsys.readouterr()
    assert "selecting" not in told.out
    assert "those of section P1 are not in the store" in told.err
    assert run(monkeypatch, "features", visium, "--import", "made", "--encoder", "mine", "--out", "store") == 0
    assert run(monkeypatch, *words) == 0


def test_a_bench_on_space_ranger_asks_for_images_and_takes_them(visium, tmp_path, monkeypatch, capsys):
    words = ("bench", write_recipe(tmp_path), "--data", visium, "--out", "out", "--features", "store")
    asks = "images of 2 sections (P1, P2); pass --image FOLDER that holds <id>.tif of each"
    assert run(monkeypatch, *words, "--dry-run") == 0
    assert f"missing: {asks}" in capsys.readouterr().out
    assert run(monkeypatch, *words) == 2
    assert asks in capsys.readouterr().err
    (tmp_path / "images" / "P2.tif").rename(tmp_path / "P2.tif")
    assert run(monkeypatch, *words, "--image", "images", "--dry-run") == 0
    assert "missing: images of 1 sections (P2) in images" in capsys.readouterr().out
    assert run(monkeypatch, *words, "--image", "P2.tif") == 2
    assert "one image for 2 sections" in capsys.readouterr().err
    (tmp_path / "P2.tif").rename(tmp_path / "images" / "P2.tif")
    assert run(monkeypatch, *words, "--image", "images", "--dry-run") == 0
    assert "missing" not in capsys.readouterr().out
    assert run(monkeypatch, *words, "--image", "images") == 0
    assert (tmp_path / "out" / "table.md").is_file()


def test_a_bench_pools_visium_hd_as_it_is_told(tmp_path, monkeypatch, capsys):
    for section in ("P1", "P2"):
        write_hd(tmp_path / "hd" / section / "outs")
        write_image(tmp_path / "images" / f"{section}.tif")
    words = ("bench", write_recipe(tmp_path), "--data", "hd", "--out", "out", "--image", "images")
    assert run(monkeypatch, *words, "--bin-um", "32") == 0
    assert run(monkeypatch, *words, "--bin-um", "32", "--dry-run") == 0
    assert "2 runs, 2 of them there already" in capsys.readouterr().out
    assert run(monkeypatch, *words, "--dry-run") == 0  # other spots are other runs
    assert "2 runs, 0 of them there already" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_a_bench_on_spatialdata_asks_for_the_pixel_size(tmp_path, monkeypatch, capsys):
    for section in ("P1", "P2"):
        write_spatialdata(tmp_path / "stores" / f"{section}.zarr")
    words = ("bench", write_recipe(tmp_path), "--data", "stores", "--out", "out")
    assert run(monkeypatch, *words, "--dry-run") == 0
    assert "missing: section P1: no pixel size" in capsys.readouterr().out
    assert run(monkeypatch, *words) == 2
    assert "pass --mpp" in capsys.readouterr().err
    assert run(monkeypatch, *words, "--mpp", "0.6", "--dry-run") == 0
    assert "missing" not in capsys.readouterr().out
    assert run(monkeypatch, *words, "--mpp", "0.6") == 0


def made_on(folder, monkeypatch, *words):
    """A ridge trained on a folder of P1 and P2; its prediction of P2 lies apart from the run."""
    assert run(monkeypatch, "train", folder, "--test", "P2", "--out", "run", *RIDGE, *NARROW, *words) == 0
    anndata.read_h5ad("run/predictions/P2.h5ad").write_h5ad("alone.h5ad")


@pytest.mark.filterwarnings("ignore")
def test_a_truth_without_a_pixel_size_has_the_predictions(tmp_path, monkeypatch, capsys):
    for section in ("P1", "P2"):
        write_spatialdata(tmp_path / "stores" / f"{section}.zarr")
    made_on("stores", monkeypatch, "--mpp", "0.6")
    for source in ("alone.h5ad", "run"):
        assert run(monkeypatch, "report", source, "--truth", "stores/P2.zarr") == 0
        assert "beside the measured counts" in (tmp_path / "report.html").read_text()
    assert run(monkeypatch, "evaluate", "alone.h5ad", "stores:P2", "--out", "scores") == 0
    capsys.readouterr()
    assert run(monkeypatch, "report", "alone.h5ad", "--truth", "stores:P2", "--mpp", "6") == 2
    assert "are both of the same section, with one --mpp and --bin-um?" in capsys.readouterr().err


def test_a_truth_of_visium_hd_is_pooled_as_the_prediction(tmp_path, monkeypatch, capsys):
    for section in ("P1", "P2"):
        write_hd(tmp_path / "hd" / section / "outs")
        write_image(tmp_path / "images" / f"{section}.tif")
    made_on("hd", monkeypatch, "--bin-um", "32", "--image", "images")
    assert run(monkeypatch, "report", "alone.h5ad", "--truth", "hd:P2") == 0
    assert "beside the measured counts" in (tmp_path / "report.html").read_text()
    assert run(monkeypatch, "evaluate", "alone.h5ad", "hd:P2", "--out", "scores") == 0
    assert json.loads((tmp_path / "scores/metrics.json").read_text())["P2"]["prediction"]["n_spots"] == 49
    capsys.readouterr()
    assert run(monkeypatch, "report", "alone.h5ad", "--truth", "hd:P2", "--bin-um", "16") == 2
    assert "--bin-um" in capsys.readouterr().err


def test_a_report_takes_the_image_from_elsewhere(visium, tmp_path, monkeypatch, capsys):
    made_on(visium, monkeypatch, "--image", "images")
    (tmp_path / "images").rename(tmp_path / "moved")
    assert run(monkeypatch, "report", "run") == 0
    without = (tmp_path / "report.html").read_text()
    assert "data:image/jpeg" in without  # the small picture that the prediction carries
    assert "beside the measured counts" not in without
    assert run(monkeypatch, "report", "run", "--image", "moved") == 0
    page = (tmp_path / "report.html").read_text()
    assert "data:image/jpeg" in page
    assert "beside the measured counts" in page
    write_image(tmp_path / "small" / "P2.tif", (700, 600))
    capsys.readouterr()
    for words, says in (
        (("run", "--image", "small"), "lie outside the image"),
        ((".", "--image", "moved"), "not with a folder of runs"),
        (("run", "--image", "nowhere"), "no such image"),
    ):
        assert run(monkeypatch, "report", *words) == 2
        assert says in capsys.readouterr().err


def test_a_truth_in_px_of_another_image_keeps_its_own_pixel_size(visium, tmp_path, monkeypatch):
    made_on(visium, monkeypatch, "--image", "images")
    predicted = anndata.read_h5ad("alone.h5ad")
    predicted.obsm["spatial"] = predicted.obsm["spatial"] / 2
    predicted.uns["genar"]["mpp"] = 2 * predicted.uns["genar"]["mpp"]
    section = read_truth(f"{visium}:P2", predicted)
    assert contract.mpp(section) == pytest.approx(0.5, rel=0.01)
    assert contract.mpp(read_truth(f"{visium}:P2", predicted, mpp=0.3)) == 0.3
    predicted = anndata.read_h5ad("alone.h5ad")
    predicted.uns["genar"]["mpp"] = 0.25  # told so when it was made
    assert contract.mpp(read_truth(f"{visium}:P2", predicted)) == 0.25


@pytest.mark.parametrize(
    ("words", "unused"),
    [
        (
            "features TISSUE --import . --encoder my --patch genar --views 8 --precision bf16 --batch-size 3",
            "--patch, --views, --precision, --batch-size",
        ),
        ("bench her2st_small --out OUT --toy --data x --features y --mpp 0.1", "--data, --features, --mpp"),
        ("panel TISSUE --recipe hvg --n-top 5 --out OUT", "--n-top"),
        ("report PREDICTION --mpp 0.3 --bin-um 8 --out OUT.html", "--bin-um, --mpp"),
        ("train TISSUE --bin-um 8 --test S2 --out OUT", "--bin-um is for format visium_hd"),
        ("features TISSUE --spacing-um 50 --out OUT", "--spacing-um is for format slide"),
    ],
)
def test_options_that_would_do_nothing_are_refused(home, tmp_path, monkeypatch, capsys, words, unused):
    shutil.copy(home / "run" / "predictions" / "S2.h5ad", tmp_path / "p.h5ad")
    places = {"TISSUE": home / "tissue", "OUT": tmp_path / "o", "OUT.html": tmp_path / "o.html"}
    places["PREDICTION"] = tmp_path / "p.h5ad"
    assert run(monkeypatch, *(places.get(word, word) for word in words.split())) == 2
    assert unused in told(capsys)
