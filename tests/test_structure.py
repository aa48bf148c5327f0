"""Spatial and gene-to-gene structure of a prediction."""

import numpy as np
import pytest
from scipy import sparse

from genar.errors import InputError
from genar.evaluation import structure


def grid(rows=9, columns=8, jitter=0.0, hexagonal=False):
    y, x = np.divmod(np.arange(rows * columns), columns)
    coords = np.stack([x + 0.5 * (y % 2) * hexagonal, y * (np.sqrt(0.75) if hexagonal else 1)], axis=1)
    return 200 * (coords + np.random.default_rng(0).uniform(-jitter, jitter, coords.shape)) + 1000


def smooth_values(coords, n_genes=7, seed=0):
    random = np.random.default_rng(seed)
    waves = np.sin(coords @ random.normal(0, 0.004, (2, n_genes)) + random.uniform(0, 6, n_genes))
    return waves + random.normal(0, np.linspace(0.1, 2, n_genes), waves.shape)


@pytest.mark.parametrize(("hexagonal", "n_inside"), [(False, 4), (True, 6)])
@pytest.mark.parametrize("jitter", [0, 0.04])
def test_neighbours_on_a_grid_are_the_next_ring(hexagonal, n_inside, jitter):
    graph = structure.neighbours(grid(hexagonal=hexagonal, jitter=jitter))
    degrees = np.asarray(graph.sum(axis=1)).ravel()
    assert degrees.max() == n_inside
    assert np.bincount(degrees.astype(int)).argmax() == n_inside
    assert (graph != graph.T).nnz == 0
    assert graph.diagonal().sum() == 0


def test_morans_i_is_scanpys():
    import scanpy as sc

    coords = grid()
    values, graph = smooth_values(coords), structure.neighbours(coords)
    expected = sc.metrics.morans_i(sparse.csr_matrix(graph), values.T.copy())
    np.testing.assert_allclose(structure.morans_i(values, graph), expected, atol=1e-6)


def test_morans_i_is_esdas():
    esda = pytest.importorskip("esda")
    weights = pytest.importorskip("libpysal.weights")
    coords = grid(hexagonal=True)
    values = smooth_values(coords)
    near = weights.DistanceBand.from_array(coords, threshold=1.3 * 200, silence_warnings=True)
    expected = [esda.Moran(values[:, g], near, transformation="B", permutations=0).I for g in range(values.shape[1])]
    np.testing.assert_allclose(structure.morans_i(values, structure.neighbours(coords)), expected, atol=1e-9)
    assert expected[0] > 0.5 > expected[-1]  # the cases are not all alike


@pytest.mark.parametrize("at_once", [1, 4, 512])
def test_gene_correlations_are_numpys(monkeypatch, at_once):
    monkeypatch.setattr(structure, "_GENES_AT_ONCE", at_once)
    values = np.random.default_rng(0).normal(size=(30, 6)) @ np.random.default_rng(1).normal(size=(6, 6))
    other = values + np.random.default_rng(2).normal(size=values.shape)
    above = np.triu_indices(6, 1)
    expected = np.corrcoef(np.corrcoef(other.T)[above], np.corrcoef(values.T)[above])[0, 1]
    assert structure.gene_gene_pcc(other, values) == pytest.approx(expected)


def test_constant_genes_are_left_out():
    coords = grid()
    truth = smooth_values(coords)
    predicted = truth + 0.1 * smooth_values(coords, seed=4)
    expected, _ = structure.structure(predicted[:, :5], truth[:, :5], coords)
    predicted[:, 5], truth[:, 6] = 3, 0
    summary, per_gene = structure.structure(predicted, truth, coords)
    assert summary == pytest.approx(expected)
    assert np.flatnonzero(np.isnan(per_gene["moran_predicted"])).tolist() == [5]
    assert np.flatnonzero(np.isnan(per_gene["moran_truth"])).tolist() == [6]


def test_spots_may_come_in_any_order_and_unit():
    coords = grid()
    truth = smooth_values(coords)
    predicted = truth + smooth_values(coords, seed=4)
    order = np.random.default_rng(0).permutation(len(coords))
    first = structure.structure(predicted, truth, coords)[0]
    assert structure.structure(predicted[order], truth[order], 0.37 * coords[order])[0] == pytest.approx(first)


def test_a_smoothed_prediction_keeps_ranks_and_shows_in_the_error():
    coords = grid(14, 14)
    truth = smooth_values(coords)
    graph = structure.neighbours(coords)
    smoothed = (truth + graph @ truth) / (1 + np.asarray(graph.sum(axis=1)))
    summary, per_gene = structure.structure(smoothed, truth, coords)
    assert (per_gene["moran_predicted"] > per_gene["moran_truth"]).all()
    assert summary["moran_mae"] > 0.1
    assert structure.structure(truth, truth, coords)[0] == pytest.approx(
        {"gene_gene_pcc": 1, "moran_pcc": 1, "moran_mae": 0}
    )


@pytest.mark.parametrize("n", [1, 2])
def test_few_spots_are_undefined_and_no_error(n):
    values = np.random.default_rng(0).random((1, 9)) * np.arange(1.0, n + 1)[:, None]
    summary, per_gene = structure.structure(values, values, grid()[:n])
    assert np.isnan(summary["gene_gene_pcc"])  # of two spots every two genes correlate perfectly
    assert np.isnan(per_gene["moran_truth"]).all() == (n == 1)


def test_structure_without_coordinates_and_wrong_shapes():
    values = np.random.default_rng(0).normal(size=(9, 4))
    assert set(structure.structure(values, values)[0]) == {"gene_gene_pcc"}
    with pytest.raises(InputError, match="coordinates"):
        structure.neighbours(np.array([[0.0, np.nan]]))
    with pytest.raises(InputError, match="graph of 9 spots"):
        structure.morans_i(values, structure.neighbours(grid()))
