"""No order of rows, no mode that a model was left in and no number of trajectories changes a result; sizes have
limits, and features that were made elsewhere are told apart."""

import pytest
import torch

from commands import run

TINY = ("--n-genes", 20, "--views", 1, "--encoder", "genar.bench.toy:narrow_encoder")


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


def test_what_memory_does_not_hold_is_one_line(monkeypatch, capsys):
    from genar import _console

    with pytest.raises(SystemExit) as stopped, _console.one_line():
        torch.empty(1 << 60)
    assert stopped.value.code == 1
    assert "error: out of memory" in capsys.readouterr().err


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
        sets = [word for setting in net for word in ("--set", setting)] if "--model" not in words else []
        out = ("--test", "S2", "--features", home / "store", "--out", tmp_path / str(number))
        assert run(monkeypatch, "train", home / "tissue", *TINY, *out, *sets, *words) == 0
        assert told in " ".join(capsys.readouterr().out.split())
