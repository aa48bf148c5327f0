""""""

import json
import shutil
import warnings
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from genar.data import contract, find_sections, pick, read_section, read_sections
from genar.data.files import replacing, write_text
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


@pytest.mark.parametrize("xy", [(-1, 5), (5, -1), (30, 5), (5, 20)])
def test_a_spot_outside_the_image_is_named(xy):
    section = fill(make_adata())
    section.obsm["spatial"] = np.array([[5, 5], [6, 6], xy, [7, 7]], dtype=float)
    with pytest.raises(InputError, match=r"1 of 4 spots lie outside the image of 30 x 20 px \(first: s2"):
        contract.check_inside(section, (30, 20))
    contract.check_inside(section[[0, 1, 3]], (30, 20))


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


def test_x_is_no_layer(tissue_sections):
    """Though anndata 0.13 counts it among them, under no name."""
    section = tissue_sections[0].copy()
    section.layers["mean"] = section.X.copy()
    assert contract.layer_names(section) == ["mean"]
    assert contract.layer_names(SimpleNamespace(layers={"mean": section.X, None: section.X})) == ["mean"]  # pyright: ignore


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


def test_missing_image_is_no_error(folder):
    (folder / "wsis" / "SIM1.tif").unlink()
    assert contract.slide_path(read_section(f"{folder}:SIM1")) is None
    assert contract.slide_path(read_section(f"{folder}:SIM2")) is not None


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".svs"])
def test_image_is_found_by_other_suffixes(folder, suffix):
    (folder / "wsis" / "SIM1.tif").rename(folder / "wsis" / f"SIM1{suffix}")
    assert contract.slide_path(read_section(f"{folder}:SIM1")).suffix == suffix


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


# --- finding sections


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


# --- files are whole or absent


def test_text_is_replaced(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    write_text(path, "new µ")
    assert path.read_text(encoding="utf-8") == "new µ"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_exception_keeps_what_was_there_and_leaves_no_temporary(tmp_path, kind):
    path = tmp_path / "thing.json"
    write_text(path / "inner" if kind == "folder" else path, "old")

    def fail():
        with replacing(path) as temporary:
            write_text(temporary / "inner" if kind == "folder" else temporary, "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (path / "inner" if kind == "folder" else path).read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "checkpoint"
    write_text(path / "old", "1")
    with replacing(path) as temporary:
        assert temporary.parent == path.parent
        write_text(temporary / "new", "2")
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_keeps_the_suffix(tmp_path):
    with replacing(tmp_path / "a.h5ad") as temporary:
        assert temporary.suffix == ".h5ad"
        temporary.touch()


# --- real sections


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
