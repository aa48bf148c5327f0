"""The size of a pixel in um: by metadata, pitch, tag or ``--mpp``, and what is told where they disagree."""

import json
import shutil
import warnings

import anndata
import numpy as np
import pytest
import tifffile

from genar.data import contract, open_slide, read_section
from genar.data.reading import visium_pitch_px
from genar.data.simulate import TissueConfig, write_tissue
from genar.data.slide import image_head
from genar.errors import InputError
from section_files import write_h5ad
from slides import STRIPED, TILED, gradient


@pytest.fixture
def folder(tissue, tmp_path):
    return shutil.copytree(tissue, tmp_path / "hest")


def test_without_any_pixel_size_mpp_is_asked_for(folder):
    shutil.rmtree(folder / "metadata")
    shutil.rmtree(folder / "wsis")
    with pytest.raises(InputError, match=r"SIM1.*--mpp"):
        read_section(f"{folder}:SIM1")
    assert contract.mpp(read_section(f"{folder}:SIM1", mpp=0.6)) == 0.6


def test_without_metadata_the_pixel_size_is_the_slide_tags(folder):
    shutil.rmtree(folder / "metadata")
    section = read_section(f"{folder}:SIM1")
    assert contract.mpp(section) == pytest.approx(0.7, rel=1e-4)
    assert section.uns[contract.GENAR][contract.SPOT_DIAMETER_UM] == pytest.approx(55, rel=1e-4)
    assert section.uns[contract.GENAR][contract.SOURCE] == "hest"


def edit_metadata(folder, **changes):
    path = folder / "metadata" / "SIM1.json"
    metadata = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in metadata.items() if value is not None}))


@pytest.mark.parametrize("silent", [None, float("nan")])
def test_without_stated_pixel_size_the_pitch_gives_it(folder, silent):
    edit_metadata(folder, pixel_size_um_estimated=silent)
    assert contract.mpp(read_section(f"{folder}:SIM1")) == pytest.approx(0.7)


@pytest.mark.parametrize("field", ["inter_spot_dist", "spot_diameter"])
def test_nan_in_the_metadata_counts_as_absent(folder, field):
    edit_metadata(folder, **{field: float("nan")})
    section = read_section(f"{folder}:SIM1")
    facts = section.uns[contract.GENAR]
    assert contract.mpp(section) == 0.7
    assert facts[contract.PITCH_UM] == (0 if field == "inter_spot_dist" else 110)
    assert facts[contract.SPOT_DIAMETER_UM] == pytest.approx(55)


def test_pitch_and_metadata_that_disagree_are_both_told(folder):
    edit_metadata(folder, pixel_size_um_estimated=0.8)
    with pytest.warns(UserWarning, match=r"SIM1.*0\.8000 um by the metadata, 0\.7000 um by the spot pitch"):
        section = read_section(f"{folder}:SIM1")
    assert contract.mpp(section) == 0.8


def test_pixel_sizes_within_five_percent_are_not_worth_a_warning(folder):
    edit_metadata(folder, pixel_size_um_estimated=0.72)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert contract.mpp(read_section(f"{folder}:SIM1")) == 0.72


def test_mpp_given_wins_without_a_warning(folder):
    edit_metadata(folder, pixel_size_um_estimated=0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert contract.mpp(read_section(f"{folder}:SIM1", mpp=0.65)) == 0.65


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


def test_a_pixel_coarser_than_any_scan_is_told(tmp_path):
    write_tissue(tmp_path, ("A",), config=TissueConfig(n_rows=4, n_cols=4, n_genes=80, mpp=2.0, counts_per_nucleus=20))
    with pytest.warns(UserWarning, match="section A: a pixel of 13.8 um is coarser than H&E is scanned at"):
        read_section(tmp_path / "st" / "A.h5ad", mpp=13.8)


@pytest.mark.parametrize("how", [TILED, STRIPED])
@pytest.mark.parametrize(("size", "unit", "mpp"), [(0.7, "µm", 0.7), (700, "nm", 0.7), (0.7, "reference frame", None)])
def test_ome_metadata_give_the_pixel_size(tmp_path, how, size, unit, mpp):
    metadata = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeXUnit": unit, "PhysicalSizeY": size}
    metadata["PhysicalSizeYUnit"] = unit
    tifffile.imwrite(tmp_path / "o.ome.tif", gradient(), photometric="rgb", metadata=metadata, **how)
    assert open_slide(tmp_path / "o.ome.tif").mpp == image_head(tmp_path / "o.ome.tif")[1] == pytest.approx(mpp)


@pytest.mark.parametrize("how", [TILED, STRIPED])
def test_pixels_that_are_no_squares_have_no_size(tmp_path, how):
    resolution = {"resolution": (1e4 / 1.4, 1e4 / 0.7), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "n.tif", gradient(), photometric="rgb", **resolution, **how)
    slide = open_slide(tmp_path / "n.tif")
    assert slide.mpp is None
    with pytest.raises(InputError, match="names no pixel size; pass --mpp"):
        slide.read_patch((100, 100), 30, 30)


def test_the_pitch_of_an_h5ad_is_that_of_the_array(tmp_path):
    write_h5ad(tmp_path / "all.h5ad")
    adata = anndata.read_h5ad(tmp_path / "all.h5ad")
    few = adata[adata.obs["array_row"].isin([0, 4]).to_numpy()].copy()
    assert few.n_obs >= 10
    few.write_h5ad(tmp_path / "few.h5ad")
    assert contract.mpp(read_section(tmp_path / "few.h5ad")) == pytest.approx(0.5, rel=0.01)


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
