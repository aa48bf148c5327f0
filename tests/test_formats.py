""""""

import gzip
import shutil
import sys
import warnings

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
from anndata import AnnData
from PIL import Image

from genar.data import contract, find_sections, open_slide, read_section, read_sections
from genar.data.reading import visium_pitch_px
from genar.errors import InputError, SectionWarning
from genar.genes import select_panel
from section_files import (
    FACTORS,
    GENES,
    counts_of,
    edit_text,
    write_h5ad,
    write_hd,
    write_legacy,
    write_spatialdata,
    write_visium,
)


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


def test_two_images_of_one_legacy_section_are_not_guessed_between(tmp_path):
    folder = write_legacy(tmp_path)
    shutil.copy(folder / "X1.jpg", folder / "X1.png")
    with pytest.raises(InputError, match=r"2 images.*--image"):
        read_section(folder)
    assert contract.slide_path(read_section(folder, image=folder / "X1.png")) == folder / "X1.png"


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


@pytest.mark.parametrize(("bin_um", "factor"), [(56, 7), (112, 14), (8, 1)])
def test_visium_hd_bins_are_pooled_to_the_chosen_width(tmp_path, bin_um, factor):
    xy, counts = write_hd(tmp_path / "H1" / "outs")
    section = read_section(tmp_path / "H1" / "outs", bin_um=bin_um)
    n = 28 // factor
    assert section.shape == (n * n, 4)
    blocks = counts.reshape(n, factor, n, factor, 4).sum(axis=(1, 3)).reshape(n * n, 4)
    np.testing.assert_array_equal(contract.counts(section), blocks)
    middles = xy.reshape(n, factor, n, factor, 2).mean(axis=(1, 3)).reshape(n * n, 2)
    np.testing.assert_allclose(contract.coords_px(section), middles, atol=1e-6)
    facts = section.uns["genar"]
    assert (facts["source"], facts["pitch_um"], facts["spot_diameter_um"]) == ("visium_hd", bin_um, bin_um)
    assert facts["mpp_by"] == pytest.approx({"metadata": 0.4, "pitch": 0.4})


def test_visium_hd_keeps_squares_half_under_tissue_and_loses_no_count_of_theirs(tmp_path):
    _, counts = write_hd(tmp_path / "H1", off=lambda row, col: col >= 18)  # 18 = 2 squares of 7 and 4 of 7 bins
    section = read_section(tmp_path / "H1")
    assert section.n_obs == 4 * 3
    assert contract.counts(section).sum() == counts.sum()
    assert (section.obs["n_bins"] >= 7 * 4).all()
    section = read_section(tmp_path / "H1", bin_um=112)
    assert section.n_obs == 2
    assert "2 squares with less than half under tissue" in section.uns["genar"]["note"]


def test_visium_hd_takes_the_widest_bins_that_fit(tmp_path):
    write_hd(tmp_path / "H1")
    write_hd(tmp_path / "H1", n=14, width=16)
    assert read_section(tmp_path / "H1", bin_um=112).obs["n_bins"].max() == 49
    assert read_section(tmp_path / "H1", bin_um=56).obs["n_bins"].max() == 49
    with pytest.raises(InputError, match=r"--bin-um 50 is no multiple of the bins there \(8, 16 um\)"):
        read_section(tmp_path / "H1", bin_um=50)
    with pytest.raises(InputError, match="--bin-um must be a positive number"):
        read_section(tmp_path / "H1", bin_um=-8)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    write_hd(tmp_path / "H1")

    def missing(*_, **__):
        raise ImportError("pyarrow")

    monkeypatch.setattr(pd, "read_parquet", missing)
    with pytest.raises(InputError, match=r"pip install 'genar\[visium-hd\]'"):
        read_section(tmp_path / "H1")


def test_a_picture_goes_into_the_px_of_the_image_with_the_spots():
    from genar.data.formats.spatialdata import _rescale

    factors = {"spot_diameter_fullres": 50.0, "microns_per_pixel": 1.0, "tissue_hires_scalef": 0.1}
    section = AnnData(np.ones((2, 2), np.float32), uns={"spatial": {"lib": {"images": {}, "scalefactors": factors}}})
    _rescale(section, 2.0)  # two px of the image to one of the frame that the table speaks of
    found = section.uns["spatial"]["lib"]["scalefactors"]
    assert found == {"spot_diameter_fullres": 100.0, "microns_per_pixel": 0.5, "tissue_hires_scalef": 0.05}


@pytest.mark.filterwarnings("ignore")
def test_spatialdata_gives_counts_positions_in_px_of_its_image_and_patches(tmp_path):
    pixels, xy, table = write_spatialdata(tmp_path / "S1.zarr")
    section = read_section(tmp_path / "S1.zarr", mpp=0.6)
    assert contract.name(section) == "S1"
    assert list(section.obs_names) == list(table.obs_names)
    np.testing.assert_array_equal(contract.counts(section), table.X)
    np.testing.assert_allclose(contract.coords_px(section), xy)
    slide = open_slide(contract.slide_path(section))
    assert slide.size_px == (400, 300)
    patch = slide.read_patch_px((100, 60), 32, 32)
    np.testing.assert_array_equal(patch, np.moveaxis(pixels, 0, 2)[44:76, 84:116])
    assert (slide.read_patch_px((0, 0), 32, 32)[:16] == 255).all()
    assert slide.thumbnail(100).shape == (75, 100, 3)
    with pytest.raises(InputError, match=r"S1.*--mpp"):
        read_section(tmp_path / "S1.zarr")
    assert [ref.format for ref in find_sections(tmp_path)] == ["spatialdata"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["hires", "lowres"])
def test_small_pictures_of_space_ranger_are_no_slide(tmp_path, kind):
    write_spatialdata(tmp_path / "S1.zarr", name=f"P1_{kind}_image")
    assert contract.slide_path(read_section(tmp_path / "S1.zarr", mpp=0.6)) is None


@pytest.mark.filterwarnings("ignore")
def test_spatialdata_that_is_damaged_or_has_no_rgb_image_is_one_line(tmp_path, monkeypatch):
    write_spatialdata(tmp_path / "S1.zarr", channels=2)
    section = read_section(tmp_path / "S1.zarr", mpp=0.6)
    with pytest.raises(InputError, match="expected an 8-bit RGB image"):
        open_slide(contract.slide_path(section))
    shutil.rmtree(tmp_path / "S1.zarr" / "tables")
    with pytest.raises(InputError, match=r"S1\.zarr"):
        read_section(tmp_path / "S1.zarr", mpp=0.6)
    monkeypatch.setitem(sys.modules, "spatialdata", None)
    with pytest.raises(InputError, match=r"pip install 'genar\[spatialdata\]'"):
        read_section(tmp_path / "S1.zarr", mpp=0.6)


def test_any_h5ad_is_a_section(tmp_path):
    adata = write_h5ad(tmp_path / "one.h5ad")
    section = read_section(tmp_path / "one.h5ad")
    np.testing.assert_array_equal(contract.counts(section), adata.X)
    assert contract.mpp(section) == pytest.approx(0.5, rel=0.01)  # Visium by its array positions
    assert section.uns["genar"]["source"] == "h5ad"
    Image.new("RGB", (2000, 1800)).save(tmp_path / "one.jpg")
    assert contract.slide_path(read_section(tmp_path / "one.h5ad")) == tmp_path / "one.jpg"
    write_h5ad(tmp_path / "two.h5ad")
    assert [ref.id for ref in find_sections(tmp_path)] == ["one", "two"]


def heap_without_end(path):
    """A piece of free room of no bytes in the heap of texts: HDF5 1.14 steps over it for ever."""
    content = bytearray(path.read_bytes())
    at = content.index(b"GCOL") + 16
    while any(content[at : at + 2]):
        at += 16 + -(-int.from_bytes(content[at + 8 : at + 16], "little") // 8) * 8
    content[at + 8 : at + 16] = bytes(8)
    path.write_bytes(content)


def group_in_itself(path):
    with h5py.File(path, "r+") as file:
        file["obs/again"] = file["obs"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [(heap_without_end, "damaged heap of texts"), (group_in_itself, "group /obs/again holds itself")],
)
def test_an_h5ad_that_its_library_would_never_leave_is_refused(tmp_path, damage, says):
    write_h5ad(tmp_path / "one.h5ad")
    read_section(tmp_path / "one.h5ad", mpp=0.5)
    damage(tmp_path / "one.h5ad")
    with pytest.raises(InputError, match=rf"one\.h5ad: .*{says}"):
        read_section(tmp_path / "one.h5ad", mpp=0.5)


def test_an_array_where_scanpy_keeps_images_holds_none(tissue_sections):
    section = tissue_sections[0].copy()
    section.uns["spatial"] = np.zeros((3, 2))
    assert contract.picture(section) is None


def test_h5ad_layer_counts_wins_and_pixel_size_is_asked_for(tmp_path):
    adata = write_h5ad(tmp_path / "one.h5ad", visium=False)
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X)
    adata.write_h5ad(tmp_path / "one.h5ad")
    with pytest.raises(InputError, match=r"one: no pixel size.*pass --mpp"):
        read_section(tmp_path / "one.h5ad")
    section = read_section(tmp_path / "one.h5ad", mpp=0.4)
    np.testing.assert_array_equal(contract.counts(section), adata.layers["counts"])
    assert section.uns["genar"]["counts_from"] == "layers['counts']"
    factors = {"spatial": {"lib": {"images": {}, "scalefactors": {"microns_per_pixel": 0.3}}}}
    write_h5ad(tmp_path / "two.h5ad", visium=False, **factors)
    assert contract.mpp(read_section(tmp_path / "two.h5ad")) == 0.3


def test_a_section_that_was_read_can_be_written_and_read_again(tmp_path, tissue_sections):
    tissue_sections[0].write_h5ad(tmp_path / "SIM1.h5ad")
    again = read_section(tmp_path / "SIM1.h5ad")
    assert (again.X != tissue_sections[0].X).nnz == 0
    assert contract.slide_path(again) == contract.slide_path(tissue_sections[0])
    assert (contract.mpp(again), again.uns["genar"]["pitch_um"]) == (0.7, 110)
    assert again.uns["genar"]["patient"] == "Simulated SIM1"


# --- the registry


def test_format_can_be_forced_and_must_be_known(tissue, tmp_path):
    assert find_sections(tissue, format="hest")[0].format == "hest"
    with pytest.raises(InputError, match="no sections found; expected Space Ranger"):
        find_sections(tissue, format="visium")
    with pytest.raises(InputError, match="'magic' is not known; expected one of hest, visium_hd"):
        find_sections(tissue, format="magic")


def test_a_panel_is_selected_without_images(tissue, tmp_path):
    folder = shutil.copytree(tissue, tmp_path / "hest", ignore=shutil.ignore_patterns("wsis"))
    assert len(select_panel(read_sections(folder), n_genes=20).genes) == 20


@pytest.mark.parametrize("swapped", [False, True])
def test_the_pitch_is_right_where_rows_and_columns_are_exchanged(swapped):
    row, column = np.divmod(np.arange(12 * 20), 20)
    kept = (row + column) % 2 == 0
    array = np.column_stack([row, column])[kept].astype(float)
    xy = array[:, ::-1] * [50, 50 * 3**0.5] / 0.5  # um over um per px
    found = visium_pitch_px(array[:, ::-1] if swapped else array, xy)
    assert found == pytest.approx(200)


def test_array_positions_of_another_array_do_not_decide_the_pitch():
    rng = np.random.default_rng(0)
    row, column = np.divmod(np.arange(12 * 20), 20)
    xy = np.column_stack([column * 100.0, row * 100.0])
    array = rng.permutation(np.column_stack([row, column]))
    assert visium_pitch_px(array, xy) == pytest.approx(100)
