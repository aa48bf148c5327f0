"""What a second look at commands found: nothing of the user's is written over, no order of spots changes a result, and
options that would do nothing are refused."""

import json
import shutil

import pytest

from commands import run

TINY = ("--n-genes", 20, "--views", 1, "--encoder", "genar.bench.toy:narrow_encoder")


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
