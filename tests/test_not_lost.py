"""What a slip of the user's must not cost: measured sections overwritten, predictions taken for measured ones, names
that mean nothing swallowed."""

import anndata
import pytest
import torch

from commands import run
from genar import machine
from genar.assess import evaluate_run
from genar.data import contract, read_sections
from genar.errors import InputError
from genar.export import write_export
from genar.genes import Panel
from genar.prediction import write_prediction


def test_a_project_of_tissuumaps_leaves_the_slide_beside_it_alone(prediction, tmp_path):
    for name in ("S.tif", "S.csv"):
        (tmp_path / name).write_text("mine")
    write_export(prediction, tmp_path / "S.tmap")
    assert [(tmp_path / name).read_text() for name in ("S.tif", "S.csv")] == ["mine", "mine"]
    assert (tmp_path / "S_tmap.csv").is_file()


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


def test_evaluation_tells_of_another_section(prediction, sections, tmp_path):
    truth = sections[0][: prediction.n_obs].copy()
    other = prediction[: truth.n_obs].copy()
    other.obs_names = truth.obs_names
    result = evaluate_run(other, truth, tmp_path / "scores", resamples=0)
    assert "the truth is of section SIM1, the prediction of SIM2" in result.notes


@pytest.mark.parametrize("command", ["panel", "groups"])
def test_a_section_to_exclude_that_is_not_there_is_told(command, tissue, sections, tmp_path, monkeypatch, capsys):
    Panel(tuple(sections[0].var_names[:10]), "given").write(tmp_path / "panel.json")
    more = ["--panel", tmp_path / "panel.json"] if command == "groups" else []
    assert run(monkeypatch, command, tissue, "--exclude", "SIM9", "--out", tmp_path / "x.json", *more) == 2
    assert "'SIM9' is no section" in capsys.readouterr().err


@pytest.fixture
def file(prediction, tmp_path):
    return write_prediction(prediction, tmp_path / "pred.h5ad")


def test_a_page_shows_the_gene_that_was_asked_for(file, prediction, tmp_path, monkeypatch, capsys):
    gene = prediction.var_names[3]
    assert run(monkeypatch, "report", file, "--out", tmp_path / "r.html", "--gene", gene) == 0
    assert f'"first":"{gene}"' in (tmp_path / "r.html").read_text()
    assert run(monkeypatch, "report", file, "--out", tmp_path / "other.html", "--gene", "NOPE") == 2
    assert not (tmp_path / "other.html").exists()


def test_scanpy_finds_the_image_and_the_array(prediction, sections, tissue):
    import matplotlib
    import scanpy as sc

    matplotlib.use("Agg")
    assert {"array_row", "array_col"} <= set(prediction.obs) or "array_row" not in sections[1].obs
    adata = sections[1].copy()
    (library,) = adata.uns["spatial"].values()
    assert library["images"]
    shown = prediction.copy()
    sc.pl.spatial(shown, color=shown.var_names[0], show=False)


def test_devices_that_are_not_here_are_told():
    assert machine.device("cpu") == "cpu"
    assert machine.device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(InputError, match=f"--device {name}: not to be had here"):
            machine.device(name)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("check", "nowhere"), "no such file or folder"),
        (("report", "runs/frist"), "no such file or folder"),
        (("export", "nofile.h5ad", "--out", "x.geojson"), "nofile.h5ad: no such file"),
        (("train", "TISSUE", "--panel", "nofile.txt", "--out", "x"), "--panel nofile.txt: no such file"),
        (("predict", "TISSUE:SIM1", "--model", "runs/frst", "--out", "x.h5ad"), "no folder runs/frst here"),
        (("predict", "TISSUE:SIM1", "--model", "runs/first", "--out", "x.csv"), ".h5ad, .geojson"),
    ],
)
def test_what_is_not_there_is_told_so(words, says, tissue, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *(word.replace("TISSUE", str(tissue)) for word in words)) == 2
    assert says in capsys.readouterr().err


def test_a_prediction_is_replaced_by_another(file, prediction, monkeypatch, tissue, tmp_path):
    """What GenAR wrote may be written again."""
    from genar.export import refuse_foreign

    refuse_foreign(file)
    write_export(prediction, tmp_path / "x.zarr")
    write_export(prediction, tmp_path / "x.zarr")
    assert "prediction" in anndata.read_h5ad(file).uns[contract.GENAR]
