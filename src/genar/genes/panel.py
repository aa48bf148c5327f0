"""The panel: the genes that are modelled, in order, and where they came from."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from genar.data.door import door
from genar.data.files import write_text
from genar.errors import InputError


@dataclass(frozen=True)
class Panel:
    """The genes that are modelled, in order, and where they came from.

    >>> panel = genar.Panel(("EPCAM", "COL1A1"), "chosen by hand")
    >>> len(panel.genes)
    2
    """

    genes: tuple[str, ...]
    recipe: str
    sections: tuple[str, ...] = ()
    """Sections the selection has seen."""
    n_top: int = 0
    """Rank cut by mean and by standard deviation (recipes ``paper`` and ``clean``); else 0."""

    def __post_init__(self):
        if not self.genes:
            raise InputError("a panel needs at least one gene, found none")
        if len(set(self.genes)) != len(self.genes):
            twice = Counter(self.genes).most_common(1)[0][0]
            raise InputError(f"the panel names {twice!r} more than once; a gene may stand in it once")

    @property
    def sha256(self) -> str:
        """Hash of the ordered gene names."""
        return hashlib.sha256("\n".join(self.genes).encode()).hexdigest()

    def seen(self, sections: Iterable[str]) -> list[str]:
        """Those of ``sections`` (names) that the selection has seen: scores on them are of genes chosen by their own
        counts."""
        return [section for section in sections if section in self.sections]

    def to_dict(self) -> dict:
        """The panel as it is written to ``panel.json``."""
        return {
            "genes": list(self.genes),
            "recipe": self.recipe,
            "sections": list(self.sections),
            "n_top": self.n_top,
            "sha256": self.sha256,
        }

    @classmethod
    def from_dict(cls, facts: dict) -> "Panel":
        """Inverse of :meth:`to_dict`; ``InputError`` where genes are missing or do not match the hash."""
        try:
            genes = facts["genes"]
            if isinstance(genes, str) or not all(isinstance(gene, str) for gene in genes):
                raise TypeError("genes must be a list of names")
            sections, n_top = tuple(facts.get("sections", ())), facts.get("n_top", 0)
            if not all(isinstance(name, str) for name in (facts["recipe"], *sections)) or type(n_top) is not int:
                raise TypeError("recipe and sections must be names, n_top a whole number")
            panel = cls(tuple(genes), facts["recipe"], sections, n_top)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not a panel: expected the keys genes and recipe ({error!r})") from error
        if facts.get("sha256", panel.sha256) != panel.sha256:
            raise InputError(
                "the panel's genes do not match its sha256; it was altered by hand: remove the hash to keep it"
            )
        return panel

    def write(self, path: Path) -> None:
        """Write ``panel.json``."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")


def check_place(path: Path) -> None:
    """``InputError`` where a panel written to ``path`` would have another suffix than ``.json``, or overwrite what is
    none."""
    if path.suffix != ".json":
        raise InputError(f"--out {path}: a panel is a .json file; name it {path.stem}.json")
    if path.is_file():
        try:
            read_panel(path)
        except InputError as error:
            raise InputError(f"--out {path}: is there already, and no panel; choose another, or delete it") from error


def read_panel(path: str | Path) -> Panel:
    """A panel from ``panel.json`` or from a text file with one gene a line (# begins a comment).

    Raises ``InputError`` naming the file where it is missing, empty or not a panel.
    """
    path = Path(path)
    with door(path, "panel", "expected panel.json or one gene a line"):
        text = path.read_text(encoding="utf-8-sig")
        facts = json.loads(text) if path.suffix == ".json" else None
    try:
        if path.suffix == ".json":
            return Panel.from_dict(facts if isinstance(facts, dict) else {"genes": facts, "recipe": path.stem})
        genes = (line.split("#")[0].strip() for line in text.splitlines())
        return Panel(tuple(gene for gene in genes if gene), recipe=path.name)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def refuse_number(n_genes: int | None, panel: str | Path) -> None:
    """``InputError`` where a number of genes is asked for beside a list of them."""
    if n_genes is not None:
        raise InputError(f"--n-genes {n_genes}: the list {panel} is taken whole; shorten it, or leave that out")


def read_aliases(path: str | Path) -> dict[str, str]:
    """Other names of genes: a line each, the name in a list and the name in the sections, between blanks or a tab.

    Raises ``InputError`` naming the line where one is not of that form.
    """
    path = Path(path)
    with door(path, "list of other gene names", "expected two names a line"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    aliases = {}
    for number, line in enumerate(lines, 1):
        if not (words := line.split("#")[0].split()):
            continue
        if len(words) != 2:
            raise InputError(f"{path}, line {number}: expected two names, found {len(words)}")
        aliases[words[0]] = words[1]
    return aliases
