"""Pixels for models that are trained end to end: the patches of every spot, read through the slide reader, in place of
an encoder's features."""

import contextlib
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from anndata import AnnData
from torch import Tensor

from genar.data import contract, open_slide
from genar.data.patches import Readers
from genar.data.progress import Bar, no_bar
from genar.data.slide import image_head
from genar.errors import InputError
from genar.features import FeatureRecipe, Inputs, default_workers
from genar.models import Model, model_class, model_names

INPUTS = ("features", "patches")
VIEWS = 8
"""flips and turns of a patch, of which training draws one a spot and epoch"""
IN_MEMORY_BYTES = 2 * 2**30
"""patches of more than this lie in a file"""
_WORTH_A_PROCESS = 512  # patches: to start a process takes as long as to read some hundreds


@dataclass(frozen=True)
class PixelRecipe:
    """Which pixels a model sees of a spot; part of a checkpoint."""

    patch: str = "hest"
    """patch convention, as of :class:`~genar.features.FeatureRecipe`"""
    width_um: float = 112.0
    """width of a ``hest`` patch, um"""
    crops: tuple[float, ...] = (1.0,)
    """patches of a spot, as multiples of that width"""
    crop_px: int = 224
    """side that each is resampled to"""

    def __post_init__(self):
        FeatureRecipe("", "", self.patch, self.width_um)  # refuses a convention that is not known
        if not self.crops or any(not crop > 0 for crop in self.crops) or self.crop_px < 1:
            raise InputError(f"patches need widths and a size above 0, found crops {self.crops} of {self.crop_px} px")

    @classmethod
    def of(cls, model: type[Model], patch: str = "hest") -> "PixelRecipe":
        """What this model takes, under a patch convention."""
        return cls(patch, crops=tuple(map(float, model.crops)), crop_px=model.crop_px)

    @classmethod
    def from_facts(cls, facts: Mapping) -> "PixelRecipe":
        """Inverse of :attr:`facts`."""
        own = {f.name: facts[f.name] for f in fields(cls)}
        return cls(**{**own, "crops": tuple(own["crops"])})

    @property
    def facts(self) -> dict:
        """As written to a checkpoint, where it stands in place of the feature recipe."""
        return {"input": "patches", **asdict(self)}

    def width_px(self, section: AnnData) -> float:
        """Width of a patch of this section in full-resolution px, that of features of the same convention."""
        return FeatureRecipe("", "", self.patch, self.width_um).width_px(section)


def takes_patches(facts: Mapping) -> bool:
    """Whether the model of a checkpoint with these facts of its features sees pixels."""
    return facts.get("input") == "patches"


def input_settings(input: str, name: str, preset: str, settings: Mapping, inputs: Inputs) -> dict:
    """The settings of model ``name`` with ``input`` among them, where it has such a setting, and its own for patches.

    Raises ``InputError`` where the model does not take that input (naming those that take patches), where preset or
    settings ask for the other one, or where ``inputs`` are of features and patches are asked for.
    """
    cls = model_class(name)
    if input not in INPUTS:
        raise InputError(f"input must be one of {', '.join(INPUTS)}, found {input!r}")
    if input not in cls.inputs:
        able = ", ".join(other for other in model_names() if input in model_class(other).inputs)
        raise InputError(f"model {name} takes {' or '.join(cls.inputs)}, not {input}; choose one of {able}")
    if input == "patches" and inputs != Inputs():
        raise InputError("widths_um and context_spots are of features; leave them out with --input patches")
    settings = dict(settings)
    if "input" not in cls.settings_types():
        return settings
    wanted = settings.get("input") or getattr(cls, "presets", {}).get(preset, {}).get("input", input)
    if wanted != input and wanted in INPUTS:
        raise InputError(f"model {name}: preset {preset} and its settings take {wanted}; pass --input {wanted}")
    own = cls.patch_settings if input == "patches" and preset == "small" else {}
    return {"input": input, **own, **settings}


def check_images(sections: Sequence[AnnData], *, needed: bool = False) -> None:
    """Refuse spots outside of their image and, where pixels are ``needed``, sections without one, by ``InputError``."""
    for section in sections:
        if (path := contract.slide_path(section)) is not None:
            contract.check_inside(section, image_head(path)[0])
        elif needed:
            raise InputError(f"{contract.no_image_message(section, '--input patches')}; or train on features")


def read_pixels(
    sections: Sequence[AnnData], recipe: PixelRecipe, folder: Path, *, workers: int | None = None, bar: Bar = no_bar
) -> Tensor:
    """The upright patches of all spots of all sections, one after the other: uint8 [N, crops, 3, px, px].

    Above ``IN_MEMORY_BYTES`` they lie in a file in ``folder``, for the caller to remove, and memory holds what is
    looked at. ``workers`` processes read; by default a thread where there are few patches. Raises ``InputError`` where
    a section has no image, the image is damaged, or the disk too full.
    """
    check_images(sections, needed=True)
    n_spots = sum(section.n_obs for section in sections)
    out = _room_for(n_spots, recipe, folder, "-".join(contract.name(s) for s in sections[:1]) or "none")
    if workers is None:
        workers = default_workers("") if n_spots * len(recipe.crops) > _WORTH_A_PROCESS else 0
    first = 0
    with Readers(workers) as readers:
        for section in sections:
            n = section.n_obs * len(recipe.crops)
            with bar(f"reading patches of {contract.name(section)}", n) as tick:
                _read_section(out[first : first + section.n_obs], section, recipe, readers, tick)
            first += section.n_obs
    return torch.from_numpy(out)


def _read_section(out: np.ndarray, section: AnnData, recipe: PixelRecipe, readers: Readers, tick) -> None:
    path = contract.slide_path(section)
    assert path is not None
    centers, width_px = contract.coords_px(section), recipe.width_px(section)
    total = out.shape[0] * out.shape[1]
    with contextlib.closing(open_slide(path)) as slide:
        for number, crop in enumerate(recipe.crops):
            for start, patches in readers.patches(slide, centers, width_px * crop, recipe.crop_px):
                stop = start + len(patches)
                out[start:stop, number] = patches.transpose(0, 3, 1, 2)
                tick(number * len(out) + stop, total)


def _room_for(n_spots: int, recipe: PixelRecipe, folder: Path, name: str) -> np.ndarray:
    """An array to be filled, in memory or in a file."""
    shape = (n_spots, len(recipe.crops), 3, recipe.crop_px, recipe.crop_px)
    needed = math.prod(shape)
    if needed <= IN_MEMORY_BYTES:
        return np.empty(shape, np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < needed:
        raise InputError(
            f"{folder}: the patches of {n_spots:,} spots take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are "
            "free; choose another --out, or fewer sections"
        )
    file = folder / f"patches-{name}.u8"
    patches = np.memmap(file, np.uint8, mode="w+", shape=shape)
    if hasattr(os, "posix_fallocate"):  # else a disk that fills up meanwhile would end the process without a word
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, needed)
    return patches


def no_features(n_spots: int) -> np.ndarray:
    """What stands for the features of spots that come as pixels: float32 [N, 8, 0], a row for each view."""
    return np.zeros((n_spots, VIEWS, 0), np.float32)
