"""Patients of sections whose own files name none: a table of the user's beside them."""

import csv
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from genar.data.door import SMALL_BYTES, door, open_text
from genar.errors import InputError, SectionWarning

TABLE = "patients.csv"
_COLUMNS = ("section", "patient")


def patient_in_table(root: Path, section: str) -> str:
    """Who ``section`` is of, by ``patients.csv`` (columns ``section`` and ``patient``) in the folder ``root`` of
    sections, or around the section's own (``P1/outs``, ``P1``); empty where no table names it.

    A table of other columns is the user's own and told of by ``SectionWarning``. Raises ``InputError`` where the file
    is no text, or gives a section two patients.
    """
    for folder in _folders(root, section):
        path = folder / TABLE
        if path.is_file() and (found := _read(path).get(section, "")):
            return found
    return ""


def _folders(root: Path, section: str) -> Iterator[Path]:
    folder = Path(os.path.abspath(root))
    yield folder
    if folder.name == "outs":
        folder = folder.parent
        yield folder
    if section in (folder.name, folder.stem):  # P1, P1.zarr
        yield folder.parent


def _read(path: Path) -> dict[str, str]:
    if path.stat().st_size > SMALL_BYTES:
        raise InputError(f"{path}: expected a table of sections and patients, found {path.stat().st_size:,} bytes")
    with door(path, "table of patients (.csv)", "is it text in UTF-8?"), open_text(path) as file:
        text = file.read().removeprefix("\ufeff")  # as Excel begins it
        delimiter = ";" if ";" in text.partition("\n")[0] else ","  # Excel's where the comma is decimal
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text), delimiter=delimiter)]
    head = [name.lower() for name in rows[0]] if rows else []
    if not set(_COLUMNS) <= set(head):
        warnings.warn(
            f"{path}: expected columns {' and '.join(_COLUMNS)}, found {', '.join(head)[:80] or 'none'}: not used",
            SectionWarning,
            stacklevel=2,
        )
        return {}
    at, named = [head.index(name) for name in _COLUMNS], {}
    for row in rows[1:]:
        section, patient = (row[i] if i < len(row) else "" for i in at)
        if section and named.setdefault(section, patient) != patient:
            raise InputError(f"{path}: section {section} is of {named[section]} and of {patient}; name one patient")
    return named
