"""The scripts of ``benchmarks``, each on a toy."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("resource", reason="the benchmarks measure memory as Unix tells it")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench():
    module = load("model")
    for size in module.SIZES:
        module.SIZES[size] = (16, 1, 2)
    return module


@pytest.mark.parametrize("variant", ["plain", "tokens", "queries", "recompute"])
@pytest.mark.parametrize("size", ["small", "released"])
def test_every_variant_trains_and_generates(bench, variant, size):
    model, loss, generate = bench.build(variant, size, (1, 4, 12))
    model.train()
    value = loss(3)
    value.backward()
    assert torch.isfinite(value)
    made = generate(3)
    assert (made if variant == "plain" else made.point).shape == (3, 12)


def test_plain_and_ours_start_alike(bench):
    """Both share the design, so fresh networks are about equally wrong."""
    losses = [bench.build(variant, "released", (1, 4, 12))[1](16).item() for variant in ("plain", "tokens")]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)


def test_a_job_runs_in_a_process_of_its_own(bench):
    job = {"what": "generate", "size": "small", "batch": 2, "threads": 1, "precision": "fp32", "repeats": 1}
    found = bench.run(variant="queries", **job, scales=(1, 4, 12))
    assert found["seconds"] > 0
    assert found["flops"] > 0


def test_evaluation_times_what_it_says(capsys):
    scores = load("evaluation").main(60, 12, 30)
    assert {len(values) for values in scores.values()} == {31}
    said = capsys.readouterr().out
    assert "metrics of all resamples" in said
    assert f"{scores['mse'][0]:8.4f} (" in said
