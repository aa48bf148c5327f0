"""What a command may write over: its own results, whole, and nothing of the user's."""

import json
import shutil

import anndata
import numpy as np
import pytest
from PIL import Image

from commands import run, told
from genar.data import contract, read_sections
from genar.data.simulate import TissueConfig, write_tissue
from genar.errors import InputError
from genar.export import refuse_foreign, write_export
from genar.prediction import write_prediction

PREDICT = ("--mpp", 2.0, "--samples", 1, "--encoder", "genar.bench.toy:narrow_encoder")


def test_files_of_others_are_not_written_over(home, tmp_path, monkeypatch, capsys):
    prediction, truth = home / "run" / "predictions" / "S2.h5ad", f"{home / 'tissue'}:S2"
    files = {
        "ann.geojson": '{"type": "FeatureCollection", "features": []}', "page.html": "<html>mine</html>",
        "mine/metrics.csv": "gene,score\n", "mine/groups.csv": "mine\n", "vit/vitessce.json": "{}",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for words in (
        ("export", prediction, "--out", tmp_path / "ann.geojson"),
        ("export", prediction, "--format", "vitessce", "--out", tmp_path / "vit"),
        ("report", prediction, "--out", tmp_path / "page.html"),
        ("report", home, "--out", tmp_path / "page.html"),
        ("evaluate", prediction, truth, "--out", tmp_path / "mine"),
        ("evaluate", prediction, truth, "--out", home / "run"),
        ("groups", home / "run", "--out", tmp_path / "mine"),
    ):
        assert run(monkeypatch, *words) == 2, words
        assert "choose another" in capsys.readouterr().err, words
    assert {name: (tmp_path / name).read_text() for name in files} == files
    for _ in range(2):  # its own are
        assert run(monkeypatch, "export", prediction, "--out", tmp_path / "p.geojson") == 0
        assert run(monkeypatch, "report", prediction, "--out", tmp_path / "p.html") == 0
        assert run(monkeypatch, "evaluate", prediction, truth, "--out", tmp_path / "e", "--resamples", 0) == 0
        assert run(monkeypatch, "groups", home / "run", "--out", tmp_path / "g") == 0


def bare(home, where):
    """A slide by itself in a new folder, as PNG."""
    where.mkdir()
    with Image.open(home / "tissue" / "wsis" / "S2.tif") as image:
        image.convert("RGB").save(where / "A.png")
    return where / "A.png"


def test_a_picture_takes_no_slides_place(home, tmp_path, monkeypatch, capsys):
    slide = bare(home, tmp_path / "slides")
    before = slide.read_bytes()
    assert run(monkeypatch, "check", slide.parent, "--mpp", 2.0, "--out", slide.parent) == 2
    assert "A.png: is there already, and no picture of GenAR's" in capsys.readouterr().err
    own = slide.rename(tmp_path / "slides" / "scan_tissue.png")
    words = ("predict", own, "--model", home / "run", "--features", tmp_path / "store", *PREDICT)
    assert run(monkeypatch, *words, "--out", tmp_path / "slides" / "scan.h5ad") == 2
    assert "scan_tissue.png: is there already" in capsys.readouterr().err
    assert own.read_bytes() == before
    assert not (tmp_path / "slides" / "scan.h5ad").exists()
    for _ in range(2):  # its own it writes again
        assert run(monkeypatch, *words, "--out", tmp_path / "p.h5ad") == 0


@pytest.mark.parametrize("command", ["evaluate", "groups", "check", "report", "panel", "export"])
def test_an_out_below_a_file_is_one_line(home, tmp_path, monkeypatch, capsys, command):
    (tmp_path / "file").write_text("x")
    prediction = home / "run" / "predictions" / "S2.h5ad"
    inside = {"report": "file/x.html", "panel": "file/x.json", "export": "file/x.geojson"}.get(command, "file")
    words = {
        "evaluate": (prediction, f"{home / 'tissue'}:S2", "--resamples", 0), "groups": (home / "run",),
        "check": (home / "tissue",), "panel": (home / "tissue", "--n-genes", 5),
    }.get(command, (prediction,))  # fmt: skip
    assert run(monkeypatch, command, *words, "--out", tmp_path / inside) == 2
    assert "found a file in its place" in capsys.readouterr().err


def words_of_export(home, *words):
    return ["export", home / "run" / "predictions" / "B.h5ad", *words]


@pytest.mark.parametrize(
    ("out", "words", "says"),
    [
        ("A.tif", ["--format", "geojson"], "name it A.geojson"),
        ("A.tif", ["--format", "spatialdata"], "name it A.zarr"),
        ("A.tif", ["--format", "vitessce"], "a file lies there"),
        ("panel.json", [], "no prediction of GenAR's"),
        ("mine.tmap", [], "no prediction of GenAR's"),
        ("file.zarr", [], "a file lies there"),
        ("view", ["--format", "vitessce"], "no prediction of GenAR's"),
    ],
)
def test_an_export_overwrites_nothing_of_the_users(lite0, out, words, says, tmp_path, monkeypatch, capsys):
    if out in ("view", "file.zarr") or words:
        pytest.importorskip("vitessce", reason="vitessce is not installed: its folders are not tried")
    shutil.copy(lite0 / "run" / "panel.json", tmp_path / "panel.json")
    (tmp_path / "view").mkdir()
    for name in ("A.tif", "mine.tmap", "file.zarr", "view/vitessce.json", "view/notes.txt"):
        (tmp_path / name).write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(monkeypatch, *words_of_export(lite0, "--out", tmp_path / out, *words)) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["predict", "TISSUE:B", "--model", "RUN", "--format", "h5ad", "--out", "TISSUE/wsis/B.tif"],
            "name it B.h5ad",
        ),
        (["panel", "TISSUE", "--n-genes", "5", "--out", "TISSUE/st/A.h5ad"], "name it A.json"),
        (["panel", "TISSUE", "--n-genes", "5", "--out", "TISSUE/metadata/A.json"], "no panel"),
    ],
)
def test_no_result_takes_the_place_of_a_section(lite0, words, says, tmp_path, monkeypatch, capsys):
    tissue = shutil.copytree(lite0 / "tissue", tmp_path / "tissue")
    before = {path: path.read_bytes() for path in tissue.rglob("*") if path.is_file()}
    words = [word.replace("TISSUE", str(tissue)).replace("RUN", str(lite0 / "run")) for word in words]
    assert run(monkeypatch, *words) == 2
    assert says in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tissue.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("mine", ["st/A.h5ad", "wsis/A.tif"])
def test_simulated_tissue_takes_the_place_of_no_measured_one(mine, held_out, tmp_path):
    config = TissueConfig(n_rows=4, n_cols=4, n_genes=80, mpp=2.0, counts_per_nucleus=20)
    for _ in range(2):  # its own it may write again
        write_tissue(tmp_path, ("A",), config=config)
    shutil.rmtree(tmp_path / ("wsis" if mine.startswith("st") else "st"))
    if mine.startswith("st"):
        del held_out.uns["simulated"]
        held_out.write_h5ad(tmp_path / mine)
    else:
        from tifffile import imwrite

        imwrite(tmp_path / mine, np.zeros((8, 8), np.uint8))
    before = (tmp_path / mine).read_bytes()
    with pytest.raises(InputError, match="not simulated"):
        write_tissue(tmp_path, ("B", "A"), config=config)
    assert (tmp_path / mine).read_bytes() == before
    assert not (tmp_path / "st" / "B.h5ad").exists()


@pytest.fixture(scope="module")
def sections(tissue):
    return read_sections(tissue)


def test_predict_does_not_overwrite_what_was_measured(sections, tissue, prediction, tmp_path, monkeypatch, capsys):
    measured = tmp_path / "SIM2.h5ad"
    sections[1].write_h5ad(measured)
    before = measured.read_bytes()
    words = ["predict", measured, "--model", tmp_path / "nowhere", "--out", measured]
    assert run(monkeypatch, *words) == 2
    assert "no prediction of GenAR's" in capsys.readouterr().err
    assert measured.read_bytes() == before
    store = tmp_path / "S1.zarr"
    (store / "tables").mkdir(parents=True)
    with pytest.raises(InputError, match="no prediction of GenAR's"):
        write_export(prediction, store)
    assert (store / "tables").is_dir()


def test_a_project_of_tissuumaps_leaves_the_slide_beside_it_alone(prediction, tmp_path):
    for name in ("S.tif", "S.csv"):
        (tmp_path / name).write_text("mine")
    write_export(prediction, tmp_path / "S.tmap")
    assert [(tmp_path / name).read_text() for name in ("S.tif", "S.csv")] == ["mine", "mine"]
    assert (tmp_path / "S_tmap.csv").is_file()


# --- its own it may


def test_what_genar_exported_is_written_again(held_out_prediction, tmp_path):
    for name in ("p.geojson", "p.json", "p.tmap"):
        for _ in range(2):
            write_export(held_out_prediction, tmp_path / name)
    pytest.importorskip("spatialdata", reason="spatialdata is not installed: its stores are not tried")
    store = write_export(held_out_prediction, tmp_path / "p.zarr")["spatialdata"]
    refuse_foreign(store)
    (store / "shapes" / "annotations").mkdir()
    with pytest.raises(InputError, match="no prediction of GenAR's"):
        refuse_foreign(store)


@pytest.fixture
def file(prediction, tmp_path):
    return write_prediction(prediction, tmp_path / "pred.h5ad")


def test_a_prediction_is_replaced_by_another(file, prediction, monkeypatch, tissue, tmp_path):
    """What GenAR wrote may be written again."""
    from genar.export import refuse_foreign

    refuse_foreign(file)
    write_export(prediction, tmp_path / "x.zarr")
    write_export(prediction, tmp_path / "x.zarr")
    assert "prediction" in anndata.read_h5ad(file).uns[contract.GENAR]


@pytest.fixture
def predicted(home):
    return anndata.read_h5ad(home / "run" / "predictions" / "S2.h5ad")


def test_nothing_of_an_earlier_scoring_stays(home, predicted, tmp_path, monkeypatch):
    truth, out = f"{home / 'tissue'}:S2", tmp_path / "scores"
    first = home / "run" / "predictions" / "S2.h5ad"
    assert run(monkeypatch, "evaluate", first, truth, "--out", out, "--resamples", 20) == 0
    assert (out / "intervals.csv").exists()
    assert (out / "zero_reliability.csv").exists()
    for name in contract.layer_names(predicted):
        del predicted.layers[name]
    predicted.X = np.random.default_rng(1).poisson(3, predicted.shape).astype(np.float32)
    predicted.write_h5ad(tmp_path / "other.h5ad")
    (out / "maps" / "S2_best_mine.png").write_bytes(b"a user's")
    assert run(monkeypatch, "evaluate", tmp_path / "other.h5ad", truth, "--out", out, "--resamples", 0) == 0
    assert not (out / "intervals.csv").exists()
    assert not (out / "intervals.json").exists()
    assert not (out / "zero_reliability.csv").exists()
    kinds = sorted(path.name.split("_")[1] for path in (out / "maps").glob("S2_*_*.png"))
    assert kinds == ["best", "best", "median", "worst"]  # and what is not GenAR's


def test_gene_sets_of_an_earlier_call_do_not_stay(home, tmp_path, monkeypatch, capsys):
    genes = json.loads((home / "run" / "panel.json").read_text())["genes"]
    (tmp_path / "sets.gmt").write_text("[acyl] kinase [/x]\tabout\t" + "\t".join(genes[:5]) + "\n")
    words = ("groups", home / "run", "--out", tmp_path / "g")
    assert run(monkeypatch, *words, "--gmt", tmp_path / "sets.gmt") == 0
    assert "[acyl] kinase [/x]" in told(capsys)  # no markup
    assert (tmp_path / "g" / "sets.csv").exists()
    assert run(monkeypatch, *words) == 0
    assert not (tmp_path / "g" / "sets.csv").exists()
