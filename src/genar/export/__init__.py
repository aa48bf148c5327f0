"""Predictions in the files that other programs open: a format a file of this folder."""

from collections.abc import Sequence
from pathlib import Path

from anndata import AnnData

from genar.errors import InputError
from genar.export.geojson import write_geojson
from genar.export.spatialdata import write_spatialdata
from genar.export.tissuumaps import write_tissuumaps
from genar.export.vitessce import write_vitessce

__all__ = [
    "FORMATS",
    "format_of",
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


def format_of(path: Path, asked: str | None = None) -> str:
    """The format to write: the one ``asked`` for, or what the suffix of ``path`` says.

    Raises ``InputError`` where neither names one.

    >>> format_of(Path("spots.geojson")), format_of(Path("out.zarr"))
    ('geojson', 'spatialdata')
    """
    found = asked or _SUFFIXES.get(path.suffix.lower())
    if found not in FORMATS:
        raise InputError(
            f"--format {found or 'was not given'}: expected {', '.join(FORMATS)}, or an --out that ends in "
            f"{', '.join(_SUFFIXES)}; found {path.name}"
        )
    if found == "tissuumaps" and path.suffix != ".tmap":
        raise InputError(f"--out {path}: TissUUmaps opens projects that end in .tmap; name it {path.stem}.tmap")
    return found


def write_export(
    predicted: AnnData, path: Path, kind: str | None = None, *, genes: Sequence[str] = ()
) -> dict[str, Path]:
    """Write a prediction [N, G] as ``kind`` (see :func:`format_of`), cut to ``genes`` where some are named.

    Returns name -> path of what was written. Raises ``InputError`` where a gene or the positions are missing, or a
    package that the format needs.
    """
    kind = format_of(path, kind)
    return {kind: FORMATS[kind](predicted, path, genes=genes)}
