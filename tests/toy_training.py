"""Trainings of a few epochs, on features that carry the depth of a spot or on a few spots."""

import numpy as np
import torch

from genar.data import contract
from genar.genes import Panel
from genar.models import Spots, model_class
from genar.training import TrainConfig, make_spots

TINY = {"width": 16, "depth": 1, "heads": 2, "components": 4, "max_count": 63}
QUICK = TrainConfig(
    max_epochs=2, batch_size=16, validate_every=1, warmup_steps=2, validation_samples=2, validation_share=0.1
)
N_FEATURES = 12


def random_features(section, views=8):
    """Features that carry the depth of a spot, so that there is something to learn."""
    random = np.random.default_rng(len(contract.name(section)))
    depth = np.log1p(section.obs[contract.LIBRARY_SIZE].to_numpy(float))
    features = random.normal(size=(section.n_obs, views, N_FEATURES))
    features[..., 0] += 3 * (depth - depth.mean())[:, None]
    return features.astype(np.float32)


def new_model(name, spots):
    torch.manual_seed(0)
    return model_class(name).create(N_FEATURES, spots, "small", TINY if name == "genar" else {})


def panel_of(sections):
    return Panel(tuple(sections[0].var_names[:20]), "given")


def spots_of(sections):
    return Spots.join([make_spots(s, random_features(s), panel_of(sections).genes) for s in sections])


def few_spots(n=40, n_genes=12, n_sections=2):
    random = torch.Generator().manual_seed(3)
    features = torch.randn(n, 2, 6, generator=random)
    counts = torch.poisson((1 + 0.5 * features[:, 0, :1]).exp() * 3 + torch.arange(n_genes) / 4, generator=random)
    xy = torch.rand(n, 2, generator=random)
    section = torch.arange(n) * n_sections // n
    return Spots(features, 1000 * xy, xy, torch.arange(n), section, counts.long())
