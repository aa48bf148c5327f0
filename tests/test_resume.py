"""Training that is stopped in the middle of an epoch goes on to the same bits."""

import itertools
import re
import signal
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from genar import training_loop
from genar.batches import SectionLoader, SpotLoader, step_seed
from genar.data import read_sections
from genar.errors import InputError, StoppedError
from genar.models import Spots, model_class
from genar.training import TrainConfig, fit, make_spots
from genar.training_config import RESUME_FILE
from genar.training_loop import _Module
from toy_models import fresh, training

QUICK = {
    "max_epochs": 3, "batch_size": 24, "validate_every": 2, "warmup_steps": 2, "validation_samples": 2,
    "validation_share": 0.2, "checkpoint_every_s": 0.0,
}  # fmt: skip
N_STEPS = 12  # four batches, three epochs
TINY = {"width": 16, "depth": 1, "heads": 2, "components": 4, "max_count": 63}


@pytest.fixture(scope="module")
def spots(tissue):
    sections = read_sections(tissue)
    random = np.random.default_rng(0)
    features = [random.normal(size=(s.n_obs, 2, 6)).astype(np.float32) for s in sections]
    genes = list(sections[0].var_names[:20])
    return Spots.join([make_spots(s, f, genes) for s, f in zip(sections, features, strict=True)])


def new_model(spots, name="genar"):
    torch.manual_seed(0)
    return model_class(name).create(6, spots, "small", TINY if name == "genar" else {})


class KilledError(Exception):
    pass


def killed_before(model, step):
    """The model, whose run ends in an error at the loss of ``step`` (from 0)."""
    inner, calls = model.loss, []

    def loss(batch):
        if len(calls) == step:
            raise KilledError
        calls.append(1)
        return inner(batch)

    model.loss = loss
    return model


def ends_alike(spots, folder, config, steps, name="genar"):
    """A run that is killed before each of ``steps``, counted from where it went on, ends as one that is not."""
    undisturbed = new_model(spots, name)
    expected = fit(undisturbed, spots, config)
    said = []
    for step in steps:
        with pytest.raises(KilledError):
            fit(killed_before(new_model(spots, name), step), spots, config, folder=folder, log=said.append)
    resumed = new_model(spots, name)
    assert fit(resumed, spots, config, folder=folder, log=said.append) == expected
    for key, tensor in undisturbed.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key
    return [line for line in said if line.startswith("going on")]


@pytest.mark.parametrize("step", [3, 4, 9])
def test_a_run_killed_at_any_step_ends_in_the_same_bits(spots, tmp_path, step):
    assert ends_alike(spots, tmp_path, TrainConfig(**QUICK), [step])[-1] == f"going on after step {step} of {N_STEPS}"


def test_a_run_killed_again_and_again_ends_in_the_same_bits(spots, tmp_path):
    assert len(ends_alike(spots, tmp_path, TrainConfig(**QUICK), [1, 6, 2])) == 3


def test_added_gradients_and_adam_with_momentum_go_on_alike(spots, tmp_path):
    """Three parts a step: resume files lie between steps, and never between the parts of one."""
    config = TrainConfig(**{**QUICK, "accumulate": 3, "batch_size": 8, "ema_decay": 0.0, "optimizer": "sgd"})
    assert len(ends_alike(spots, tmp_path, config, [8])) == 1


def test_sections_as_batches_go_on_alike(spots, tmp_path):
    config = TrainConfig(**{**QUICK, "validation_share": 0.0})
    assert ends_alike(spots, tmp_path, config, [3], "histogene") == ["going on after step 3 of 6"]


def test_a_run_that_was_out_of_patience_when_killed_does_not_train_on(spots, tmp_path, monkeypatch):
    config = TrainConfig(**{**QUICK, "max_epochs": 40, "lr": 0.2, "validate_every": 1, "patience": 1})
    undisturbed = new_model(spots)
    expected = fit(undisturbed, spots, config)
    assert len(expected.history) < config.max_epochs
    fit(new_model(spots), spots, config, folder=tmp_path)  # as if killed after its last resume file
    resumed = killed_before(new_model(spots), 0)
    assert fit(resumed, spots, config, folder=tmp_path) == expected
    assert all(torch.equal(t, resumed.state_dict()[k]) for k, t in undisturbed.state_dict().items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_keeps_it(spots, tmp_path, number):
    config = TrainConfig(**{**QUICK, "checkpoint_every_s": 3600.0})
    undisturbed, stopped = new_model(spots), new_model(spots)
    expected = fit(undisturbed, spots, config)
    inner, calls = stopped.loss, []

    def loss(batch):
        calls.append(1)
        if len(calls) == 6:
            signal.raise_signal(number)
        return inner(batch)

    stopped.loss = loss
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(StoppedError, match=f"{number.name}.*same command") as stop:
        fit(stopped, spots, config, folder=tmp_path)
    assert stop.value.exit_code == 128 + number
    assert len(calls) == 6
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    resumed, said = new_model(spots), []
    assert fit(resumed, spots, config, folder=tmp_path, log=said.append) == expected
    assert said[0] == f"going on after step 6 of {N_STEPS}"
    assert all(torch.equal(t, resumed.state_dict()[k]) for k, t in undisturbed.state_dict().items())


def test_training_in_a_thread_needs_no_signals(spots, tmp_path):
    config, done = TrainConfig(**{**QUICK, "max_epochs": 1}), []
    thread = threading.Thread(target=lambda: done.append(fit(new_model(spots), spots, config, folder=tmp_path)))
    thread.start()
    thread.join()
    assert len(done) == 1


def test_a_resume_file_that_was_cut_is_one_clear_line(spots, tmp_path):
    config = TrainConfig(**{**QUICK, "max_epochs": 1})
    fit(new_model(spots), spots, config, folder=tmp_path)
    whole = (tmp_path / RESUME_FILE).read_bytes()
    (tmp_path / RESUME_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"last\.ckpt: not a whole resume file; delete it"):
        fit(new_model(spots), spots, config, folder=tmp_path)


def test_resume_files_are_as_far_apart_as_asked(spots, tmp_path):
    """An hour apart, a run that is killed in its second epoch goes on from the end of its first."""
    config = TrainConfig(**{**QUICK, "checkpoint_every_s": 3600.0})
    assert ends_alike(spots, tmp_path, config, [7]) == [f"going on after step 4 of {N_STEPS}"]


def test_a_loss_that_came_to_nothing_does_not_replace_what_can_be_gone_on_from(spots, tmp_path):
    config = TrainConfig(**QUICK)
    undisturbed, failing = new_model(spots), new_model(spots)
    expected = fit(undisturbed, spots, config)
    inner, calls = failing.loss, []

    def loss(batch):
        calls.append(1)
        found = inner(batch)
        return found if len(calls) < 6 else replace(found, total=found.total * float("nan"))

    failing.loss = loss
    with pytest.raises(InputError, match="the loss is nan in epoch 2; a lower lr"):
        fit(failing, spots, config, folder=tmp_path)
    assert len(calls) == 6  # not at the end of the epoch
    resumed, said = new_model(spots), []
    assert fit(resumed, spots, config, folder=tmp_path, log=said.append) == expected
    assert said[0] == f"going on after step 5 of {N_STEPS}"


def test_long_epochs_are_told_of_now_and_then(spots, monkeypatch):
    clock = itertools.count(step=40)
    monkeypatch.setattr(training_loop, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    said = []
    fit(new_model(spots), spots, TrainConfig(**QUICK), log=said.append)
    told = [line for line in said if line.startswith("step")]
    assert [line.partition(":")[0] for line in told] == [f"step {n} of {N_STEPS}" for n in (2, 5, 11)]
    assert re.fullmatch(r"step 2 of 12: loss \d+\.\d nats, about 7 minutes to go", told[0])


@pytest.mark.parametrize("make", [
    lambda spots: SpotLoader(spots, 5, 2, 7, lambda: 3, 0, 1),
    lambda spots: SectionLoader(spots, spots.section.unique(), 7, lambda: 3, 0, 1),
])  # fmt: skip
def test_a_loader_goes_on_behind_what_it_gave(spots, make):
    whole = [share.batch.spot_ids.tolist() for share in make(spots)]
    for n_given in range(len(whole) + 1):
        first, second = make(spots), make(spots)
        given = iter(first)
        for _ in range(n_given):
            next(given)
        second.load_state_dict(first.state_dict())
        rest = whole[n_given:] or whole  # an epoch that was given out is followed by the next
        assert [share.batch.spot_ids.tolist() for share in second] == rest
        assert len(list(second)) == len(whole)


def test_steps_epochs_and_processes_draw_their_own_numbers():
    seeds = {step_seed(s, e, b, r) for s in (0, 1) for e in range(20) for b in range(200) for r in range(4)}
    assert len(seeds) == 2 * 20 * 200 * 4
    assert 0 <= step_seed(2**32 - 1, 10**6, 10**9, 10**5) < 2**63


def test_a_run_does_not_go_on_in_steps_of_another_size(tmp_path):
    settings = {"max_epochs": 2, "batch_size": 16, "validation_share": 0.0}
    fit(fresh("genar"), training(), TrainConfig(**settings), folder=tmp_path)
    kept = torch.load(tmp_path / RESUME_FILE, weights_only=True)
    assert kept["genar"]["steps"] == [4, 1]
    module = _Module(fresh("genar"), training(), None, TrainConfig(**settings, memory_gib=1e-6), print, 1)
    with pytest.raises(InputError, match=r"batches an epoch in 1 parts each, this one .*as many processes as before"):
        module.on_load_checkpoint(kept)
