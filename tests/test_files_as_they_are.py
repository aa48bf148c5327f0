"""Sections as they lie on real disks: merged, linked, named from within their folder, beside others."""

import gzip
import shutil

import anndata
import numpy as np
import pytest
from PIL import Image

from genar.data import contract, find_sections, open_slide, read_section
from genar.encoders import load_encoder
from genar.errors import InputError, NoRawCountsError, SectionWarning
from section_files import write_h5ad, write_hd, write_legacy, write_visium


def test_a_pixel_size_no_scanner_has_is_not_believed(own_tissue, tmp_path):
    """TIFFs of the HEST library say a tenth of the truth in their tags, and metadata may be missing."""
    shutil.rmtree(own_tissue / "metadata")
    image = own_tissue / "wsis" / "A.tif"
    import tifffile

    pixels = tifffile.imread(image)
    tifffile.imwrite(image, pixels, photometric="rgb", resolution=(1e4 / 0.07, 1e4 / 0.07), resolutionunit="CENTIMETER")
    with pytest.raises(InputError, match=r"finer than any scanner; .* pass --mpp 0\.7, or --mpp 0\.07"):
        read_section(f"{own_tissue}:A")
    assert contract.mpp(read_section(f"{own_tissue}:A", mpp=0.7)) == 0.7


def test_merged_sections_are_refused(own_tissue, tmp_path):
    one = anndata.read_h5ad(own_tissue / "st" / "A.h5ad")
    for name, options in (("ids", {"label": "library_id"}), ("places", {})):
        merged = anndata.concat({"A": one, "B": one}, index_unique="-", **options)
        merged.write_h5ad(tmp_path / f"{name}.h5ad")
        with pytest.raises(InputError, match="several sections in one file"):
            read_section(tmp_path / f"{name}.h5ad", mpp=0.5)


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


def test_a_link_is_called_as_it_is_called(tmp_path):
    write_visium(tmp_path / "archive" / "run_123" / "outs")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "P1").symlink_to(tmp_path / "archive" / "run_123")
    (tmp_path / "study" / "patients.csv").write_text("section,patient\nP1,Ann\n")
    for path in (f"{tmp_path / 'study'}:P1", tmp_path / "study" / "P1", tmp_path / "study" / "P1" / "outs"):
        section = read_section(path)
        assert (contract.name(section), section.uns["genar"]["patient"]) == ("P1", "Ann")


def test_a_table_of_patients_is_of_its_own_folder(own_tissue, tmp_path):
    (tmp_path / "patients.csv").write_text("section,patient\nA,Bea\n")  # of another data set, further up
    before = read_section(f"{own_tissue}:A").uns["genar"]["patient"]
    assert before != "Bea"
    (own_tissue / "wsis" / "patients.csv").write_text("section,patient\nA,Cem\n")
    for path in (own_tissue / "wsis" / "A.tif", f"{own_tissue / 'wsis'}:A"):
        assert read_section(path, mpp=0.7).uns["genar"]["patient"] == "Cem"


def test_a_file_is_the_same_named_from_within_its_folder(own_tissue, monkeypatch):
    whole = read_section(f"{own_tissue}:A")
    monkeypatch.chdir(own_tissue / "st")
    assert read_section("A.h5ad").uns["genar"] == whole.uns["genar"]
    monkeypatch.chdir(own_tissue / "wsis")
    assert read_section("A.tif").uns["genar"]["mpp"] == read_section(own_tissue / "wsis" / "A.tif").uns["genar"]["mpp"]


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


@pytest.mark.parametrize(("mode", "told"), [("YCbCr", "YCbCr"), ("LAB", "CIELab")])
def test_colours_that_are_not_rgb_are_refused(tmp_path, mode, told):
    Image.new("RGB", (300, 300), (200, 120, 180)).convert(mode).save(tmp_path / "y.tif")
    with pytest.raises(InputError, match=f"expected an 8-bit RGB image, found {told}"):
        open_slide(tmp_path / "y.tif")


def test_a_layer_that_holds_no_counts_is_named(own_tissue, tmp_path):
    section = anndata.read_h5ad(own_tissue / "st" / "A.h5ad")
    section.layers["counts"] = np.log1p(section.X)
    section.write_h5ad(tmp_path / "A.h5ad")
    with pytest.raises(NoRawCountsError, match=r"layers\['counts'\] holds fractional .* goes before X: delete it"):
        read_section(tmp_path / "A.h5ad", mpp=0.5)


def test_imported_features_have_one_precision():
    with pytest.raises(InputError, match="computes in fp32, not in bf16; leave it out"):
        load_encoder("import:mine", precision="bf16")


def test_a_name_that_no_file_can_have_is_refused(own_tissue):
    with pytest.raises(InputError, match="its id must be a plain name"):
        contract.check_name("ж" * 150)
