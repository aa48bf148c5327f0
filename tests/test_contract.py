"""What a section is: names, counts, places and units."""

from types import SimpleNamespace

import anndata
import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse

from genar.data import contract
from genar.errors import InputError


def make_adata(counts=None, n_spots=4, n_genes=3):
    counts = np.arange(n_spots * n_genes).reshape(n_spots, n_genes) if counts is None else np.asarray(counts)
    adata = AnnData(counts.astype(np.float32))
    adata.obs_names = [f"s{i}" for i in range(adata.n_obs)]
    adata.var_names = [f"G{i}" for i in range(adata.n_vars)]
    adata.obsm["spatial"] = np.stack([np.arange(adata.n_obs) * 10.0, np.ones(adata.n_obs)], axis=1)
    return adata


def fill(adata):
    return contract.new_section(adata, section="S1", mpp=0.5, spot_diameter_um=55, source="test")


def with_value(value):
    counts = np.ones((4, 3))
    counts[1, 2] = value
    return make_adata(counts)


def with_names(**names):
    adata = make_adata()
    for axis, values in names.items():
        setattr(adata, axis, values)
    return adata


def with_spatial(xy):
    adata = make_adata()
    del adata.obsm["spatial"]
    if xy is not None:
        adata.obsm["spatial"] = np.asarray(xy)
    return adata


@pytest.mark.parametrize(
    ("adata", "says"),
    [
        (make_adata(np.ones((0, 3))), "at least one spot, found none"),
        (with_names(obs_names=["a", "b", "b", "c"]), "spot name 'b' occurs more than once"),
        (with_names(var_names=["A", "A", "B"]), "gene name 'A' occurs more than once"),
        (with_names(var_names=["A", "", "B"]), "gene name '' is empty or holds a NUL"),
        (with_names(obs_names=["a", "b", "c\0", "c"]), r"spot name 'c\\x00' is empty or holds a NUL"),
        (with_value(np.nan), "NaN or infinite"),
        (with_value(np.inf), "NaN or infinite"),
        (with_value(-3), r"negative values \(least -3\)"),
        (with_value(0.5), "fractional values such as 0.5.*log-transformed.*layers"),
        (make_adata(np.log1p(np.arange(12).reshape(4, 3))), "looks log-transformed"),
        (with_spatial(None), "spot centres.*found none"),
        (with_spatial([[0, 0], [1, np.nan], [2, 2], [3, 3]]), "must be finite"),
        (with_spatial([[0, 0], [1, np.inf], [2, 2], [3, 3]]), "must be finite"),
        (with_spatial(np.arange(12.0).reshape(4, 3)), r"shape \(4, 3\)"),
        (with_spatial(np.full((4, 2), 7.0)), "all 4 spots lie at the same point"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*names are not unique:UserWarning")
def test_what_is_no_section_is_refused_in_one_line(adata, says):
    with pytest.raises(InputError, match=says) as caught:
        fill(adata)
    assert "section S1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_normalised_counts_beyond_any_logarithm_are_not_called_log_transformed():
    with pytest.raises(InputError, match="fractional") as caught:
        fill(make_adata(np.ones((4, 3)) * 1000.5))
    assert "log-transformed" not in str(caught.value)


@pytest.mark.parametrize("values", [[[2.0**31]], [[1.0, 3e9]]])
def test_counts_beyond_an_int32_are_refused(values):
    one = anndata.AnnData(np.array(values))
    with pytest.raises(InputError, match=r"here: X holds .*expected raw counts below 2\^31"):
        contract.check_counts(one, "here")


def test_a_name_that_no_file_can_have_is_refused(own_tissue):
    with pytest.raises(InputError, match="its id must be a plain name"):
        contract.check_name("ж" * 150)


def test_a_pixel_size_of_nothing_is_told(prediction):
    broken = prediction.copy()
    broken.uns[contract.GENAR]["mpp"] = 0.0
    with pytest.raises(InputError, match="must be above 0 um"):
        contract.spot_diameter_px(broken)


def test_one_spot_and_spots_without_counts_are_sections():
    assert fill(make_adata(n_spots=1)).n_obs == 1
    assert fill(make_adata(np.zeros((4, 3)))).obs[contract.LIBRARY_SIZE].tolist() == [0, 0, 0, 0]


def test_spots_on_one_line_are_a_section():
    assert np.ptp(contract.coords_px(fill(make_adata()))[:, 1]) == 0


def test_counts_come_in_the_order_of_the_genes_asked():
    section = fill(make_adata())
    np.testing.assert_array_equal(contract.counts(section, ["G2", "G0"]), [[2, 0], [5, 3], [8, 6], [11, 9]])
    assert contract.counts(section).dtype == np.int32


def test_missing_genes_are_named():
    with pytest.raises(InputError, match=r"section S1: 2 of 3 panel genes missing \(KRT5, MUC1\)"):
        contract.counts(fill(make_adata()), ["KRT5", "G1", "MUC1"])
    with pytest.raises(InputError, match=r"7 of 7 panel genes missing \(X0, X1, X2, X3, X4, …\)"):
        contract.counts(fill(make_adata()), [f"X{i}" for i in range(7)])


def test_library_size_is_the_total_over_all_genes_and_outlives_a_cut():
    section = fill(make_adata())
    assert section.obs[contract.LIBRARY_SIZE].tolist() == [3, 12, 21, 30]
    assert section[:, ["G0"]].obs[contract.LIBRARY_SIZE].tolist() == [3, 12, 21, 30]


def test_x_is_csr_and_coordinates_have_units():
    section = fill(make_adata())
    assert isinstance(section.X, sparse.csr_matrix)
    np.testing.assert_allclose(contract.coords_um(section), contract.coords_px(section) * 0.5)


def test_x_is_no_layer(tissue_sections):
    """Though anndata 0.13 counts it among them, under no name."""
    section = tissue_sections[0].copy()
    section.layers["mean"] = section.X.copy()
    assert contract.layer_names(section) == ["mean"]
    assert contract.layer_names(SimpleNamespace(layers={"mean": section.X, None: section.X})) == ["mean"]  # pyright: ignore


@pytest.mark.parametrize("xy", [(-1, 5), (5, -1), (30, 5), (5, 20)])
def test_a_spot_outside_the_image_is_named(xy):
    section = fill(make_adata())
    section.obsm["spatial"] = np.array([[5, 5], [6, 6], xy, [7, 7]], dtype=float)
    with pytest.raises(InputError, match=r"1 of 4 spots lie outside the image of 30 x 20 px \(first: s2"):
        contract.check_inside(section, (30, 20))
    contract.check_inside(section[[0, 1, 3]], (30, 20))
