"""Where a recipe's tables lie: in the bench's folder itself, or beside those of the recipe that was there first."""

import json
from collections.abc import Collection
from pathlib import Path

from genar.bench.recipe import Recipe
from genar.data.door import read_json
from genar.data.files import write_text

RECORD = "tables.json"
"""Whose tables a folder holds, and which files they are."""


def home_of(recipe: Recipe, out: Path) -> Path:
    """``out``, or ``out/<recipe>`` where it holds the tables of another recipe, known by the name of its file."""
    owner = _owner(out)
    return out if owner in ("", recipe.name, f"# {recipe.title}") else out / recipe.name


def settle(recipe: Recipe, home: Path, written: Collection[Path]) -> None:
    """Put down what was written, and delete what the same recipe wrote earlier and does not write any more."""
    names = sorted(path.name for path in written if path.parent == home)
    for name in _earlier(home):
        if name not in names and Path(name).name == name:
            (home / name).unlink(missing_ok=True)
    write_text(home / RECORD, json.dumps({"recipe": recipe.name, "files": names}, indent=1) + "\n")


def _owner(folder: Path) -> str:
    """Name of the recipe; the head of the table where an older bench put no name down; "" where there is none."""
    if (folder / RECORD).is_file():
        return str(_record(folder).get("recipe", ""))
    table = folder / "table.md"
    return table.read_text(encoding="utf-8").split("\n", 1)[0] if table.is_file() else ""


def _earlier(folder: Path) -> list[str]:
    return list(map(str, _record(folder).get("files", ()))) if (folder / RECORD).is_file() else []


def _record(folder: Path) -> dict:
    return read_json(folder / RECORD, "record of tables", "delete it and run the bench again")
