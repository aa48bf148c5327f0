"""Protocols: which sections are held out together. Pure functions of section ids and patients.

=========== ===========================================================================================
``section`` the named sections, held out together; none named: each section once
``paper``   the paper's section
``patient`` every section of a patient; each patient once, or those of the named sections or patients
``kfold``   k folds over patients, or over sections where a patient is not known (the fold says so)
=========== ===========================================================================================
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from genar.data.contract import section_key
from genar.errors import InputError, first_names

PROTOCOLS = ("section", "paper", "patient", "kfold")


@dataclass(frozen=True)
class Fold:
    """One division of the sections: ``test`` is held out, everything else is trained on."""

    name: str
    test: tuple[str, ...]
    """ids, naturally sorted"""
    note: str = ""
    """what a reader of its scores must know, such as a patient in training and held out; "" where nothing"""


def folds(
    protocol: str,
    sections: Mapping[str, str],
    *,
    held_out: Collection[str] = (),
    paper: Collection[str] = (),
    k: int = 5,
) -> list[Fold]:
    """The folds of ``protocol`` over ``sections`` (id -> patient, "" where not known), in an order that is always the
    same.

    ``held_out`` names sections (protocol ``patient``: patients or sections), ``paper`` is the section that the paper
    held out, ``k`` the number of folds of ``kfold``. Raises ``InputError`` where a name is unknown, patients are needed
    and not known, there are fewer patients (sections) than folds, or nothing is left to train on.

    >>> patients = {"S1": "Ann", "S2": "Ann", "S3": "Bea", "S10": "Cyd"}
    >>> tuple(fold.test for fold in folds("patient", patients))
    (('S1', 'S2'), ('S3',), ('S10',))
    >>> folds("section", patients, held_out=["S2"])[0].note
    'Ann has sections in training and held out: generalisation between patients is not tested'
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r} is not known; expected one of {', '.join(PROTOCOLS)}")
    known = {section: sections[section] for section in sorted(sections, key=section_key)}
    if protocol == "kfold":
        made = _kfold(known, k)
    elif protocol == "patient":
        made = _patients(known, held_out)
    elif protocol == "paper":
        if not paper:
            raise InputError("protocol paper needs the section that the paper held out; name a data set of the paper")
        made = [("paper", _known(paper, known, "of the paper"), "")]
    else:
        made = [("+".join(test), test, "") for test in _sections(known, held_out)]
    return [_fold(name, test, note, known) for name, test, note in made]


def _fold(name: str, test: Sequence[str], note: str, sections: Mapping[str, str]) -> Fold:
    test = tuple(section for section in sections if section in set(test))
    if len(test) == len(sections):
        raise InputError(f"fold {name}: all {len(sections)} sections are held out; leave at least one for training")
    train = {patient for section, patient in sections.items() if section not in test}
    shared = shared_patients_note(train, {sections[section] for section in test})
    return Fold(name, test, "; ".join(filter(None, (note, shared))))


def shared_patients_note(training: Collection[str], held_out: Collection[str]) -> str:
    """What a reader must know where patients are in training and held out; else nothing. "" is nobody.

    >>> shared_patients_note(["Ann", ""], ["Ann", "Bea", ""])
    'Ann has sections in training and held out: generalisation between patients is not tested'
    """
    shared = sorted({*training} & {*held_out} - {""}, key=section_key)
    verb = "has" if len(shared) == 1 else "have"
    who = ", ".join(shared)
    if not shared:
        return ""
    return f"{who} {verb} sections in training and held out: generalisation between patients is not tested"


def _known(names: Collection[str], sections: Mapping[str, str], which: str = "to hold out") -> tuple[str, ...]:
    unknown = [name for name in names if name not in sections]
    if unknown:
        known = f"among the {len(sections)}: {first_names(sections, 5)}"
        raise InputError(f"section {which} {', '.join(unknown)} is not {known}")
    return tuple(names)


def _sections(sections: Mapping[str, str], held_out: Collection[str]) -> list[tuple[str, ...]]:
    return [_known(held_out, sections)] if held_out else [(section,) for section in sections]


def _patients(sections: Mapping[str, str], held_out: Collection[str]) -> list[tuple[str, tuple[str, ...], str]]:
    """A fold a patient, in the order of their first section."""
    nameless = [section for section, patient in sections.items() if not patient]
    chosen = dict.fromkeys(filter(None, sections.values()))
    if held_out:
        named = {name: sections.get(name, name) for name in held_out}
        for name, patient in named.items():
            if patient not in chosen:
                known = f"patients are {first_names(chosen, 5)}" if chosen else "no section's patient is"
                raise InputError(f"protocol patient: the patient of {name!r} is not known; known {known}")
        chosen = dict.fromkeys(named.values())
    elif nameless:
        raise InputError(
            f"protocol patient: the patient of {len(nameless)} of {len(sections)} sections is not known "
            f"({first_names(nameless, 5)}); name it in the recipe (patients), in their metadata or in patients.csv "
            "beside them, name who is held out, or use kfold"
        )
    note = f"the patient of {len(nameless)} sections in training is not known" if nameless else ""
    return [(who, tuple(s for s, patient in sections.items() if patient == who), note) for who in chosen]


def _kfold(sections: Mapping[str, str], k: int) -> list[tuple[str, tuple[str, ...], str]]:
    """Groups, the largest first, each into the fold that holds the fewest sections so far."""
    nameless = sum(not patient for patient in sections.values())
    note = f"folds are over sections: the patient of {nameless} of {len(sections)} is not known" if nameless else ""
    groups: dict[str, list[str]] = {}
    for section, patient in sections.items():
        groups.setdefault(section if nameless else patient, []).append(section)
    kind = "sections" if nameless else "patients"
    if not 2 <= k <= len(groups):
        raise InputError(f"kfold: found {k} folds and {len(groups)} {kind}; expected 2 to {len(groups)} folds")
    parts: list[list[str]] = [[] for _ in range(k)]
    for group in sorted(groups.values(), key=len, reverse=True):  # stable: equals stay in natural order
        min(parts, key=len).extend(group)
    return [(f"fold {number}", tuple(part), note) for number, part in enumerate(parts, 1)]
