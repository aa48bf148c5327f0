"""Full, quota-limited and read-only disks, files where folders should be, leftovers of the dead, two runs in one
folder, a clock that is set back: one clear line, nothing lost, nothing half-written."""

import ast
import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

import genar
from commands import run, sets
from genar.data import files
from genar.data.files import alone, replacing, scratch_beside, write_text
from genar.errors import InputError
from genar.genes import Panel
from genar.models import model_class
from genar.models.checkpoint import Checkpoint, save_checkpoint
from genar.prediction import write_prediction
from genar.resume import WholeFiles
from genar.training import fit

SMALL = ("--n-genes", "20", "--encoder", "genar.bench.toy:narrow_encoder", "--samples", "2")
TINY = ("width=16", "depth=1", "heads=2", "components=4", "max_epochs=2", "batch_size=16", "max_count=63",
        "linear_start=false", "checkpoint_every_s=0")  # fmt: skip
SET = tuple(sets(*TINY))


@contextlib.contextmanager
def no_file_above(n_bytes):
    """No file may grow beyond that: what a quota does, without the right to mount anything."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, and a function that mounts it anew with other options."""
    folder = tmp_path / "small"
    folder.mkdir()

    if shutil.which("mount") is None:
        pytest.skip("no mount on this machine, so no small disk")

    def mount(*options):
        return subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)

    if (done := mount("-t", "tmpfs", "-o", "size=256k", "tmpfs")).returncode:
        pytest.skip(f"no right to mount a small disk here: {done.stderr.strip()}")
    yield folder, lambda options: mount("-o", f"remount,{options}").check_returncode()
    subprocess.run(["umount", str(folder)], check=True)


def write_adata(path):
    write_prediction(anndata.AnnData(np.random.default_rng(0).normal(size=(300, 300))), path)


def write_checkpoint(path):
    model = model_class("mean")(4, 20_000)
    save_checkpoint(path, Checkpoint("mean", model, Panel(("A",), "given"), {}))


WRITERS = {
    "notes.txt": lambda path: write_text(path, "x" * 100_000),
    "counts.h5ad": write_adata,  # HDF5 complains once more about each of its files that it cannot close
    "checkpoint": write_checkpoint,
    "last.ckpt": lambda path: WholeFiles().save_checkpoint({"state": torch.zeros(100_000)}, path),
}


def refuses(name, path, says):
    """The writer refuses; HDF5 in a process of its own: it keeps what it cannot close, and later tests break on it."""
    if not name.endswith("h5ad"):
        with pytest.raises(InputError, match=says):
            WRITERS[name](path)
    elif child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
    else:
        try:
            with pytest.raises(InputError, match=says):
                WRITERS[name](path)
            os._exit(0)
        finally:
            os._exit(1)


def told(capsys):
    """The one line on standard error."""
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert len(lines) == 1, lines
    return lines[0]


# -- full ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", WRITERS)
def test_no_room_is_one_line_and_the_old_file_stays(name, tmp_path):
    path = tmp_path / name
    path.write_text("old") if "." in name else (path.mkdir(), (path / "old").touch())
    with no_file_above(20_000):
        refuses(name, path, f"{name}: cannot be written: .*raise the limit")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert path.read_text() == "old" if path.is_file() else (path / "old").exists()
    WRITERS[name](path)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert path.stat().st_size > 20_000 if path.is_file() else (path / "model.safetensors").stat().st_size > 20_000


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_and_the_old_file_stays(name, small_disk):
    folder, mount = small_disk
    path = folder / name
    path.write_text("old") if "." in name else (path.mkdir(), (path / "old").touch())
    (folder / "filler").write_bytes(b"x" * (200 << 10))
    refuses(name, path, f"{name}: cannot be written: the disk is full; free some space")
    assert {p.name for p in folder.iterdir()} == {name, "filler"}
    assert path.read_text() == "old" if path.is_file() else (path / "old").exists()
    mount("size=16m")
    WRITERS[name](path)


@pytest.fixture(scope="module")
def undisturbed(tissue, tmp_path_factory):
    """A run, and the words that made it but for its place."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    words = ("train", tissue, "--test", "SIM2", "--features", out.parent / "store", *SMALL, *SET)
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *words, "--out", out) == 0
    return out, words


def weights(folder):
    return (folder / "checkpoint" / "model.safetensors").read_bytes()


def test_training_on_a_full_disk_stops_and_goes_on_when_there_is_room(undisturbed, small_disk, monkeypatch, capsys):
    out, words = undisturbed
    folder, mount = small_disk
    assert run(monkeypatch, *words, "--out", folder / "run") == 2
    assert "the disk is full; free some space" in told(capsys)
    hidden = [path.name for path in folder.rglob(".*")]
    assert hidden == []
    mount("size=64m")
    assert run(monkeypatch, *words, "--out", folder / "run") == 0
    assert weights(folder / "run") == weights(out)
    assert not (folder / "run" / "resume").exists()


def test_features_on_a_full_disk_go_on_when_there_is_room(tissue, small_disk, monkeypatch, capsys):
    folder, mount = small_disk
    filler = folder / "filler"
    encoder = ("--encoder", "genar.bench.toy:wide_encoder", "--views", "8", "--widths-um", 112)
    words = ("features", tissue, *encoder, "--workers", 0, "--out")
    assert run(monkeypatch, *words, folder.parent / "whole") == 0
    filler.write_bytes(b"x" * (226 << 10))
    capsys.readouterr()
    assert run(monkeypatch, *words, folder / "store") == 2
    assert "the disk is full; free some space" in told(capsys)
    filler.unlink()
    mount("size=16m")
    assert run(monkeypatch, *words, folder / "store") == 0
    whole, gone_on = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()}
                      for f in (folder.parent / "whole", folder / "store"))  # fmt: skip
    assert gone_on == whole


# -- where nothing may be written ------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["run", "deep/run"])
def test_a_file_where_a_folder_should_be_is_one_line(undisturbed, tissue, tmp_path, monkeypatch, capsys, below):
    out, words = undisturbed
    file = tmp_path / "taken"
    file.write_text("mine")
    for command in (
        (*words, "--out", file / below),
        ("features", tissue, *SMALL[2:4], "--workers", 0, "--out", file / below),
        (
            "predict",
            f"{tissue}:SIM2",
            "--model",
            out,
            "--features",
            out.parent / "store",
            "--out",
            file / below / "a.h5ad",
        ),
        ("bench", "her2st_small", "--toy", "--out", file / below),
        ("fetch", "her2st", "--out", file / below),
    ):
        assert run(monkeypatch, *command) == 2, command
        assert "found a file" in told(capsys)
    assert file.read_text() == "mine"


def test_a_read_only_disk_is_one_line(undisturbed, tissue, small_disk, monkeypatch, capsys):
    out, words = undisturbed
    folder, mount = small_disk
    mount("ro")
    for command in (
        (*words, "--out", folder / "run"),
        ("features", tissue, *SMALL[2:4], "--workers", 0, "--out", folder / "store"),
        ("predict", f"{tissue}:SIM2", "--model", out, "--features", out.parent / "store", "--out", folder / "a.h5ad"),
        ("bench", "her2st_small", "--toy", "--out", folder / "bench"),
        ("fetch", "her2st", "--out", folder / "data"),
    ):
        assert run(monkeypatch, *command) == 2, command
        assert "read-only" in told(capsys)
    mount("rw")
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_one_line(undisturbed, tmp_path, monkeypatch, capsys):
    (tmp_path / "theirs").mkdir(mode=0o500)
    assert run(monkeypatch, *undisturbed[1], "--out", tmp_path / "theirs" / "run") == 2
    assert "no permission" in told(capsys)


# -- two at once -----------------------------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused(undisturbed, tmp_path, monkeypatch, capsys):
    _, words = undisturbed
    with alone(tmp_path / "run", "training run"):
        assert run(monkeypatch, *words, "--out", tmp_path / "run") == 2
        assert "another training run is writing there; wait for it, or choose another --out" in told(capsys)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert not (tmp_path / "run").exists()  # nothing came into it


def test_a_second_bench_in_a_folder_is_refused(tmp_path, monkeypatch, capsys):
    with alone(tmp_path / "bench", "bench"):
        assert run(monkeypatch, "bench", "her2st_small", "--toy", "--out", tmp_path / "bench") == 2
        assert "another bench is writing there" in told(capsys)


def test_a_lock_ends_with_its_process(tmp_path):
    """However it ends: the file that a killed process leaves holds nobody up."""
    lines = (
        "import os, pathlib, sys",
        "from genar.data.files import alone",
        "with alone(pathlib.Path(sys.argv[1]), 'run'): os.kill(os.getpid(), 9)",
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(genar.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", "\n".join(lines), tmp_path], env=environment).returncode == -9
    assert (tmp_path / ".lock").exists()
    with alone(tmp_path, "run"):
        pass
    assert not (tmp_path / ".lock").exists()


# -- what the dead leave ---------------------------------------------------------------------------------------------


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path, monkeypatch):
    path = tmp_path / "a.h5ad"
    theirs = files._name_beside(path)  # of a process that lives: this one
    theirs.write_text("half")
    monkeypatch.setattr(os, "getpid", dead_pid)
    (left := files._name_beside(path)).write_text("half")
    (folder := files._name_beside(path)).mkdir()
    (other := files._name_beside(tmp_path / "b.h5ad")).write_text("half")
    monkeypatch.undo()
    write_text(path, "whole")
    assert sorted(tmp_path.iterdir()) == sorted([path, theirs, other])
    assert not left.exists()
    assert not folder.exists()
    with scratch_beside(tmp_path / "b.h5ad") as scratch:
        assert scratch.is_dir()
        assert not other.exists()
    assert sorted(tmp_path.iterdir()) == sorted([path, theirs])


def test_a_folder_that_was_being_replaced_comes_back(tmp_path, monkeypatch):
    """Killed after the old one was taken away and before the new one stood in its place."""
    path = tmp_path / "checkpoint"
    for text in ("old", "new"):
        with replacing(path) as temporary:
            temporary.mkdir()
            (temporary / text).touch()
    assert [p.name for p in path.iterdir()] == ["new"]

    def killed(source, target):
        os.rename(source, target)
        if target != path:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "getpid", dead_pid)
    with contextlib.suppress(KeyboardInterrupt), monkeypatch.context() as patch, replacing(path) as temporary:
        patch.setattr(os, "replace", killed)
        temporary.mkdir()
    assert not path.exists()
    monkeypatch.undo()
    with contextlib.suppress(ZeroDivisionError), replacing(path):
        assert [p.name for p in path.iterdir()] == ["new"]
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


# -- a store that was cut, a clock that was set back ----------------------------------------------------------------


@pytest.mark.parametrize("part", ["features/c/2/0/0", "zarr.json", "barcode/c/0"])
def test_a_store_cut_in_the_middle_is_one_line(undisturbed, tissue, tmp_path, monkeypatch, capsys, part):
    out, _ = undisturbed
    store = shutil.copytree(out.parent / "store", tmp_path / "store")
    cut = next(store.glob("SIM2*.zarr")) / part
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    words = ("predict", f"{tissue}:SIM2", "--model", out, *SMALL[2:4], "--features", store)
    words = (*words, "--out", tmp_path / "a.h5ad")
    assert run(monkeypatch, *words) == 2
    kind = "metadata of a Zarr array" if part == "zarr.json" else "feature store"
    assert re.search(f"not (a )?readable {kind}", line := told(capsys))
    assert "delete it and embed again" in line
    assert not list(tmp_path.glob(".*"))
    if part == "zarr.json":
        shutil.rmtree(cut.parent)
        assert run(monkeypatch, *words) == 0


def test_a_clock_set_back_changes_nothing(undisturbed, tmp_path, monkeypatch):
    """A run that is interrupted, has its files' times in the future, and goes on with a clock that runs backwards."""
    out, words = undisturbed
    run_ = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("genar.runs.fit", _fit_half())
        with pytest.raises(ZeroDivisionError):
            run(patch, *words, "--out", run_)
    future = time.time() + 1e6
    for path in (*run_.rglob("*"), *(out.parent / "store").rglob("*")):
        os.utime(path, (future, future))
    times = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    assert run(monkeypatch, *words, "--out", run_) == 0
    assert weights(run_) == weights(out)


def _fit_half():
    def half(model, spots, config, **options):
        def log(line):
            if "epoch 1/" in line:
                raise ZeroDivisionError

        return fit(model, spots, config, **{**options, "log": log})

    return half


def test_nothing_asks_for_the_time_of_day():
    """Durations come from clocks that never run backwards, and no choice hangs on a file's time."""
    for path in Path(genar.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("st_mtime", "st_ctime", "getmtime", "utcnow", "now"), path
                assert not (node.attr == "time" and getattr(node.value, "id", "") == "time"), path
