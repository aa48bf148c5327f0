"""What the console is told: interrupts, memory that runs out, the first words of a docstring."""

import gc
import signal
import subprocess
import sys

import pytest
import torch

from commands import run
from genar import _console
from genar._console import first_paragraph
from launchers import environment


def started(*words):
    return subprocess.Popen(
        [sys.executable, "-m", "genar.cli", *map(str, words)], text=True, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def _interrupts_are_heard():
    """Also by processes of tests that were started in a shell's background, where nobody hears them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts_are_heard")
def test_an_interrupt_outside_of_the_training_is_told(tissue, tmp_path):
    words = ("train", tissue, "--test", "SIM2", "--out", tmp_path / "run", "--features", tmp_path / "store")
    process = started(*words, "--n-genes", 20)
    for line in process.stdout:
        if line.startswith("reading"):
            break
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.strip().splitlines()[-1] == "interrupted; start the same command again to go on"


FORGETTING = """
import time, weakref
from genar._console import one_line

def interrupted(_):
    raise KeyboardInterrupt

class Thing: pass

with one_line():
    thing = Thing()
    kept = weakref.ref(thing, interrupted)
    del thing
    time.sleep(30)
"""


@pytest.mark.usefixtures("_interrupts_are_heard")
def test_an_interrupt_while_an_object_is_removed_is_heard():
    done = subprocess.run([sys.executable, "-c", FORGETTING], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "interrupted; start the same command again to go on\n"


def test_what_memory_does_not_hold_is_one_line(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped, _console.one_line():
        torch.empty(1 << 60)
    assert stopped.value.code == 1
    assert "error: out of memory" in capsys.readouterr().err


def test_garbage_is_not_looked_for_while_modules_load(monkeypatch):
    with _console.loading():
        assert not gc.isenabled()
    with pytest.raises(ZeroDivisionError), _console.loading():
        _ = 1 / 0
    assert gc.isenabled()
    assert run(monkeypatch, "models") == 0
    assert gc.isenabled()
    gc.disable()
    try:
        with _console.loading():
            pass
        assert not gc.isenabled()  # as it was
    finally:
        gc.enable()


def test_docstrings_are_told_without_their_marks():
    told = first_paragraph("""Of :class:`~genar.Panel` and ``x = 1``,
    on two lines.

    More.""")
    assert told == "Of genar.Panel and x = 1, on two lines."
