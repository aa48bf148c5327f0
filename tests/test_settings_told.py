"""``genar train`` tells of settings that the model or its training does not use, and refuses those it cannot."""

import re

import pytest

from commands import run, sets
from genar.models import model_class
from genar.runs import TrainPlan, _unused
from genar.training import TrainConfig

TINY = ("--n-genes", 20, "--views", 1, "--encoder", "genar.bench.toy:narrow_encoder")


def test_settings_that_this_training_does_not_use_are_told(home, tmp_path, monkeypatch, capsys):
    net = ("width=16", "depth=1", "heads=2", "components=4", "max_epochs=1", "samples=2", "widths_um=[112]")
    for number, (words, told) in enumerate(
        [
            (("--set", "patience=1"), "(validation_share 0): patience are not used"),
            (("--set", "validation_share=0.01"), "no section has spots enough for a strip of 0.01"),
            (("--set", "final_loss=cross_entropy", "--set", "sigma_base=1"), "sigma_base does nothing with final_loss"),
            (("--set", "scales=[20]", "--set", "token_noise=0.1"), "token_noise does nothing with a single scale"),
            (("--model", "histogene", "--set", "batch_size=8", "--set", "max_epochs=1"), "does not use batch_size"),
            (("--model", "ridge", "--recipe", "paper"), "model ridge is fitted at once, and does not use recipe"),
        ]
    ):
        given = sets(*net) if "--model" not in words else []
        out = ("--test", "S2", "--features", home / "store", "--out", tmp_path / str(number))
        assert run(monkeypatch, "train", home / "tissue", *TINY, *out, *given, *words) == 0
        assert told in " ".join(capsys.readouterr().out.split())


def test_training_settings_of_a_model_that_is_not_trained_are_told(lite0, tmp_path, monkeypatch, capsys):
    words = ["train", lite0 / "tissue", "--test", "B", "--model", "ridge", "--out", tmp_path / "run", "--views", "1"]
    more = ["--n-genes", "5", "--features", lite0 / "store", "--set", "lr=5", "--set", "samples=3"]
    assert run(monkeypatch, *words, *more) == 0
    told = capsys.readouterr().out
    assert "is fitted at once, and does not use lr" in told
    assert "does not use, or have, samples" in told


@pytest.mark.parametrize("words", [["--preset", "nonsense"], ["--set", "width=3"]])
def test_a_closed_form_refuses_what_it_does_not_know(words, lite0, tmp_path, monkeypatch, capsys):
    command = ["train", lite0 / "tissue", "--test", "B", "--model", "ridge", "--out", tmp_path / "run"]
    assert run(monkeypatch, *command, *words) == 2
    assert re.search("nonsense|width", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("model", "setting"),
    [
        ("genar", "components=10000000000"),
        ("genar", "count_basis=100000000000"),
        ("genar", "max_count=10000000000"),
        ("genar", "mlp_ratio=1e9"),
        ("bleep", "width=10000000000"),
    ],
)
def test_sizes_have_a_limit(home, tmp_path, monkeypatch, capsys, model, setting):
    words = ("--test", "S2", "--model", model, "--set", setting, "--out", tmp_path / "run", *TINY)
    assert run(monkeypatch, "train", home / "tissue", *words) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_command_refuses_such_a_decoding_before_it_reads_anything(tissue, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    words = ["train", tissue, "--test", "SIM2", "--model", "stem", "--set", "decode=greedy", "--out", out]
    assert run(monkeypatch, *words) == 2
    assert "decodes by mean" in capsys.readouterr().err
    assert not (out / "panel.json").exists()


def test_decoding_of_a_run_that_predicts_nothing_is_told(home, tmp_path, monkeypatch, capsys):
    words = ("--model", "ridge", "--samples", 5, "--features", home / "store", "--out", tmp_path / "run", *TINY)
    assert run(monkeypatch, "train", home / "tissue", *words) == 0
    assert "nothing is predicted without --test: samples are for `genar predict`" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "told"), [("bleep", True), ("egn", True), ("foundation", False)])
def test_models_that_compare_spots_say_so_where_processes_share_a_batch(name, told, tmp_path):
    for devices in (1, 2):
        plan = TrainPlan(tmp_path, ("S2",), tmp_path / "run", name, devices=devices)
        notes = list(_unused(plan, model_class(name), TrainConfig(), {}))
        assert any("compares the spots of a batch" in note for note in notes) == (told and devices == 2)
