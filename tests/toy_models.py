"""Every model at toy size, and sections of random features that they learn from."""

from dataclasses import replace
from functools import lru_cache

import torch

from genar.models import Decoding, Spots, model_class, model_names
from genar.models._base import LN2

TINY = {
    "genar": {"width": 16, "depth": 1, "heads": 2, "components": 4},
    "bleep": {"width": 16},
    "egn": {"width": 16, "depth": 2, "heads": 2, "mlp_width": 16, "bridge_heads": 2, "bridge_width": 8},
    "foundation": {"width": 16, "blocks": 1, "max_count": 60},
    "hist2st": {"width": 16, "depth": 1, "heads": 2, "head_width": 8, "hidden": 16},
    "histogene": {"width": 16, "depth": 1, "heads": 2, "head_width": 8, "hidden": 16},
    "m2ost": {"width": 12, "depth": 1, "hidden": 8, "gate_hidden": 8},
    "stem": {"width": 16, "depth": 1, "heads": 2},
    "triplex": {"width": 16, "heads": (2, 2, 2), "depths": (1, 1, 1), "spots_per_step": 32},
    "umpire": {"width": 16, "depth": 1, "heads": 2, "hidden": 16},
}
"""the ``small`` preset where a model is not named"""
N_FEATURES, N_GENES, N_VIEWS = 10, 8, 2
ONCE = Decoding(samples=1, steps=10)  # steps: of stem
GRADIENT = [name for name in model_names() if model_class(name).gradient]


def section(n_columns, n_rows, key=1):
    """Spots of an array of 200 um whose counts follow their features."""
    random = torch.Generator().manual_seed(key)
    place = torch.cartesian_prod(torch.arange(n_columns).float(), torch.arange(n_rows).float())
    n = len(place)
    x = torch.randn(n, 1, N_FEATURES, generator=random) + 0.1 * torch.randn(n, N_VIEWS, N_FEATURES, generator=random)
    counts = torch.poisson(torch.exp(1 + 0.8 * x[:, 0, :N_GENES]), generator=random).long()
    unit = place / place.max(dim=0).values.clamp(min=1)
    return Spots(x, place * 200 + 1000, unit, torch.arange(n) + 100_000 * key, torch.full((n,), key), counts)


@lru_cache
def training():
    return Spots.join([section(6, 5, key=1), section(5, 6, key=2)])


def fresh(name):
    torch.manual_seed(0)
    model = model_class(name).create(N_FEATURES, training(), "small", TINY.get(name, {}))
    model.prepare(training())
    return model


@lru_cache
def prepared(name):
    """With constants set and fresh weights; no test may train it."""
    return fresh(name).eval()


def log2_values(model, spots):
    with torch.inference_mode():
        return model.predict_sections(replace(spots, counts=None).batch(), ONCE).layers["log1p_mean"] / LN2


def made(name, spots, **settings):
    """Not prepared yet."""
    torch.manual_seed(0)
    return model_class(name).create(spots.n_features, spots, "small", {**TINY.get(name, {}), **settings})


def array_spots(n_rows, n_columns, n_genes, n_features=24, seed=0):
    """A square array of 100 um whose counts follow the features."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n_rows * n_columns, 1, n_features, generator=random)
    weight = torch.randn(n_features, n_genes, generator=torch.Generator().manual_seed(9)) / n_features**0.5
    counts = torch.poisson((x[:, 0] @ weight + 1.5).exp2(), generator=random).long()
    place = torch.cartesian_prod(torch.arange(n_columns), torch.arange(n_rows)).float()
    n = len(x)
    return Spots(x, 100 * place, place / place.amax(dim=0), torch.arange(n), torch.full((n,), seed), counts)
