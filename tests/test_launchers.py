"""Processes that srun, torchrun or nobody started: how many there are, and when they end."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from pytorch_lightning.plugins.environments import SLURMEnvironment

from genar import processes
from genar.errors import InputError

pytestmark = pytest.mark.usefixtures("_nobody_started_us")
STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "train"}
PARENT = """
import os, subprocess, sys
env = {**os.environ, "LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}
code = "import time; from genar import processes; processes.end_with_parent(); print(1, flush=True); time.sleep(99)"
child = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
"""


@pytest.mark.parametrize(
    ("environ", "expected", "rank"),
    [
        ({}, processes.Group(), 0),
        (
            {"TORCHELASTIC_RUN_ID": "a", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8", "RANK": "5"},
            processes.Group(4, 2, "torchrun"),
            5,
        ),
        (
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"},
            processes.Group(2, 2, "srun"),
            3,
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}, processes.Group(), 0),  # a batch script
    ],
)
def test_launchers_are_found_by_themselves(environ, expected, rank, monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert processes.group() == expected
    assert processes.rank() == rank
    if expected.by:
        with pytest.raises(InputError, match=f"--devices 7: {expected.by} started"):
            processes.group(devices=7)
    else:
        for name, value in {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "NODE_RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        assert processes.group(2, 3).size == 6
        with pytest.raises(InputError, match="at least 1"):
            processes.group(0)


def given(monkeypatch, **environ):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


def test_srun_may_be_told_the_tasks_of_all_machines(monkeypatch):
    given(monkeypatch, **STEP, SLURM_NTASKS="2", SLURM_STEP_NUM_TASKS="2", SLURM_NNODES="1")
    assert processes.group() == processes.Group(2, 1, "srun")
    with pytest.raises(RuntimeError, match="ntasks"):
        SLURMEnvironment()  # Lightning's own refuses
    ours = processes.srun_environment()
    ours.validate_settings(2, 1)
    assert (ours.world_size(), ours.global_rank(), ours.auto_requeue) == (2, 1, False)


def test_an_interactive_shell_of_four_tasks_is_one_process(monkeypatch):
    given(monkeypatch, **{**STEP, "SLURM_PROCID": "0"}, SLURM_NTASKS="4", SLURM_STEP_NUM_TASKS="1", SLURM_NNODES="1")
    assert processes.group() == processes.Group()
    assert processes.rank() == 0


def test_tasks_that_do_not_divide_among_the_machines_are_refused(monkeypatch):
    given(monkeypatch, **STEP, SLURM_NTASKS="3", SLURM_STEP_NUM_TASKS="3", SLURM_STEP_NUM_NODES="2")
    with pytest.raises(InputError, match="srun started 3 tasks on 2 machines; start as many on each"):
        processes.group()


def test_machines_that_nobody_starts_together_are_told_what_to_set(monkeypatch):
    with pytest.raises(InputError, match="--num-nodes 2: set MASTER_ADDR and MASTER_PORT"):
        processes.group(1, 2)
    given(monkeypatch, MASTER_ADDR="10.0.0.1", MASTER_PORT="29500", NODE_RANK="1")
    assert processes.group(1, 2) == processes.Group(1, 2)
    assert processes.rank() == 1
    with pytest.raises(InputError, match="NODE_RANK is 1, of 1 machines; give --num-nodes, or unset it"):
        processes.group()


@pytest.mark.parametrize("environ", [{}, {"LOCAL_RANK": "0", "WORLD_SIZE": "1"}, {"LOCAL_RANK": "1"}])
def test_a_process_that_nobody_started_outlives_its_shell(environ, monkeypatch):
    given(monkeypatch, **environ)
    monkeypatch.setattr(processes.threading, "Thread", None)  # would be called
    processes.end_with_parent()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc here to look for the process in")
def test_a_child_ends_when_the_first_process_does():
    child = int(subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, check=True).stdout)
    until = time.monotonic() + 20
    while time.monotonic() < until and is_running(child):
        time.sleep(0.2)
    assert not is_running(child)
