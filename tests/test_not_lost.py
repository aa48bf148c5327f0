"""What a slip of the user's must not cost: measured sections overwritten, predictions taken for measured ones, names
that mean nothing swallowed."""

import pytest
import torch

from commands import run
from genar import machine
from genar.data import read_sections
from genar.errors import InputError
from genar.genes import Panel


@pytest.fixture(scope="module")
def sections(tissue):
    return read_sections(tissue)


@pytest.mark.parametrize("command", ["panel", "groups"])
def test_a_section_to_exclude_that_is_not_there_is_told(command, tissue, sections, tmp_path, monkeypatch, capsys):
    Panel(tuple(sections[0].var_names[:10]), "given").write(tmp_path / "panel.json")
    more = ["--panel", tmp_path / "panel.json"] if command == "groups" else []
    assert run(monkeypatch, command, tissue, "--exclude", "SIM9", "--out", tmp_path / "x.json", *more) == 2
    assert "'SIM9' is no section" in capsys.readouterr().err


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
