"""What users hand over from Python and what lies where they point: whole objects of any make are taken, or refused in a
line, and nothing of theirs is lost, run or believed unseen."""

import re

import pytest

from commands import run


@pytest.mark.parametrize("words", [["--preset", "nonsense"], ["--set", "width=3"]])
def test_a_closed_form_refuses_what_it_does_not_know(words, lite0, tmp_path, monkeypatch, capsys):
    command = ["train", lite0 / "tissue", "--test", "B", "--model", "ridge", "--out", tmp_path / "run"]
    assert run(monkeypatch, *command, *words) == 2
    assert re.search("nonsense|width", capsys.readouterr().err)


def test_training_settings_of_a_model_that_is_not_trained_are_told(lite0, tmp_path, monkeypatch, capsys):
    words = ["train", lite0 / "tissue", "--test", "B", "--model", "ridge", "--out", tmp_path / "run", "--views", "1"]
    more = ["--n-genes", "5", "--features", lite0 / "store", "--set", "lr=5", "--set", "samples=3"]
    assert run(monkeypatch, *words, *more) == 0
    told = capsys.readouterr().out
    assert "is fitted at once, and does not use lr" in told
    assert "does not use, or have, samples" in told
