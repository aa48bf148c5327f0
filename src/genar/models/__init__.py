"""Models: one file each, and the folder is the registry."""

from importlib import import_module
from pathlib import Path

from genar.errors import InputError
from genar.models._base import Batch, Counts, Decoding, LossOutput, Model, Spots

__all__ = ["Batch", "Counts", "Decoding", "LossOutput", "Model", "Spots", "model_class", "model_names"]


def model_names() -> list[str]:
    """Every model of the folder."""
    files = (path.stem for path in Path(__file__).parent.glob("*.py"))
    return sorted(name for name in files if not name.startswith("_") and name != "checkpoint")


def model_class(name: str) -> type[Model]:
    """The class of a model; ``InputError`` with the known names where there is none."""
    if name not in model_names():
        raise InputError(f"model {name!r} is not known; expected one of {', '.join(model_names())}")
    return import_module(f"genar.models.{name}").MODEL
