"""How patches become features: the recipe, what a model sees of it, and where its store lies."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import platformdirs
from anndata import AnnData

from genar.data import contract
from genar.data.door import reason_of
from genar.encoders import Encoder, check_precision
from genar.errors import InputError

PATCHES = ("hest", "genar", "stem")
_LOOKS, _WINDOW = 33, 1 << 16
RECIPE_VERSION = 1
"""Raised when the same recipe would give other features, so that no store of the old way is taken for one of the
new."""


@dataclass(frozen=True)
class FeatureRecipe:
    """How patches become features; part of a store's name and of a checkpoint.

    Raises ``InputError`` where patch, views, width or precision is none of those known.
    """

    encoder: str
    """Name of the encoder, as ``--encoder`` has it."""
    weights_sha256: str
    """Hash of its weights; empty where they are not known yet."""
    patch: str = "hest"
    """Patch convention: ``hest`` (``width_um`` wide), ``genar`` (224 native px), ``stem`` (the spot's diameter, at
    least 224 native px)."""
    width_um: float = 112.0
    """Width of a ``hest`` patch in um."""
    views: int = 8
    """1: the upright patch; 8: its flips and turns, too."""
    precision: str = "fp32"
    """Of the encoder's arithmetic: ``fp32``, ``bf16`` or ``fp16``."""

    def __post_init__(self):
        for name, kind in (("width_um", float), ("views", int)):  # 112 is 112.0, and NumPy's numbers are numbers
            if isinstance(value := getattr(self, name), int | float | np.number) and kind(value) == value:
                object.__setattr__(self, name, kind(value))
        if self.patch not in PATCHES:
            raise InputError(f"patch convention {self.patch!r} is not known; expected one of {', '.join(PATCHES)}")
        if self.views not in (1, 8):
            raise InputError(f"views must be 1 or 8, found {self.views}")
        if not self.width_um > 0:
            raise InputError(f"width_um must be positive, found {self.width_um}")
        check_precision(self.precision)

    def width_px(self, section: AnnData) -> float:
        """Width of a patch of this section in full-resolution px. Raises ``InputError`` where its pixel size is not
        known."""
        mpp = contract.mpp(section)
        if self.patch == "hest":
            return self.width_um / mpp
        if self.patch == "genar":
            return 224.0
        return max(224.0, float(section.uns[contract.GENAR].get(contract.SPOT_DIAMETER_UM, 0)) / mpp)


@dataclass(frozen=True)
class Inputs:
    """What of the stored features a model sees of a spot, beyond the one patch.

    Raises ``InputError`` where a width or a number is not above 0, or stands there twice.
    """

    widths_um: tuple[float, ...] = ()
    """widths of the patches of a spot, um, the first the recipe's own; empty: that one alone"""
    context_spots: tuple[int, ...] = ()
    """for each number, the mean feature (of the last width) of so many nearest spots joins the spot's own"""

    def __post_init__(self):
        widths, context = self.widths_um, self.context_spots
        if any(width <= 0 for width in widths) or any(n < 1 for n in context):
            raise InputError(f"widths_um must be positive and context_spots at least 1, found {widths}, {context}")
        if len(set(widths)) < len(widths) or len(set(context)) < len(context):
            raise InputError(f"widths_um and context_spots must each differ, found {widths}, {context}")

    @property
    def n_blocks(self) -> int:
        """Feature vectors of a spot, one after the other."""
        return max(1, len(self.widths_um)) + len(self.context_spots)

    def recipes(self, recipe: FeatureRecipe) -> list[FeatureRecipe]:
        """A recipe for each patch width. Raises ``InputError`` where the patch convention has no widths in um."""
        if self.widths_um and recipe.patch != "hest":
            raise InputError(f"widths_um needs patch convention hest, found {recipe.patch}")
        return [replace(recipe, width_um=float(width)) for width in self.widths_um] or [recipe]


def recipe_of(encoder: Encoder, *, patch: str = "hest", width_um: float = 112.0, views: int = 0) -> FeatureRecipe:
    """The recipe with this encoder: patches of ``width_um`` um, 1 or 8 ``views`` (0: the encoder's own default). Raises
    ``InputError`` where the ``patch`` is not hest, genar or stem, or one of the numbers cannot be.

    >>> recipe = genar.recipe_of(genar.load_encoder(), width_um=309.0)
    >>> recipe.width_um, recipe.views
    (309.0, 8)
    """
    views = views or encoder.row.views
    return FeatureRecipe(encoder.row.name, encoder.weights_sha256, patch, width_um, views, encoder.precision)


def recipe_and_inputs(facts: Mapping) -> tuple[FeatureRecipe, Inputs]:
    """What a checkpoint says of its features. Raises ``InputError`` where that is not enough to make them."""
    known = {f.name for f in fields(Inputs)}
    try:
        inputs = Inputs(**{name: tuple(facts[name]) for name in known if name in facts})
        recipe = FeatureRecipe(**{name: value for name, value in facts.items() if name not in known})
        if not (isinstance(recipe.encoder, str) and isinstance(recipe.weights_sha256, str)):
            raise TypeError("encoder and weights_sha256 must be text")
    except TypeError as error:
        raise InputError(
            f"the checkpoint does not say how its features are made ({reason_of(error)}): expected the fields of a "
            "FeatureRecipe in Checkpoint.features (dataclasses.asdict); genar.predict_section takes features themselves"
        ) from error
    return recipe, inputs


def default_store() -> Path:
    """Folder of the feature stores where none is named: ``$GENAR_FEATURES``, or the user's cache."""
    return Path(os.environ.get("GENAR_FEATURES") or platformdirs.user_cache_path("genar") / "features")


def store_path(section: AnnData, recipe: FeatureRecipe, store: Path) -> Path:
    """Where the features of this section under this recipe lie, made already or not.

    The name's hash covers the recipe (encoder, weights, convention, width in um and, by the pixel size, in px, views,
    precision), its version, the spots and the slide file.
    """
    slide = contract.slide_path(section)
    made_of = {
        **asdict(recipe),
        "spots": hashlib.sha256("\n".join(section.obs_names).encode()).hexdigest(),
        "coords_px": hashlib.sha256(contract.coords_px(section).round(3).tobytes()).hexdigest(),
        "width_px": round(recipe.width_px(section), 3),
        "slide": _fingerprint(slide) if slide else "",
    }
    if recipe.precision == "fp32":  # stores made before there was a choice keep their name
        del made_of["precision"]
    if RECIPE_VERSION > 1:
        made_of["version"] = RECIPE_VERSION
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return Path(store) / f"{contract.name(section)}-{digest[:16]}.zarr"


def _fingerprint(slide: Path) -> str:
    """Identity of a slide without reading gigabytes: its size and :data:`_LOOKS` windows spread over it; of the image
    of a SpatialData store, the names and sizes of its files and windows of as many of them."""
    if slide.name not in ("zarr.json", ".zattrs"):
        size = slide.stat().st_size
        return f"{size}-{_windows([(slide, int(at)) for at in np.linspace(0, max(0, size - _WINDOW), _LOOKS)])}"
    files = sorted(path for path in slide.parent.rglob("*") if path.is_file())
    listed = [(path.relative_to(slide.parent).as_posix(), path.stat().st_size) for path in files]
    chosen = sorted({int(i) for i in np.linspace(0, len(files) - 1, _LOOKS)})
    names = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return f"{names}-{_windows([(files[i], 0) for i in chosen])}"


def _windows(places: list[tuple[Path, int]]) -> str:
    """Hash of ``_WINDOW`` bytes of each file from its place."""
    digest = hashlib.sha256()
    for path, at in places:
        with path.open("rb") as file:
            file.seek(at)
            digest.update(file.read(_WINDOW))
    return digest.hexdigest()
