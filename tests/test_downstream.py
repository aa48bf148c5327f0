"""The code of docs/downstream.md, run as it stands on a toy of the demo's files."""

from collections import Counter

import numpy as np
import pytest

from genar.data.simulate import MARKERS
from pages import run_page
from toy_prediction import write_toy


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
