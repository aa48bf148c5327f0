"""GenAR at toy size, in all its variants."""

from dataclasses import replace

import numpy as np
import torch

from genar.genes import Scales, default_sizes
from genar.models import Spots
from genar.models.genar import GenAR, paper, small

N_GENES, N_FEATURES = 24, 16
TINY = small(n_features=N_FEATURES, width=16, depth=2, heads=2, max_count=31, components=6, count_basis=8)
VARIANTS = {
    "default": TINY,
    "tokens": replace(TINY, history="tokens"),
    "causal": replace(TINY, within="causal"),
    "tokens-causal": replace(TINY, history="tokens", within="causal"),
    "no-identity": replace(TINY, gene_identity=False),
    "unit": replace(TINY, coords="unit"),
    "pitch": replace(TINY, coords="pitch"),
    "free-classes": replace(TINY, count_basis=0),
    "temperature": replace(TINY, group_temperature=1.5),
    "paper-like": paper(n_features=N_FEATURES, width=16, depth=2, heads=2, max_count=31),
    "no-linear-start": replace(TINY, linear_start=False),
    "cross-entropy": replace(TINY, final_loss="cross_entropy"),
    "gaussian-nll": replace(TINY, final_loss="gaussian_nll"),
    "continuous": replace(TINY, output="continuous", final_loss="gaussian_nll"),
    "squared-error": replace(TINY, output="continuous", final_loss="squared_error"),
    "continuous-paper": paper(
        n_features=N_FEATURES, width=16, depth=2, heads=2, max_count=31, output="continuous", final_loss="gaussian_nll"
    ),
    "two-blocks": paper(n_features=N_FEATURES, width=16, depth=2, heads=2, max_count=31, n_blocks=2),
    "recompute": replace(TINY, recompute=True),
}
DISTRIBUTIONS = [name for name in VARIANTS if name != "squared-error"]


def make_spots(n=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    counts = torch.poisson(torch.rand(N_GENES, generator=g) * 8 * torch.rand(n, 1, generator=g), generator=g).long()
    return Spots(
        torch.randn(n, 8, N_FEATURES, generator=g),
        torch.rand(n, 2, generator=g) * 2000,
        torch.rand(n, 2, generator=g),
        torch.arange(n),
        torch.arange(n) % 2,
        counts.clamp(max=31),
    )


def make_model(config=TINY, sizes=None, shake=0.2):
    torch.manual_seed(1)
    order = tuple(np.random.default_rng(3).permutation(N_GENES).tolist())
    model = GenAR(config, Scales(order, sizes or default_sizes(N_GENES)))
    model.prepare(make_spots())
    with torch.no_grad():  # fresh heads are alike; shaken weights make every path matter
        for parameter in model.parameters():
            parameter += shake * torch.randn_like(parameter)
    return model.eval()
