"""Short trainings, odd settings and edited recipes: what they must not do in silence."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from commands import run as genar
from genar.data import read_sections
from genar.errors import InputError
from genar.genes import Scales, select_panel
from genar.models import Decoding, model_class
from genar.models._base import Counts
from genar.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from genar.models.genar import GenAR, small
from genar.settings import read_decoding
from genar.training import TrainConfig, fit
from toy_training import TINY, few_spots


def trained(model="genar", settings=None, spots=None, **config):
    spots = few_spots() if spots is None else spots
    torch.manual_seed(1)
    made = model_class(model).create(6, spots, "small", TINY if settings is None else settings)
    return made, fit(made, spots, TrainConfig(**{"batch_size": 16, "lr": 1e-2, **config}))


# --- training


@pytest.mark.parametrize("config", [{}, {"max_epochs": 1}, {"max_epochs": 1, "batch_size": 64}, {"ema_decay": 0}])
def test_a_short_training_is_one(config):
    """Fewer steps than the warm-up, up to a single one: the weights are not those of the start."""
    start = trained(max_epochs=0)[0].state_dict()
    end = trained(**config)[0].state_dict()
    assert any(not torch.equal(start[name], end[name]) for name in start)


def test_validation_before_the_averages_sees_the_weights():
    _, summary = trained(max_epochs=3, validate_every=1, validation_share=0.2, warmup_steps=100, ema_decay=0.9)
    scores = [entry["val_mse"] for entry in summary.history]
    assert len(set(scores)) == 3


@pytest.mark.parametrize(("epochs", "every", "validated"), [(2, 3, [2]), (5, 3, [3, 5]), (6, 3, [3, 6])])
def test_the_last_epoch_is_validated(epochs, every, validated):
    _, summary = trained(max_epochs=epochs, validate_every=every, validation_share=0.2)
    assert [entry["epoch"] for entry in summary.history] == validated


def test_a_loss_that_is_no_number_is_told():
    with pytest.raises(InputError, match="the loss is nan in epoch"):
        trained(lr=1e30, ema_decay=0)


def test_accumulate_is_refused_where_a_section_is_a_step():
    with pytest.raises(InputError, match="takes a section a step"):
        trained("histogene", {}, accumulate=2)


def test_one_training_spot_is_refused_in_words():
    with pytest.raises(InputError, match="linear_start=false"):
        trained(spots=few_spots(1, n_sections=1))
    trained(settings={**TINY, "linear_start": False, "components": 0}, spots=few_spots(1, n_sections=1), max_epochs=1)


@pytest.mark.parametrize(
    "config", [{"seed": -1}, {"seed": 2**32}, {"weight_decay": -1}, {"clip": -1.0}, {"warmup_steps": -1}]
)
def test_settings_of_training_that_make_no_sense(config):
    with pytest.raises(InputError, match=f"train:.*{next(iter(config))}"):
        TrainConfig(**config)


# --- models


@pytest.mark.parametrize(
    ("model", "settings", "says"),
    [
        ("genar", {"scale_weights": (1.0, 2.0)}, "one a scale, 4 of them, found 2"),
        ("genar", {"scale_weights": (0.0,) * 4}, "not all zero"),
        ("genar", {"mlp_ratio": -1.0}, "mlp_ratio"),
        ("genar", {"sigma_slope": -0.1}, "sigma_slope"),
        ("genar", {"group_temperature": -1.0}, "group_temperature"),
        ("histogene", {"n_positions": 0}, "at least 1"),
        ("histogene", {"dropout": 1.5}, "in \\[0, 1\\)"),
        ("hist2st", {"graph_layers": 0}, "at least 1"),
        ("m2ost", {"spots_per_step": 0}, "at least 1"),
    ],
)
def test_settings_of_models_that_make_no_sense(model, settings, says):
    with pytest.raises(InputError, match=says):
        model_class(model).check_settings("small", settings, n_genes=20)


@pytest.mark.parametrize(
    ("model", "settings", "how", "says"),
    [
        ("stem", {}, {"decode": "greedy"}, "decodes by mean"),
        ("stem", {}, {"decode": "mean", "steps": 2000}, "steps must be at most"),
        ("genar", {"output": "continuous", "final_loss": "squared_error"}, {"decode": "median"}, "squared error"),
    ],
)
def test_a_decoding_that_the_model_has_not_is_refused_before_training(model, settings, how, says, tmp_path, capsys):
    with pytest.raises(InputError, match=says):
        model_class(model).check_decoding("small", settings, Decoding(**how))


def test_the_command_refuses_such_a_decoding_before_it_reads_anything(tissue, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    words = ["train", tissue, "--test", "SIM2", "--model", "stem", "--set", "decode=greedy", "--out", out]
    assert genar(monkeypatch, *words) == 2
    assert "decodes by mean" in capsys.readouterr().err
    assert not (out / "panel.json").exists()


@pytest.mark.parametrize("final_loss", ["squared_error", "gaussian_nll"])
def test_a_continuous_output_reaches_the_largest_count(final_loss):
    config = small(
        **{**TINY, "max_count": 3}, n_features=6, output="continuous", final_loss=final_loss, linear_start=False
    )
    model = GenAR(config, Scales(tuple(range(4)), (1, 4)))
    head = model.head
    torch.nn.init.constant_(head.mean, np.log1p(40.0))  # far beyond the classes
    torch.nn.init.zeros_(head.weight.weight)
    torch.nn.init.zeros_(head.weight.bias) if head.weight.bias is not None else None
    p = head.logits(slice(1, 5), torch.zeros(2, 4, 16), None).softmax(dim=2)
    assert (p.argmax(dim=2) == 3).all()
    assert (p[:, :, 3] > 0.5).all()


def test_no_count_is_beyond_an_int32():
    counts = Counts.from_log2(torch.tensor([[40.0, -1.0, 3.0]])).point
    assert counts.tolist()[0][1:] == [0, 7]
    assert 2**30 < int(counts[0, 0]) < 2**31


def test_a_model_of_many_genes_is_read_back(tmp_path):
    n_genes = 3000
    random = torch.Generator().manual_seed(0)
    counts = torch.poisson(torch.ones(6, n_genes), generator=random).long()
    spots = replace(few_spots(6, 2, 1), counts=counts)
    settings = {"width": 16, "depth": 1, "heads": 2, "max_count": 31, "components": 0, "linear_start": False}
    model = model_class("genar").create(6, spots, "small", settings)
    panel = SimpleNamespace(genes=tuple(f"G{i}" for i in range(n_genes)))
    from genar.genes import Panel

    save_checkpoint(tmp_path / "model", Checkpoint("genar", model, Panel(panel.genes, "given"), {"encoder": "none"}))
    assert load_checkpoint(tmp_path / "model").model.sizes == model.sizes


def test_the_seed_of_a_prediction_is_its_own():
    assert read_decoding(["seed=3"]) == {"seed": 3}
    with pytest.raises(InputError, match="seed must be"):
        Decoding(seed=2**70)


# --- panels


@pytest.mark.parametrize("recipe", ["hvg", "moran"])
def test_a_section_without_counts_chooses_no_gene(tissue, recipe):
    sections = read_sections(tissue)
    empty = sections[1].copy()
    empty.X = empty.X * 0
    empty.X.eliminate_zeros()
    assert (
        select_panel([sections[0], empty], n_genes=5, recipe=recipe).genes
        == select_panel([sections[0][:, sections[0].var_names], empty], n_genes=5, recipe=recipe).genes
    )
    with pytest.raises(InputError, match="can rank no gene"):
        select_panel([empty], n_genes=5, recipe=recipe)
