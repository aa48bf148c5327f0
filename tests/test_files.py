"""Files are whole or absent, have names that every system takes, and folders one writer."""

import os
from pathlib import Path

import pytest
from filelock import FileLock

from genar.data import files
from genar.data.files import alone, file_part, refusal, replacing, write_text


def test_text_is_replaced(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    write_text(path, "new µ")
    assert path.read_text(encoding="utf-8") == "new µ"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_exception_keeps_what_was_there_and_leaves_no_temporary(tmp_path, kind):
    path = tmp_path / "thing.json"
    write_text(path / "inner" if kind == "folder" else path, "old")

    def fail():
        with replacing(path) as temporary:
            write_text(temporary / "inner" if kind == "folder" else temporary, "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (path / "inner" if kind == "folder" else path).read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "checkpoint"
    write_text(path / "old", "1")
    with replacing(path) as temporary:
        assert temporary.parent == path.parent
        write_text(temporary / "new", "2")
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_keeps_the_suffix(tmp_path):
    with replacing(tmp_path / "a.h5ad") as temporary:
        assert temporary.suffix == ".h5ad"
        temporary.touch()


def test_a_link_to_a_folder_is_written_anew(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "old").write_text("old")
    (tmp_path / "here").symlink_to(tmp_path / "far")
    with replacing(tmp_path / "here") as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("new")
    assert os.listdir(tmp_path / "here") == ["new"]
    assert (tmp_path / "far" / "old").exists()
    assert sorted(os.listdir(tmp_path)) == ["far", "here"]


def test_text_ends_its_lines_the_same_everywhere(tmp_path):
    write_text(tmp_path / "a.csv", "a,b\n1,2\n")
    assert (tmp_path / "a.csv").read_bytes() == b"a,b\n1,2\n"


def test_names_of_files_stay_where_they_can_and_differ_where_they_cannot():
    for name in ("ERBB2", "H2-Ab1", "RP11-34P13.7", "基因α"):
        assert file_part(name) == name
    assert len({file_part(name) for name in ("a/b", "a\\b", "a:b", "a-b")}) == 4
    assert len(file_part("A" * 300)) < 100


@pytest.mark.parametrize("name", ["CON", "aux", "nul.txt", "COM1", "lpt9.h5ad"])
def test_names_that_windows_keeps_for_itself_are_changed(name):
    assert file_part(name) != name
    assert file_part("CONA") == "CONA"


def test_a_lock_goes_where_nobody_removes_an_open_file(tmp_path, monkeypatch):
    unlink, held = Path.unlink, []

    def windows_unlink(self, missing_ok=False):
        if any(lock.is_locked and Path(lock.lock_file) == self for lock in held):
            raise PermissionError(13, "The process cannot access the file because it is being used")
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", windows_unlink)
    lock = FileLock(tmp_path / "one.lock")
    lock.acquire()
    held.append(lock)
    files.let_go(lock)
    assert not lock.is_locked
    assert not list(tmp_path.iterdir())


def test_what_fails_in_a_locked_folder_is_what_is_told(tmp_path, monkeypatch):
    unlink = Path.unlink

    def refuse(self, missing_ok=False):
        if self.name == ".lock":
            raise PermissionError(13, "The process cannot access the file because it is being used")
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(ZeroDivisionError), alone(tmp_path / "run", "training run"):
        _ = 1 / 0
    with alone(tmp_path / "run", "training run"):  # it was let go all the same
        pass


def test_a_system_without_words_for_a_quota_takes_no_other_error_for_one(monkeypatch):
    monkeypatch.setattr(files.os, "strerror", lambda number: "Unknown error")
    assert refusal(RuntimeError("CUDA error: unknown error"), "x") is None
