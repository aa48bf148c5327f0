"""``genar demo`` where it was made before, or stopped."""

import shutil

from commands import assert_one_error, run


def test_the_demo_is_not_made_twice(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "report.html").write_text("")
    assert run(monkeypatch, "demo", "--out", tmp_path) == 2
    assert_one_error(capsys, "delete the folder, or give another --out")
    assert not (tmp_path / "simulated_tissue").exists()


def test_a_demo_that_was_stopped_at_its_page_gets_it(home, tmp_path, monkeypatch):
    shutil.copytree(home / "run", tmp_path / "demo" / "run")
    assert run(monkeypatch, "demo", "--out", tmp_path / "demo") == 0
    assert "<html" in (tmp_path / "demo" / "report.html").read_text()
    assert run(monkeypatch, "demo", "--out", tmp_path / "demo") == 2
