"""The formats: one file each, asked in turn what a folder or file holds. The contents tell, not the name.

A format has ``NAME``, ``EXPECTED`` (what it looks like, for messages), ``sections(root) -> list of ids`` (empty where
``root`` is not of this format) and ``read(root, id, options) -> AnnData``; one that knows single files has
``of_file(path) -> (root, id) | None``, too, one that knows the image without the counts
``image(root, id, options) -> Path | None``, one that knows the patient ``patient(root, id) -> str``, one that can tell
half of a section ``incomplete(root) -> list of words``, and one in which predictions are written, too,
``is_prediction(root, id)``.
"""

import contextlib
import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from anndata import AnnData

from genar.data.contract import GENAR, PATIENT, section_key, slide_path
from genar.data.contract import name as name_of
from genar.data.door import door
from genar.data.patients import patient_in_table
from genar.data.reading import ReadOptions
from genar.errors import InputError, SectionWarning, first_names

# Files of this folder, in the order in which they are asked: what is told by more comes first.
FORMATS = ("hest", "visium_hd", "visium", "spatialdata", "legacy_st", "h5ad", "slide")


# Options that sections of one format alone are read by.
USED_BY = {"bin_um": "visium_hd", "spacing_um": "slide", "spot_um": "slide", "hexagonal": "slide"}


def used_by(refs: Sequence["SectionRef"], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that mean something to at least one of these sections."""
    formats = {ref.format for ref in refs}
    return {name: value for name, value in options.items() if name not in USED_BY or USED_BY[name] in formats}


def format_module(name: str) -> ModuleType:
    """The module of a format. Raises ``InputError`` with the known ones where there is none of that name."""
    if name not in FORMATS:
        raise InputError(f"format {name!r} is not known; expected one of {', '.join(FORMATS)}")
    return import_module(f"genar.data.formats.{name}")


@dataclass(frozen=True)
class SectionRef:
    """Where a section lies: its format, the folder and its id. ``read`` loads it."""

    format: str
    """name of a module of ``genar.data.formats``"""
    root: Path
    """the folder"""
    id: str
    """the section's name there; of a slide its file's"""

    def read(self, options: ReadOptions | None = None, **more) -> AnnData:
        """The section as the contract has it, N spots x all genes (a bare slide: x 0); ``more`` are fields of
        ``ReadOptions``, such as ``mpp`` (um per px). A table ``patients.csv`` beside it says whose it is.

        Raises ``InputError`` where a file is missing or damaged, or the section breaks the contract.
        """
        with door(f"{self.root}:{self.id}", f"section ({self.format})", "are its files complete?"):
            section = format_module(self.format).read(self.root, self.id, options or ReadOptions(**more))
        if patient := patient_in_table(self.root, name_of(section)):
            section.uns[GENAR][PATIENT] = patient
        return section

    @property
    def patient(self) -> str:
        """Who it is of, as far as that is known before it is read: by ``patients.csv`` or the metadata; "" where not.

        Raises ``InputError`` where those are damaged.
        """
        of_format = getattr(format_module(self.format), "patient", lambda root, section: "")
        return patient_in_table(self.root, self.id) or of_format(self.root, self.id)

    def image(self, options: ReadOptions) -> Path | None:
        """The section's image, or ``None``; read are the counts only where the format cannot tell without them.

        Raises ``InputError`` as ``read`` does, and where ``options.image`` is a folder without it.
        """
        if find := getattr(format_module(self.format), "image", None):
            return find(self.root, self.id, options)
        return slide_path(self.read(options))


def find_sections(path: str | Path, *, format: str | None = None) -> list[SectionRef]:
    """Every section that ``path`` names: a folder, ``FOLDER:ID``, or a section's own file; ``format`` rules out others.

    Raises ``InputError`` naming what was expected where there is none, or where the id is not in the folder.
    """
    path = Path(path)
    modules = [format_module(name) for name in ((format,) if format else FORMATS)]
    if path.is_dir():
        return _in_folder(path, modules)
    if path.is_file():
        for module in modules:
            if (of_file := getattr(module, "of_file", None)) and (found := of_file(path)):
                return [SectionRef(module.__name__.rpartition(".")[2], *found)]
    folder, _, section = str(path).rpartition(":")
    if folder and Path(folder).is_dir():
        return pick(_in_folder(Path(folder), modules), [section])
    if not path.exists():
        raise InputError(f"{path}: no such file or folder{_near(path)}")
    raise InputError(f"{path}: no section here; expected a folder in {_expected(modules)}; or one section as FOLDER:ID")


def find_section(path: str | Path, *, format: str | None = None) -> SectionRef:
    """The one section that ``path`` names. Raises ``InputError`` as :func:`find_sections`, and where there are
    several."""
    refs = find_sections(path, format=format)
    if len(refs) > 1:
        names = ", ".join(ref.id for ref in refs)
        raise InputError(f"{path}: expected one section, found {len(refs)} ({names}); name one as {path}:{refs[0].id}")
    return refs[0]


def _near(path: Path) -> str:
    """What lies beside it under a like name."""
    there = path.parent.is_dir()
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()] if there else [], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _in_folder(folder: Path, modules: Sequence[ModuleType]) -> list[SectionRef]:
    for number, module in enumerate(modules):
        if ids := sorted(module.sections(folder), key=section_key):
            _tell_of_others(folder, module, modules[number + 1 :], ids)
            if lacking := getattr(module, "incomplete", lambda root: [])(folder):
                told = f"{folder}: left out are {first_names(lacking)}: is the copy complete?"
                warnings.warn(told, SectionWarning, stacklevel=3)
            return [SectionRef(module.__name__.rpartition(".")[2], folder, section) for section in ids]
    raise InputError(f"{folder}: no sections found; expected {_expected(modules)}")


def _tell_of_others(folder: Path, taken: ModuleType, modules: Sequence[ModuleType], ids: Sequence[str]) -> None:
    """Warn of sections of other formats in the folder, which are not read; slides among them are images of those that
    are, and predictions are no sections."""
    others = []
    for module in modules:
        with contextlib.suppress(InputError):  # what is wrong with them is said when they are read
            found = module.sections(folder) if module.NAME != "slide" else []
            is_predicted = getattr(module, "is_prediction", lambda root, section: False)
            others += [f"{one} ({module.NAME})" for one in found if one not in ids and not is_predicted(folder, one)]
    if others:
        warnings.warn(
            f"{folder}: read as format {taken.NAME}; not read are {first_names(others)}: give each format a folder of "
            "its own",
            SectionWarning,
            stacklevel=4,
        )


def _expected(modules: Sequence[ModuleType]) -> str:
    return "; ".join(module.EXPECTED for module in modules)


def pick(refs: list[SectionRef], ids: Iterable[str]) -> list[SectionRef]:
    """Those of ``refs`` with the given ids, in that order; ``InputError`` with the known ids where one is unknown.

    An id that holds commas may come in the parts between them, as a list of the command line is cut.
    """
    known, ids, found = {_parts(ref.id): ref for ref in refs}, list(ids), []
    while ids:
        n = next((n for n in range(len(ids), 0, -1) if _parts(",".join(ids[:n])) in known), 0)
        if not n:
            names = ", ".join(ref.id for ref in refs)
            raise InputError(f"{ids[0]!r} is no section of {refs[0].root}; it holds {names}")
        found.append(known[_parts(",".join(ids[:n]))])
        ids = ids[n:]
    return found


def without(refs: list[SectionRef], ids: Iterable[str]) -> list[SectionRef]:
    """``refs`` but those with the given ids; ``InputError`` where one is unknown, or nothing is left."""
    left_out = pick(refs, ids)
    kept = [ref for ref in refs if ref not in left_out]
    if not kept:
        raise InputError(f"{refs[0].root}: every section is excluded; leave at least one")
    return kept


def _parts(section: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in section.split(","))


def read_section(path: str | Path, *, format: str | None = None, **options) -> AnnData:
    """Read the one section that ``path`` names: N spots x all genes, slots as in :mod:`genar.data.contract`.

    ``options`` are the fields of :class:`genar.data.ReadOptions`: ``image``, ``mpp``, ``bin_um``, ``spacing_um``,
    ``spot_um``, ``hexagonal``.
    Raises ``InputError`` where ``path`` names none or several, where an option means nothing to it, or where the
    section breaks the contract.

    >>> section = genar.read_section("tissue:SIM1")
    >>> section.shape, section.obsm["spatial"].shape
    ((35, 80), (35, 2))
    """
    ref = find_section(path, format=format)
    return ref.read(options_for([ref], **options))


def read_sections(
    path: str | Path, ids: Iterable[str] | None = None, *, format: str | None = None, **options
) -> list[AnnData]:
    """Read every section that ``path`` names, or those with the given ids; ``options`` as in :func:`read_section`.
    Raises ``InputError`` as that does, and where an id is not there.

    >>> [section.n_obs for section in genar.read_sections("tissue")]
    [35, 35]
    """
    refs = find_sections(path, format=format)
    refs = refs if ids is None else pick(refs, ids)
    how = options_for(refs, **options)
    return [ref.read(how) for ref in refs]


def options_for(refs: Sequence[SectionRef], **options) -> ReadOptions:
    """The options for these sections; ``InputError`` where one image is named for several of them, or an option means
    nothing to any of them."""
    given = {name: value for name, value in options.items() if value is not None}
    if refs:
        for name in given.keys() - used_by(refs, given).keys():
            raise InputError(
                f"--{name.replace('_', '-')} is for format {USED_BY[name]}, and none of the sections of "
                f"{refs[0].root} is of that ({', '.join(sorted({ref.format for ref in refs}))}); leave it out"
            )
    how = ReadOptions(**given)
    if len(refs) > 1 and how.image is not None and how.image.is_file():
        raise InputError(
            f"{how.image}: one image for {len(refs)} sections ({', '.join(ref.id for ref in refs)}); name one section, "
            "or a folder of images called <id>.tif"
        )
    return how
