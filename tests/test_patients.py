"""``patients.csv``: whose a section is where its own files do not say so."""

import json
import shutil

import anndata
import pytest

from commands import run
from genar.data import contract, read_section, read_sections
from genar.data.simulate import TissueConfig, write_tissue
from genar.errors import InputError, SectionWarning
from section_files import write_visium

TABLE = "section,patient\nP1,Ann\nP2,Bea\n"


def patient(section):
    return section.uns[contract.GENAR][contract.PATIENT]


@pytest.fixture
def folder(tmp_path):
    for name in ("P1", "P2", "P3"):
        write_visium(tmp_path / name / "outs")
    return tmp_path


def test_space_rangers_sections_are_of_those_the_table_says(folder):
    assert list(map(patient, read_sections(folder))) == ["", "", ""]
    (folder / "patients.csv").write_text(TABLE)
    assert list(map(patient, read_sections(folder))) == ["Ann", "Bea", ""]
    assert patient(read_section(f"{folder}:P2")) == "Bea"
    assert patient(read_section(folder / "P1" / "outs")) == "Ann"  # named alone it is of the same patient
    assert patient(read_section(folder / "P1" / "outs" / "filtered_feature_bc_matrix.h5")) == "Ann"


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffSection;Patient;Age\r\nP1; Ann;61\r\n",
        'patient,ward,section\n"Ann",3,P1\n\n,,\n',
        "section,patient\nP1,Ann\nP1,Ann\n,Bea\n,\n",
    ],
)
def test_tables_as_spreadsheets_write_them(folder, text):
    (folder / "patients.csv").write_text(text, encoding="utf-8", newline="")
    assert patient(read_section(f"{folder}:P1")) == "Ann"


def test_a_table_of_other_things_is_told_of_and_left_alone(folder):
    (folder / "patients.csv").write_text("id,age\nP1,61\n")
    with pytest.warns(SectionWarning, match="expected columns section and patient, found id, age: not used"):
        assert patient(read_section(f"{folder}:P1")) == ""


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"section,patient\nP1,Ann\nP1,Bea\n", "section P1 is of Ann and of Bea"),
        (b"\xff\xfe\x00s", "not a readable table of patients"),
        (b"section,patient\nP1," + b"A" * 200_000, "not a readable table of patients"),
        (b"section,patient\n" + b"P1,Ann\n" * 2_000_000, "found 14,000,016 bytes"),
    ],
)
def test_bad_tables_are_one_line(folder, content, told):
    (folder / "patients.csv").write_bytes(content)
    with pytest.raises(InputError, match=told):
        read_section(f"{folder}:P1")


def test_training_tells_of_a_patient_on_both_sides(tmp_path, monkeypatch, capsys):
    tissue, out = tmp_path / "tissue", tmp_path / "run"
    config = TissueConfig(n_rows=6, n_cols=6, n_genes=80, counts_per_nucleus=20)
    write_tissue(tissue, ("A", "B"), config=config)
    (tissue / "patients.csv").write_text("section,patient\nA,Ann\nB,Ann\n")
    words = ("--test", "B", "--model", "mean", "--n-genes", 20, "--views", 1, "--features", tmp_path / "features")
    assert run(monkeypatch, "train", tissue, "--out", out, *words) == 0
    assert "note: Ann has sections in training and held out" in " ".join(capsys.readouterr().out.split())
    predicted = anndata.read_h5ad(out / "predictions" / "B.h5ad")
    assert patient(predicted) == "Ann"
    assert "the model was trained on sections of Ann, too" in contract.trained_on_note(predicted)


def test_a_table_of_patients_is_of_its_own_folder(own_tissue, tmp_path):
    (tmp_path / "patients.csv").write_text("section,patient\nA,Bea\n")  # of another data set, further up
    before = read_section(f"{own_tissue}:A").uns["genar"]["patient"]
    assert before != "Bea"
    (own_tissue / "wsis" / "patients.csv").write_text("section,patient\nA,Cem\n")
    for path in (own_tissue / "wsis" / "A.tif", f"{own_tissue / 'wsis'}:A"):
        assert read_section(path, mpp=0.7).uns["genar"]["patient"] == "Cem"


@pytest.mark.parametrize(("stated", "name"), [(0, "0"), (1.0, "1"), ("P", "P"), (None, ""), (float("nan"), "")])
def test_a_patient_may_be_a_number(tmp_path, home, stated, name):
    shutil.copytree(home / "tissue", tmp_path / "tissue")
    facts = tmp_path / "tissue" / "metadata" / "S1.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "patient": stated}))
    assert read_section(f"{tmp_path / 'tissue'}:S1").uns["genar"]["patient"] == name
