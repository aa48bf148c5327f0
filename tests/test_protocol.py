"""Which sections a fold holds out."""

import numpy as np
import pytest

from genar.data.datasets import DATASETS
from genar.errors import InputError
from genar.evaluation.protocol import PROTOCOLS, folds

PATIENTS = {"S1": "Ann", "S2": "Ann", "S3": "Bea", "S10": "Cyd", "S11": "Cyd", "S4": "Dot"}


def her2st():
    row = DATASETS["her2st"]
    return {section: row.patients[section] for section in row.sections}


def test_section_holds_out_what_is_named_together_or_each_once():
    (fold,) = folds("section", PATIENTS, held_out=["S10", "S3"])
    assert fold.test == ("S3", "S10")
    assert fold.note.startswith("Cyd has sections in training and held out")
    each = folds("section", PATIENTS)
    assert [fold.test for fold in each] == [("S1",), ("S2",), ("S3",), ("S4",), ("S10",), ("S11",)]
    assert [bool(fold.note) for fold in each] == [True, True, False, False, True, True]


def test_the_papers_split_leaves_the_held_out_patient_in_training():
    (fold,) = folds("paper", her2st(), paper=[DATASETS["her2st"].held_out])
    assert fold.test == ("SPA148",)
    assert fold.note.startswith("Patient B has sections in training and held out")


@pytest.mark.parametrize("protocol", ["patient", "kfold"])
def test_every_section_is_held_out_once_and_no_patient_is_on_both_sides(protocol):
    sections = her2st()
    made = folds(protocol, sections, k=4)
    assert len(made) == {"patient": 8, "kfold": 4}[protocol]
    assert sorted(section for fold in made for section in fold.test) == sorted(sections)
    for fold in made:
        test = {sections[section] for section in fold.test}
        assert not test & {patient for section, patient in sections.items() if section not in fold.test}
        assert fold.note == ""
    if protocol == "kfold":
        assert {len(fold.test) for fold in made} == {9}  # six and three sections a patient: balanced


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_folds_do_not_depend_on_the_order_of_the_sections(protocol):
    shuffled = {section: PATIENTS[section] for section in np.random.default_rng(0).permutation(list(PATIENTS)).tolist()}
    assert list(shuffled) != list(PATIENTS)
    assert folds(protocol, shuffled, paper=["S3"], k=3) == folds(protocol, PATIENTS, paper=["S3"], k=3)


def test_kfold_is_over_sections_where_a_patient_is_unknown_and_says_so():
    made = folds("kfold", {**PATIENTS, "S5": ""}, k=7)
    assert all(len(fold.test) == 1 for fold in made)
    assert all("over sections: the patient of 1 of 7 is not known" in fold.note for fold in made)
    assert "Ann has sections in training" in made[0].note


def test_a_named_patient_or_section_stands_for_all_of_the_patient():
    for name in ("Ann", "S2"):
        (fold,) = folds("patient", PATIENTS, held_out=[name])
        assert (fold.name, fold.test, fold.note) == ("Ann", ("S1", "S2"), "")
    (fold,) = folds("patient", {**PATIENTS, "S5": ""}, held_out=["Bea"])
    assert fold.note == "the patient of 1 sections in training is not known"
    brain = DATASETS["mouse_brain"]
    (fold,) = folds("patient", {s: brain.patients.get(s, "") for s in brain.sections}, held_out=[brain.held_out])
    assert set(fold.test) == {brain.held_out, *brain.sisters}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"protocol": "loo"}, "'loo' is not known; expected one of section, paper, patient, kfold"),
        ({"protocol": "section", "held_out": ["S9"]}, "to hold out S9 is not among the 6: S1, S2, S3, S4, S10, …"),
        ({"protocol": "section", "held_out": list(PATIENTS)}, "all 6 sections are held out"),
        ({"protocol": "paper"}, "needs the section that the paper held out"),
        ({"protocol": "paper", "paper": ["SPA148"]}, "of the paper SPA148 is not among"),
        ({"protocol": "patient", "held_out": ["Eve"]}, "the patient of 'Eve' is not known; known patients are Ann"),
        ({"protocol": "patient", "sections": {**PATIENTS, "S5": ""}}, r"1 of 7 sections is not known \(S5\)"),
        ({"protocol": "patient", "sections": {"S1": "Ann", "S2": "Ann"}}, "fold Ann: all 2 sections are held out"),
        ({"protocol": "kfold", "k": 5}, "found 5 folds and 4 patients; expected 2 to 4 folds"),
        ({"protocol": "kfold", "k": 1}, "found 1 folds"),
        ({"protocol": "kfold", "k": 3, "sections": {"S1": "", "S2": ""}}, "3 folds and 2 sections"),
        ({"protocol": "section", "sections": {"S1": ""}}, "all 1 sections are held out"),
    ],
)
def test_what_cannot_be_split_is_one_clear_line(words, message):
    with pytest.raises(InputError, match=message) as caught:
        folds(**{"sections": PATIENTS, **words})
    assert "\n" not in str(caught.value)
