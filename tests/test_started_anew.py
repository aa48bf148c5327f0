"""Runs that are started again, or by others: SLURM's steps, machines, other data, other numbers of processes."""

import os
import signal
import subprocess
import sys

import pytest

from launchers import LAUNCHERS

pytestmark = pytest.mark.usefixtures("_nobody_started_us")


def started(*words, **environ):
    known = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    return subprocess.Popen(
        [sys.executable, "-m", "genar.cli", *map(str, words)], text=True, env={**known, **environ},
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
