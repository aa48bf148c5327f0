"""Sections of the first spatial transcriptomics, as tables of counts, spots and an image."""

import gzip
import shutil

import numpy as np
import pandas as pd
import pytest

from genar.data import contract, find_sections, read_section, read_sections
from genar.errors import InputError
from section_files import edit_text, write_legacy


@pytest.mark.parametrize("flat", [True, False])
def test_legacy_st_keeps_selected_spots_with_counts_in_the_order_of_the_counts(tmp_path, flat):
    section = read_section(write_legacy(tmp_path, flat=flat))
    assert contract.name(section) == "X1"
    assert list(section.obs_names) == ["010x009", "010x010", "011x010"]
    assert list(section.var_names) == ["GENE1", "GENE2"]
    np.testing.assert_array_equal(contract.counts(section), [[1, 0], [5, 7], [0, 2]])
    np.testing.assert_allclose(contract.coords_px(section), [[2505, 2250], [2505, 2500], [2755.5, 2500]])
    facts = section.uns["genar"]
    assert (facts["source"], facts["pitch_um"], facts["spot_diameter_um"]) == ("legacy_st", 200, 100)
    assert facts["note"] == "1 selected spots have no counts and are dropped: 12x12"
    assert contract.mpp(section) == pytest.approx(200 / 250.25, rel=1e-3)
    assert contract.slide_path(section).suffix == ".jpg"


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("X1.tsv.gz", "10x9", "A1", "expected rows named like 10x21"),
        ("X1.tsv.gz", "10x9", "10x10", "'10x10' occurs more than once"),
        ("X1.tsv.gz", "GENE2", "GENE1", "gene name 'GENE1' occurs more than once"),
        ("X1.tsv.gz", "\t7\n", "\tmany\n", "expected a count in every cell"),
        ("X1.tsv.gz", "\t7\n", "\t\n", "expected a count in every cell"),
        ("X1.tsv.gz", "\t7\n", "\t-7\n", "negative"),
        ("X1.tsv.gz", "\t7\n", "\tnan\n", "NaN"),
        ("X1.tsv.gz", "\t7\n", "\n", "10x10 has 1 counts for 2 genes"),
        ("X1.tsv.gz", "\t7\n", "\t0.7\n", "fractional"),
        ("X1_selection.tsv", "pixel_x", "px", "no pixel_x"),
        ("X1_selection.tsv", "12\t12\t", "10\t10\t", "selected more than once"),
        ("X1_selection.tsv", "11\t10\t", "11.5\tten\t", "whole numbers"),
        ("X1_selection.tsv", "11\t10\t", "10.97\t10\t", "whole numbers"),
    ],
)
def test_legacy_st_refuses_what_is_not_as_described(tmp_path, file, old, new, says):
    edit_text(write_legacy(tmp_path) / file, old, new)
    with pytest.raises(InputError, match=says) as caught:
        read_section(tmp_path)
    assert "\n" not in str(caught.value)


def test_legacy_st_refuses_broken_files_and_sections_without_spots(tmp_path):
    folder = write_legacy(tmp_path)
    with gzip.open(folder / "X1.tsv.gz", "wt") as file:
        file.write("\tGENE1\n77x77\t1\n")
    with pytest.raises(InputError, match="none of the 4 spots"):
        read_section(folder)
    (folder / "X1.tsv.gz").write_bytes(gzip.compress(b"\tG\n" + b"1x1\t1\n" * 99)[:-20])
    with pytest.raises(InputError, match="not a readable table"):
        read_section(folder)


def test_legacy_st_takes_the_counts_beside_the_selection_and_no_section_twice(tmp_path):
    write_legacy(tmp_path / "p1")
    shutil.copytree(tmp_path / "p1", tmp_path / "p2")
    edit_text(tmp_path / "p2" / "X1.tsv.gz", "10x10\t5\t7", "10x10\t6\t8")
    with pytest.raises(InputError, match=r"section X1: two selections \(.*p1.*p2.*\); name one folder of them"):
        read_sections(tmp_path)
    for name in ("X1_selection.tsv", "X1.jpg"):
        (tmp_path / "p1" / name).unlink()
    section = read_section(tmp_path)  # p1 still has counts of that name
    np.testing.assert_array_equal(contract.counts(section)[1], [6, 8])


def test_two_tables_of_counts_are_refused(tmp_path):
    write_legacy(tmp_path, flat=False)
    (tmp_path / "backup").mkdir()
    counts = next(tmp_path.glob("cnts/*.tsv.gz"))
    shutil.copy(counts, tmp_path / "backup" / counts.name)
    with pytest.raises(InputError, match="two tables of counts"):
        find_sections(tmp_path)


def test_a_row_that_is_no_spot_is_told_in_few_words(tmp_path):
    write_legacy(tmp_path)
    with gzip.open(tmp_path / "X1.tsv.gz", "wt") as file:
        file.write("\tGENE1\tGENE2\n" + "x" * 1_000_000 + "\t1\n")
    with pytest.raises(InputError, match="expected rows named like 10x21, found 'xxx") as refused:
        read_section(tmp_path)
    assert len(str(refused.value)) < 400


def test_two_images_of_one_legacy_section_are_not_guessed_between(tmp_path):
    folder = write_legacy(tmp_path)
    shutil.copy(folder / "X1.jpg", folder / "X1.png")
    with pytest.raises(InputError, match=r"2 images.*--image"):
        read_section(folder)
    assert contract.slide_path(read_section(folder, image=folder / "X1.png")) == folder / "X1.png"


def test_an_image_is_not_that_of_a_section_with_a_longer_name(tmp_path):
    write_legacy(tmp_path)
    (tmp_path / "X1.jpg").rename(tmp_path / "X1.2.jpg")
    assert contract.slide_path(read_section(tmp_path)) is None


@pytest.mark.real
@pytest.mark.parametrize("section", ["SPA138", "SPA139", "SPA140", "SPA141"])
def test_real_legacy_files_give_what_the_hest_files_hold(shared, section):
    table = pd.read_csv(shared / "data" / "her2st" / "sections.csv", index_col="id")
    row, raw = table.loc[section], shared / "data" / "her2st" / "raw"
    ours = read_section(f"{raw}:{row.section}")
    theirs = read_section(f"{shared / 'data' / 'her2st'}:{section}")
    assert list(ours.obs_names) == list(theirs.obs_names)
    assert list(ours.var_names) == list(theirs.var_names)
    assert (ours.X != theirs.X).nnz == 0
    np.testing.assert_array_equal(contract.coords_px(ours), contract.coords_px(theirs))
    np.testing.assert_array_equal(ours.obs["library_size"], theirs.obs["library_size"])
    dropped = row.selected_without_counts if isinstance(row.selected_without_counts, str) else ""
    assert set(ours.uns["genar"]["note"].rpartition(": ")[2].split(", ")) == set(dropped.split(";"))
    fitted = (row.pixel_size_um_gridfit_x + row.pixel_size_um_gridfit_y) / 2
    assert contract.mpp(ours) == pytest.approx(fitted, rel=2e-3)
    assert contract.slide_path(ours).suffix == ".jpg"
    assert [ref.id for ref in find_sections(raw)] == ["C2", "C3", "C4", "C5"]
