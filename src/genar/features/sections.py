"""Features of many sections: embedded one after the other, shared between processes, or brought in from elsewhere."""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from anndata import AnnData

from genar import encoders
from genar.data import contract
from genar.data.patches import Readers
from genar.data.progress import Bar, no_bar
from genar.errors import InputError
from genar.features.imports import find_feature_file, import_features, import_recipe, read_foreign_features
from genar.features.recipe import FeatureRecipe, Inputs, recipe_of
from genar.features.store import BATCH_SIZE, Busy, embed


def embed_sections(
    sections: Sequence[AnnData],
    encoder: encoders.Encoder,
    recipe: FeatureRecipe,
    store: Path,
    bar: Bar = no_bar,
    *,
    workers: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> dict[str, Path]:
    """Embed sections one after the other; section -> store. What is stored already is not made again.

    What another process is embedding is left to it, and looked at again when the rest is done. ``workers`` processes
    read the patches; 0: a thread of this one does; ``None``: :func:`default_workers` beside a GPU, else a thread.
    """
    if workers is None:
        workers = 0 if encoder.device.type == "cpu" else default_workers(encoder.device.type)
    stores, waiting = {}, list(sections)
    with Readers(workers) as readers:
        while waiting:
            busy = []
            for section in waiting:
                with suppress(Busy), bar(f"embedding {contract.name(section)}", section.n_obs) as tick:
                    stores[contract.name(section)] = embed(
                        section, encoder, recipe, store,
                        readers=readers, batch_size=batch_size, wait=False, progress=tick,
                    )  # fmt: skip
                    continue
                busy.append(section)
            time.sleep(0.5 if len(busy) == len(waiting) else 0)
            waiting = busy
    return {contract.name(section): stores[contract.name(section)] for section in sections}


def embed_widths(
    sections: Sequence[AnnData],
    encoder: encoders.Encoder,
    store: Path,
    *,
    patch: str = "hest",
    views: int = 0,
    widths_um: Sequence[float] = (),
    workers: int = 0,
    batch_size: int = BATCH_SIZE,
    bar: Bar = no_bar,
) -> dict[str, Path]:
    """Embed every section at every width; section (and width, where there are several) -> store."""
    if batch_size < 1 or workers < 0:
        raise InputError(f"batch size must be at least 1 and workers at least 0, found {batch_size} and {workers}")
    recipes = Inputs(widths_um=tuple(widths_um)).recipes(recipe_of(encoder, patch=patch, views=views))
    stores = {}
    for recipe in recipes:
        made = embed_sections(sections, encoder, recipe, store, bar, workers=workers, batch_size=batch_size)
        width = f" {recipe.width_um:g} um" if len(recipes) > 1 else ""
        stores |= {f"{name}{width}": path for name, path in made.items()}
    return stores


def default_workers(device: str) -> int:
    """Reading processes where none are named: beside a GPU most of the cores, beside a CPU that computes, too, one."""
    return 1 if device == "cpu" else max(1, min(8, (os.cpu_count() or 1) - 1))


def import_sections(sections: Sequence[AnnData], folder: Path, name: str, store: Path) -> dict[str, Path]:
    """Store features made elsewhere as ``import:NAME``; section -> store. Nothing is stored where one file is wrong."""
    recipe = import_recipe(name)
    files = [find_feature_file(folder, contract.name(section)) for section in sections]
    for section, file in zip(sections, files, strict=True):
        read_foreign_features(file, section)
    return {
        contract.name(section): import_features(section, file, recipe, store)
        for section, file in zip(sections, files, strict=True)
    }
