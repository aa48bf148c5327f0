"""The machine: peaks of memory, and devices that are here or not."""

import subprocess
import sys

import pytest
import torch

from genar import machine
from genar.errors import InputError

MEASURE = """
import numpy
from genar import machine
machine.keep_freed_memory()
def peak(mib):
    clock = machine.Clock()
    numpy.ones(mib << 17)
    print(clock.peak_rss_mib())
peak(10)
peak(500)
peak(10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts a peak anew")
def test_a_runs_peak_does_not_hold_what_earlier_runs_freed():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    before, large, after = map(float, done.stdout.split())
    assert large > before + 450
    assert after < before + 50


def test_devices_that_are_not_here_are_told():
    assert machine.device("cpu") == "cpu"
    assert machine.device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(InputError, match=f"--device {name}: not to be had here"):
            machine.device(name)
