"""AnnData files of any program as sections: their counts, spots, places and libraries."""

import anndata
import numpy as np
import pytest
from PIL import Image

from commands import run
from genar.data import contract, find_sections, read_section
from genar.errors import InputError, NoRawCountsError
from genar.prediction import write_prediction
from section_files import write_h5ad


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


def test_a_layer_that_holds_no_counts_is_named(own_tissue, tmp_path):
    section = anndata.read_h5ad(own_tissue / "st" / "A.h5ad")
    section.layers["counts"] = np.log1p(section.X)
    section.write_h5ad(tmp_path / "A.h5ad")
    with pytest.raises(NoRawCountsError, match=r"layers\['counts'\] holds fractional .* goes before X: delete it"):
        read_section(tmp_path / "A.h5ad", mpp=0.5)


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


def test_cellxgene_says_beside_its_library_that_it_is_single(tmp_path):
    library = {"images": {}, "scalefactors": {"spot_diameter_fullres": 110.0}}
    write_h5ad(tmp_path / "one.h5ad", spatial={"is_single": True, "A": library})
    assert contract.mpp(read_section(tmp_path / "one.h5ad")) == pytest.approx(0.5, rel=0.01)


def test_several_sections_in_one_file_are_refused(tmp_path):
    library = {"images": {}, "scalefactors": {"spot_diameter_fullres": 110.0}}
    write_h5ad(tmp_path / "two.h5ad", spatial={"A": library, "B": library})
    with pytest.raises(InputError, match=r"holds 2 libraries \(A, B\)"):
        read_section(tmp_path / "two.h5ad")
    adata = anndata.read_h5ad(tmp_path / "two.h5ad")
    adata.obs["library_id"] = "B"
    adata.write_h5ad(tmp_path / "one.h5ad")
    assert list(read_section(tmp_path / "one.h5ad").uns["spatial"]) == ["B"]


def test_merged_sections_are_refused(own_tissue, tmp_path):
    one = anndata.read_h5ad(own_tissue / "st" / "A.h5ad")
    for name, options in (("ids", {"label": "library_id"}), ("places", {})):
        merged = anndata.concat({"A": one, "B": one}, index_unique="-", **options)
        merged.write_h5ad(tmp_path / f"{name}.h5ad")
        with pytest.raises(InputError, match="several sections in one file"):
            read_section(tmp_path / f"{name}.h5ad", mpp=0.5)


def test_places_in_letters_are_no_array(home, tmp_path):
    section = anndata.read_h5ad(home / "tissue" / "st" / "S2.h5ad")
    section.obs["array_row"] = [chr(65 + i % 26) for i in range(section.n_obs)]
    section.obs["array_col"] = np.arange(section.n_obs)
    section.write_h5ad(tmp_path / "letters.h5ad")
    assert contract.name(read_section(tmp_path / "letters.h5ad", mpp=2.0)) == "letters"


def test_an_array_where_scanpy_keeps_images_holds_none(tissue_sections):
    section = tissue_sections[0].copy()
    section.uns["spatial"] = np.zeros((3, 2))
    assert contract.picture(section) is None


def test_a_section_that_was_read_can_be_written_and_read_again(tmp_path, tissue_sections):
    tissue_sections[0].write_h5ad(tmp_path / "SIM1.h5ad")
    again = read_section(tmp_path / "SIM1.h5ad")
    assert (again.X != tissue_sections[0].X).nnz == 0
    assert contract.slide_path(again) == contract.slide_path(tissue_sections[0])
    assert (contract.mpp(again), again.uns["genar"]["pitch_um"]) == (0.7, 110)
    assert again.uns["genar"]["patient"] == "Simulated SIM1"


@pytest.fixture
def file(prediction, tmp_path):
    return write_prediction(prediction, tmp_path / "pred.h5ad")


def test_a_prediction_is_no_measured_section(file, tissue, tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match="holds predicted counts"):
        read_section(file)
    assert run(monkeypatch, "check", file, "--out", tmp_path / "check") == 2
    assert "holds predicted counts" in capsys.readouterr().err
    assert run(monkeypatch, "evaluate", f"{tissue}:SIM2", file, "--out", tmp_path / "scores") == 2
