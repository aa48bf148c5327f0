"""Checkpoint and section in, AnnData of counts out."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor

import genar
from genar.data import contract
from genar.data.files import replacing
from genar.errors import InputError
from genar.models import Counts, Decoding, Model
from genar.models.checkpoint import Checkpoint
from genar.training import make_spots

SAMPLES = 16
LAYERS = ("mean", "log1p_mean", "p_zero", "sd", "q05", "q25", "q50", "q75", "q95")
_SPOTS_AT_ONCE = 64


def decoding(model: Model | type[Model], facts: Mapping) -> Decoding:
    """The default decoding of a prediction with ``facts`` over it: the model's first, expectations over ``SAMPLES``
    trajectories, the layers ``LAYERS``, and what the model's ``decoding_defaults`` say otherwise."""
    own = model.decoding_defaults
    return Decoding(**{"decode": model.decodings[0], "samples": SAMPLES, "layers": LAYERS, **own, **facts})


def predict_section(
    checkpoint: Checkpoint,
    section: AnnData,
    features: np.ndarray,
    how: Decoding | None = None,
    *,
    patches: Tensor | None = None,
    batch_size: int = _SPOTS_AT_ONCE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AnnData:
    """Predict the panel's counts at every spot: AnnData [N, G] with integer counts in X.

    ``features`` [N, views, F] are averaged over the views; a model that was trained on pixels takes ``patches`` uint8
    [N, crops, 3, px, px], upright. X is made by ``how.decode`` (``greedy`` for GenAR by
    default); ``layers`` (as far as the model has them) are of the distribution averaged over ``how.samples``
    trajectories; ``var`` holds the mean and variance of each gene's counts in training, where the checkpoint knows
    them. ``obsm["spatial"]`` and ``uns["spatial"]`` are kept; ``uns["genar"]["prediction"]`` says how it was
    made. Raises ``InputError`` where the features or ``how.decode`` do not fit the model.
    """
    model = checkpoint.model
    how = how or decoding(model, {})
    if how.decode not in model.decodings:
        raise InputError(f"model {checkpoint.name} decodes by {', '.join(model.decodings)}, not by {how.decode!r}")
    expected = how if how.trajectories == how.samples else replace(how, decode="mean")
    spots = make_spots(section, features, patches=patches)
    if model.unit == "section":
        batch_size = max(1, len(spots))
    points, layers = [], []
    for start in range(0, len(spots), batch_size):
        batch = spots.batch(slice(start, start + batch_size))
        with torch.inference_mode():
            layers.append(model.predict(batch, expected))
            points.append(layers[-1] if expected == how else model.predict(batch, replace(how, layers=())))
        progress(min(start + batch_size, len(spots)), len(spots))
    made = {"model": checkpoint.name, **asdict(how), "layers": list(how.kept)}
    made |= {"checkpoint_sha256": checkpoint.sha256, "panel_sha256": checkpoint.panel.sha256}
    made |= {"encoder": str(checkpoint.features.get("encoder", "")), "genar_version": genar.__version__}
    predicted = _as_anndata(section, checkpoint.panel.genes, Counts.join(points), Counts.join(layers), made)
    for column in (contract.TRAINING_MEAN, contract.TRAINING_VARIANCE):
        if column in checkpoint.training:
            predicted.var[column] = np.asarray(checkpoint.training[column], dtype=np.float64)
    return predicted


def _as_anndata(section: AnnData, genes: tuple[str, ...], point: Counts, expected: Counts, made: dict) -> AnnData:
    adata = AnnData(
        sparse.csr_matrix(point.point.numpy().astype(np.int32)),
        obs=pd.DataFrame(index=section.obs_names.copy()),
        layers={name: values.float().numpy() for name, values in expected.layers.items()},
    )
    adata.var_names = list(genes)
    adata.obsm[contract.SPATIAL] = contract.coords_px(section).copy()
    if "spatial" in section.uns:
        adata.uns["spatial"] = section.uns["spatial"]
    adata.uns[contract.GENAR] = {**section.uns[contract.GENAR], "prediction": made}
    return adata


def write_prediction(adata: AnnData, path: Path) -> Path:
    """Write the ``.h5ad``, whole or not at all."""
    with replacing(path) as temporary:
        adata.write_h5ad(temporary, compression="gzip")
    return path
