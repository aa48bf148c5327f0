import importlib.util
from pathlib import Path

import pytest
import torch

MODEL = Path(__file__).parent.parent / "benchmarks" / "model.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_model", MODEL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
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
