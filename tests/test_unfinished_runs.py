"""Runs that were stopped: they go on with what they were started with, and with nothing else."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

from commands import run, sets
from genar import encoders, genes, resume, runs
from genar.data import read_section
from genar.errors import InputError
from genar.settings import sort_settings
from genar.training_config import RESUME_FILE

pytestmark = pytest.mark.usefixtures("_nobody_started_us")
SETTINGS = {"width": 16, "depth": 1, "heads": 2, "components": 4, "widths_um": [], "samples": 1, "max_epochs": 3}
TINY = ("--n-genes", 20, "--views", 1, "--encoder", "genar.bench.toy:narrow_encoder")
NET = ("width=16", "depth=1", "heads=2", "components=4", "max_epochs=1", "samples=2", "widths_um=[112]")


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


def test_another_gene_set_file_is_another_run(home, tmp_path, monkeypatch, capsys):
    from genar import runs

    genes = json.loads((home / "run" / "panel.json").read_text())["genes"]
    file = tmp_path / "sets.gmt"

    def start(order):
        file.write_text("one\tx\t" + "\t".join(order))
        return run(
            monkeypatch, "train", home / "tissue", "--test", "S2", "--out", tmp_path / "run", *TINY, "--features",
            home / "store", "--set", f"order={file}", *sets(*NET),
        )  # fmt: skip

    def stopped(*_, folder, **__):
        (folder / RESUME_FILE).write_text("of a run that was stopped")
        raise InputError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "fit", stopped)
        assert start(genes) == 2
    assert "stopped" in capsys.readouterr().err
    assert start(genes[::-1]) == 2
    assert "unfinished run with other order" in capsys.readouterr().err


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


def test_a_run_does_not_go_on_with_other_imported_features(home, tmp_path, monkeypatch, capsys):
    def bring(seed):
        random = np.random.default_rng(seed)
        (tmp_path / "made").mkdir(exist_ok=True)
        for name in ("S1", "S2"):
            n = read_section(f"{home / 'tissue'}:{name}").n_obs
            np.save(tmp_path / "made" / f"{name}.npy", random.normal(size=(n, 8)).astype(np.float32))
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        words = ("--import", tmp_path / "made", "--encoder", "mine", "--out", tmp_path / "store")
        assert run(monkeypatch, "features", home / "tissue", *words) == 0

    def train(*more):
        net = ("width=16", "depth=1", "heads=2", "components=4", "max_epochs=3", "samples=2")
        words = ("--encoder", "import:mine", "--features", tmp_path / "store", "--out", tmp_path / "run", *more)
        return run(monkeypatch, "train", home / "tissue", "--test", "S2", "--n-genes", 20, *words, *sets(*net))

    bring(1)
    with monkeypatch.context() as patch:
        patch.setattr("genar.runs.save_checkpoint", lambda *_: (_ for _ in ()).throw(InputError("stopped here")))
        assert train() == 2
    assert (tmp_path / "run" / "resume" / RESUME_FILE).exists()
    bring(2)
    assert train() == 2
    assert "holds an unfinished run with other imported features" in " ".join(capsys.readouterr().err.split())
    bring(1)
    assert train() == 0


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
