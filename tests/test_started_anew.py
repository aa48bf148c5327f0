"""Runs that are started again, or by others: SLURM's steps, machines, other data, other numbers of processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment

from genar import encoders, genes, processes, resume, runs
from genar.errors import InputError
from genar.settings import sort_settings
from genar.training import TrainConfig, fit
from genar.training_config import RESUME_FILE
from genar.training_loop import _Module
from launchers import LAUNCHERS
from toy_models import fresh, training

pytestmark = pytest.mark.usefixtures("_nobody_started_us")
STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "train"}
SETTINGS = {"width": 16, "depth": 1, "heads": 2, "components": 4, "widths_um": [], "samples": 1, "max_epochs": 3}
PARENT = """
import os, subprocess, sys
env = {**os.environ, "LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}
code = "import time; from genar import processes; processes.end_with_parent(); print(1, flush=True); time.sleep(99)"
child = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
"""


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


@pytest.fixture
def plan(tissue, tmp_path):
    """Of a run on a tissue of its own that is stopped after its second epoch."""
    own = shutil.copytree(tissue, tmp_path / "own")
    (tmp_path / "panel.txt").write_text("\n".join(list(anndata.read_h5ad(own / "st" / "SIM1.h5ad").var_names)[:12]))
    panel, settings = str(tmp_path / "panel.txt"), sort_settings(SETTINGS)
    return runs.TrainPlan(own, ("SIM2",), tmp_path / "run", panel=panel, views=1, settings=settings, maps=False)


def stop_after_two(plan, monkeypatch):
    save, saved = resume.Saver._save, []

    def once_more(self, trainer):
        save(self, trainer)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume.Saver, "_save", once_more)
        patch.setattr("pytorch_lightning.trainer.call._interrupt", lambda *_: None)
        with pytest.raises(BaseException):  # noqa: B017, PT011 (Lightning ends the process)
            runs.train_run(plan, say=lambda line: None)
    assert (plan.out / "resume" / RESUME_FILE).exists()


def test_a_run_does_not_go_on_with_other_counts(plan, monkeypatch):
    stop_after_two(plan, monkeypatch)
    path = plan.sections / "st" / "SIM1.h5ad"
    section = anndata.read_h5ad(path)
    section.X = section.X[np.random.default_rng(0).permutation(section.n_obs)]
    section.write_h5ad(path)
    with pytest.raises(InputError, match="holds an unfinished run with other data; repeat it as it was"):
        runs.train_run(plan, say=lambda line: None)


def test_a_run_does_not_go_on_with_another_panel(plan, monkeypatch):
    stop_after_two(plan, monkeypatch)
    names = genes.read_panel(plan.panel).genes
    with open(plan.panel, "w") as file:
        file.write("\n".join(reversed(names)))
    with pytest.raises(InputError, match="holds an unfinished run with other panel; repeat it as it was"):
        runs.train_run(plan, say=lambda line: None)


def test_a_run_does_not_go_on_with_another_encoders_features(plan, tmp_path, monkeypatch):
    own = tmp_path / "own.pth"
    state = encoders.embedded_lite0(encoders.build_network(encoders.encoder_row(encoders.DEFAULT)))
    torch.save(state, own)
    plan = replace(plan, weights=own, features=tmp_path / "store")
    stop_after_two(plan, monkeypatch)
    torch.save({name: tensor * 2 if "weight" in name else tensor for name, tensor in state.items()}, own)
    with pytest.raises(InputError, match="holds an unfinished run with other features; repeat it as it was"):
        runs.train_run(plan, say=lambda line: None)
    torch.save(state, own)
    assert runs.train_run(plan, say=lambda line: None).outputs["run"].is_file()


def test_a_run_goes_on_from_another_folder_and_with_a_panel_of_another_name(plan, tmp_path, monkeypatch):
    stop_after_two(plan, monkeypatch)
    moved, panel = plan.out.rename(tmp_path / "moved"), shutil.copy(plan.panel, tmp_path / "same.txt")
    monkeypatch.chdir(tmp_path)
    there = replace(plan, sections=Path("own"), out=Path("moved"), panel=str(panel))
    said = []
    assert runs.train_run(there, say=said.append).outputs["run"].is_file()
    assert any(line.startswith("going on after step 2") for line in said), said
    assert (moved / "run.json").is_file()


def test_a_run_goes_on_whichever_of_its_gpus_a_process_has(plan, monkeypatch):
    """Of several processes each writes what it was told; the last to write is not always the same."""
    stop_after_two(plan, monkeypatch)
    mark = plan.out / "resume" / "plan.json"
    facts = json.loads(mark.read_text())
    mark.write_text(json.dumps({**facts, "device": "cpu:1"}))
    assert runs.train_run(plan, say=lambda line: None).outputs["run"].is_file()


def test_a_run_does_not_go_on_with_other_settings_and_says_which(plan, monkeypatch):
    stop_after_two(plan, monkeypatch)
    other = replace(plan, views=8, settings=sort_settings({**SETTINGS, "seed": 7}))
    with pytest.raises(InputError, match=r"other settings \(train\.seed null there, 7 here; views 1 there, 8 here\)"):
        runs.train_run(other, say=lambda line: None)
    with pytest.raises(InputError, match=r"other settings \(model\.depth 1 there, 2 here\); repeat those, or choose"):
        runs.train_run(replace(plan, settings=sort_settings({**SETTINGS, "depth": 2})), say=lambda line: None)


def test_a_run_whose_record_is_lost_says_so(plan, monkeypatch):
    stop_after_two(plan, monkeypatch)
    (plan.out / "resume" / "plan.json").unlink()
    with pytest.raises(InputError, match=r"plan\.json: no such file; expected a record of the unfinished run"):
        runs.train_run(plan, say=lambda line: None)
    for damaged in ('{"settings": [3]}', '{"settings": {"model": 3}}', '{"found": 3}', "{}"):
        (plan.out / "resume" / "plan.json").write_text(damaged)
        with pytest.raises(InputError, match=r"plan\.json: not a readable record of the unfinished run"):
            runs.train_run(plan, say=lambda line: None)


def test_a_run_does_not_go_on_in_steps_of_another_size(tmp_path):
    settings = {"max_epochs": 2, "batch_size": 16, "validation_share": 0.0}
    fit(fresh("genar"), training(), TrainConfig(**settings), folder=tmp_path)
    kept = torch.load(tmp_path / RESUME_FILE, weights_only=True)
    assert kept["genar"]["steps"] == [4, 1]
    module = _Module(fresh("genar"), training(), None, TrainConfig(**settings, memory_gib=1e-6), print, 1)
    with pytest.raises(InputError, match=r"batches an epoch in 1 parts each, this one .*as many processes as before"):
        module.on_load_checkpoint(kept)


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


@pytest.mark.parametrize("environ", [{}, {"LOCAL_RANK": "0", "WORLD_SIZE": "1"}, {"LOCAL_RANK": "1"}])
def test_a_process_that_nobody_started_outlives_its_shell(environ, monkeypatch):
    given(monkeypatch, **environ)
    monkeypatch.setattr(processes.threading, "Thread", None)  # would be called
    processes.end_with_parent()
