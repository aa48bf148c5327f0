"""Tissue sections as AnnData: find them on disk, read them, check them. The format is told from the contents."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from anndata import AnnData

from genar.data import contract
from genar.data.slide import Slide, open_slide
from genar.errors import InputError

__all__ = ["SectionRef", "Slide", "contract", "find_sections", "open_slide", "read_section", "read_sections"]

_FORMATS = ("hest",)  # files of data/formats, in the order in which they are asked


def format_modules() -> list[ModuleType]:
    """The format modules."""
    return [import_module(f"genar.data.formats.{name}") for name in _FORMATS]


@dataclass(frozen=True)
class SectionRef:
    """Where a section lies: its format, the folder and its id. ``read`` loads it."""

    format: str
    root: Path
    id: str

    def read(self, *, mpp: float | None = None) -> AnnData:
        """The section as the contract has it; ``mpp`` (um per px) overrides the pixel size."""
        return import_module(f"genar.data.formats.{self.format}").read(self.root, self.id, mpp=mpp)


def find_sections(path: str | Path) -> list[SectionRef]:
    """Every section that ``path`` names: a folder, ``FOLDER:ID``, or a section's own file inside such a folder.

    Raises ``InputError`` naming what was expected where there is none, or where the id is not in the folder.
    """
    path = Path(path)
    if path.is_dir():
        return _in_folder(path)
    if path.suffix == ".h5ad" and path.is_file() and path.parent.name == "st":
        return [ref for ref in _in_folder(path.parent.parent) if ref.id == path.stem]
    folder, _, section = str(path).rpartition(":")
    if folder and Path(folder).is_dir():
        return pick(_in_folder(Path(folder)), [section])
    raise InputError(
        f"{path}: no section here; expected a folder in HEST-1k layout (st/<id>.h5ad, wsis/<id>.tif, "
        "metadata/<id>.json), a section's .h5ad inside its st/ folder, or FOLDER:ID"
    )


def _in_folder(folder: Path) -> list[SectionRef]:
    for module in format_modules():
        if ids := module.sections(folder):
            return [SectionRef(module.NAME, folder, section) for section in ids]
    raise InputError(f"{folder}: no sections found; expected HEST-1k layout (st/<id>.h5ad, wsis/<id>.tif, …)")


def pick(refs: list[SectionRef], ids: Iterable[str]) -> list[SectionRef]:
    """Those of ``refs`` with the given ids, in that order; ``InputError`` with the known ids where one is unknown."""
    known, ids = {ref.id: ref for ref in refs}, list(ids)
    for section in ids:
        if section not in known:
            raise InputError(f"{section!r} is no section of {refs[0].root}; it holds {', '.join(known)}")
    return [known[section] for section in ids]


def read_section(path: str | Path, *, mpp: float | None = None) -> AnnData:
    """Read the one section that ``path`` names: N spots x all genes, slots as in :mod:`genar.data.contract`.

    Raises ``InputError`` where ``path`` names none or several, or where the section breaks the contract.
    """
    refs = find_sections(path)
    if len(refs) > 1:
        names = ", ".join(ref.id for ref in refs)
        raise InputError(f"{path}: expected one section, found {len(refs)} ({names}); name one as {path}:{refs[0].id}")
    return refs[0].read(mpp=mpp)


def read_sections(path: str | Path, ids: Iterable[str] | None = None, *, mpp: float | None = None) -> list[AnnData]:
    """Read every section that ``path`` names, or those with the given ids."""
    refs = find_sections(path)
    return [ref.read(mpp=mpp) for ref in (refs if ids is None else pick(refs, ids))]
