"""Encoder, training and prediction on a device that is not the CPU (see ``far_device``), in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch.utils import backend_registration

from genar import machine
from genar.errors import InputError
from genar.models import model_names

HAVE = all(
    hasattr(backend_registration, name) for name in ("_setup_privateuseone_for_python_backend", "_DummyBackendModule")
)
WHOLE = ("encoder", "fit genar", "fit histogene", "run")


@pytest.fixture(scope="module")
def found(tmp_path_factory, worker_id):
    folder = tmp_path_factory.getbasetemp()
    kept = (folder if worker_id == "master" else folder.parent) / "far_device.json"
    with FileLock(f"{kept}.lock"):  # once for all workers
        if not kept.exists():
            command = [sys.executable, Path(__file__).with_name("far_device.py")]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            assert done.returncode == 0, done.stderr
            kept.write_text(done.stdout.splitlines()[-1])
    return json.loads(kept.read_text())


@pytest.mark.skipif(not HAVE, reason=f"PyTorch {torch.__version__} takes no device written in Python")
@pytest.mark.parametrize("what", [*WHOLE, *(f"model {name}" for name in model_names())])
def test_a_device_gives_what_the_cpu_gives(found, what):
    assert isinstance(found[what], float), found[what]
    assert found[what] < 1e-4  # of a count, or of log2(1 + count)


def test_each_process_of_a_machine_gets_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    assert machine.device("auto") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert machine.device("auto") == machine.device("cuda") == "cuda:1"
    assert machine.device("cuda:0") == "cuda:0"
    monkeypatch.delenv("LOCAL_RANK")
    for name, value in {"SLURM_STEP_ID": "0", "SLURM_PROCID": "6", "SLURM_LOCALID": "2", "SLURM_NTASKS": "8"}.items():
        monkeypatch.setenv(name, value)
    assert machine.device("auto") == "cuda:2"  # srun numbers its tasks, too
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # an interactive shell is one task, whatever the job has
    assert machine.device("auto") == "cuda"


def test_models_stay_on_the_cpu_where_a_gpu_has_no_float64():
    assert machine.of_models("mps") == machine.of_models("mps:0") == "cpu"
    assert machine.of_models("cuda:1") == "cuda:1"


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"--devices 2: this machine has 1 GPU; --device cpu"):
        machine.check_devices("cuda", 2)
    machine.check_devices("cuda", 1)
    machine.check_devices("cpu", 64)
