"""Settings from a YAML file and the command line, sorted into those of the model, the training, the decoding and the
inputs."""

import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from genar.data.door import door
from genar.data.yaml_text import load_yaml
from genar.errors import InputError
from genar.features import Inputs
from genar.models import Decoding, model_class
from genar.training import TrainConfig


@dataclass(frozen=True)
class Settings:
    """Plain values by owner; each owner checks its own."""

    model: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)
    decoding: dict = field(default_factory=dict)
    inputs: dict = field(default_factory=dict)


def read_settings(
    config: Path | None, assignments: Sequence[str], model: str = "genar", *, owners: Sequence[str] = ()
) -> Settings:
    """Settings from a YAML file and ``KEY=VALUE`` lines, which win; see :func:`sort_settings`."""
    settings: dict = {}
    if config is not None:
        with door(config, "YAML file", "expected lines of the form key: value"):
            settings = load_yaml(config.read_text(encoding="utf-8")) or {}
        if not isinstance(settings, dict):
            raise InputError(f"{config}: expected lines of the form key: value, found {type(settings).__name__}")
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {text}: expected KEY=VALUE")
        with door(f"--set {text}", "value", "expected KEY=VALUE"):
            settings[key.strip()] = _number(load_yaml(value))
    return sort_settings(settings, model, owners=owners)


def sort_settings(settings: Mapping, model: str = "genar", *, owners: Sequence[str] = ()) -> Settings:
    """Settings by their owner.

    A key is a setting of ``model``, or a field of ``TrainConfig``, ``Decoding`` or ``Inputs``; of those that know it
    the first one's, ``owners`` before all others. Raises ``InputError`` naming one that is none of them, or a value of
    another type.
    """
    kinds = {"model": model_class(model).settings_types()}
    kinds |= {name: {f.name: f.type for f in fields(owner)} for name, owner in _OWNERS.items()}
    kinds = {name: kinds[name] for name in (*owners, *(name for name in kinds if name not in owners))}
    sorted_out: dict[str, dict] = {owner: {} for owner in kinds}
    for key, value in settings.items():
        owner = next((owner for owner, known in kinds.items() if key in known), None)
        if owner is None:
            near = difflib.get_close_matches(str(key), [name for known in kinds.values() for name in known], n=1)
            raise InputError(f"setting {key!r} is not known" + (f"; did you mean {near[0]!r}?" if near else ""))
        sorted_out[owner][key] = _fit_type(key, value, kinds[owner][key])
    return Settings(**sorted_out)


def read_decoding(assignments: Sequence[str]) -> dict:
    """Fields of ``Decoding`` from ``KEY=VALUE`` lines. Raises ``InputError`` naming another key."""
    return _of_decoding(read_settings(None, assignments, owners=("decoding",)))


def sort_decoding(settings: Mapping) -> dict:
    """Fields of ``Decoding``, each of its type. Raises ``InputError`` naming another key."""
    return _of_decoding(sort_settings(settings, owners=("decoding",)))


def _of_decoding(settings: Settings) -> dict:
    if others := [*settings.model, *settings.train, *settings.inputs]:
        known = ", ".join(f.name for f in fields(Decoding))
        raise InputError(f"setting {others[0]!r} is the training's; a prediction takes {known}")
    return settings.decoding


_OWNERS = {"train": TrainConfig, "decoding": Decoding, "inputs": Inputs}


def _number(value):
    """YAML 1.1 reads 1e-3 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _fit_type(key: str, value, kind):
    """The value as its field's type; whole numbers pass for real ones, a lone one for a list."""
    if isinstance(kind, types.GenericAlias):
        element = typing.get_args(kind)[0]
        values = list(value) if isinstance(value, list | tuple) else [value]
        return tuple(_fit_type(key, v, element) for v in values)
    value = value.item() if isinstance(value, np.generic) else value
    value = _number(value) if kind is float else value
    if kind is float and type(value) is int and abs(value) < 1e300:
        value = float(value)
    if type(value) is int and abs(value) >= 2**63:  # Python does not even print some of them
        raise InputError(f"setting {key}: expected a number of less than 64 bits")
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        found = repr(value) if len(repr(value)) < 100 else f"{repr(value)[:100]}…"
        raise InputError(f"setting {key}: expected {getattr(kind, '__name__', kind)}, found {found}")
    return value
