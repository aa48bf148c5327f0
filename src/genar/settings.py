"""Settings from a YAML file and the command line, sorted into those of the model, the training, the decoding and the
inputs."""

import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

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


def read_settings(config: Path | None, assignments: Sequence[str], model: str = "genar") -> Settings:
    """Settings from a YAML file and ``KEY=VALUE`` lines, which win.

    A key is a setting of ``model``, or a field of ``TrainConfig``, ``Decoding`` or ``Inputs``. Raises ``InputError``
    naming one that is none of them, or a value of another type.
    """
    import yaml

    settings: dict = {}
    if config is not None:
        try:
            settings = yaml.safe_load(config.read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{config}: not readable YAML ({error})") from error
        if not isinstance(settings, dict):
            raise InputError(f"{config}: expected lines of the form key: value, found {type(settings).__name__}")
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {text}: expected KEY=VALUE")
        try:
            settings[key.strip()] = _number(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise InputError(f"--set {text}: the value is not readable ({error})") from error
    kinds = {"model": model_class(model).settings_types()}
    kinds |= {name: {f.name: f.type for f in fields(owner)} for name, owner in _OWNERS.items()}
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
    settings = read_settings(None, assignments)
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
    value = _number(value) if kind is float else value
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"setting {key}: expected {getattr(kind, '__name__', kind)}, found {value!r}")
    return value
