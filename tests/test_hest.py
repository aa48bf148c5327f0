"""Sections in HEST-1k's layout: what metadata and files say of spots, of whole sections and of patients."""

import json
import shutil
import warnings

import anndata
import numpy as np
import pytest

from genar.data import contract, find_sections, read_section, read_sections
from genar.errors import InputError, SectionWarning


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


# --- what lies beside sections of another format


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
