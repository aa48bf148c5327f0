"""GenAR among LazySlide's models: tile features and coordinates in, a table of counts out (extra ``lazyslide``)."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genar.data.neighbours import nearest_spots
from genar.errors import InputError
from genar.models import Batch
from genar.models.checkpoint import load_checkpoint
from genar.prediction import decoding, of_expectation


def register_model(
    source: str | Path,
    key: str = "genar",
    *,
    revision: str | None = None,
    mpp: float | None = None,
    values: str = "mean",
    samples: int | None = None,
    seed: int = 0,
) -> type:
    """Make a checkpoint (a folder, a training run, or ``organisation/name`` of the hub) known to LazySlide as ``key``.

    ``lazyslide.tl.feature_prediction(wsi, key, feature_key=...)`` then writes a table with a column a gene: ``values``
    ``mean`` for expected counts, over ``samples`` trajectories (16) of ``seed``, ``counts`` for generated ones. The
    features [tiles, F] must be those of the encoder that the model was trained with, over patches as wide; where it was
    trained with several widths, side by side (:func:`widen_tiles`, :func:`join_features`). Means of the nearest tiles
    are added here. ``mpp`` (um per px of the tiles' coordinates) is needed by models that look at positions. Returns
    the class. Raises ``InputError`` where LazySlide is missing, the model takes pixels or positions without ``mpp``,
    ``values`` is neither; the prediction raises it where the features' width differs.
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
    how = decoding(model, {"layers": ("mean", "log1p_mean"), "seed": seed, **({"samples": samples} if samples else {})})
    how = of_expectation(how) if values == "mean" else how
    widths, context = tuple(facts.get("widths_um", ())), tuple(facts.get("context_spots", ()))
    n_widths = max(1, len(widths))
    n_given = model.n_features // (n_widths + len(context)) * n_widths

    class GenARModel(FeaturePredictionModel):
        """Raw gene counts of tiles from their features."""

        features_model_name = str(facts.get("encoder", ""))
        needs_coords = True
        whole_slide = placed or bool(context)

        def __init__(self, **_: Any):
            self.model = model

        def predict(self, features, coords=None) -> dict[str, Any]:
            """Features [n, F] and tile corners [n, 2] -> gene -> [n]."""
            x = np.asarray(features.toarray() if hasattr(features, "toarray") else features, dtype=np.float32)
            if x.ndim != 2 or x.shape[1] != n_given:
                of = f", of patches {' and '.join(f'{w:g}' for w in widths)} um wide side by side" if widths[1:] else ""
                raise InputError(f"features have shape {x.shape}, the model takes [tiles, {n_given}]{of}")
            corners = np.zeros((len(x), 2)) if coords is None else np.asarray(coords, dtype=np.float64)
            if context:
                near, last = nearest_spots(corners, max(context)), x[:, -(x.shape[1] // n_widths) :]
                x = np.concatenate([x, *(last[near[:, :n]].mean(axis=1) for n in context)], axis=1)
            batch = _batch(x, corners, mpp or 1.0).to(model.device)
            with torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
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


def _batch(features: np.ndarray, corners: np.ndarray, mpp: float) -> Batch:
    """Tiles of one slide: features [n, F] and corners [n, 2] in px of ``mpp`` um."""
    ids = [zlib.crc32(f"{a:.0f}x{b:.0f}".encode()) for a, b in corners]  # a tile's draws follow its place
    xy = corners * mpp
    extent = np.where(np.ptp(xy, axis=0) > 0, np.ptp(xy, axis=0), 1)
    return Batch(
        torch.from_numpy(features), torch.from_numpy(xy).float(),
        torch.from_numpy((xy - xy.min(axis=0)) / extent).float(), torch.tensor(ids),
        section=torch.zeros(len(features), dtype=torch.long),
    )  # fmt: skip


def widen_tiles(wsi, width_um: float, *, tile_px: int = 224, tile_key: str = "tiles", key_added: str = "") -> str:
    """Add tiles of ``width_um`` around the centres of the slide's tiles, ``tile_px`` wide when they are read, for a
    model that looks at several widths; returns their key (``tiles_309um`` where none is given).

    ``wsi`` is a ``WSIData``. Raises ``InputError`` where its pixel size is not known or the tiles would be magnified.
    """
    from wsidata import TileSpec  # pyright: ignore
    from wsidata.io import add_tiles  # pyright: ignore

    mpp = wsi.properties.mpp
    if not mpp:
        raise InputError("the slide's pixel size is not known; set wsi.set_mpp(...) first")
    if width_um / tile_px < mpp:
        raise InputError(
            f"{tile_px} px for {width_um:g} um are finer than the slide's {mpp:g} um per px; give tile_px of at most "
            f"{int(width_um / mpp)}"
        )
    tiles, key = wsi.shapes[tile_key], key_added or f"{tile_key}_{width_um:g}um"
    box = tiles.bounds.to_numpy()
    spec = TileSpec.from_wsidata(wsi, tile_px, mpp=width_um / tile_px)
    corners = (box[:, :2] + box[:, 2:]) / 2 - np.array([spec.base_width, spec.base_height]) / 2
    add_tiles(wsi, key, corners.round().astype(int), spec, tiles["tissue_id"].to_numpy())
    return key


def join_features(wsi, tables: Sequence[str], key_added: str = "genar", *, tile_key: str = "tiles") -> str:
    """Put feature tables of the same tiles side by side, in the order of the model's widths, as the features
    ``key_added`` of ``tile_key``; returns the name of the new table.

    Raises ``InputError`` where a table is missing or the rows are not as many as the tiles.
    """
    from wsidata.io import add_features  # pyright: ignore

    if missing := [name for name in tables if name not in wsi.tables]:
        raise InputError(f"no table {missing[0]!r}; there are {', '.join(sorted(wsi.tables)) or 'none'}")
    parts, n_tiles = [np.asarray(wsi.tables[name].X, dtype=np.float32) for name in tables], len(wsi.shapes[tile_key])
    for name, part in zip(tables, parts, strict=True):
        if len(part) != n_tiles:
            raise InputError(f"table {name!r} has {len(part)} rows, {tile_key!r} {n_tiles} tiles")
    key = f"{key_added}_{tile_key}"
    add_features(wsi, key=key, tile_key=tile_key, features=np.concatenate(parts, axis=1))
    return key
