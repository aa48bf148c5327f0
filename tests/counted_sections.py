"""Sections of given or random counts, in memory alone."""

import numpy as np
from anndata import AnnData

from genar.data import contract


def make_section(counts, genes, name="S1"):
    adata = AnnData(np.asarray(counts, dtype=np.float32))
    adata.var_names = list(genes)
    adata.obs_names = [f"{name}-{i}" for i in range(adata.n_obs)]
    adata.obsm["spatial"] = np.arange(2.0 * adata.n_obs).reshape(-1, 2)
    return contract.new_section(adata, section=name, mpp=0.5, spot_diameter_um=55, source="test")


def random_section(genes, name="S1", n_spots=60, seed=0):
    rng = np.random.default_rng([seed, 1])
    mean = np.exp(np.random.default_rng(seed).normal(1, 1.2, len(genes)))
    return make_section(rng.negative_binomial(2, 2 / (2 + mean), (n_spots, len(genes))), genes, name)
