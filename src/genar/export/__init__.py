"""Predictions in the files that other programs open: a format a file of this folder."""

from collections.abc import Sequence
from pathlib import Path

from anndata import AnnData

from genar.data.door import door
from genar.errors import InputError
from genar.export.geojson import write_geojson
from genar.export.spatialdata import write_spatialdata
from genar.export.tissuumaps import write_tissuumaps
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


def format_of(path: Path, asked: str | None = None, *more: str) -> str:
    """The format to write: the one ``asked`` for, or what the suffix of ``path`` says; ``more`` names suffixes that
    mean something to the caller.

    Raises ``InputError`` where neither names one.

    >>> format_of(Path("spots.geojson")), format_of(Path("out.zarr"))
    ('geojson', 'spatialdata')
    """
    found = asked or _SUFFIXES.get(path.suffix.lower())
    if found not in FORMATS:
        raise InputError(
            f"--format {found or 'was not given'}: expected {', '.join(FORMATS)}, or an --out that ends in "
            f"{', '.join((*more, *_SUFFIXES))}; found {path.name}"
        )
    if found == "tissuumaps" and path.suffix != ".tmap":
        raise InputError(f"--out {path}: TissUUmaps opens projects that end in .tmap; name it {path.stem}.tmap")
    return found


def refuse_foreign(path: Path) -> None:
    """``InputError`` where an ``.h5ad``, a store or a folder that is no prediction of GenAR's lies at ``path``: a
    measured section must not be overwritten."""
    if path.is_dir():
        ours = (path / "vitessce.json").is_file() or any(path.glob("tables/*/uns/genar/prediction"))
        if ours or not any(path.iterdir()):
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
    predicted: AnnData, path: Path, kind: str | None = None, *, genes: Sequence[str] = ()
) -> dict[str, Path]:
    """Write a prediction [N, G] as ``kind`` (see :func:`format_of`), cut to ``genes`` where some are named.

    Returns name -> path of what was written. Raises ``InputError`` where a gene or the positions are missing, or a
    package that the format needs.
    """
    kind = format_of(path, kind)
    refuse_foreign(path)
    return {kind: FORMATS[kind](predicted, path, genes=genes)}
