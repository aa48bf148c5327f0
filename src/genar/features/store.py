"""Fill a store: every spot of a section embedded once, chunk by chunk, resumed where it stopped.

A store is a Zarr group ``<section>-<hash>.zarr`` with ``features`` [N, views, F] (float16; float32 where imported),
``barcode`` [N] and, as attributes, the recipe and what it was made of. One that is still being filled ends in
``.partial``; beside it lies ``.lock``, which the operating system frees when the process that holds it ends, however it
ends. Chunks are always cut at the same spots, so that a resumed store holds the same bits as an undisturbed one.
"""

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from anndata import AnnData
from filelock import FileLock, Timeout

import genar
from genar import defaults
from genar.data import contract
from genar.data.files import let_go, make_folder
from genar.data.patches import CHUNK, Readers
from genar.data.slide import Slide, open_slide
from genar.encoders import Encoder, ImportedFeatures
from genar.errors import InputError
from genar.features.recipe import FeatureRecipe, store_path

BATCH_SIZE = defaults.BATCH_SIZE
_BLANK_SD = 12.0  # of the values 0 to 255 of a patch; glass has 2 to 8, tissue 30 and more
_MANY = 0.9


class Busy(Exception):  # noqa: N818
    """Another process embeds this section now."""


def embed(
    section: AnnData,
    encoder: Encoder,
    recipe: FeatureRecipe,
    store: str | Path,
    *,
    readers: Readers | None = None,
    batch_size: int = BATCH_SIZE,
    wait: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Embed every spot of ``section`` and return the path of its store; what is stored already is not made again.

    ``progress(done, total)`` is called after each step. ``readers`` reads patches in worker processes, without them a
    thread does; ``batch_size`` patches go through the encoder at once. An interrupted call leaves a ``.partial`` store
    that the next call continues. Where another process is at it, its end is waited for, or ``Busy`` raised
    (``wait=False``). Raises ``InputError`` where the section has no image, a spot lies outside of it, or the image is
    damaged.

    >>> section, encoder = genar.read_section("tissue:SIM1"), genar.load_encoder()
    >>> store = genar.embed(section, encoder, genar.recipe_of(encoder, views=1), "features")
    >>> genar.read_features(store, section).shape  # spots, views, features
    (35, 1, 1280)
    """
    path = store_path(section, recipe, Path(store))
    if not path.is_dir():
        with contextlib.closing(_open_image(section, encoder)) as slide, _locked(path, wait):
            if not path.is_dir():  # else made by another process meanwhile
                _fill(path, slide, section, encoder, recipe, readers, batch_size, progress)
    with contextlib.suppress(OSError):  # of one that was killed when all was done; the store may be another's
        path.with_suffix(".lock").unlink(missing_ok=True)
    progress(section.n_obs, section.n_obs)
    return path


def check_source(section: AnnData, encoder: Encoder, recipe: FeatureRecipe, store: Path) -> None:
    """Refuse, before any work, a section whose features are not stored and cannot be made: without an image, or where
    they are made elsewhere. Raises ``InputError``."""
    if not store_path(section, recipe, store).is_dir():
        _image_of(section, encoder)


def _image_of(section: AnnData, encoder: Encoder) -> Path:
    """Where the image lies of which features are to be made."""
    if isinstance(encoder, ImportedFeatures):
        raise encoder.refusal(f"section {contract.name(section)}")
    if (path := contract.slide_path(section)) is None:
        raise InputError(contract.no_image_message(section, "its features"))
    return path


def _open_image(section: AnnData, encoder: Encoder) -> Slide:
    """The section's image, with every spot inside."""
    slide = open_slide(_image_of(section, encoder))
    try:
        contract.check_inside(section, slide.size_px)
    except InputError:
        slide.close()
        raise
    return slide


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[None]:
    """Hold the store's lock. Its file goes when the store is whole: whoever still waits for it then finds the store."""
    make_folder(path.parent)
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=-1 if wait else 0, poll_interval=0.2)
    except Timeout as error:
        raise Busy(str(path)) from error
    try:
        yield
    finally:
        if path.is_dir():
            let_go(lock)
        else:
            lock.release()


def _fill(path, slide, section, encoder, recipe, readers, batch_size, progress) -> None:
    partial = path.with_suffix(".partial")
    group = _open_partial(partial, section, encoder, recipe)
    n_done = int(group.attrs["n_done"])  # pyright: ignore
    progress(n_done, section.n_obs)
    centers, width_px = contract.coords_px(section), recipe.width_px(section)
    per_step = -(-batch_size // CHUNK) * CHUNK  # whole chunks of the store
    n_blank = 0
    with contextlib.nullcontext(readers) if readers else Readers() as reading:
        steps = reading.patches(
            slide, centers, width_px, encoder.row.input_px, start=n_done, per_step=per_step
        )  # fmt: skip
        for start, patches in steps:
            stop = start + len(patches)
            n_blank += int((patches[:, ::8, ::8].reshape(len(patches), -1).std(axis=1) < _BLANK_SD).sum())
            group["features"][start:stop] = _encode_views(encoder, patches, recipe.views, batch_size)  # pyright: ignore
            group.attrs["n_done"] = stop
            progress(stop, section.n_obs)
    os.replace(partial, path)
    if n_blank > _MANY * (section.n_obs - n_done):
        warnings.warn(
            f"section {contract.name(section)}: {n_blank} of {section.n_obs - n_done} patches show hardly anything; do "
            "coordinates and image belong together? `genar check --out FOLDER` draws them",
            stacklevel=2,
        )


def _open_partial(path: Path, section: AnnData, encoder: Encoder, recipe: FeatureRecipe):
    """The half-filled store of an earlier run, or a new one; a partial store that was cut while created is made
    anew."""
    import zarr

    for cut in path.rglob("*.partial"):  # Zarr's own, of a process that was killed
        cut.unlink()
    if path.is_dir():
        with contextlib.suppress(KeyError, ValueError, OSError):
            group = zarr.open_group(path, mode="r+")
            if "n_done" in group.attrs and "features" in group:
                return group
        shutil.rmtree(path)
    group = new_store(path, section, recipe, encoder.width, dtype="float16", rows_per_chunk=CHUNK)
    group.attrs.update({"input_px": encoder.row.input_px, "n_done": 0})
    return group


def new_store(path: Path, section: AnnData, recipe: FeatureRecipe, width: int, *, dtype: str, rows_per_chunk: int):
    """A new Zarr group for the features of a section's spots; its rows read as NaN until they are written."""
    import zarr

    path.parent.mkdir(parents=True, exist_ok=True)
    group = zarr.open_group(path, mode="w")
    group.create_array(
        "features",
        shape=(section.n_obs, recipe.views, width),
        chunks=(rows_per_chunk, recipe.views, width),
        dtype=dtype,
        fill_value=float("nan"),  # a lost chunk reads as NaN, which read_features refuses
    )
    barcodes = section.obs_names.to_numpy().astype(object)
    group.create_array("barcode", shape=barcodes.shape, dtype="string")[:] = barcodes
    group.attrs.update({**asdict(recipe), "section": contract.name(section), "mpp": contract.mpp(section)})
    group.attrs.update({"genar_version": genar.__version__})
    return group


def _encode_views(encoder: Encoder, patches: np.ndarray, views: int, batch_size: int) -> np.ndarray:
    """Features float16 [n, views, F]; view 0 is upright, then the turns by 90 degrees, then the same mirrored."""
    upright = torch.from_numpy(patches)
    turned = [torch.rot90(upright, k, (1, 2)) for k in range(4 if views == 8 else 1)]
    if views == 8:
        turned += [view.flip(2) for view in turned]
    encoded = [torch.cat([encoder(batch) for batch in view.split(batch_size)]) for view in turned]
    features = torch.stack(encoded, dim=1).half()
    if not features.isfinite().all():
        raise InputError(
            f"encoder {encoder.row.name}: features that are NaN or beyond 65504 (they are stored in half precision); "
            "are its weights and its mean and std right?"
        )
    return features.numpy()
