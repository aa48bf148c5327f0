"""GenAR: raw gene counts of every spot of a tissue slide, generated from its H&E image scale by scale.

The names of the walk from sections to scores, each loaded when it is first asked for, so that ``import genar`` costs
next to nothing:

>>> import genar
>>> panel = genar.Panel(("EPCAM", "COL1A1"), "chosen by hand")
>>> len(panel.genes)
2
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # what editors and type checkers see of it
    from genar.data import open_slide, read_section, read_sections
    from genar.data.simulate import write_tissue
    from genar.data.tissue import place_spots
    from genar.encoders import load_encoder
    from genar.errors import InputError
    from genar.evaluation import score
    from genar.features import embed, read_features, recipe_of
    from genar.genes import Panel, fit_scales, select_panel
    from genar.models.checkpoint import load_checkpoint
    from genar.models.genar import GenAR
    from genar.notebook import predict, train
    from genar.prediction import predict_section

_HOMES = {
    "GenAR": "models.genar",
    "InputError": "errors",
    "Panel": "genes",
    "embed": "features",
    "fit_scales": "genes",
    "load_checkpoint": "models.checkpoint",
    "load_encoder": "encoders",
    "open_slide": "data",
    "place_spots": "data.tissue",
    "predict": "notebook",
    "predict_section": "prediction",
    "read_features": "features",
    "read_section": "data",
    "read_sections": "data",
    "recipe_of": "features",
    "score": "evaluation",
    "select_panel": "genes",
    "train": "notebook",
    "write_tissue": "data.simulate",
}

__all__ = [
    "GenAR",
    "InputError",
    "Panel",
    "embed",
    "fit_scales",
    "load_checkpoint",
    "load_encoder",
    "open_slide",
    "place_spots",
    "predict",
    "predict_section",
    "read_features",
    "read_section",
    "read_sections",
    "recipe_of",
    "score",
    "select_panel",
    "train",
    "write_tissue",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'genar' has no attribute {name!r}")
    return getattr(import_module(f"genar.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
