"""GenAR among LazySlide's models: tile features and coordinates in, a table of counts out (extra ``lazyslide``)."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genar.errors import InputError
from genar.models import Batch
from genar.models.checkpoint import load_checkpoint
from genar.prediction import decoding


def register_model(
    source: str | Path,
    key: str = "genar",
    *,
    revision: str | None = None,
    mpp: float | None = None,
    values: str = "mean",
) -> type:
    """Make a checkpoint (a folder, a training run, or ``organisation/name`` of the hub) known to LazySlide as ``key``.

    ``lazyslide.tl.feature_prediction(wsi, key, feature_key=...)`` then writes a table with a column a gene: ``values``
    ``mean`` for expected counts, ``counts`` for generated ones. The features [tiles, F] must be those of the encoder
    that the model was trained with, over patches as wide. ``mpp`` (um per px of the tiles' coordinates) is needed by
    models that look at positions. Returns the class. Raises ``InputError`` where LazySlide is missing, the model takes
    pixels or positions without ``mpp``, ``values`` is neither; the prediction raises it where the features' width
    differs.
    """
    try:
        from lazyslide_models import MODEL_REGISTRY  # pyright: ignore
        from lazyslide_models._model_registry import register  # pyright: ignore
        from lazyslide_models.base import FeaturePredictionModel, ModelTask  # pyright: ignore
    except ImportError as error:
        raise InputError("LazySlide is not installed; pip install 'genar[lazyslide]'") from error
    if values not in ("mean", "counts"):
        raise InputError(f"values must be mean or counts, found {values!r}")
    checkpoint = load_checkpoint(source, revision=revision)
    model, facts = checkpoint.model, checkpoint.features
    if facts.get("input") == "patches":
        raise InputError(f"{source}: takes pixels, not features; LazySlide's feature prediction has none for it")
    config = getattr(model, "config", None)
    placed = model.unit == "section" or getattr(config, "coords", "none") != "none"
    if placed and mpp is None:
        raise InputError(f"{source}: the model looks at positions: give mpp, the um per px of the tiles' coordinates")
    how = decoding(model, {"layers": ("mean", "log1p_mean")})

    class GenARModel(FeaturePredictionModel):
        """Raw gene counts of tiles from their features."""

        features_model_name = str(facts.get("encoder", ""))
        needs_coords = True
        whole_slide = placed

        def __init__(self, **_: Any):
            self.model = model

        def predict(self, features, coords=None) -> dict[str, Any]:
            """Features [n, F] and tile corners [n, 2] -> gene -> [n]."""
            x = np.asarray(features.toarray() if hasattr(features, "toarray") else features, dtype=np.float32)
            n_features = getattr(config, "n_features", None) or getattr(model, "n_features", x.shape[1])
            if x.ndim != 2 or x.shape[1] != n_features:
                raise InputError(f"features have shape {x.shape}, the model takes [tiles, {n_features}]")
            corners = np.zeros((len(x), 2)) if coords is None else np.asarray(coords, dtype=np.float64)
            ids = [zlib.crc32(f"{a:.0f}x{b:.0f}".encode()) for a, b in corners]  # a tile's draws follow its place
            xy = corners * (mpp or 1.0)
            extent = np.where(np.ptp(xy, axis=0) > 0, np.ptp(xy, axis=0), 1)
            device = next(iter(model.state_dict().values())).device
            batch = Batch(
                torch.from_numpy(x), torch.from_numpy(xy).float(),
                torch.from_numpy((xy - xy.min(axis=0)) / extent).float(), torch.tensor(ids),
                section=torch.zeros(len(x), dtype=torch.long),
            ).to(device)  # fmt: skip
            with torch.inference_mode(), torch.autocast(device.type, enabled=False):
                made = model.predict(batch, how)
            mean = made.layers["mean"] if "mean" in made.layers else made.layers["log1p_mean"].expm1()
            found = mean if values == "mean" else made.point
            return dict(zip(checkpoint.panel.genes, found.float().cpu().numpy().T, strict=True))

    MODEL_REGISTRY.pop(key, None)  # registered again: the newer one serves
    return register(
        key=key, task=ModelTask.feature_prediction, license="MIT (code)", commercial=None,
        description="Raw gene counts of tiles, generated scale by scale from encoder features.",
        vision_encoder=str(facts.get("encoder", "")),
    )(GenARModel)  # fmt: skip
