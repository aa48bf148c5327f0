"""Save and load one self-describing folder: ``model.safetensors``, ``config.json``, ``README.md``. Loading runs no
pickle."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import genar
from genar.data.files import replacing
from genar.errors import InputError
from genar.genes import Panel
from genar.models import Model, model_class

FORMAT = 1
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


@dataclass
class Checkpoint:
    """A model and all that a prediction with it needs."""

    name: str
    """the model's name in the registry"""
    model: Model
    panel: Panel
    features: dict
    """the feature recipe: encoder, weights hash, patch convention, width, views; or, with ``input`` ``patches``, which
    pixels the model takes"""
    training: dict = field(default_factory=dict)
    """what it was trained on and how"""
    sha256: str = ""
    """of the weights file"""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write the folder, whole or not at all, and return it; sets ``checkpoint.sha256``."""
    with replacing(folder) as temporary:
        temporary.mkdir()
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.model.state_dict().items()}
        save_file(state, temporary / WEIGHTS)
        checkpoint.sha256 = _hash(temporary / WEIGHTS)
        facts = {
            "format": FORMAT,
            "genar_version": genar.__version__,
            "name": checkpoint.name,
            "model": checkpoint.model.facts(),
            "panel": checkpoint.panel.to_dict(),
            "features": checkpoint.features,
            "training": checkpoint.training,
            "sha256": checkpoint.sha256,
        }
        (temporary / CONFIG).write_text(json.dumps(facts, indent=1) + "\n")
        (temporary / CARD).write_text(_card(checkpoint))
    return folder


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Load a checkpoint folder (or a training run that holds one), the model in evaluation mode.

    Raises ``InputError`` where a file is missing, damaged, of a newer format or altered, or a tensor has the wrong
    shape.
    """
    folder = Path(folder)
    if (folder / "checkpoint").is_dir():
        folder = folder / "checkpoint"
    facts = _read_config(folder / CONFIG)
    try:
        model = model_class(facts["name"]).from_facts(facts["model"])
        checkpoint = Checkpoint(
            facts["name"], model, Panel.from_dict(facts["panel"]), facts["features"], facts["training"], facts["sha256"]
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / CONFIG}: not a GenAR checkpoint: {error!r} is missing or malformed") from error
    _load_weights(folder / WEIGHTS, model)
    found = _hash(folder / WEIGHTS)
    if found != checkpoint.sha256:
        raise InputError(
            f"{folder / WEIGHTS}: altered since it was saved: sha256 {found[:12]}…, "
            f"expected {checkpoint.sha256[:12]}…; copy it again"
        )
    model.eval()
    return checkpoint


def _read_config(path: Path) -> dict:
    try:
        facts = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(
            f"{path.parent}: not a checkpoint: {path.name} is missing; name a run or its checkpoint/"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable JSON ({error}); copy the checkpoint again") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("format"), int):
        raise InputError(f"{path}: not a GenAR checkpoint: it names no format")
    if facts["format"] > FORMAT:
        raise InputError(f"{path}: format {facts['format']} is newer than this GenAR ({genar.__version__}); upgrade it")
    return facts


def _load_weights(path: Path, model: Model) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); copy the checkpoint again") from error
    own = model.state_dict()
    if set(own) != set(state):
        odd = sorted(set(own) ^ set(state))
        raise InputError(f"{path}: {len(odd)} tensors do not belong to the model of {CONFIG} (first: {odd[0]})")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            expected, got = list(own[name].shape), list(tensor.shape)
            raise InputError(
                f"{path}: tensor {name} has shape {got}, {CONFIG} expects {expected}; copy the checkpoint again"
            )
    model.load_state_dict(state)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _card(checkpoint: Checkpoint) -> str:
    """A short model card."""
    training, features = checkpoint.training, checkpoint.features
    n_weights = sum(p.numel() for p in checkpoint.model.parameters())
    sections = ", ".join(training.get("sections", ())) or "not recorded"
    source = f"{features.get('encoder')}, {features.get('views')} views"
    if features.get("input") == "patches":
        source = f"none; patches of {features.get('crop_px')} px, end to end"
    return f"""# {checkpoint.name}: gene counts from H&E

- Model: {checkpoint.name}, {n_weights:,} trained weights, GenAR {genar.__version__}
- Genes: {len(checkpoint.panel.genes)} (panel recipe {checkpoint.panel.recipe})
- Trained on: {sections}
- Features: {source}; patch convention {features.get("patch")}

Load it with `genar predict SECTION --model THIS_FOLDER --out pred.h5ad`. For research; not for clinical decisions.
"""
