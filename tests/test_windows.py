"""On Linux, Windows' rules: no open file is removed or renamed, and no module needs Unix."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from commands import sets

ROOT = Path(__file__).parent.parent
RULED = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "windows")}
TINY = ("width=16", "depth=1", "heads=2", "components=4", "max_epochs=2", "batch_size=16", "max_count=63",
        "widths_um=[]", "checkpoint_every_s=0")  # fmt: skip
UNIX_ALONE = {"fcntl", "grp", "pty", "pwd", "resource", "termios"}


BREAKS_THE_RULE = """
import os, pathlib, sys

path = pathlib.Path(sys.argv[1])
with path.open("w"):
    for breach in (path.unlink, lambda: os.replace(path, "other"), lambda: os.rename(path.parent, "other")):
        try:
            breach()
        except PermissionError:
            continue
        sys.exit(3)
path.unlink()
"""


@pytest.fixture(scope="module")
def as_on_windows(tmp_path_factory):
    """Run a command in a process that cannot remove or rename what it has open."""
    if sys.platform != "linux":
        pytest.skip("open files are looked up in /proc")
    folder = tmp_path_factory.mktemp("windows")
    environment = {**RULED, "GENAR_FEATURES": str(folder / "store"), "OMP_NUM_THREADS": "1"}

    def call(*words, start=("-m", "genar.cli")):
        given = [sys.executable, *start, *map(str, words)]
        done = subprocess.run(given, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return folder

    return call


def test_the_rule_holds_in_such_a_process(as_on_windows, tmp_path):
    assert subprocess.run([sys.executable, "-c", BREAKS_THE_RULE, str(tmp_path / "held")], env=RULED).returncode == 0


@pytest.fixture(scope="module")
def trained(as_on_windows, tissue):
    return as_on_windows(
        "train", tissue, "--test", "SIM2", "--out", "run", "--n-genes", 20, "--views", 1, "--samples", 2, *sets(*TINY)
    )


def test_training_leaves_nothing_behind(trained):
    assert {"checkpoint", "panel.json", "predictions", "run.json"} <= {
        path.name for path in (trained / "run").iterdir()
    }
    assert not (trained / "run" / "resume").exists()
    assert not list((trained / "run").rglob(".*"))
    assert not list((trained / "store").rglob("*.lock"))


def test_patches_in_a_file_are_let_go(as_on_windows, tissue):
    """As many as take a file of their own, which the training has mapped."""
    code = (
        "import sys\nfrom genar import cli, pixels\nfrom genar.models.st_net import STNet\n"
        "pixels.IN_MEMORY_BYTES, STNet.crop_px = 1, 32\n"
        "sys.argv = ['genar', *sys.argv[1:]]\ncli.main()"
    )
    folder = as_on_windows(
        "train", tissue, "--test", "SIM2", "--out", "pixels", "--n-genes", 5, "--model", "st_net",
        "--input", "patches", "--set", "max_epochs=1", start=("-c", code),
    )  # fmt: skip
    assert (folder / "pixels" / "run.json").is_file()
    assert not (folder / "pixels" / "resume").exists()


def test_a_prediction_is_made_scored_shown_and_exported(trained, as_on_windows, tissue):
    once = (
        ("predict", f"{tissue}:SIM2", "--model", "run", "--out", "p.h5ad", "--samples", "2"),
        ("evaluate", "p.h5ad", str(tissue / "st" / "SIM2.h5ad"), "--out", "scores", "--resamples", "20"),
        ("report", "run", "--out", "report.html"),
        ("export", "p.h5ad", "--out", "p.geojson"),
        ("export", "p.h5ad", "--out", "p.tmap"),
    )
    embed = ("features", str(tissue), "--out", "store2", "--views", "1", "--workers", "2")
    code = (
        "import sys\nfrom genar import cli\n"
        f"for words in {(*once, *once[1:], embed)!r}:\n"  # the second time over what lies there
        "    sys.argv = ['genar', *words]\n"
        "    try: cli.main()\n"
        "    except SystemExit as stop: assert not stop.code, words"
    )
    as_on_windows(start=("-c", code))
    assert not list(trained.rglob(".*"))


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks"])
def test_no_module_needs_unix_to_be_imported(folder):
    """Tests are collected, and commands begin, where these modules are not; benchmarks are Unix's alone."""
    found = []
    for path in (ROOT / folder).rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if UNIX_ALONE & set(names):
                found.append(str(path.relative_to(ROOT)))
    assert set(found) <= {"benchmarks/model.py", "benchmarks/evaluation.py", "tests/fuzz/runner.py"}
