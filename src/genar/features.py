"""The feature store: every spot of a section embedded once, found again by its recipe, resumed where it stopped.

A store is a Zarr group ``<section>-<hash>.zarr`` with ``features`` float16 [N, views, F], ``barcode`` [N] and, as
attributes, the recipe and what it was made of. The hash covers the recipe, the spots and the slide file: what differs
in any of them is another store. A store that is still being filled ends in ``.partial``.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import platformdirs
import torch
from anndata import AnnData
from scipy.spatial import KDTree

import genar
from genar.data import contract
from genar.data.slide import Slide, open_slide
from genar.encoders import Encoder
from genar.errors import InputError

_SPOTS_PER_CHUNK = 16
PATCHES = ("hest", "genar", "stem")


@dataclass(frozen=True)
class FeatureRecipe:
    """How patches become features; part of a store's name and of a checkpoint."""

    encoder: str
    weights_sha256: str
    patch: str = "hest"
    """Patch convention: ``hest`` (``width_um`` wide), ``genar`` (224 native px), ``stem`` (the spot's diameter, at
    least 224 native px)."""
    width_um: float = 112.0
    """Width of a ``hest`` patch in um."""
    views: int = 8
    """1: the upright patch; 8: its flips and turns, too."""

    def __post_init__(self):
        if self.patch not in PATCHES:
            raise InputError(f"patch convention {self.patch!r} is not known; expected one of {', '.join(PATCHES)}")
        if self.views not in (1, 8):
            raise InputError(f"views must be 1 or 8, found {self.views}")
        if not self.width_um > 0:
            raise InputError(f"width_um must be positive, found {self.width_um}")

    def width_px(self, section: AnnData) -> float:
        """Width of a patch of this section in full-resolution px."""
        mpp = contract.mpp(section)
        if self.patch == "hest":
            return self.width_um / mpp
        if self.patch == "genar":
            return 224.0
        return max(224.0, float(section.uns[contract.GENAR][contract.SPOT_DIAMETER_UM]) / mpp)


@dataclass(frozen=True)
class Inputs:
    """What of the stored features a model sees of a spot, beyond the one patch."""

    widths_um: tuple[float, ...] = ()
    """widths of the patches of a spot, the first the recipe's own; empty: that one alone"""
    context_spots: tuple[int, ...] = ()
    """for each number, the mean feature of so many nearest spots joins the spot's own"""

    def __post_init__(self):
        if any(width <= 0 for width in self.widths_um) or any(n < 1 for n in self.context_spots):
            raise InputError(
                f"widths_um must be positive and context_spots at least 1, found {self.widths_um}, {self.context_spots}"
            )

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
    """The recipe with this encoder; ``views=0`` takes the encoder's own default."""
    return FeatureRecipe(encoder.row.name, encoder.weights_sha256, patch, width_um, views or encoder.row.views)


def default_store() -> Path:
    """Folder of the feature stores where none is named: ``$GENAR_FEATURES``, or the user's cache."""
    return Path(os.environ.get("GENAR_FEATURES") or platformdirs.user_cache_path("genar") / "features")


def embed(
    section: AnnData,
    encoder: Encoder,
    recipe: FeatureRecipe,
    store: Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Embed every spot of ``section`` and return the path of its store; what is stored already is not made again.

    ``progress(done, total)`` is called after each chunk of spots. An interrupted call leaves a ``.partial`` store that
    the next call continues. Raises ``InputError`` where the section has no image, a spot lies outside of it, or the
    image is damaged.
    """
    path = store_path(section, recipe, store)
    if path.is_dir():
        progress(section.n_obs, section.n_obs)
        return path
    slide_path = contract.slide_path(section)
    if slide_path is None:
        raise InputError(f"section {contract.name(section)}: no slide image (wsis/<id>.tif); features cannot be made")
    with contextlib.closing(open_slide(slide_path)) as slide:
        contract.check_inside(section, slide.size_px)
        partial = path.with_suffix(".partial")
        group = _open_partial(partial, section, encoder, recipe)
        n_done = int(group.attrs["n_done"])  # pyright: ignore
        progress(n_done, section.n_obs)
        for start, patches in _patches(slide, section, recipe, encoder.row.input_px, n_done):
            stop = start + len(patches)
            group["features"][start:stop] = _encode_views(encoder, patches, recipe.views)  # pyright: ignore
            group.attrs["n_done"] = stop
            progress(stop, section.n_obs)
    os.replace(partial, path)
    return path


def store_path(section: AnnData, recipe: FeatureRecipe, store: Path) -> Path:
    """Where the features of this section under this recipe lie, made already or not."""
    slide = contract.slide_path(section)
    made_of = {
        **asdict(recipe),
        "spots": hashlib.sha256("\n".join(section.obs_names).encode()).hexdigest(),
        "coords_px": hashlib.sha256(contract.coords_px(section).round(3).tobytes()).hexdigest(),
        "width_px": round(recipe.width_px(section), 3),
        "slide": _fingerprint(slide) if slide else "",
    }
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return Path(store) / f"{contract.name(section)}-{digest[:16]}.zarr"


def read_features(path: Path, section: AnnData) -> np.ndarray:
    """Features float32 [N, views, F] of the section's spots, in their order.

    Raises ``InputError`` where the store is damaged or its rows are not the section's spots.
    """
    import zarr

    try:
        group = zarr.open_group(path, mode="r")
        barcodes = [str(name) for name in group["barcode"][:]]  # pyright: ignore
        features = np.asarray(group["features"][:], dtype=np.float32)  # pyright: ignore
    except (KeyError, ValueError, OSError, RuntimeError) as error:
        raise InputError(f"{path}: not a readable feature store ({error}); delete it and embed again") from error
    if barcodes != list(section.obs_names):
        raise InputError(
            f"{path}: its {len(barcodes)} rows are not the {section.n_obs} spots of section {contract.name(section)}; "
            "delete the store and embed again"
        )
    if not np.isfinite(features).all():
        raise InputError(f"{path}: holds NaN or infinite features; delete it and embed again")
    return features


def read_inputs(paths: Sequence[Path], section: AnnData, inputs: Inputs) -> np.ndarray:
    """Features float32 [N, views, blocks F]: each patch width's, then the neighbours' means of the first width.

    The neighbours' mean is taken view by view. A section of fewer spots takes those there are; a lone spot itself.
    """
    parts = [read_features(path, section) for path in paths]
    if inputs.context_spots:
        coords, own = contract.coords_um(section), parts[0]
        n_most = min(max(inputs.context_spots), len(coords) - 1)
        nearest = KDTree(coords).query(coords, k=n_most + 1)[1].reshape(len(coords), -1)
        others = _without_self(nearest)
        for n in inputs.context_spots:
            among = others[:, : min(n, n_most)] if n_most else np.arange(len(coords))[:, None]
            parts.append(own[among].mean(axis=1))
    return np.concatenate(parts, axis=2)


def _without_self(nearest: np.ndarray) -> np.ndarray:
    """Neighbours [N, n] of [N, n + 1]; the spot itself need not come first where two lie at one place."""
    others = np.empty((len(nearest), nearest.shape[1] - 1), dtype=int)
    for spot, row in enumerate(nearest):
        others[spot] = row[row != spot][: nearest.shape[1] - 1]
    return others


def _fingerprint(slide: Path) -> str:
    """Identity of a slide file without reading gigabytes: its size, its first and its last MiB."""
    size, window = slide.stat().st_size, 1 << 20
    with slide.open("rb") as file:
        digest = hashlib.sha256(file.read(window))
        file.seek(max(0, size - window))
        digest.update(file.read(window))
    return f"{size}-{digest.hexdigest()}"


def _open_partial(path: Path, section: AnnData, encoder: Encoder, recipe: FeatureRecipe):
    """The half-filled store of an earlier run, or a new one; a partial store that was cut while created is made
    anew."""
    import zarr

    if path.is_dir():
        with contextlib.suppress(KeyError, ValueError, OSError):
            group = zarr.open_group(path, mode="r+")
            if "n_done" in group.attrs and "features" in group:
                return group
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    group = zarr.open_group(path, mode="w")
    group.create_array(
        "features",
        shape=(section.n_obs, recipe.views, encoder.width),
        chunks=(_SPOTS_PER_CHUNK, recipe.views, encoder.width),
        dtype="float16",
        fill_value=float("nan"),  # a lost chunk reads as NaN, which read_features refuses
    )
    barcodes = section.obs_names.to_numpy().astype(object)
    group.create_array("barcode", shape=barcodes.shape, dtype="string")[:] = barcodes
    group.attrs.update({**asdict(recipe), "section": contract.name(section), "mpp": contract.mpp(section)})
    group.attrs.update({"input_px": encoder.row.input_px, "genar_version": genar.__version__, "n_done": 0})
    return group


def _patches(
    slide: Slide, section: AnnData, recipe: FeatureRecipe, out_px: int, start: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, patches uint8 [n, px, px, 3]) chunk by chunk; the next chunk is read while this one is encoded."""
    centers, width_px = contract.coords_px(section), recipe.width_px(section)

    def read(first: int) -> np.ndarray:
        chunk = centers[first : first + _SPOTS_PER_CHUNK]
        return np.stack([slide.read_patch_px(center, width_px, out_px) for center in chunk])

    starts = range(start, len(centers), _SPOTS_PER_CHUNK)
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = reader.submit(read, starts[0]) if starts else None
        for i, first in enumerate(starts):
            patches = ahead.result()  # pyright: ignore
            ahead = reader.submit(read, starts[i + 1]) if i + 1 < len(starts) else None
            yield first, patches


def _encode_views(encoder: Encoder, patches: np.ndarray, views: int) -> np.ndarray:
    """Features float16 [n, views, F]; view 0 is upright, then the turns by 90 degrees, then the same mirrored."""
    upright = torch.from_numpy(patches)
    turned = [torch.rot90(upright, k, (1, 2)) for k in range(4 if views == 8 else 1)]
    if views == 8:
        turned += [view.flip(2) for view in turned]
    return torch.stack([encoder(view) for view in turned], dim=1).half().numpy()
