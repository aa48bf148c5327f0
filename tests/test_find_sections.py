"""Sections are found, named and picked in files and folders as they lie on disks."""

import shutil
import warnings

import anndata
import numpy as np
import pytest
from PIL import Image

from genar.data import contract, find_sections, pick, read_section, read_sections
from genar.errors import InputError, SectionWarning
from section_files import write_h5ad, write_hd, write_legacy, write_visium


@pytest.mark.parametrize(
    ("name", "ids"), [("{}", ["SIM1", "SIM2"]), ("{}:SIM2", ["SIM2"]), ("{}/st/SIM2.h5ad", ["SIM2"])]
)
def test_sections_are_found_by(tissue, name, ids):
    refs = find_sections(name.format(tissue))
    assert [ref.id for ref in refs] == ids
    assert [contract.name(ref.read()) for ref in refs] == ids


def test_unknown_id_lists_the_known_ones(tissue):
    for find in (lambda: find_sections(f"{tissue}:SIM3"), lambda: read_sections(tissue, ["SIM1", "SIM3"])):
        with pytest.raises(InputError, match=r"'SIM3' is no section of .*SIM1, SIM2"):
            find()


@pytest.mark.parametrize("name", ["nothing", "nothing:SIM1", "nothing.h5ad", "st/SIM9.h5ad"])
def test_a_path_that_is_not_there_is_told_so(tmp_path, name):
    with pytest.raises(InputError, match=f"{name}: no such file or folder"):
        find_sections(tmp_path / name)


def test_a_folder_near_is_named(tissue, tmp_path):
    with pytest.raises(InputError, match=f"did you mean {tissue}"):
        read_section(f"{tissue}x")


def test_a_file_that_is_no_section_says_what_was_expected(tmp_path):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(InputError, match="expected a folder in HEST-1k layout"):
        find_sections(tmp_path / "notes.txt")


def test_an_empty_folder_says_what_was_expected(tmp_path):
    with pytest.raises(InputError, match="no sections found; expected HEST-1k layout"):
        find_sections(tmp_path)


def test_several_sections_where_one_is_expected(tissue):
    with pytest.raises(InputError, match=r"expected one section, found 2 \(SIM1, SIM2\); name one as .*:SIM1"):
        read_section(tissue)


def test_sections_are_sorted_naturally(tmp_path):
    (tmp_path / "st").mkdir()
    for name in ("SPA10", "SPA9", "SPA100", "INT1"):
        (tmp_path / "st" / f"{name}.h5ad").touch()
    assert [ref.id for ref in find_sections(tmp_path)] == ["INT1", "SPA9", "SPA10", "SPA100"]


@pytest.mark.parametrize("names", [("10x1", "A2"), ("A", "1A"), ("1", "a", "2b")])
def test_names_beginning_with_digits_sort_beside_others(tmp_path, names):
    (tmp_path / "st").mkdir()
    for name in names:
        (tmp_path / "st" / f"{name}.h5ad").touch()
    assert {ref.id for ref in find_sections(tmp_path)} == set(names)


def test_pick_keeps_the_order_asked_for_and_takes_any_iterable(tissue):
    refs = find_sections(tissue)
    assert [ref.id for ref in pick(refs, ["SIM2", "SIM1"])] == ["SIM2", "SIM1"]
    assert [ref.id for ref in pick(refs, (name for name in ("SIM2", "SIM1")))] == ["SIM2", "SIM1"]


def test_an_id_with_a_comma_can_be_named(lite0, tmp_path):
    for name in ("A", "A,1", "A, 2"):
        shutil.copy(lite0 / "tissue" / "st" / "A.h5ad", tmp_path / f"{name}.h5ad")
    refs = find_sections(tmp_path)
    for ids, found in ((["A", "1"], ["A,1"]), (["A", "A", "2"], ["A", "A, 2"]), (["A,1", "A"], ["A,1", "A"])):
        assert [ref.id for ref in pick(refs, ids)] == found
    with pytest.raises(InputError, match="'2' is no section"):
        pick(refs, ["A", "1", "2"])


def test_format_can_be_forced_and_must_be_known(tissue, tmp_path):
    assert find_sections(tissue, format="hest")[0].format == "hest"
    with pytest.raises(InputError, match="no sections found; expected Space Ranger"):
        find_sections(tissue, format="visium")
    with pytest.raises(InputError, match="'magic' is not known; expected one of hest, visium_hd"):
        find_sections(tissue, format="magic")


def test_sections_of_another_format_are_told(tmp_path):
    for name in ("P1", "P2"):
        write_visium(tmp_path / name / "outs")
    assert len(find_sections(tmp_path)) == 2
    write_hd(tmp_path / "H1" / "outs")
    write_h5ad(tmp_path / "pred.h5ad")  # mostly a prediction
    with pytest.warns(SectionWarning, match=r"read as format visium_hd; not read are P1 \(visium\), P2 \(visium\)"):
        assert [ref.id for ref in find_sections(tmp_path)] == ["H1"]


def test_half_a_section_is_told(tmp_path):
    for name in ("P1", "P2"):
        write_visium(tmp_path / "v" / name / "outs")
    shutil.rmtree(tmp_path / "v" / "P2" / "outs" / "spatial")
    with pytest.warns(SectionWarning, match=r"left out are P2 \(no spatial/\): is the copy complete"):
        assert [ref.id for ref in find_sections(tmp_path / "v")] == ["P1"]
    (tmp_path / "l").mkdir()
    for name in ("X1", "X2"):
        write_legacy(tmp_path / "l", name)
    (tmp_path / "l" / "X2.tsv.gz").unlink()
    with pytest.warns(SectionWarning, match=r"left out are X2 \(no counts\)"):
        assert [ref.id for ref in find_sections(tmp_path / "l")] == ["X1"]


def test_a_link_is_called_as_it_is_called(tmp_path):
    write_visium(tmp_path / "archive" / "run_123" / "outs")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "P1").symlink_to(tmp_path / "archive" / "run_123")
    (tmp_path / "study" / "patients.csv").write_text("section,patient\nP1,Ann\n")
    for path in (f"{tmp_path / 'study'}:P1", tmp_path / "study" / "P1", tmp_path / "study" / "P1" / "outs"):
        section = read_section(path)
        assert (contract.name(section), section.uns["genar"]["patient"]) == ("P1", "Ann")


def test_a_file_is_the_same_named_from_within_its_folder(own_tissue, monkeypatch):
    whole = read_section(f"{own_tissue}:A")
    monkeypatch.chdir(own_tissue / "st")
    assert read_section("A.h5ad").uns["genar"] == whole.uns["genar"]
    monkeypatch.chdir(own_tissue / "wsis")
    assert read_section("A.tif").uns["genar"]["mpp"] == read_section(own_tissue / "wsis" / "A.tif").uns["genar"]["mpp"]


def test_an_image_is_found_from_any_folder(own_tissue, tmp_path, monkeypatch):
    for project, grey in (("one", 90), ("two", 200)):
        (tmp_path / project / "wsis").mkdir(parents=True)
        Image.new("RGB", (600, 600), (grey,) * 3).save(tmp_path / project / "wsis" / "A.png")
    monkeypatch.chdir(tmp_path / "one")
    section = read_section(f"{own_tissue}:A", image="wsis/A.png")
    section.write_h5ad(tmp_path / "one" / "kept.h5ad")
    monkeypatch.chdir(tmp_path / "two")
    again = read_section("../one/kept.h5ad")
    assert contract.slide_path(again).resolve() == tmp_path / "one" / "wsis" / "A.png"
    again.uns[contract.GENAR][contract.SLIDE] = "wsis/A.png"  # as it was typed
    again.write_h5ad(tmp_path / "one" / "older.h5ad")
    assert contract.slide_path(read_section("../one/older.h5ad")).resolve() == tmp_path / "one" / "wsis" / "A.png"


def test_a_run_folder_is_called_like_itself(tmp_path):
    write_visium(tmp_path / "P1" / "outs")
    assert [ref.id for ref in find_sections(tmp_path / "P1")] == ["P1"]
    write_hd(tmp_path / "H1" / "outs")
    assert [ref.id for ref in find_sections(tmp_path / "H1")] == ["H1"]


def test_names_that_a_mac_leaves_and_capital_suffixes(tmp_path):
    (tmp_path / "st").mkdir()
    write_h5ad(tmp_path / "st" / "A.h5ad")
    (tmp_path / "st" / "._A.h5ad").write_bytes(b"\0")
    (tmp_path / "wsis").mkdir()
    Image.new("RGB", (2000, 1800)).save(tmp_path / "wsis" / "A.TIF", format="TIFF")
    (section,) = read_sections(tmp_path, mpp=0.5)
    assert contract.slide_path(section).name == "A.TIF"
    legacy = write_legacy(tmp_path / "legacy")
    (legacy / "._X1_selection.tsv").write_bytes(b"\0")
    assert [ref.id for ref in find_sections(legacy)] == ["X1"]


def test_two_slides_of_one_stem_are_two_sections(tissue, tmp_path):
    for name in ("a.tif", "a.tiff"):
        shutil.copy(tissue / "wsis" / "SIM1.tif", tmp_path / name)
    assert [contract.name(s) for s in read_sections(tmp_path)] == ["a.tif", "a.tiff"]


@pytest.fixture
def hest(tissue, tmp_path):
    return shutil.copytree(tissue, tmp_path / "hest")


def test_sections_of_other_formats_are_told_and_predictions_are_not(hest, tmp_path):
    for name in ("P3", "guess"):
        shutil.copy(hest / "st" / "SIM1.h5ad", hest / f"{name}.h5ad")
    guess = anndata.read_h5ad(hest / "guess.h5ad")
    guess.uns[contract.GENAR] = {contract.PREDICTION: {"model": "ridge"}}
    guess.write_h5ad(hest / "guess.h5ad")
    with pytest.warns(SectionWarning, match=r"read as format hest; not read are P3 \(h5ad\): give each"):
        assert len(find_sections(hest)) == 2


def test_sections_one_after_the_other_are_refused_by_their_array(tissue_sections, tmp_path):
    """``anndata.concat`` names them as the user likes, and drops what tells of the image."""
    one, other = tissue_sections
    for section, shift in ((one, 0.0), (other, 3.3)):
        n = int(np.ceil(np.sqrt(section.n_obs)))
        row, col = np.divmod(np.arange(section.n_obs), n)
        section.obs["array_row"], section.obs["array_col"] = row, 2 * col + row % 2
        section.obsm["spatial"] = section.obsm["spatial"] + shift
    merged = anndata.concat([one, other], label="sample", keys=["P1", "P2"], index_unique="-")
    merged.write_h5ad(tmp_path / "both.h5ad")
    with pytest.raises(InputError, match=r"several sections in one file .most spots lie at another's place"):
        read_section(tmp_path / "both.h5ad", mpp=0.5)


def test_options_that_mean_nothing_to_the_one_section_are_refused(hest):
    for option in ("bin_um", "spacing_um"):
        with pytest.raises(InputError, match=f"--{option.replace('_', '-')} is for format .*leave it out"):
            read_section(f"{hest}:SIM1", **{option: 16.0})


def test_nothing_is_said_of_a_whole_folder(hest):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_sections(hest)) == 2
