"""The data sets of the paper, their sections and patients."""

import csv

import pytest

from genar.data.datasets import DATASETS, dataset
from genar.errors import InputError


def test_the_five_of_the_paper():
    told = {
        name: (len(d.sections), d.sections[0], d.sections[-1], d.held_out, d.n_spots, d.n_patients)
        for name, d in DATASETS.items()
    }
    assert told == {
        "her2st": (36, "SPA119", "SPA154", "SPA148", 13_620, 8),
        "prad": (23, "MEND139", "MEND162", "MEND145", 62_710, 2),
        "kidney": (23, "NCBI692", "NCBI714", "NCBI697", 25_944, 22),
        "mouse_brain": (14, "NCBI658", "NCBI671", "NCBI667", 43_823, 3),
        "ccrcc": (24, "INT1", "INT24", "INT2", 74_220, 24),
    }
    assert "MEND155" not in dataset("prad").sections
    assert dataset("mouse_brain").species == "Mus musculus"


@pytest.mark.parametrize("data", DATASETS.values(), ids=list(DATASETS))
def test_every_row_hangs_together(data):
    assert len(set(data.sections)) == len(data.sections)
    assert data.held_out in data.sections
    assert set(data.patients) <= set(data.sections)
    assert not data.names or list(data.names) == list(data.sections)
    assert len(set(data.patients.values())) <= data.n_patients


def test_patients():
    her2st, prad, mouse = dataset("her2st"), dataset("prad"), dataset("mouse_brain")
    of_patient = {p: [s for s in her2st.sections if her2st.patients[s] == p] for p in set(her2st.patients.values())}
    ranges = {p[-1]: (int(s[-1][3:]), int(s[0][3:])) for p, s in of_patient.items()}
    assert ranges == {
        "A": (154, 149), "B": (148, 143), "C": (142, 137), "D": (136, 131),
        "E": (130, 128), "F": (127, 125), "G": (124, 122), "H": (121, 119),
    }  # fmt: skip
    assert her2st.sisters == tuple(f"SPA{n}" for n in range(143, 148))  # B2-B6
    assert len(prad.sisters) == 14
    assert prad.patients["MEND153"] != prad.patients["MEND154"] == prad.patients["MEND162"]
    assert mouse.sisters == ("NCBI659", "NCBI663")
    assert dataset("ccrcc").sisters == dataset("kidney").sisters == ()


def test_sections_are_picked_by_id_or_by_name():
    her2st = dataset("HER2ST")
    assert her2st.pick(["B1", "SPA119", "A1", "SPA148"]) == ("SPA148", "SPA119", "SPA154")
    assert her2st.pick([]) == her2st.sections
    with pytest.raises(InputError, match=r"'I1' is no section of her2st.*SPA119.*H3 … A1"):
        her2st.pick(["I1"])
    with pytest.raises(InputError, match="expected one of her2st, prad, kidney, mouse_brain, ccrcc"):
        dataset("liver")


@pytest.mark.real
def test_names_are_those_of_the_hest_table(shared):
    with (shared / "data/her2st/section_to_hest_id.csv").open() as file:
        table = {row["hest_id"]: (row["section"], row["patient"]) for row in csv.DictReader(file)}
    her2st = dataset("her2st")
    assert {s: (her2st.names[s], her2st.patients[s]) for s in her2st.sections} == table
