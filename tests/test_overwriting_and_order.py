"""What a second look at commands found: nothing of the user's is written over, no order of spots changes a result, and
options that would do nothing are refused."""

import json
import shutil

import anndata
import pytest
from PIL import Image

import genar
from commands import run
from genar.data import read_section
from genar.errors import InputError
from genar.inference import pitch_note
from genar.models.checkpoint import load_checkpoint

PREDICT = ("--mpp", 2.0, "--samples", 1, "--encoder", "genar.bench.toy:narrow_encoder")
TINY = ("--n-genes", 20, "--views", 1, "--encoder", "genar.bench.toy:narrow_encoder")


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


def test_a_truth_of_the_same_name_that_lies_elsewhere_is_refused(home, tmp_path, monkeypatch, capsys):
    predicted = anndata.read_h5ad(home / "run" / "predictions" / "S2.h5ad")
    truth = read_section(f"{home / 'tissue'}:S2")
    truth.obsm["spatial"] = truth.obsm["spatial"][:, ::-1] + 5000
    with pytest.raises(InputError, match="um from where the prediction of S2 has it"):
        genar.score(predicted, truth)


def test_a_model_of_whole_sections_tells_of_another_distance(home):
    checkpoint = load_checkpoint(home / "run")
    checkpoint.features["context_spots"] = []
    slide = genar.place_spots(home / "tissue" / "wsis" / "S2.tif", mpp=2.0, spacing_um=60)
    assert not pitch_note(checkpoint, slide)
    checkpoint.model.unit = "section"
    assert "looks at neighbours 110 um away" in pitch_note(checkpoint, slide)


def test_check_lists_the_stores_of_these_spots_alone(home, tmp_path, monkeypatch, capsys):
    shutil.copytree(home / "tissue", tmp_path / "tissue")
    for part in ("st", "wsis", "metadata"):
        for path in (tmp_path / "tissue" / part).glob("S2.*"):
            path.rename(path.with_name(f"S1-2{path.suffix}"))
    words = ("check", tmp_path / "tissue", "--out", tmp_path / "overlays", "--json", "--features")
    store = tmp_path / "store"
    run(monkeypatch, "features", tmp_path / "tissue", "--out", store, *TINY[2:], "--widths-um", 112)
    for path in store.glob("S1-[!2]*"):  # of S1 there is none
        shutil.rmtree(path)
    capsys.readouterr()
    assert run(monkeypatch, *words, store) == 0
    rows = json.loads(capsys.readouterr().out)["sections"]
    assert {row["section"]: len(row["features"]) for row in rows} == {"S1": 0, "S1-2": 1}
    assert run(monkeypatch, *words, tmp_path / "nowhere") == 2
    assert "no such folder" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("features", "TISSUE", "--import", "X", "--out", "X", "--widths-um", "55"), "--widths-um"),
        (("panel", "TISSUE", "--out", "X/p.json", "--aliases", "X"), "--aliases"),
        (("groups", "RUN", "--out", "X", "--exclude", "S1", "--mpp", "3"), "--exclude, --mpp"),
    ],
)
def test_options_that_would_do_nothing_are_refused(home, tmp_path, monkeypatch, capsys, words, named):
    places = {"TISSUE": home / "tissue", "RUN": home / "run"}
    words = [places.get(word, word.replace("X", str(tmp_path / "x"))) for word in words]
    assert run(monkeypatch, *words) == 2
    assert f"{named} would do nothing here" in capsys.readouterr().err


def test_a_section_is_no_prediction_to_report_on(home, tmp_path, monkeypatch, capsys):
    section = home / "tissue" / "st" / "S2.h5ad"
    assert run(monkeypatch, "report", section, "--out", tmp_path / "r.html") == 2
    assert "expected a prediction" in capsys.readouterr().err
