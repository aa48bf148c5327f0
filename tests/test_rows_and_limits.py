"""No order of rows, no mode that a model was left in and no number of trajectories changes a result; sizes have
limits, and features that were made elsewhere are told apart."""

import shutil

import numpy as np
import pytest
import torch

import genar
from commands import run
from genar.data import read_section
from genar.errors import InputError
from genar.models import Batch, Decoding
from genar.models._training_spots import strips
from genar.models.checkpoint import load_checkpoint
from genar.models.genar import small
from genar.prediction import predict_section
from genar.training_config import RESUME_FILE

TINY = ("--n-genes", 20, "--views", 1, "--encoder", "genar.bench.toy:narrow_encoder")


def test_strips_of_a_grid_are_the_same_in_any_order():
    x, y = torch.meshgrid(torch.arange(7.0), torch.arange(9.0), indexing="ij")
    grid = torch.stack([x.flatten(), y.flatten()], dim=1)
    first = strips(grid, 5)
    for seed in range(5):
        order = torch.randperm(len(grid), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(strips(grid[order], 5), first[order])
    assert first.bincount().tolist() == [13, 13, 12, 13, 12]
    shared = first.unflatten(0, (7, 9))  # a column that two strips share is cut once, and not mixed
    assert int((shared.diff(dim=1) != 0).sum(dim=1).max()) == 1


def test_a_model_left_in_training_predicts_as_ever(home):
    checkpoint, section = load_checkpoint(home / "run"), read_section(f"{home / 'tissue'}:S2")
    features = np.random.default_rng(0).normal(size=(section.n_obs, 1, checkpoint.model.n_features)).astype(np.float32)
    awake = checkpoint.model.train()
    made = predict_section(checkpoint, section, features).layers["mean"]
    assert awake.training  # as it was left
    awake.eval()
    np.testing.assert_array_equal(made, predict_section(checkpoint, section, features).layers["mean"])


def test_many_trajectories_go_through_in_parts(monkeypatch):
    scales = genar.fit_scales(np.random.default_rng(0).poisson(3, (50, 20)), (1, 4, 20))
    torch.manual_seed(0)
    model = genar.GenAR(small(n_features=8, max_count=15, components=4, width=16, depth=1, heads=2), scales).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    spots = Batch(torch.randn(3, 8), torch.rand(3, 2), torch.rand(3, 2), torch.arange(3))
    how, sizes, last = Decoding(samples=50, layers=("mean", "sd", "q95")), [], model._last_inputs
    whole = model.predict(spots, how)

    def watched(batch, how, n, draws, cache):
        sizes.append(n * len(batch.features))
        return last(batch, how, n, draws, cache)

    monkeypatch.setattr("genar.models.genar._TRAJECTORIES", 16)
    monkeypatch.setattr(model, "_last_inputs", watched)
    parts = model.predict(spots, how)
    assert sizes == [16, 16, 16, 2] * 3
    for name in ("mean", "sd"):
        torch.testing.assert_close(parts.layers[name], whole.layers[name], rtol=1e-5, atol=1e-6)
    assert (parts.layers["q95"] - whole.layers["q95"]).abs().max() <= 1


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


def test_temperature_has_a_least():
    with pytest.raises(InputError, match="temperature must be at least 1e-06, found 1e-38"):
        Decoding(decode="sample", temperature=1e-38)


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
        sets = [word for setting in net for word in ("--set", setting)]
        return run(monkeypatch, "train", home / "tissue", "--test", "S2", "--n-genes", 20, *words, *sets)

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


def test_the_notebook_refuses_as_the_command_does(home, tmp_path):
    with pytest.raises(InputError, match="--encoder, --views would do nothing here"):
        genar.train(
            home / "tissue", tmp_path / "run", model="hist2st", input="patches", encoder="resnet18", views=1,
            progress=False,
        )  # fmt: skip
    with pytest.raises(InputError, match="nonsense"):
        genar.train(home / "tissue", tmp_path / "run", beside="nonsense", progress=False)
    with pytest.raises(InputError, match=r"'S9' is no section"):
        genar.train(home / "tissue", tmp_path / "run", only="S9", progress=False)
    for wrong, told in (({"n_genes": "20"}, "n_genes must be a whole number, found '20'"),
                        ({"views": "1"}, "views must be a whole number, found '1'"),
                        ({"mpp": "2.0"}, "--mpp must be a positive number of um, found '2.0'")):  # fmt: skip
        with pytest.raises(InputError, match=told):
            genar.train(home / "tissue", tmp_path / "run", progress=False, **wrong)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())
