"""Visium HD: bins pooled to spots of a chosen width."""

import numpy as np
import pandas as pd
import pytest

from genar.data import contract, find_sections, read_section
from genar.errors import InputError
from section_files import write_hd


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


def test_bins_of_visium_hd_are_no_spots_of_visium(tmp_path):
    write_hd(tmp_path / "H1" / "outs")
    folder = tmp_path / "H1" / "outs" / "binned_outputs"
    for named in (folder, folder / "square_008um", folder / "square_008um" / "filtered_feature_bc_matrix.h5"):
        with pytest.raises(InputError, match="name the outs folder"):
            find_sections(named)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    write_hd(tmp_path / "H1")

    def missing(*_, **__):
        raise ImportError("pyarrow")

    monkeypatch.setattr(pd, "read_parquet", missing)
    with pytest.raises(InputError, match=r"pip install 'genar\[visium-hd\]'"):
        read_section(tmp_path / "H1")
