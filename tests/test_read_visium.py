"""Visium: folders of Space Ranger, of every age, packed, cut, beside their images."""

import gzip
import shutil
import warnings

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from genar.data import contract, find_sections, read_section, read_sections
from genar.errors import InputError, SectionWarning
from section_files import FACTORS, GENES, counts_of, edit_text, write_visium


@pytest.mark.parametrize("matrix", ["h5", "mtx"])
@pytest.mark.parametrize("header", [True, False])
def test_space_ranger_of_every_age(tmp_path, matrix, header):
    kept = write_visium(tmp_path / "P1" / "outs", matrix=matrix, header=header, all_barcodes=not header)
    section = read_section(tmp_path / "P1" / "outs")
    assert contract.name(section) == "P1"
    inside = [i for i, row in enumerate(kept) if row[1]]
    assert list(section.obs_names) == [kept[i][0] for i in inside]
    assert list(section.var_names) == ["KRT8", "TBCE", "TBCE-1", "B2M"]  # no antibodies, names made unique
    assert list(section.var["gene_ids"]) == [number for number, _ in GENES]
    np.testing.assert_array_equal(contract.counts(section), counts_of(kept)[inside])
    np.testing.assert_array_equal(contract.coords_px(section), [(kept[i][5], kept[i][4]) for i in inside])
    assert contract.mpp(section) == pytest.approx(0.5, rel=0.01)
    assert contract.slide_path(section) is None
    facts = section.uns["genar"]
    assert (facts["source"], facts["pitch_um"], facts["spot_diameter_um"]) == ("visium", 100, 55)
    assert ("not under tissue" in facts["note"]) == (not header)


@pytest.fixture
def outs(tmp_path):
    write_visium(tmp_path / "P1" / "outs")
    return tmp_path / "P1" / "outs"


def test_a_folder_of_outs_is_several_sections(outs, tmp_path):
    write_visium(tmp_path / "P10" / "outs")
    write_visium(tmp_path / "P2")
    assert [ref.id for ref in find_sections(tmp_path)] == ["P1", "P2", "P10"]
    assert [contract.name(s) for s in read_sections(tmp_path, ["P10", "P2"])] == ["P10", "P2"]
    assert contract.name(read_section(f"{tmp_path}:P10")) == "P10"
    assert contract.name(read_section(outs / "filtered_feature_bc_matrix.h5")) == "P1"


def positions(outs):
    return outs / "spatial" / "tissue_positions.csv"


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_positions_out_of_a_spreadsheet_have_quotes_and_a_mark(tmp_path, mark):
    write_visium(tmp_path / "P1" / "outs", all_barcodes=True)
    plain = read_section(tmp_path / "P1" / "outs")
    path = positions(tmp_path / "P1" / "outs")
    table = pd.read_csv(path)
    path.write_text(mark + table.to_csv(index=False, quoting=1), encoding="utf-8")
    quoted = read_section(tmp_path / "P1" / "outs")
    assert list(quoted.obs_names) == list(plain.obs_names)
    np.testing.assert_array_equal(contract.coords_px(quoted), contract.coords_px(plain))
    edit_text(path, '"1"', '"yes"')
    with pytest.raises(InputError, match="column in_tissue must hold numbers"):
        read_section(tmp_path / "P1" / "outs")


def test_spatial_files_may_be_packed(tmp_path):
    write_visium(tmp_path / "P1" / "outs")
    plain = read_section(tmp_path / "P1" / "outs")
    for name in ("tissue_positions.csv", "scalefactors_json.json"):
        path = tmp_path / "P1" / "outs" / "spatial" / name
        path.with_name(f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = read_section(tmp_path / "P1" / "outs")
    np.testing.assert_array_equal(contract.coords_px(packed), contract.coords_px(plain))


def keep_some(outs, wanted):
    """Of the spots leave those under tissue that are ``wanted`` (a function of row and column)."""
    table = pd.read_csv(positions(outs))
    table["in_tissue"] = [int(wanted(r, c)) for r, c in zip(table["array_row"], table["array_col"], strict=True)]
    table.to_csv(positions(outs), index=False)


@pytest.mark.parametrize("wanted", [lambda r, c: r == 4, lambda r, c: (7 * r + 3 * c) % 5 == 0], ids=["one row", "few"])
def test_the_pitch_is_that_of_the_array_however_few_spots_there_are(tmp_path, wanted):
    write_visium(tmp_path / "P1" / "outs", all_barcodes=True)
    whole = read_section(tmp_path / "P1" / "outs")
    keep_some(tmp_path / "P1" / "outs", wanted)
    few = read_section(tmp_path / "P1" / "outs")
    assert 3 < few.n_obs < whole.n_obs
    assert contract.mpp(few) == pytest.approx(0.5, rel=0.01)


def test_the_full_resolution_image_is_named_apart_and_is_not_the_hires_png(outs, tmp_path):
    for name in ("scan.png", "images/P1.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
    tifffile.imwrite(tmp_path / "images" / "P1.tif", np.full((1800, 2000, 3), 200, np.uint8), photometric="rgb",
                     resolution=(2e4, 2e4), resolutionunit="CENTIMETER")  # fmt: skip
    section = read_section(outs, image=tmp_path / "images" / "P1.tif")
    assert contract.slide_path(section) == tmp_path / "images" / "P1.tif"
    assert section.uns["genar"]["mpp_by"]["image"] == pytest.approx(0.5)
    assert contract.slide_path(read_section(outs, image=tmp_path / "images")).name == "P1.tif"
    shutil.copy(outs / "spatial" / "tissue_hires_image.png", tmp_path / "scan.png")
    for wrong in (outs / "spatial" / "tissue_hires_image.png", tmp_path / "scan.png"):
        with pytest.raises(InputError, match=r"downsampled tissue_hires_image\.png; expected the full-resolution"):
            read_section(outs, image=wrong)
    with pytest.raises(InputError, match="no such image"):
        read_section(outs, image=tmp_path / "nowhere.tif")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no image of section P1; expected P1\.tif"):
        read_section(outs, image=tmp_path / "empty")
    write_visium(tmp_path / "P2" / "outs")
    with pytest.raises(InputError, match="one image for 2 sections"):
        read_sections(tmp_path, image=tmp_path / "images" / "P1.tif")


@pytest.mark.parametrize("kind", ["cut", "text", "bomb", "deep"])
def test_a_picture_that_cannot_be_read_is_left_out_with_a_note(kind, outs):
    path = outs / "spatial" / "tissue_lowres_image.png"
    if kind == "text":
        path.write_text("no image")
    elif kind == "bomb":
        Image.new("1", (40_000, 40_000)).save(path)
    else:
        noise = np.random.default_rng(0).integers(0, 255, (90, 100), dtype=np.uint16)
        Image.fromarray(noise if kind == "deep" else noise.astype(np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[: None if kind == "deep" else 2000])
    section = read_section(outs)
    (library,) = section.uns["spatial"].values()
    assert set(library["images"]) == {"hires"}
    assert "a picture is left out: " in section.uns["genar"]["note"]
    assert "tissue_lowres_image.png: " in section.uns["genar"]["note"]


def test_a_large_picture_of_space_ranger_is_shrunk_with_its_scale(outs):
    Image.new("RGB", (4000, 3600), "white").save(outs / "spatial" / "tissue_hires_image.png")
    (library,) = read_section(outs).uns["spatial"].values()
    assert library["images"]["hires"].shape == (1800, 2000, 3)
    assert library["scalefactors"]["tissue_hires_scalef"] == pytest.approx(FACTORS["tissue_hires_scalef"] / 2)


def test_an_image_tag_that_disagrees_is_told_but_not_one_ten_times_too_small(outs, tmp_path):
    def image(per_cm):
        tags = {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER", "photometric": "rgb"}
        tifffile.imwrite(tmp_path / "a.tif", np.full((1800, 2000, 3), 200, np.uint8), **tags)
        return tmp_path / "a.tif"

    with pytest.warns(UserWarning, match=r"0\.(49|50)\d* um by the spot pitch, 0\.2500 um by the image's tag"):
        assert contract.mpp(read_section(outs, image=image(4e4))) == pytest.approx(0.5, rel=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SectionWarning)
        read_section(outs, image=image(2e5))  # as the HEST library writes it


def drop_matrix_part(outs):
    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "a") as file:
        del file["matrix/indptr"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (drop_matrix_part, "not a readable 10x matrix"),
        (lambda outs: (outs / "filtered_feature_bc_matrix.h5").write_bytes(b"\x89HDF"), "not a readable 10x matrix"),
        (lambda outs: (outs / "spatial" / "tissue_positions.csv").unlink(), "expected one of tissue_positions"),
        (lambda outs: (outs / "spatial" / "tissue_positions.csv").write_text("barcode\n1\n"), "expected columns"),
        (lambda outs: edit_text(outs / "spatial" / "tissue_positions.csv", "AAAC0000-1", "GGGG-1"), "no position"),
        (lambda outs: (outs / "spatial" / "scalefactors_json.json").unlink(), "scalefactors_json.json"),
        (lambda outs: (outs / "spatial" / "scalefactors_json.json").write_text("{"), "scalefactors_json.json"),
    ],
)
def test_damaged_space_ranger_outputs_are_one_line(outs, damage, says):
    damage(outs)
    with pytest.raises(InputError, match=says) as caught:
        read_section(outs)
    assert "\n" not in str(caught.value)


def test_a_matrix_folder_that_lacks_a_file_is_one_line(tmp_path):
    write_visium(tmp_path / "P1", matrix="mtx")
    folder = tmp_path / "P1" / "filtered_feature_bc_matrix"
    (folder / "features.tsv.gz").unlink()
    with pytest.raises(InputError, match=r"expected features\.tsv\.gz"):
        read_section(tmp_path / "P1")
