"""Simulated tissue: its counts, its image, its files."""

import json
from dataclasses import replace

import anndata
import numpy as np
import openslide
import pytest
from PIL import Image
from scipy.stats import spearmanr

from genar.data import contract
from genar.data.simulate import (
    KINDS,
    MARKERS,
    TissueConfig,
    gene_programs,
    sample_counts,
    simulate_section,
    write_tissue,
)

SMALL = TissueConfig(n_rows=8, n_cols=8, n_genes=120)


@pytest.fixture(scope="module")
def section():
    return simulate_section("SIM1", seed=3, config=replace(SMALL, n_rows=14, n_cols=14))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tissue(tmp_path_factory.mktemp("tissue"), ("A", "B"), seed=1, config=SMALL)


def test_same_seed_same_bytes_and_sections_differ():
    adata, image = simulate_section("A", seed=1, config=SMALL)
    again, image_again = simulate_section("A", seed=1, config=SMALL)
    assert (adata.X != again.X).nnz == 0
    assert adata.obs.equals(again.obs)
    np.testing.assert_array_equal(image, image_again)
    for name, seed in (("B", 1), ("A", 2)):
        assert not np.array_equal(simulate_section(name, seed, SMALL)[1], image)


def test_gene_modules_depend_on_the_seed_alone():
    assert gene_programs(1, 150).equals(gene_programs(1, 150))
    assert not gene_programs(1, 150).equals(gene_programs(2, 150))
    assert gene_programs(0, 300).index.is_unique


def test_contract_holds(section):
    adata, image = section
    contract.check(adata)
    contract.check_inside(adata, image.shape[1::-1])
    assert contract.name(adata) == "SIM1"
    assert contract.counts(adata).sum() == adata.obs[contract.LIBRARY_SIZE].sum()
    assert adata.uns["simulated"] is True
    assert image.dtype == np.uint8
    fractions = adata.obs[[f"fraction_{kind}" for kind in KINDS]].to_numpy()
    assert (fractions.max(axis=0) > 0.5).all()  # every kind occurs
    assert ((fractions.sum(axis=1) >= 0.5) & (fractions.sum(axis=1) <= 1 + 1e-9)).all()
    spatial = adata.uns["spatial"]["ST"]
    assert max(spatial["images"]["downscaled_fullres"].shape) == 1000
    assert spatial["scalefactors"]["tissue_downscaled_fullres_scalef"] == pytest.approx(1000 / max(image.shape))


def test_background_is_light_on_every_side(section):
    _, image = section
    for edge in (image[:8], image[-8:], image[:, :8], image[:, -8:]):
        assert edge.mean() > 235


@pytest.mark.parametrize(("mean", "dispersion"), [(0.3, 0.1), (20.0, 0.1), (20.0, 0.5), (5.0, 0.0)])
def test_negative_binomial_moments(mean, dispersion):
    draws = sample_counts(np.random.default_rng(0), np.full(400_000, mean), dispersion)
    assert draws.mean() == pytest.approx(mean, rel=0.01)
    assert draws.var() == pytest.approx(mean + dispersion * mean**2, rel=0.03)


@pytest.mark.parametrize("kind", ["gland", "stroma", "immune"])
def test_markers_follow_their_region(section, kind):
    adata, _ = section
    share = contract.counts(adata, MARKERS[kind].split()) / adata.obs[[contract.LIBRARY_SIZE]].to_numpy()
    correlation = [spearmanr(gene, adata.obs[f"fraction_{kind}"]).statistic for gene in share.T]
    assert np.mean(correlation) > 0.5


def test_library_size_follows_the_nuclei(section):
    adata, _ = section
    assert spearmanr(adata.obs[contract.LIBRARY_SIZE], adata.obs["n_nuclei"]).statistic > 0.9


def test_spots_with_more_nuclei_are_bluer_in_the_image(section):
    adata, image = section
    x, y = contract.coords_px(adata).astype(int).T
    red = [image[row - 39 : row + 40, col - 39 : col + 40, 0].mean() for row, col in zip(y, x, strict=True)]
    assert spearmanr(red, adata.obs["n_nuclei"]).statistic < -0.8


def test_slide_opens_in_openslide(folder):
    _, image = simulate_section("A", seed=1, config=SMALL)
    with openslide.OpenSlide(folder / "wsis" / "A.tif") as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert slide.dimensions == image.shape[1::-1]
        assert slide.level_count >= 3
        for axis in "xy":
            assert float(slide.properties[f"openslide.mpp-{axis}"]) == pytest.approx(SMALL.mpp, rel=1e-4)
        pixels = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
        size = slide.level_dimensions[2]
        coarse = np.asarray(slide.read_region((0, 0), 2, size).convert("RGB"))
    assert np.abs(pixels.astype(int) - image).mean() < 3
    assert np.abs(coarse.astype(int) - np.asarray(Image.fromarray(image).reduce(4))).mean() < 5


def test_files_are_whole_labelled_and_repeatable(folder):
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    expected = ("st/A.h5ad", "st/B.h5ad", "wsis/A.tif", "wsis/B.tif", "metadata/A.json", "metadata/B.json")
    assert names == set(expected)
    metadata = json.loads((folder / "metadata" / "A.json").read_text())
    adata = anndata.read_h5ad(folder / "st" / "A.h5ad")
    assert metadata["simulated"] is True
    assert "not a patient" in metadata["dataset_title"]
    assert metadata["st_technology"] == "Simulated"
    assert metadata["spots_under_tissue"] == adata.n_obs
    assert metadata["pixel_size_um_estimated"] == SMALL.mpp
    assert adata.uns["simulated"]
    slide = (folder / "wsis" / "A.tif").read_bytes()
    write_tissue(folder, ("A",), seed=1, config=SMALL)
    assert (anndata.read_h5ad(folder / "st" / "A.h5ad").X != adata.X).nnz == 0
    assert (folder / "wsis" / "A.tif").read_bytes() == slide


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_rows": 2},
        {"spot_diameter_um": 0},
        {"spot_diameter_um": 200},
        {"mpp": 0},
        {"n_genes": 10},
        {"dispersion": -1},
        {"counts_per_nucleus": 0},
    ],
)
def test_bad_config_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TissueConfig(**wrong)


@pytest.mark.parametrize("sections", [(), ("A", "A"), ("../A",), ("",)])
def test_bad_section_names_are_refused(tmp_path, sections):
    with pytest.raises(ValueError, match="sections must be names"):
        write_tissue(tmp_path, sections, config=SMALL)
    assert not list(tmp_path.iterdir())
