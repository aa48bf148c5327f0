"""Inputs that are sound but not as the formats' pages draw them: sparse, quoted, packed, renamed, concatenated."""

import gzip
import json
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image

from genar.data import contract, find_sections, open_slide, read_section, read_sections
from genar.data.door import room
from genar.data.slide import glance, image_head
from genar.encoders.weights import fit_weights
from genar.errors import InputError
from genar.features.recipe import _fingerprint
from section_files import edit_text, write_h5ad, write_hd, write_legacy, write_spatialdata, write_visium
from slides import noise


def positions(outs):
    return outs / "spatial" / "tissue_positions.csv"


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


def test_the_pitch_of_an_h5ad_is_that_of_the_array(tmp_path):
    write_h5ad(tmp_path / "all.h5ad")
    adata = anndata.read_h5ad(tmp_path / "all.h5ad")
    few = adata[adata.obs["array_row"].isin([0, 4]).to_numpy()].copy()
    assert few.n_obs >= 10
    few.write_h5ad(tmp_path / "few.h5ad")
    assert contract.mpp(read_section(tmp_path / "few.h5ad")) == pytest.approx(0.5, rel=0.01)


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


def test_a_run_folder_is_called_like_itself(tmp_path):
    write_visium(tmp_path / "P1" / "outs")
    assert [ref.id for ref in find_sections(tmp_path / "P1")] == ["P1"]
    write_hd(tmp_path / "H1" / "outs")
    assert [ref.id for ref in find_sections(tmp_path / "H1")] == ["H1"]


def test_bins_of_visium_hd_are_no_spots_of_visium(tmp_path):
    write_hd(tmp_path / "H1" / "outs")
    folder = tmp_path / "H1" / "outs" / "binned_outputs"
    for named in (folder, folder / "square_008um", folder / "square_008um" / "filtered_feature_bc_matrix.h5"):
        with pytest.raises(InputError, match="name the outs folder"):
            find_sections(named)


# --- AnnData and SpatialData


def test_several_sections_in_one_file_are_refused(tmp_path):
    library = {"images": {}, "scalefactors": {"spot_diameter_fullres": 110.0}}
    write_h5ad(tmp_path / "two.h5ad", spatial={"A": library, "B": library})
    with pytest.raises(InputError, match=r"holds 2 libraries \(A, B\)"):
        read_section(tmp_path / "two.h5ad")
    adata = anndata.read_h5ad(tmp_path / "two.h5ad")
    adata.obs["library_id"] = "B"
    adata.write_h5ad(tmp_path / "one.h5ad")
    assert list(read_section(tmp_path / "one.h5ad").uns["spatial"]) == ["B"]


def test_cellxgene_says_beside_its_library_that_it_is_single(tmp_path):
    library = {"images": {}, "scalefactors": {"spot_diameter_fullres": 110.0}}
    write_h5ad(tmp_path / "one.h5ad", spatial={"is_single": True, "A": library})
    assert contract.mpp(read_section(tmp_path / "one.h5ad")) == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("kind", [int, bool, str])
def test_spots_that_are_not_under_tissue_are_dropped(tmp_path, kind):
    write_h5ad(tmp_path / "one.h5ad")
    adata = anndata.read_h5ad(tmp_path / "one.h5ad")
    inside = np.arange(adata.n_obs) % 3 > 0
    adata.obs["in_tissue"] = inside.astype(int).astype(kind)
    adata.write_h5ad(tmp_path / "one.h5ad")
    section = read_section(tmp_path / "one.h5ad")
    assert list(section.obs_names) == list(adata.obs_names[inside])
    assert f"{(~inside).sum()} spots are not under tissue" in section.uns["genar"]["note"]


@pytest.mark.filterwarnings("ignore")
def test_of_a_table_of_several_regions_the_rows_of_the_shapes_are_read(tmp_path):
    _, xy, table = write_spatialdata(tmp_path / "S1.zarr")
    import spatialdata as sd

    store = sd.read_zarr(tmp_path / "S1.zarr")
    other = table.copy()
    other.obs["region"] = pd.Categorical(["cells"] * table.n_obs)
    both = anndata.concat([table, other], index_unique="-")
    both.obs["region"] = pd.Categorical(both.obs["region"])
    del both.uns
    region = {"region": ["spots", "cells"], "region_key": "region", "instance_key": "instance_id"}
    store.tables["table"] = sd.models.TableModel.parse(both, **region)
    store.write(tmp_path / "S2.zarr")
    section = read_section(tmp_path / "S2.zarr", mpp=0.6)
    np.testing.assert_allclose(contract.coords_px(section), xy)
    # circles of radius 10 in a frame of the same scale as the image's px
    assert contract.spot_diameter_px(section) == pytest.approx(20)


# --- names


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


def test_an_image_is_not_that_of_a_section_with_a_longer_name(tmp_path):
    write_legacy(tmp_path)
    (tmp_path / "X1.jpg").rename(tmp_path / "X1.2.jpg")
    assert contract.slide_path(read_section(tmp_path)) is None


@pytest.mark.parametrize("tile", [None, (256, 256)])
@pytest.mark.parametrize("more", [{}, {"metadata": {"axes": "CYX"}}, {"ome": True, "metadata": {"axes": "CYX"}}])
def test_colours_on_pages_of_their_own_are_refused(tmp_path, tile, more):
    tifffile.imwrite(tmp_path / "x.tif", noise().transpose(2, 0, 1), photometric="minisblack", tile=tile, **more)
    with pytest.raises(InputError, match="colours are on pages of their own"):
        open_slide(tmp_path / "x.tif")
    tifffile.imwrite(tmp_path / "grey.tif", noise()[..., 0], photometric="minisblack", tile=tile)
    assert open_slide(tmp_path / "grey.tif").size_px == (500, 400)


@pytest.mark.parametrize(
    ("pixels", "kind", "says"),
    [(noise()[..., 0], {"photometric": "miniswhite"}, "inverted"),
     (np.dstack([noise(), noise()[..., :1]]), {"photometric": "separated"}, "CMYK"),
     (noise()[..., 0], {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}, "palette")],
)  # fmt: skip
def test_numbers_that_are_no_colours_are_refused(tmp_path, pixels, kind, says):
    tifffile.imwrite(tmp_path / "x.tif", pixels, **kind)
    with pytest.raises(InputError, match=says):
        open_slide(tmp_path / "x.tif")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_what_is_transparent_is_white(tmp_path, suffix):
    alpha = np.where(np.arange(500) < 250, 0, 255)[None, :, None].repeat(400, 0).astype(np.uint8)
    pixels = np.concatenate([noise(), alpha], axis=2)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(pixels).save(path) if suffix == "png" else tifffile.imwrite(
        path, pixels, photometric="rgb", extrasamples=["unassalpha"]
    )
    patch = open_slide(path).read_patch_px((250, 200), 400, 400)
    assert (patch[:, :200] == 255).all()
    np.testing.assert_array_equal(patch[:, 200:], noise()[:, 250:450])
    assert (glance(path, 500).view[:, :250] == 255).all()


def test_a_big_tiff_in_strips_is_read(tmp_path):
    tifffile.imwrite(tmp_path / "x.btf", noise(), bigtiff=True, photometric="rgb")
    patch = open_slide(tmp_path / "x.btf").read_patch_px((200, 200), 100, 100)
    np.testing.assert_array_equal(patch, noise()[150:250, 150:250])


def test_a_slide_of_the_hest_library_says_a_tenth_of_its_pixel_size(tissue, tmp_path):
    (tmp_path / "wsis").mkdir()
    with tifffile.TiffFile(tissue / "wsis" / "SIM1.tif") as tiff:
        pixels = tiff.asarray()
    per_cm = 10_000 / contract.mpp(read_section(f"{tissue}:SIM1")) * 10
    slide = tmp_path / "wsis" / "SIM1.tif"
    tifffile.imwrite(slide, pixels, resolution=(per_cm, per_cm), resolutionunit="CENTIMETER", photometric="rgb")
    tag = 10_000 / per_cm
    if tag < 0.1:
        with pytest.raises(InputError, match=f"pass --mpp {10 * tag:.4g}"):
            read_section(slide)
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "SIM1.json").write_text(json.dumps({"pixel_size_um_estimated": 10 * tag}))
    section = read_section(slide)
    assert contract.mpp(section) == pytest.approx(10 * tag)


def test_two_slides_of_one_stem_are_two_sections(tissue, tmp_path):
    for name in ("a.tif", "a.tiff"):
        shutil.copy(tissue / "wsis" / "SIM1.tif", tmp_path / name)
    assert [contract.name(s) for s in read_sections(tmp_path)] == ["a.tif", "a.tiff"]


# --- features


def test_a_changed_image_is_another_slide(tmp_path):
    pixels = noise(3000, 2000)
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="rgb")
    before = _fingerprint(tmp_path / "x.tif")
    pixels[1000:2000] = pixels[1000:2000, :, ::-1]
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="rgb")
    assert _fingerprint(tmp_path / "x.tif") != before


@pytest.mark.filterwarnings("ignore")
def test_a_changed_store_is_another_slide(tmp_path):
    pytest.importorskip("spatialdata")
    marks = []
    for turn in (False, True):
        write_spatialdata(tmp_path / "S1.zarr")
        image = tmp_path / "S1.zarr" / "images" / "he"
        if turn:
            chunk = max((path for path in image.rglob("c/*/*/*") if path.is_file()), key=lambda p: p.stat().st_size)
            chunk.write_bytes(chunk.read_bytes()[::-1])
        marks.append(_fingerprint(image / "zarr.json"))
        shutil.rmtree(tmp_path / "S1.zarr")
    assert marks[0] != marks[1]


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "levit_128s"])
def test_weights_with_two_classifiers_fit_the_encoder(name):
    import timm

    whole, encoder = timm.create_model(name), timm.create_model(name, num_classes=0)
    fit_weights(encoder, whole.state_dict(), "here")
    x = torch.zeros(1, 3, 224, 224)
    assert encoder.eval()(x).shape == (1, encoder.num_features)
    with pytest.raises(InputError, match="not weights of this network"):
        fit_weights(encoder, {"nonsense": torch.zeros(1)}, "here")


# --- room


def test_a_dense_matrix_of_real_counts_has_room():
    assert room(6_900_000) > 1000 * 36_601 * 4  # a shallow section, packed
    assert room(6_500_000) > 1000 * 33_000 * 8  # the same as int64
    assert room(3_400_000) > 60_000 * 200 * 12  # what model mean predicts, the same at every spot
    assert room(9_999_999) < 1 << 30


@pytest.mark.parametrize("tiled", [None, (64, 64)])
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_a_thumbnail_before_the_slide_is_not_taken_for_it(tmp_path, tiled, compression):
    path, pixels = tmp_path / "thumb_first.tif", noise()
    with tifffile.TiffWriter(path) as tiff:
        for page in (pixels[::4, ::4], pixels):
            tiff.write(
                page, photometric="rgb", tile=tiled, compression=compression, metadata=None, resolution=(20000, 20000),
                resolutionunit="CENTIMETER",
            )  # fmt: skip
    slide = open_slide(path)
    assert image_head(path) == (slide.size_px, slide.mpp) == ((500, 400), 0.5)
    assert np.array_equal(slide.read_patch_px((250, 200), 100, 100), pixels[150:250, 200:300])
    assert np.abs(glance(path, 500).view.astype(int) - pixels).max() == 0
