"""Settings from a YAML file and the command line, sorted into those of the model and those of the training."""

import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from genar.errors import InputError
from genar.models.genar import GenARConfig
from genar.training import TrainConfig


def read_settings(config: Path | None, assignments: Sequence[str]) -> tuple[dict, dict]:
    """Settings of the model and of the training, from a YAML file and ``KEY=VALUE`` lines, which win.

    A key is a field of ``TrainConfig`` or ``GenARConfig``, or ``scales``. Raises ``InputError`` naming one that is
    neither.
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
    known_train, known_model = ({f.name: f for f in fields(cls)} for cls in (TrainConfig, GenARConfig))
    for key, value in settings.items():
        if key not in known_train and key not in known_model and key != "scales":
            near = difflib.get_close_matches(str(key), [*known_train, *known_model, "scales"], n=1)
            raise InputError(f"setting {key!r} is not known" + (f"; did you mean {near[0]!r}?" if near else ""))
        field_type = {**known_train, **known_model}[key].type if key != "scales" else None
        settings[key] = _fit_type(key, value, field_type)
    return {k: v for k, v in settings.items() if k not in known_train}, {
        k: v for k, v in settings.items() if k in known_train
    }


def _number(value):
    """YAML 1.1 reads 1e-3 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _fit_type(key: str, value, kind):
    """The value as its field's type; whole numbers pass for real ones."""
    if key == "scales":
        if isinstance(value, list) and all(type(v) is int for v in value):
            return tuple(value)
        raise InputError(f"setting scales: expected a list of whole numbers such as [1, 20, 200], found {value!r}")
    value = _number(value) if kind is float else value
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"setting {key}: expected {kind.__name__}, found {value!r}")
    return value
