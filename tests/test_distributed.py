"""Training shared by two processes on this machine (gloo): as one process trains, written once, resumable."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from launchers import environment

pytestmark = pytest.mark.usefixtures("_nobody_started_us")
SETTINGS = {
    "width": 16, "depth": 1, "heads": 2, "components": 4, "max_count": 63, "dropout": 0, "drop_path": 0,
    "feature_dropout": 0, "validation_share": 0.2, "validate_every": 1, "batch_size": 16, "ema_decay": 0,
    "patience": 50, "max_epochs": 3, "widths_um": "[]", "context_spots": "[]",
}  # fmt: skip
SRUN = {
    "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "41", "SLURM_JOB_NAME": "train",
    "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1", "SLURM_NTASKS_PER_NODE": "2",
}  # fmt: skip


def command(tissue, out, *more, **settings):
    words = ["train", tissue, "--test", "SIM2", "--out", out, "--n-genes", "20", "--views", "1"]
    words += ["--samples", "2", *more]
    for name, value in {**SETTINGS, **settings}.items():
        words += ["--set", f"{name}={value}"]
    return [sys.executable, "-m", "genar.cli", *map(str, words)]


@pytest.fixture(scope="module")
def alone(tissue, tmp_path_factory):
    """A run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    done = subprocess.run(command(tissue, out), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def by_srun(tissue, tmp_path_factory):
    """A run of the two processes of a step of SLURM, and what each said."""
    out = tmp_path_factory.mktemp("srun") / "run"
    started = [
        subprocess.Popen(
            command(tissue, out), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment(**SRUN, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    told = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    return out, told


def check_same(run, alone):
    """Weights, history and predictions of a shared run are those of one process but for the order of its sums."""
    one, two = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (alone, run))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-3)
    histories = [
        json.loads((f / "checkpoint" / "config.json").read_text())["training"]["history"] for f in (alone, run)
    ]
    for mine, theirs in zip(*histories, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    layers = [anndata.read_h5ad(f / "predictions" / "SIM2.h5ad").layers["log1p_mean"] for f in (alone, run)]
    np.testing.assert_allclose(layers[1], layers[0], atol=1e-3)
    assert not (run / "resume").exists()


def test_processes_started_by_srun_find_each_other_and_train_what_one_does(alone, by_srun):
    run, told = by_srun
    assert "run.json" in told[0][0]
    assert told[1][0] == ""  # one process speaks
    check_same(run, alone)


def test_a_killed_process_ends_the_run_and_the_run_goes_on(tissue, alone, by_srun, tmp_path):
    """Started by ``--devices``; it ends in the bits of the run that nobody disturbed."""
    words = command(tissue, tmp_path / "run", "--devices", 2, checkpoint_every_s=0)
    process = subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("epoch 2/"):
            break
    assert sum(line.startswith("epoch 1/3") for line in said) == 1  # one process speaks
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("no /proc here to find the other process by")
    other = next(
        pid for pid in map(int, children.read_text().split()) if b"train" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(other, signal.SIGKILL)
    started = time.monotonic()
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert time.monotonic() - started < 60
    assert (tmp_path / "run" / "resume" / "last.ckpt").is_file()
    assert not (tmp_path / "run" / "run.json").exists()
    if process.returncode == 1:  # it noticed by itself, before it was stopped
        assert "start the same command again" in error
    again = subprocess.run([*words, "--json"], env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert len(again.stdout.splitlines()) == 1
    assert "going on after step" in again.stderr
    assert "epoch 1/3" not in again.stderr
    assert again.stderr.count("epoch 3/3") == 1
    check_same(tmp_path / "run", alone)
    weights = [(folder / "checkpoint" / "model.safetensors").read_bytes() for folder in (tmp_path / "run", by_srun[0])]
    assert weights[0] == weights[1]
