"""The layout of HEST-1k: counts, metadata and images in folders beside each other."""

import json
import os
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest

from genar.data import contract, find_sections, read_section, read_sections
from genar.errors import InputError, SectionWarning


def test_simulated_folder_reads_as_written(tissue, tissue_sections):
    assert [contract.name(section) for section in tissue_sections] == ["SIM1", "SIM2"]
    for section in tissue_sections:
        contract.check(section)
        name = contract.name(section)
        raw = anndata.read_h5ad(tissue / "st" / f"{name}.h5ad")
        np.testing.assert_array_equal(contract.counts(section), raw.X.toarray())
        np.testing.assert_array_equal(contract.coords_px(section), raw.obsm["spatial"])
        assert contract.slide_path(section) == tissue / "wsis" / f"{name}.tif"
        assert contract.mpp(section) == 0.7
        facts = section.uns[contract.GENAR]
        assert (facts[contract.PITCH_UM], facts[contract.SPOT_DIAMETER_UM]) == (110, 55)
        assert facts[contract.SOURCE] == "simulated"
        assert facts[contract.PATIENT] == f"Simulated {name}"


@pytest.fixture
def folder(tissue, tmp_path):
    return shutil.copytree(tissue, tmp_path / "hest")


def edit_adata(folder, edit):
    path = folder / "st" / "SIM1.h5ad"
    adata = anndata.read_h5ad(path)
    edit(adata)
    adata.write_h5ad(path)


def test_layer_counts_wins_over_x(folder, tissue_sections):
    def normalise(adata):
        adata.layers["counts"] = adata.X.copy()
        adata.X = adata.X.log1p()

    edit_adata(folder, normalise)
    section = read_section(f"{folder}:SIM1")
    np.testing.assert_array_equal(contract.counts(section), contract.counts(tissue_sections[0]))
    assert (section.obs[contract.LIBRARY_SIZE] == tissue_sections[0].obs[contract.LIBRARY_SIZE]).all()


def test_dense_int64_x_is_accepted(folder, tissue_sections):
    def densify(adata):
        adata.X = adata.X.toarray().astype(np.int64)

    edit_adata(folder, densify)
    section = read_section(f"{folder}:SIM1")
    assert (section.X != tissue_sections[0].X).nnz == 0


def test_log_transformed_x_is_refused(folder):
    def normalise(adata):
        adata.X = adata.X.log1p()

    edit_adata(folder, normalise)
    with pytest.raises(InputError, match=r"section SIM1.*log"):
        read_section(f"{folder}:SIM1")


def test_missing_image_is_no_error(folder):
    (folder / "wsis" / "SIM1.tif").unlink()
    assert contract.slide_path(read_section(f"{folder}:SIM1")) is None
    assert contract.slide_path(read_section(f"{folder}:SIM2")) is not None


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".svs"])
def test_image_is_found_by_other_suffixes(folder, suffix):
    (folder / "wsis" / "SIM1.tif").rename(folder / "wsis" / f"SIM1{suffix}")
    assert contract.slide_path(read_section(f"{folder}:SIM1")).suffix == suffix


def test_spots_beside_the_tissue_are_dropped_from_hest_too(tissue, tmp_path):
    for kind, suffix in (("st", "h5ad"), ("metadata", "json"), ("wsis", "tif")):
        (tmp_path / kind).mkdir()
        os.symlink(tissue / kind / f"SIM1.{suffix}", tmp_path / kind / f"SIM1.{suffix}")
    adata = anndata.read_h5ad(tissue / "st" / "SIM1.h5ad")
    adata.obs["in_tissue"] = np.r_[[0] * 5, [1] * (adata.n_obs - 5)]
    (tmp_path / "st" / "SIM1.h5ad").unlink()
    adata.write_h5ad(tmp_path / "st" / "SIM1.h5ad")
    assert read_section(f"{tmp_path}:SIM1").n_obs == adata.n_obs - 5


@pytest.mark.parametrize("text", ['{"pixel_size_um_estimated": 0.7', "[0.7]"])
def test_broken_metadata_names_the_file(folder, text):
    (folder / "metadata" / "SIM1.json").write_text(text)
    with pytest.raises(InputError, match=r"metadata.SIM1\.json.*JSON"):
        read_section(f"{folder}:SIM1")


def test_truncated_h5ad_names_the_file(folder):
    path = folder / "st" / "SIM1.h5ad"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(InputError, match=r"st.SIM1\.h5ad: not a readable"):
        read_section(f"{folder}:SIM1")


@pytest.mark.parametrize("content", [b"", b"spot,gene\n1,2\n"])
def test_a_file_that_is_no_h5ad_names_the_file(folder, content):
    (folder / "st" / "SIM1.h5ad").write_bytes(content)
    with pytest.raises(InputError, match=r"st.SIM1\.h5ad: not a readable"):
        read_section(f"{folder}:SIM1")


def test_hdf5_without_counts_is_refused(folder):
    def drop(adata):
        del adata.X

    edit_adata(folder, drop)
    with pytest.raises(InputError, match=r"section SIM1: X is missing.*layers"):
        read_section(f"{folder}:SIM1")


@pytest.mark.real
@pytest.mark.filterwarnings("error")
def test_real_sections_agree_with_their_table(shared):
    table = pd.read_csv(shared / "data" / "her2st" / "sections.csv", index_col="id")
    found = read_sections(shared / "data" / "her2st")
    assert {contract.name(s): s.n_obs for s in found} == {"SPA141": 187, "SPA140": 180, "SPA139": 184, "SPA138": 181}
    for section in found:
        row, library = table.loc[contract.name(section)], section.obs[contract.LIBRARY_SIZE]
        assert (section.n_obs, section.n_vars) == (row.n_spots, row.n_genes)
        assert (library.min(), library.median(), library.max()) == (row.min_umi, row.median_umi, row.max_umi)
        assert contract.counts(section).max() == row.max_count
        assert (np.asarray(section.X.sum(axis=0)).ravel() == 0).sum() == row.genes_zero
        assert contract.mpp(section) == pytest.approx(row.pixel_size_um)
        assert section.uns[contract.GENAR][contract.PATIENT] == row.patient
        assert section.uns[contract.GENAR][contract.SPOT_DIAMETER_UM] == row.spot_diameter_um
        assert section.uns[contract.GENAR][contract.PITCH_UM] == row.inter_spot_dist_um
        contract.check_inside(section, (row.image_width, row.image_height))


@pytest.mark.real
def test_reader_agrees_with_the_object_the_hest_library_makes(shared):
    section = read_section(f"{shared / 'data' / 'her2st'}:SPA141")
    peer = anndata.read_h5ad(shared / "data" / "her2st" / "peer" / "SPA141.h5ad")
    assert list(section.obs_names) == list(peer.obs_names)
    assert list(section.var_names) == list(peer.var_names)
    np.testing.assert_array_equal(contract.counts(section), peer.X)
    np.testing.assert_allclose(contract.coords_px(section), peer.obsm["spatial"], rtol=0, atol=1e-6)


@pytest.fixture
def hest(tissue, tmp_path):
    return shutil.copytree(tissue, tmp_path / "hest")


def facts_of(folder, section, **changes):
    path = folder / "metadata" / f"{section}.json"
    facts = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(facts))
    return facts


def test_bins_that_were_pooled_are_as_wide_and_far_apart_as_in_the_file(hest):
    """HEST's Visium HD sections are of spots of 128 um; their metadata tell of bins of 2 um."""
    before = read_section(f"{hest}:SIM1").uns[contract.GENAR]
    facts_of(hest, "SIM1", inter_spot_dist=2, spot_diameter=2)
    path = hest / "st" / "SIM1.h5ad"
    adata = anndata.read_h5ad(path)
    adata.obs = adata.obs.drop(columns=["array_row", "array_col"], errors="ignore")
    width_px = before["spot_diameter_um"] / before["mpp"]
    adata.uns["spatial"] = {"ST": {"images": {}, "scalefactors": {"spot_diameter_fullres": width_px}}}
    adata.write_h5ad(path)
    with pytest.warns(SectionWarning, match="say bins 2 um apart; in the file they are pooled to spots .* um apart"):
        facts = read_section(f"{hest}:SIM1").uns[contract.GENAR]
    assert facts["pitch_um"] == pytest.approx(before["pitch_um"], rel=0.05)
    assert facts["spot_diameter_um"] == pytest.approx(before["spot_diameter_um"], rel=1e-6)
    assert facts["mpp"] == before["mpp"]
    assert "pitch" not in facts["mpp_by"]


def test_a_pixel_size_that_is_somewhat_wrong_makes_no_pooled_bins(hest):
    before = read_section(f"{hest}:SIM1").uns[contract.GENAR]
    stated = facts_of(hest, "SIM1")["pixel_size_um_estimated"]
    facts_of(hest, "SIM1", pixel_size_um_estimated=1.5 * stated)
    with pytest.warns(SectionWarning, match="pixel size"):
        facts = read_section(f"{hest}:SIM1").uns[contract.GENAR]
    assert facts["pitch_um"] == before["pitch_um"]


def test_several_sections_in_one_file_are_refused(hest):
    path = hest / "st" / "SIM1.h5ad"
    adata = anndata.read_h5ad(path)
    adata.obs["library_id"] = np.where(np.arange(adata.n_obs) < 10, "A", "B")
    adata.write_h5ad(path)
    with pytest.raises(InputError, match=r"several sections in one file \(obs\['library_id'\] names 2\)"):
        read_section(f"{hest}:SIM1")


def test_an_image_without_counts_is_told(hest):
    (hest / "st" / "SIM2.h5ad").unlink()
    with pytest.warns(SectionWarning, match=r"left out are SIM2 \(no st/SIM2.h5ad\)"):
        assert [ref.id for ref in find_sections(hest)] == ["SIM1"]


def test_the_slide_alone_is_of_the_sections_patient(hest):
    facts_of(hest, "SIM1", patient="Patient 7")
    slide = hest / "wsis" / "SIM1.tif"
    assert find_sections(slide)[0].patient == "Patient 7"
    assert read_section(slide).uns[contract.GENAR][contract.PATIENT] == "Patient 7"
    (hest / "patients.csv").write_text("section,patient\nSIM1,Ann\n")
    assert read_section(slide).uns[contract.GENAR][contract.PATIENT] == "Ann"
    assert find_sections(f"{hest}:SIM1")[0].patient == "Ann"
