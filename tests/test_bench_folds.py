"""Folds of a bench: patients of the files, folders of any name, and data that are not those of a finished run."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from genar import bench, read_sections
from genar.bench.plan import plan_runs
from genar.errors import InputError
from genar.evaluation.protocol import Fold
from toy_bench import HEAD, RIDGE, read, run_recipe

FOUR = HEAD.replace("sections: [A, B]\nheld_out: [A]", "sections: [A, B, C, D]\nPROTOCOL") + RIDGE


def planned(tmp_path, data, protocol, **changes):
    return plan_runs(read(tmp_path, FOUR.replace("PROTOCOL", protocol), **changes), data, tmp_path / "out")


@pytest.fixture
def own_four(four, tmp_path):
    return shutil.copytree(four, tmp_path / "four")


def test_patients_of_a_table_cut_the_folds(own_four, tmp_path):
    (own_four / "patients.csv").write_text("section,patient\nA,Ann\nB,Ann\nC,Bea\nD,Bea\n")
    for protocol in ("protocol: patient", "protocol: kfold\nk: 2"):
        plan = planned(tmp_path, own_four, protocol)
        assert {run.fold.test for run in plan.runs} == {("A", "B"), ("C", "D")}
        assert not any(run.fold.note for run in plan.runs)
    plan = planned(tmp_path, own_four, "held_out: [A]")
    assert plan.runs[0].fold.note.startswith("Ann has sections in training and held out")
    named = planned(tmp_path, own_four, "protocol: patient\nheld_out: [Bea]")
    assert [run.fold.test for run in named.runs] == [("C", "D")]
    # what the recipe says goes before what is found, and without data nothing is known
    own = planned(tmp_path, own_four, "protocol: patient\npatients: {A: Cyd, B: Dot}")
    assert [run.fold.test for run in own.runs] == [("A",), ("B",), ("C", "D")]
    with pytest.raises(InputError, match=r"the patient of 4 of 4 sections is not known .*patients\.csv"):
        planned(tmp_path, None, "protocol: patient")


@pytest.mark.parametrize("names", [("张", "李"), ("P 1", "P-1"), ("Ann", "Bea")])
def test_patients_of_any_script_have_folders_of_their_own(own_four, tmp_path, names):
    one, other = names
    plan = planned(tmp_path, own_four, f"protocol: patient\npatients: {{A: {one}, B: {one}, C: {other}, D: {other}}}")
    folders = [run.plan.out for run in plan.runs]
    assert len(set(folders)) == 2
    assert all(folder.name.isascii() for folder in folders)


def test_a_fold_of_many_sections_has_a_name_that_disks_take():
    from genar.bench.plan import _leaf

    ids = tuple(f"PATIENT_A_SECTION_{i:03d}" for i in range(40))
    names = {_leaf(Fold("+".join(ids[:n]), ids[:n])) for n in (20, 30, 40)}
    assert len(names) == 3
    assert max(map(len, names)) < 100
    assert _leaf(Fold("SPA138", ("SPA138",))) == "SPA138"


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("held_out: [A]\nk: 3", "k is the number of folds of protocol kfold, found protocol section"),
        ("panel: genes200_her2st.txt\nheld_out: [A]", "n_genes beside the list .* taken whole; leave it out"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(tmp_path, keys, says):
    with pytest.raises(InputError, match=says):
        read(tmp_path, FOUR.replace("PROTOCOL", keys))


def test_a_run_of_other_images_is_not_taken_for_one_of_these(bench_tissue, tmp_path):
    data = shutil.copytree(bench_tissue, tmp_path / "data")
    recipe = read(tmp_path, HEAD + RIDGE)
    run_recipe(recipe, data, tmp_path / "out", tmp_path / "features")
    before = (tmp_path / "out" / "table.csv").read_text()
    run_recipe(recipe, data, tmp_path / "out", tmp_path / "features")  # the same, and nothing is refused
    image = data / "wsis" / "B.tif"
    pixels = np.asarray(Image.open(image)).copy()
    pixels[:50] = 0
    shutil.copy(image, tmp_path / "kept.tif")
    Image.fromarray(pixels).save(image)
    with pytest.raises(InputError, match="made with another image, or other places, of section B"):
        run_recipe(recipe, data, tmp_path / "out", tmp_path / "features")
    image.unlink()  # tables of what was run need no image
    run_recipe(recipe, data, tmp_path / "out", tmp_path / "features")
    assert (tmp_path / "out" / "table.csv").read_text() == before


def test_groups_are_of_the_whole_list(bench_tissue, tmp_path):
    known = list(read_sections(bench_tissue)[0].var_names[:30])
    (tmp_path / "panel.txt").write_text("\n".join(known) + "\n")
    text = "title: g\nsections: [A, B]\nheld_out: [A]\npanel: panel.txt\ngroups: true\n"
    bench.bench_run(read(tmp_path, text), bench_tissue, tmp_path / "out", say=str)
    (path,) = (tmp_path / "out").glob("groups_*.json")
    assert sum(map(len, json.loads(path.read_text()).values())) == 30
