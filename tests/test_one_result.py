"""Predictions of other methods are shown as they are, or refused; no result stands beside another's; options that would
do nothing are refused."""

import json
import shutil

from commands import run


def test_a_demo_that_was_stopped_at_its_page_gets_it(home, tmp_path, monkeypatch):
    shutil.copytree(home / "run", tmp_path / "demo" / "run")
    assert run(monkeypatch, "demo", "--out", tmp_path / "demo") == 0
    assert "<html" in (tmp_path / "demo" / "report.html").read_text()
    assert run(monkeypatch, "demo", "--out", tmp_path / "demo") == 2


def test_overlays_of_sections_of_one_name_are_all_named(home, tmp_path, monkeypatch, capsys):
    shutil.copytree(home / "tissue", tmp_path / "again")
    assert run(monkeypatch, "check", home / "tissue", tmp_path / "again", "--out", tmp_path / "o", "--json") == 0
    outputs = json.loads(capsys.readouterr().out.splitlines()[-1])["outputs"]
    assert sorted(outputs) == ["overlay S1", "overlay S1_2", "overlay S2", "overlay S2_2"]
