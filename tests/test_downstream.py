"""The code of docs/downstream.md, run as it stands on a toy of the demo's files."""

from collections import Counter

import numpy as np
import pytest

from genar.data import contract, read_sections
from genar.data.simulate import MARKERS, TissueConfig, write_tissue
from genar.genes import Panel
from genar.models import Decoding, Spots, model_class
from genar.models.checkpoint import Checkpoint
from genar.prediction import predict_section, write_prediction
from genar.training import TrainConfig, fit, make_spots
from pages import run_page

SHOWN = ("n_nuclei", "fraction_gland", "fraction_stroma", "fraction_immune", "fraction_fat")


def what_the_image_shows(section):
    """Features [N, 1, F]: what lies under each spot, in place of an encoder."""
    return section.obs[list(SHOWN)].to_numpy(np.float32)[:, None]


def write_toy(folder):
    """The sections of the demo and a prediction of the second one, where the demo leaves them, smaller."""
    config = TissueConfig(n_rows=14, n_cols=14, n_genes=110, mpp=2.0, counts_per_nucleus=20)
    training, held_out = read_sections(write_tissue(folder / "simulated_tissue", config=config))
    genes = Panel(tuple(sorted(gene for names in MARKERS.values() for gene in names.split())), "named")
    spots = Spots.join([make_spots(training, what_the_image_shows(training), genes.genes)])
    model = model_class("ridge").create(len(SHOWN), spots, "", {})
    fit(model, spots, TrainConfig())
    checkpoint = Checkpoint("ridge", model, genes, {})
    predicted = predict_section(checkpoint, held_out, what_the_image_shows(held_out), Decoding("mean"))
    return write_prediction(predicted, folder / "run" / "predictions" / f"{contract.name(held_out)}.h5ad")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names that the blocks of the page leave behind."""
    folder = tmp_path_factory.mktemp("downstream")
    write_toy(folder / "genar-demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run_page("downstream.md")


def test_domains_agree_more_than_by_chance(page):
    assert 0.3 < page["agreement"] <= 1
    for section in (page["measured"], page["predicted"]):
        assert 2 <= section.obs["domain"].nunique() <= 12
        assert (section.layers["counts"].data == np.rint(section.layers["counts"].data)).all()


def test_markers_are_those_of_the_tissue(page):
    """Some domain is told by genes of one module, and the prediction names many of the same genes."""
    module = {gene: name for name, genes in MARKERS.items() for gene in genes.split()}
    for found in (page["of_measured"], page["of_predicted"]):
        modules = [Counter(module[gene] for gene in genes).most_common(1)[0] for genes in found.values()]
        assert {name for name, times in modules if times >= 4} - {"housekeeping"}
    assert set(page["of_measured"]) == set(page["of_predicted"])
    assert page["shared"] > 0.2  # by chance 5 of 70 genes


def test_tests_of_expectations_find_what_is_not_there(page):
    """The numbers of the page's table."""
    share = page["significant"]
    assert 0.02 < share["measured counts"] < 0.09
    assert share["expectations"] > 0.5
    assert share["measured counts"] < share["drawn counts"] < 0.2


def test_random_halves_are_right_on_average_and_wrong_one_by_one(page):
    counts, expected = (np.array(page["shares"][name]) for name in ("measured counts", "expectations"))
    assert abs(counts.mean() - 0.05) < 0.01
    assert abs(expected.mean() - 0.05) < 0.04
    assert expected.min() < 0.01
    assert expected.max() > 2 * counts.max()
