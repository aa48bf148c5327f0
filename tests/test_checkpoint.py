"""Checkpoints: read back, refused where they were altered or say too little, and run no code."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

import genar
from commands import run
from genar.data import read_sections
from genar.errors import InputError
from genar.genes import Panel
from genar.models import model_class
from genar.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from genar.training import TrainConfig, fit, make_spots
from toy_training import QUICK, few_spots, new_model, panel_of, spots_of


@pytest.fixture(scope="module")
def spots(tissue):
    return spots_of(read_sections(tissue))


@pytest.fixture
def saved(spots, tissue_sections, tmp_path):
    model = new_model("mean", spots)
    fit(model, spots, QUICK)
    return save_checkpoint(tmp_path / "model", Checkpoint("mean", model, panel_of(tissue_sections), {}))


def test_a_wrong_shape_is_one_clear_line(saved):
    from safetensors.torch import save_file

    save_file({"gene_mean": torch.zeros(7)}, saved / "model.safetensors")
    with pytest.raises(InputError, match=r"gene_mean has shape \[7\].*expects \[20\]"):
        load_checkpoint(saved)


def test_altered_weights_are_refused(saved):
    from safetensors.torch import save_file

    save_file({"gene_mean": torch.zeros(20)}, saved / "model.safetensors")
    with pytest.raises(InputError, match="altered"):
        load_checkpoint(saved)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 99}', '{"format": 1, "name": "mean"}'])
def test_damaged_configs_are_refused(saved, damage):
    (saved / "config.json").write_text(damage)
    with pytest.raises(InputError, match=r"config\.json"):
        load_checkpoint(saved)


def test_cut_weights_and_missing_folders_are_refused(saved, tmp_path):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="safetensors"):
        load_checkpoint(saved)
    with pytest.raises(InputError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "nowhere")


def test_a_model_of_many_genes_is_read_back(tmp_path):
    n_genes = 3000
    random = torch.Generator().manual_seed(0)
    counts = torch.poisson(torch.ones(6, n_genes), generator=random).long()
    spots = replace(few_spots(6, 2, 1), counts=counts)
    settings = {"width": 16, "depth": 1, "heads": 2, "max_count": 31, "components": 0, "linear_start": False}
    model = model_class("genar").create(6, spots, "small", settings)
    panel = SimpleNamespace(genes=tuple(f"G{i}" for i in range(n_genes)))

    save_checkpoint(tmp_path / "model", Checkpoint("genar", model, Panel(panel.genes, "given"), {"encoder": "none"}))
    assert load_checkpoint(tmp_path / "model").model.sizes == model.sizes


def test_a_checkpoint_chooses_no_code_that_runs(lite0, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "stranger.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    checkpoint = load_checkpoint(lite0 / "ridge")
    checkpoint.features = {**checkpoint.features, "encoder": "stranger:build"}
    save_checkpoint(tmp_path / "model", checkpoint)
    words = ["predict", f"{lite0 / 'tissue'}:B", "--model", tmp_path / "model", "--out", tmp_path / "p.h5ad"]
    assert run(monkeypatch, *words) == 2
    assert "pass --encoder stranger:build" in capsys.readouterr().err
    assert run(monkeypatch, *words, "--encoder", "efficientnet_lite0") == 2
    assert "was trained on stranger:build" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match="has no function build"):
        genar.predict(f"{lite0 / 'tissue'}:B", checkpoint, encoder="stranger:build", progress=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("facts", [{"encoder": "efficientnet_lite0"}, {}, {"input": "patches"}, {"widths_um": 5}])
def test_a_checkpoint_that_says_too_little_of_its_features_is_told(facts, lite0, tmp_path, monkeypatch, capsys):
    checkpoint = load_checkpoint(lite0 / "ridge")
    checkpoint.features = facts
    save_checkpoint(tmp_path / "model", checkpoint)
    words = ["predict", f"{lite0 / 'tissue'}:B", "--model", tmp_path / "model", "--out", tmp_path / "p.h5ad"]
    assert run(monkeypatch, *words) == 2
    assert capsys.readouterr().err.count("error: ") == 1


def test_a_checkpoint_made_in_python_serves_the_command(lite0, held_out, tmp_path, monkeypatch):
    encoder = genar.load_encoder()
    recipe = genar.recipe_of(encoder, views=1)
    features = genar.read_features(genar.embed(held_out, encoder, recipe, lite0 / "store"), held_out)
    panel = genar.select_panel([held_out], n_genes=10)
    spots = make_spots(held_out, features, panel.genes)
    model = model_class("ridge").create(encoder.width, spots, "", {})
    fit(model, spots, TrainConfig())
    save_checkpoint(str(tmp_path / "model"), Checkpoint("ridge", model, panel, asdict(recipe)))
    words = ["predict", f"{lite0 / 'tissue'}:B", "--model", tmp_path / "model", "--out", tmp_path / "p.h5ad"]
    assert run(monkeypatch, *words, "--features", lite0 / "store") == 0
