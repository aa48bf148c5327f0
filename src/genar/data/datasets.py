"""The paper's five data sets: which sections they hold, whose they are, and which one the paper held out.

The facts are those of the HEST-1k table, version 1.1.0, and of the paper. A section's own metadata file says more;
what is here is what must be known before a file is read: what to fetch, and how to split.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from genar.errors import InputError


@dataclass(frozen=True)
class Dataset:
    """One data set of the paper."""

    name: str
    sections: tuple[str, ...]
    """HEST-1k ids, naturally sorted, as ``genar.data.find_sections`` lists them."""
    held_out: str
    """The one section on which the paper reports its results."""
    species: str
    technology: str
    n_spots: int
    """Spots under tissue of all sections together."""
    n_patients: int
    """Patients, or animals."""
    patients: Mapping[str, str] = field(default_factory=dict)
    """Section -> whose it is, for those sections of which it is known here."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Section -> the authors' own name of it, where it is in use (A1 ... H3)."""
    note: str = ""
    """What a reader of results should know."""

    @property
    def sisters(self) -> tuple[str, ...]:
        """Sections known to be of the held-out section's patient, which the paper left in training."""
        owner = self.patients.get(self.held_out)
        return tuple(s for s in self.sections if s != self.held_out and owner and self.patients.get(s) == owner)

    def pick(self, ids) -> tuple[str, ...]:
        """The sections with the given ids or authors' names, in that order; all where none is given.

        Raises ``InputError`` with the known ids where one is unknown.
        """
        by_name = {name: section for section, name in self.names.items()} | {s: s for s in self.sections}
        for section in ids:
            if section not in by_name:
                names = f", or {' … '.join((*self.names.values(),)[:: len(self.names) - 1])}" if self.names else ""
                raise InputError(
                    f"{section!r} is no section of {self.name}; expected one of {', '.join(self.sections)}{names}"
                )
        return tuple(dict.fromkeys(by_name[section] for section in ids)) or self.sections


def _ids(prefix: str, first: int, last: int, without: tuple[int, ...] = ()) -> tuple[str, ...]:
    return tuple(f"{prefix}{number}" for number in range(first, last + 1) if number not in without)


def _her2st_names() -> dict[str, str]:
    """SPA119 -> H3, …, SPA154 -> A1: patients A to D have six sections, E to H three; the ids run backwards."""
    names = [f"{patient}{n}" for patient in "ABCDEFGH" for n in range(1, 7 if patient in "ABCD" else 4)]
    return dict(zip(_ids("SPA", 119, 154), reversed(names), strict=True))


_HER2ST = _her2st_names()

DATASETS: dict[str, Dataset] = {
    row.name: row
    for row in (
        Dataset(
            "her2st",
            _ids("SPA", 119, 154),
            held_out="SPA148",
            species="Homo sapiens",
            technology="Spatial Transcriptomics",
            n_spots=13_620,
            n_patients=8,
            patients={section: f"Patient {name[0]}" for section, name in _HER2ST.items()},
            names=_HER2ST,
            note="spots of 100 um on a grid of 200 um",
        ),
        Dataset(
            "prad",
            _ids("MEND", 139, 162, without=(155,)),
            held_out="MEND145",
            species="Homo sapiens",
            technology="Visium",
            n_spots=62_710,
            n_patients=2,
            patients={s: f"Patient {2 if int(s[4:]) <= 153 else 1}" for s in _ids("MEND", 139, 162, without=(155,))},
        ),
        Dataset(
            "kidney",
            _ids("NCBI", 692, 714),
            held_out="NCBI697",
            species="Homo sapiens",
            technology="Visium",
            n_spots=25_944,
            n_patients=22,
            note="the held-out section has 317 spots",
        ),
        Dataset(
            "mouse_brain",
            _ids("NCBI", 658, 671),
            held_out="NCBI667",
            species="Mus musculus",
            technology="Visium",
            n_spots=43_823,
            n_patients=3,
            patients=dict.fromkeys(("NCBI659", "NCBI663", "NCBI667"), "the held-out mouse"),
        ),
        Dataset(
            "ccrcc",
            _ids("INT", 1, 24),
            held_out="INT2",
            species="Homo sapiens",
            technology="Visium",
            n_spots=74_220,
            n_patients=24,
            patients={section: f"the patient of {section}" for section in _ids("INT", 1, 24)},
            note="INT1-INT12 are frozen (36,601 genes), INT13-INT24 FFPE with probes (17,943 genes)",
        ),
    )
}


def dataset(name: str) -> Dataset:
    """The data set called ``name``; ``InputError`` with the known names where there is none.

    >>> dataset("her2st").names["SPA148"], dataset("ccRCC").held_out
    ('B1', 'INT2')
    """
    key = name.lower().replace("-", "_")
    if key not in DATASETS:
        raise InputError(f"data set {name!r} is not known; expected one of {', '.join(DATASETS)}")
    return DATASETS[key]
