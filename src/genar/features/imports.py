"""Take in features made elsewhere: ``.h5`` of TRIDENT, CLAM and HEST, ``.pt``, ``.npy``.

Rows are matched to spots by barcode where the file has them, else by position (the patches' corners differ from the
spots' centres by half a patch, the same for all), else taken in the order of the spots, which must be as many.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from anndata import AnnData
from scipy.spatial import KDTree

from genar.data import contract
from genar.data.door import check_hdf5, door
from genar.data.files import replacing
from genar.encoders import IMPORTED
from genar.encoders.torch_files import read_torch
from genar.errors import InputError
from genar.features.recipe import FeatureRecipe, store_path
from genar.features.store import new_store
from genar.features.stored import read_features

_SUFFIXES = (".h5", ".pt", ".npy")
_FOLDERS = (".", "h5_files", "pt_files")  # CLAM's and TRIDENT's
_FEATURES, _COORDS, _BARCODES = ("features", "embeddings", "feats"), ("coords",), ("barcodes", "barcode")
IMPORTED_SHA256 = "imported_sha256"
_TOLERANCE_PX = 2.0  # corners are whole pixels


def import_recipe(name: str, *, width_um: float = 112.0) -> FeatureRecipe:
    """The recipe under which features made elsewhere are stored; ``name`` is what the user calls them."""
    return FeatureRecipe(f"{IMPORTED}{name.removeprefix(IMPORTED)}", "imported", "hest", width_um, 1)


def find_feature_file(folder: Path, section: str) -> Path:
    """The feature file of a section: ``<section>.h5``, ``.pt`` or ``.npy``; ``InputError`` where there is none."""
    for suffix in _SUFFIXES:  # h5 first: it says which row is which spot
        for place in _FOLDERS:
            if (file := folder / place / f"{section}{suffix}").is_file():
                return file
    raise InputError(
        f"{folder}: no features of section {section}; expected {section}.h5, {section}.pt or {section}.npy"
    )


def import_features(section: AnnData, file: Path, recipe: FeatureRecipe, store: Path) -> Path:
    """Store the features of ``file`` under ``recipe`` and return the path of the store.

    Raises ``InputError`` where the file is damaged, its rows do not match the section's spots, or other features were
    imported under this name before.
    """
    features = read_foreign_features(file, section)
    path = store_path(section, recipe, store)
    if path.is_dir():
        known = read_features(path, section)
        if known.shape == (len(features), 1, features.shape[1]) and (known[:, 0] == features).all():
            return path
        raise InputError(
            f"{file}: other features of section {contract.name(section)} were imported as {recipe.encoder} before; "
            f"choose another --encoder name, or delete {path}"
        )
    with replacing(path) as temporary:
        group = new_store(temporary, section, recipe, features.shape[1], dtype="float32", rows_per_chunk=256)
        group["features"][:] = features[:, None]  # pyright: ignore
        digest = hashlib.sha256(np.ascontiguousarray(features).tobytes()).hexdigest()
        group.attrs.update({"imported_from": file.name, IMPORTED_SHA256: digest, "n_done": section.n_obs})
    return path


def imported_sha256(store: Path) -> str:
    """Hash of the features in a store that were made elsewhere; empty where an older release imported them."""
    import zarr

    with door(store, "feature store"):
        return str(zarr.open_group(store, mode="r").attrs.get(IMPORTED_SHA256, ""))


def read_foreign_features(file: Path, section: AnnData) -> np.ndarray:
    """Features float32 [N, F] of the section's spots, in their order; ``InputError`` where the rows are not they."""
    with door(file, "file of features", "make it again"):
        return _matched(file, {".h5": _read_h5, ".pt": _read_pt, ".npy": _read_npy}[file.suffix](file), section)


def _matched(file: Path, arrays: dict[str, np.ndarray], section: AnnData) -> np.ndarray:
    features = arrays["features"]
    if features.ndim == 3 and len(features) == 1:  # some writers keep a batch axis
        features = features[0]
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating):
        raise InputError(f"{file}: expected features [N, F], found shape {features.shape} of {features.dtype}")
    name, n_spots = contract.name(section), section.n_obs
    if len(features) != n_spots:
        raise InputError(f"{file}: its {len(features)} rows do not match the {n_spots} spots of section {name}")
    order = _order(file, arrays, section)
    features = features[order].astype(np.float32)
    if not np.isfinite(features).all():
        raise InputError(f"{file}: holds NaN or infinite features; make it again")
    return features


def _order(file: Path, arrays: dict[str, np.ndarray], section: AnnData) -> np.ndarray:
    """For each spot its row in the file."""
    order = np.arange(section.n_obs)
    if "barcodes" in arrays:
        row_of = {_text(value): row for row, value in enumerate(arrays["barcodes"].reshape(-1))}
        missing = [spot for spot in section.obs_names if spot not in row_of]
        if missing or len(row_of) != section.n_obs:
            raise InputError(
                f"{file}: its barcodes do not match the {section.n_obs} spots of section {contract.name(section)} "
                f"({len(missing)} spots have no row{f', first {missing[0]}' if missing else ''})"
            )
        order = np.array([row_of[spot] for spot in section.obs_names])
    if "coords" in arrays:
        by_place = _order_by_place(file, arrays["coords"], section)
        if "barcodes" in arrays and (by_place != order).any():
            raise InputError(f"{file}: its barcodes and its coords do not match; which of them is right?")
        order = by_place
    return order


def _order_by_place(file: Path, corners: np.ndarray, section: AnnData) -> np.ndarray:
    centers, corners = contract.coords_px(section), np.asarray(corners, dtype=float).reshape(-1, 2)
    refusal = InputError(
        f"{file}: its coords do not match the {section.n_obs} spots of section {contract.name(section)}; expected the "
        "corners (x, y) of one patch around each spot, in full-resolution px"
    )
    if len(corners) != len(centers):
        raise refusal
    half = centers.mean(axis=0) - corners.mean(axis=0)
    if abs(half[0] - half[1]) > _TOLERANCE_PX or half.min() < -_TOLERANCE_PX:  # a patch is square
        raise refusal
    distance, row = KDTree(corners + half).query(centers, p=np.inf)
    if distance.max() > _TOLERANCE_PX or len(np.unique(row)) != len(centers):
        raise refusal
    return np.asarray(row)


def _text(value) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _read_h5(file: Path) -> dict[str, np.ndarray]:
    import h5py

    with door(file, "HDF5 file"):
        check_hdf5(file)
        with h5py.File(file, "r") as stored:
            named = {name: np.asarray(item[()]) for name, item in stored.items() if isinstance(item, h5py.Dataset)}
    return _named(file, named)


def _read_pt(file: Path) -> dict[str, np.ndarray]:
    with door(file, "file of tensors"):
        stored = read_torch(file)
    if isinstance(stored, torch.Tensor):
        stored = {"features": stored}
    if not isinstance(stored, dict):
        raise InputError(f"{file}: expected a tensor or a dict of tensors, found {type(stored).__name__}")
    return _named(
        file, {name: _array(value) for name, value in stored.items() if isinstance(value, torch.Tensor | list)}
    )


def _array(value) -> np.ndarray:
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    return (value.float() if value.is_floating_point() else value).numpy()  # numpy knows no bf16


def _read_npy(file: Path) -> dict[str, np.ndarray]:
    with door(file, ".npy file of numbers"):
        try:
            mapped = np.load(file, mmap_mode="r", allow_pickle=False)  # an array larger than its file is refused
        except MemoryError as error:  # nothing is allocated: Python's parser says so of a head nested too deep
            raise InputError(f"{file}: not a readable .npy file of numbers (its head is damaged)") from error
        if not isinstance(mapped, np.ndarray):
            raise InputError(f"{file}: expected an array (.npy), found an archive of arrays")
        return {"features": np.array(mapped)}


def _named(file: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays under the names used here; each program has its own."""
    found = {
        ours: arrays[theirs]
        for ours, known in (("features", _FEATURES), ("coords", _COORDS), ("barcodes", _BARCODES))
        for theirs in known
        if theirs in arrays
    }
    if "features" not in found:
        raise InputError(
            f"{file}: expected an array named {' or '.join(_FEATURES)}, found {', '.join(arrays) or 'none'}"
        )
    return found
