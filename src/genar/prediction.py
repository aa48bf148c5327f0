"""Checkpoint and section in, AnnData of counts out."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
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
from genar.data.pictures import for_plots
from genar.data.row_blocks import write_rows
from genar.errors import InputError
from genar.models import Counts, Decoding, Model
from genar.models.checkpoint import Checkpoint
from genar.streaming import Rows
from genar.training import check_finite, make_spots

SAMPLES = 16
LAYERS = ("mean", "log1p_mean", "p_zero", "sd", "q05", "q25", "q50", "q75", "q95")
_SPOTS_AT_ONCE = 64
_BLOCK = 4096  # spots whose features are read, and whose counts are written, in one go


def decoding(model: Model | type[Model], facts: Mapping) -> Decoding:
    """The default decoding of a prediction with ``facts`` over it: the model's first, expectations over ``SAMPLES``
    trajectories, the layers ``LAYERS``, and what the model's ``decoding_defaults`` say otherwise."""
    own = model.decoding_defaults
    return Decoding(**{"decode": model.decodings[0], "samples": SAMPLES, "layers": LAYERS, **own, **facts})


def of_expectation(how: Decoding) -> Decoding:
    """The decoding that the layers come from: over all its trajectories, where X follows one."""
    return how if how.trajectories == how.samples else replace(how, decode="mean")


def unused_note(model: Model, how: Decoding, facts: Mapping, layers: Collection[str]) -> str:
    """A line that names what of the decoding ``facts`` that a user gave, and that led to ``how``, is not in a
    prediction that has ``layers``; empty where all is."""
    names = [name for name in facts if name not in ("decode", "layers", *model.decodes_by_of(how))]
    names += [f"layer {name}" for name in facts.get("layers", ()) if name not in layers]
    return f"note: the model does not use, or have, {', '.join(names)}: left out of the prediction" if names else ""


def predict_section(
    checkpoint: Checkpoint,
    section: AnnData,
    features: Rows | np.ndarray | Tensor,
    how: Decoding | None = None,
    *,
    patches: Tensor | None = None,
    batch_size: int = _SPOTS_AT_ONCE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AnnData:
    """Predict the panel's counts at every spot: AnnData [N, G] with integer counts in X.

    ``features`` [N, views, F], an array, a tensor or ``StoredInputs``, are averaged over the views; a model that was
    trained on pixels takes ``patches`` uint8 [N, crops, 3, px, px], upright. X is made by ``how.decode`` (``greedy``
    for GenAR by default); ``layers`` (as far as the model has them) are of the distribution averaged over
    ``how.samples`` trajectories; ``var`` holds the mean and variance of each gene's counts in training, where the
    checkpoint knows them. ``obsm["spatial"]`` and ``uns["spatial"]`` are kept, with a picture ``hires`` to plot over;
    ``uns["genar"]["prediction"]`` says how it was made. It is computed where the model lies. Raises ``InputError``
    where there are no spots, or the features or ``how.decode`` do not fit the model.

    >>> checkpoint, section = genar.load_checkpoint("run"), genar.read_section("tissue:SIM2")
    >>> encoder = genar.load_encoder()
    >>> store = genar.embed(section, encoder, genar.recipe_of(encoder, views=1), "features")
    >>> genar.predict_section(checkpoint, section, genar.read_features(store, section)).shape
    (35, 20)
    """
    rows, how = _checked(checkpoint, section, features, patches, how)
    made = zip(*_blocks(checkpoint, section, rows, how, patches, batch_size, progress), strict=True)
    x, layers = _as_written(*(Counts.join(parts) for parts in made))
    predicted = _without_counts(checkpoint, section, how, layers)
    predicted.X = x
    for name, values in layers.items():
        predicted.layers[name] = values
    return predicted


def predict_to_file(
    checkpoint: Checkpoint,
    section: AnnData,
    features: Rows | np.ndarray | Tensor,
    path: Path,
    how: Decoding | None = None,
    *,
    patches: Tensor | None = None,
    batch_size: int = _SPOTS_AT_ONCE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """What :func:`predict_section` gives, written to an ``.h5ad`` block by block, whole or not at all: memory holds
    4,096 spots of it. A model that takes a whole section at a time still needs its features and counts at once. Returns
    ``path``; raises as that does.
    """
    rows, how = _checked(checkpoint, section, features, patches, how)
    blocks = (_as_written(*b) for b in _blocks(checkpoint, section, rows, how, patches, batch_size, progress))
    with replacing(path) as temporary:
        first = next(blocks)
        write_rows(temporary, _without_counts(checkpoint, section, how, first[1]), chain([first], blocks))
    return path


def held_bytes(checkpoint: Checkpoint, section: AnnData, how: Decoding) -> int:
    """What the prediction of a section takes in memory, about."""
    return 4 * section.n_obs * len(checkpoint.panel.genes) * (1 + len(how.kept))


def _checked(
    checkpoint: Checkpoint, section: AnnData, features: Rows | np.ndarray | Tensor, patches: Tensor | None, how
) -> tuple[Rows, Decoding]:
    """Features and decoding, once they fit the model and the section."""
    model, name = checkpoint.model, contract.name(section)
    how = how or decoding(model, {})
    if not isinstance(how, Decoding):
        raise InputError(f"how is a genar.models.Decoding, found {type(how).__name__}; genar.predict takes its fields")
    if how.decode not in model.decodings:
        raise InputError(f"model {checkpoint.name} decodes by {', '.join(model.decodings)}, not by {how.decode!r}")
    if not section.n_obs:
        raise InputError(f"section {name}: expected at least one spot, found none; is this the right section?")
    if patches is None and checkpoint.features.get("input") == "patches" and "patches" in model.inputs:
        raise InputError(f"section {name}: model {checkpoint.name} takes patches, found none; genar.predict reads them")
    features = features.detach().cpu().float().numpy() if isinstance(features, Tensor) else features
    if features.shape[0] != section.n_obs:
        raise InputError(
            f"section {name}: features of {features.shape[0]} spots, {section.n_obs} expected; embed this very section"
        )
    if len(features.shape) != 3 or features.shape[2] != model.n_features:
        raise InputError(
            f"section {name}: features of shape {list(features.shape)}, the model takes [{section.n_obs}, views, "
            f"{model.n_features}]; read them as it was trained on: genar.predict does"
        )
    return features, how


def _blocks(
    checkpoint: Checkpoint, section: AnnData, features: Rows, how: Decoding, patches: Tensor | None, size: int, progress
) -> Iterator[tuple[Counts, Counts]]:
    """Point counts and expectations of about ``_BLOCK`` spots after the other, predicted ``size`` at a time; of all at
    once where the model's unit is the section."""
    model, n_spots = checkpoint.model, section.n_obs
    expected = of_expectation(how)
    places = make_spots(section, np.zeros((n_spots, 1, 0), np.float32), patches=patches)
    size = max(1, n_spots if model.unit == "section" else size)
    per_block = -(-_BLOCK // size) * size
    with _asleep(model):
        for first in range(0, n_spots, per_block):
            rows = torch.arange(first, min(first + per_block, n_spots))
            seen = _as_float(features[first : first + per_block])
            check_finite(seen, section.obs_names[first : first + per_block], contract.name(section))
            held = replace(places.rows(rows), features=seen)
            points, layers = [], []
            for start in range(0, len(rows), size):
                batch = held.batch(slice(start, start + size)).to(model.device)
                with torch.inference_mode():
                    layers.append(model.predict(batch, expected).to("cpu"))
                    other = expected != how
                    points.append(model.predict(batch, replace(how, layers=())).to("cpu") if other else layers[-1])
                progress(first + min(start + size, len(rows)), n_spots)
            yield Counts.join(points), Counts.join(layers)


@contextmanager
def _asleep(model: Model) -> Iterator[None]:
    """Without dropout meanwhile, whatever a loop of the user's left it in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _as_float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _as_written(point: Counts, expected: Counts) -> tuple[sparse.csr_matrix, dict[str, np.ndarray]]:
    """X and the layers of a prediction."""
    layers = {name: values.float().contiguous().numpy() for name, values in expected.layers.items()}
    if bad := [name for name, values in layers.items() if not np.isfinite(values).all()]:
        raise InputError(
            f"the model predicts NaN or infinite values ({', '.join(bad)}): are its weights and inputs sound?"
        )
    return sparse.csr_matrix(point.point.numpy().astype(np.int32)), layers


def _without_counts(checkpoint: Checkpoint, section: AnnData, how: Decoding, layers: Collection[str]) -> AnnData:
    """All of a prediction but X and ``layers``."""
    made = {"model": checkpoint.name, "decode": how.decode, "layers": list(layers)}
    made |= {name: getattr(how, name) for name in checkpoint.model.decodes_by_of(how)}
    made |= {"checkpoint_sha256": checkpoint.sha256, "panel_sha256": checkpoint.panel.sha256}
    seen = {contract.TRAINING_SECTIONS: "sections", contract.TRAINING_PATIENTS: "patients"}
    made |= {name: list(checkpoint.training[key]) for name, key in seen.items() if checkpoint.training.get(key)}
    made |= {contract.TRAINED_ON_SIMULATED: True} if checkpoint.training.get(contract.SIMULATED) else {}
    made |= {"encoder": str(checkpoint.features.get("encoder", "")), "genar_version": genar.__version__}
    var = pd.DataFrame(index=pd.Index(list(checkpoint.panel.genes)))
    places = {name: section.obs[name].to_numpy() for name in ("array_row", "array_col") if name in section.obs}
    adata = AnnData(obs=pd.DataFrame(places, index=section.obs_names.copy()), var=var)
    adata.obsm[contract.SPATIAL] = contract.coords_px(section).copy()
    if spatial := for_plots(section):
        adata.uns[contract.SPATIAL] = spatial
    adata.uns[contract.GENAR] = {**section.uns[contract.GENAR], contract.PREDICTION: made}
    for column in (contract.TRAINING_MEAN, contract.TRAINING_VARIANCE):
        if column in checkpoint.training:
            adata.var[column] = np.asarray(checkpoint.training[column], dtype=np.float64)
    return adata


def write_prediction(adata: AnnData, path: Path) -> Path:
    """Write the ``.h5ad``, whole or not at all."""
    with replacing(path) as temporary:
        adata.write_h5ad(temporary, compression="gzip")
    return path
