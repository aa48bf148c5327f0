"""Save and load one self-describing folder: ``model.safetensors``, ``config.json``, ``README.md``. Loading runs no
pickle."""

import copy
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch.nn.modules.module import register_module_parameter_registration_hook

import genar
from genar.data.door import door, read_json, room
from genar.data.files import refusal, replacing, scratch_beside, write_text
from genar.errors import InputError
from genar.fetch.models import download_model, is_hub_id, upload_model
from genar.genes import Panel
from genar.models import Model, model_class
from genar.models._card import card_markdown

FORMAT = 2
_ATTENTION_BYTES, _CARD_BYTES = 1 << 30, 1 << 20
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
    card: str = field(default="", repr=False)
    """the card that lay beside it; saved again with the same weights"""
    card_of: str = field(default="", repr=False)
    """sha256 of the weights that the card tells of, as this release writes them; empty: of any"""

    @property
    def pitch_um(self) -> float:
        """Distance of the training's spots, um; 0 where it is not told."""
        return self._length("pitch_um")

    @property
    def spot_um(self) -> float:
        """Diameter of the training's spots, um; 0 where it is not told."""
        return self._length("spot_diameter_um")

    @property
    def hexagonal(self) -> bool:
        """Whether the training's spots lie on a hexagonal array, as Visium's."""
        return self.training.get("hexagonal") is True

    def _length(self, name: str) -> float:
        told = self.training.get(name)
        return float(told) if isinstance(told, int | float) and 0 < told < math.inf else 0.0

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> "Checkpoint":
        """As :func:`load_checkpoint`."""
        return load_checkpoint(source, revision=revision)

    def save_pretrained(self, folder: str | Path) -> Path:
        """As :func:`save_checkpoint`."""
        return save_checkpoint(folder, self)

    def push_to_hub(self, hub_id: str, *, private: bool = False, revision: str | None = None) -> str:
        """Write it to ``hub_id`` (``organisation/name``) of the Hugging Face hub as one commit; returns the address.

        Raises ``InputError`` where the hub is out of reach or refuses.
        """
        with tempfile.TemporaryDirectory(prefix="genar-") as scratch:
            folder = self.save_pretrained(Path(scratch) / "checkpoint")
            return upload_model(folder, hub_id, private=private, revision=revision)


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> Path:
    """Write the folder and return it; sets ``checkpoint.sha256``.

    A new folder, or one that holds a checkpoint and nothing else, is written whole or not at all. In any other, a clone
    of a repository, say, each of the three files is, and all else stays as it is, a ``README.md`` of the user's own,
    too. The card is the one that was loaded, where the weights are still those; else a new one, without scores, as
    those are the training run's. Raises ``InputError`` where another model's files, or a training run, lie there.
    """
    folder = Path(folder)
    with _filling(folder) as temporary:
        try:
            save_file(_state(checkpoint.model), temporary / WEIGHTS)
        except SafetensorError as error:  # the system's refusal in words of its own
            raise OSError(str(error)) from error
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
        shutil.copymode(temporary / CONFIG, temporary / WEIGHTS)  # which their library lets nobody else read
        kept = checkpoint.card if checkpoint.card_of in ("", checkpoint.sha256) else ""
        card = kept or card_markdown(facts, _n_weights(checkpoint.model), {})
        (temporary / CARD).write_text(card, encoding="utf-8")
    return folder


@contextmanager
def _filling(folder: Path) -> Iterator[Path]:
    """Yield a new folder that becomes ``folder``, or whose files go into it one by one where other things lie there."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    ours = _is_ours(folder)
    if not there or (ours and there <= {WEIGHTS, CONFIG, CARD}):
        with replacing(folder) as temporary:
            temporary.mkdir()
            yield temporary
        return
    if (folder / "checkpoint").is_dir():
        raise InputError(f"{folder}: holds a training run; a checkpoint needs a folder of its own, choose another")
    if foreign := sorted(there & {WEIGHTS, CONFIG}) if not ours else []:
        raise InputError(
            f"{folder}: its {foreign[0]} is not of a GenAR checkpoint; choose another folder, or delete it"
        )
    with scratch_beside(folder) as temporary:
        try:
            yield temporary
        except OSError as error:
            raise refusal(error, folder) or error from error
        for name in (WEIGHTS, CONFIG, *([CARD] if ours or CARD not in there else [])):
            with replacing(folder / name) as path:
                os.replace(temporary / name, path)


def _is_ours(folder: Path) -> bool:
    try:
        return isinstance(read_json(folder / CONFIG, "JSON of a checkpoint").get("panel"), dict)
    except InputError:
        return False


def rewrite_card(folder: Path, scores: Mapping[str, Mapping[str, Mapping]]) -> None:
    """Write the card of a saved checkpoint anew, with ``scores`` (see ``_card.card_markdown``)."""
    facts = _read_config(folder / CONFIG)
    model = model_class(facts["name"]).from_facts(facts["model"])
    write_text(folder / CARD, card_markdown(facts, _n_weights(model), scores))


def _n_weights(model: Model) -> int:
    return sum(p.numel() for p in model.parameters())


def checkpoint_folder(source: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: ``source`` itself, the one of a training run, or that of ``organisation/name`` on the
    Hugging Face hub at ``revision`` (a branch, tag or commit), fetched where it is not yet here. What lies on this
    machine wins. Raises ``InputError`` as ``fetch.models.download_model`` does."""
    if is_hub_id(str(source)):
        try:
            return download_model(str(source), revision)
        except InputError as error:
            raise InputError(f"no folder {source} here, and of the hub: {error}") from error
    if revision is not None:
        raise InputError(f"--revision {revision}: {source} is not a name on the hub, and has no revisions")
    folder = Path(source)
    return folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder


def load_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Load a checkpoint folder, a training run that holds one, or ``organisation/name`` of the hub (see
    :func:`checkpoint_folder`), the model in evaluation mode.

    Raises ``InputError`` where a file is missing, damaged, of a newer format or altered, or a tensor has the wrong
    shape.

    >>> checkpoint = genar.load_checkpoint("run")
    >>> checkpoint.name, len(checkpoint.panel.genes)
    ('ridge', 20)
    """
    folder = checkpoint_folder(source, revision)
    facts = _read_config(folder / CONFIG)
    with door(folder / WEIGHTS, "safetensors file", "copy the checkpoint again"):
        shapes = _shapes(folder / WEIGHTS)
    with door(folder / CONFIG, "GenAR checkpoint", "a key is missing or malformed: copy the checkpoint again"):
        try:
            model = _model_of(folder / WEIGHTS, facts, shapes)
        except InputError as error:
            if str(folder) in str(error):
                raise
            raise InputError(f"{folder / CONFIG}: {error}; copy the checkpoint again") from error
        for key in ("features", "training"):
            if not isinstance(facts[key], dict):
                raise TypeError(f"{key} must be an object")
        checkpoint = Checkpoint(
            facts["name"], model, Panel.from_dict(facts["panel"]), facts["features"], facts["training"],
            str(facts["sha256"]),
        )  # fmt: skip
    with door(folder / WEIGHTS, "safetensors file", "copy the checkpoint again"):
        _load_weights(folder / WEIGHTS, model, facts["format"])
    found = _hash(folder / WEIGHTS)
    if found != checkpoint.sha256:
        raise InputError(
            f"{folder / WEIGHTS}: altered since it was saved: sha256 {found[:12]}…, "
            f"expected {checkpoint.sha256[:12]}…; copy it again"
        )
    model.eval()
    if (folder / CARD).is_file() and (folder / CARD).stat().st_size <= _CARD_BYTES:
        checkpoint.card = (folder / CARD).read_text(encoding="utf-8", errors="replace")
        # tensors of an older format are saved under other names
        checkpoint.card_of = found if facts["format"] == FORMAT else hashlib.sha256(save(_state(model))).hexdigest()
    return checkpoint


def push_checkpoint(source: str | Path, hub_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Write the checkpoint of a folder or run, once it has been read without fault, to ``hub_id`` with its card as it
    lies there. Returns the address. Raises ``InputError`` as :func:`load_checkpoint` and the hub do."""
    load_checkpoint(source)
    return upload_model(checkpoint_folder(source), hub_id, private=private, revision=revision)


def _read_config(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"{path.parent}: not a checkpoint: {path.name} is missing; name a run or its checkpoint/")
    facts = read_json(path, "JSON of a checkpoint", "copy the checkpoint again")
    if not isinstance(facts.get("format"), int):
        raise InputError(f"{path}: not a GenAR checkpoint: it names no format")
    if facts["format"] > FORMAT:
        raise InputError(f"{path}: format {facts['format']} is newer than this GenAR ({genar.__version__}); upgrade it")
    return facts


def _shapes(path: Path) -> dict[str, list[int]]:
    """Tensor -> shape, by the head of the weights' file."""
    with safe_open(path, framework="pt") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _model_of(path: Path, facts: dict, shapes: dict[str, list[int]]) -> Model:
    """The model of the configuration, with fresh weights.

    It is made without memory first: a configuration of a few bytes may ask for any number and size of tensors, and must
    not be believed before they are found to be those of the weights' file. Raises ``InputError`` where they are not.
    """
    cls = model_class(str(facts["name"]))
    with _at_most(len(shapes), path), torch.device("meta"):
        measured = cls.from_facts(copy.deepcopy(facts["model"]))
    stored = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    own, stored = measured.state_dict(), measured.upgraded(stored, facts["format"])
    if set(own) != set(stored):
        odd = sorted(set(own) ^ set(stored))
        raise InputError(f"{path}: {len(odd)} tensors do not belong to the model of {CONFIG} (first: {odd[0]})")
    for name, tensor in stored.items():
        if (got := list(tensor.shape)) != (expected := list(own[name].shape)):
            raise InputError(
                f"{path}: tensor {name} has shape {got}, {CONFIG} expects {expected}; copy the checkpoint again"
            )
    if measured.mask_bytes > max(_ATTENTION_BYTES, room(path.stat().st_size)):
        raise InputError(
            f"{path}: masks of attention of {measured.mask_bytes / 2**30:,.1f} GiB, in a file of "
            f"{path.stat().st_size / 2**20:.1f} MiB: is it damaged?"
        )
    return cls.from_facts(facts["model"])


@contextmanager
def _at_most(n_tensors: int, path: Path) -> Iterator[None]:
    """Refuse a model of far more parameters than the weights' file has, before the last of them is made."""
    made = 0

    def count(module, name, parameter) -> None:
        nonlocal made
        made += parameter is not None
        if made > 2 * n_tensors + 100:  # a network may replace some that it made
            raise InputError(f"{path}: holds {n_tensors} tensors, {CONFIG} asks for more; copy the checkpoint again")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _load_weights(path: Path, model: Model, version: int) -> None:
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model.load_state_dict(model.upgraded(state, version))


def _state(model: Model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
