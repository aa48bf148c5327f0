"""Predictions in the files that other programs open: a format a file of this folder."""

import re
from collections.abc import Sequence
from pathlib import Path

from anndata import AnnData

from genar.data.door import door
from genar.data.files import MARK
from genar.errors import InputError
from genar.export.geojson import write_geojson
from genar.export.spatialdata import write_spatialdata
from genar.export.tissuumaps import UID, write_tissuumaps
from genar.export.vitessce import write_vitessce

__all__ = [
    "FORMATS",
    "format_of",
    "refuse_foreign",
    "write_export",
    "write_geojson",
    "write_spatialdata",
    "write_tissuumaps",
    "write_vitessce",
]

FORMATS = {
    "geojson": write_geojson,
    "spatialdata": write_spatialdata,
    "tissuumaps": write_tissuumaps,
    "vitessce": write_vitessce,
}
_SUFFIXES = {".geojson": "geojson", ".json": "geojson", ".zarr": "spatialdata", ".tmap": "tissuumaps"}
_IN_A_FOLDER = {"vitessce.json", "prediction.sdata.zarr"}
_IN_A_STORE = {"images/he", "shapes/spots", "tables/table"}
_MARKS = {"geojson": ("software", MARK), "tissuumaps": ("uid", UID)}  # members of the file, and their value
_MARK_WITHIN = 1 << 16  # bytes of a file


def format_of(path: Path, asked: str | None = None, *more: str) -> str:
    """The format to write: the one ``asked`` for, or what the suffix of ``path`` says; ``more`` names suffixes that
    mean something to the caller.

    Raises ``InputError`` where neither names one, or ``path`` has a suffix of something else.

    >>> format_of(Path("spots.geojson")), format_of(Path("out.zarr"))
    ('geojson', 'spatialdata')
    """
    found = asked or _SUFFIXES.get(path.suffix.lower())
    if found not in FORMATS:
        raise InputError(
            f"--format {found or 'was not given'}: expected {', '.join(FORMATS)}, or an --out that ends in "
            f"{', '.join((*more, *_SUFFIXES))}; found {path.name}"
        )
    suffixes = [suffix for suffix, kind in _SUFFIXES.items() if kind == found]
    if suffixes and path.suffix.lower() not in suffixes:
        raise InputError(f"--out {path}: {found} ends in {' or '.join(suffixes)}; name it {path.stem}{suffixes[0]}")
    return found


def refuse_foreign(path: Path) -> None:
    """``InputError`` where something lies at ``path`` that is no prediction of GenAR's, or holds other things, too: a
    measured section, or a user's own work, must not be overwritten."""
    if path.is_dir():
        there = {one.name for one in path.iterdir()}
        elements = {one.relative_to(path).as_posix() for one in path.glob("*/*") if one.is_dir()}
        is_store = elements <= _IN_A_STORE and any(path.glob("tables/*/uns/genar/prediction"))
        holds_store = there <= _IN_A_FOLDER and any(path.glob("*.zarr/tables/*/uns/genar/prediction"))
        if is_store or holds_store or not there:
            return
    elif path.is_file() and (mark := _MARKS.get(_SUFFIXES.get(path.suffix.lower(), ""))):
        with path.open("rb") as file:
            if re.search(rb'"%s":\s*"%s"' % tuple(part.encode() for part in mark), file.read(_MARK_WITHIN)):
                return
    elif path.suffix == ".h5ad" and path.is_file():
        import h5py

        with door(path, ".h5ad file", "choose another --out"), h5py.File(path) as file:
            if "uns/genar/prediction" in file:
                return
    else:
        return
    raise InputError(
        f"--out {path}: is there already, and no prediction of GenAR's; choose another, or delete it first"
    )


def write_export(
    predicted: AnnData, path: str | Path, kind: str | None = None, *, genes: Sequence[str] = ()
) -> dict[str, Path]:
    """Write a prediction [N, G] as ``kind`` (see :func:`format_of`), cut to ``genes`` where some are named.

    Returns name -> path of what was written. Raises ``InputError`` where a gene or the positions are missing, or a
    package that the format needs.
    """
    path = Path(path)
    kind = format_of(path, kind)
    refuse_foreign(path)
    return {kind: FORMATS[kind](predicted, path, genes=genes)}
