"""What users' lists, counts and own code may hold: each is taken, or refused in a line."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from genar import encoders
from genar.data import contract
from genar.errors import InputError
from genar.features import Inputs
from genar.genes import read_gene_sets, read_panel, select_panel
from genar.genes.panel import read_aliases
from genar.genes.selection import RECIPES, _moments

BOM = "﻿"


def section(counts, name="A"):
    """A section of these counts [N, G] on a line of spots."""
    counts = np.asarray(counts)
    adata = anndata.AnnData(
        sparse.csr_matrix(counts, dtype=np.float32),
        obs=pd.DataFrame(index=[f"spot{i}" for i in range(len(counts))]),
        var=pd.DataFrame(index=[f"G{i}" for i in range(counts.shape[1])]),
    )
    adata.obsm[contract.SPATIAL] = np.stack([100.0 * np.arange(len(counts)), np.zeros(len(counts))], axis=1)
    adata.uns[contract.GENAR] = {contract.SECTION: name, contract.MPP: 0.5}
    return adata


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("counts", [np.full((60, 1), 4), np.full((60, 30), 4), np.zeros((60, 12))])
def test_genes_that_do_not_vary_are_no_traceback(recipe, counts):
    if recipe == "highest_mean" and counts.any():
        assert len(select_panel([section(counts)], n_genes=1, recipe=recipe).genes) == 1
    else:
        with pytest.raises(InputError, match=r"^panel: "):
            select_panel([section(counts)], n_genes=1, recipe=recipe)


def test_moments_are_those_of_all_spots():
    random = np.random.default_rng(0)
    parts = [random.poisson(random.gamma(1, 4, 40), (n, 40)) for n in (90, 7, 1)]
    mean, variance = _moments([section(part) for part in parts], [f"G{i}" for i in range(40)])
    whole = np.concatenate(parts)
    np.testing.assert_allclose(mean, whole.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(variance, whole.var(axis=0, ddof=1), rtol=1e-9)


def test_lists_from_windows_begin_with_their_first_gene(tmp_path):
    for name, text in (("p.txt", "EPCAM\nGNAS\n"), ("p.json", '{"genes": ["EPCAM", "GNAS"], "recipe": "own"}')):
        (tmp_path / name).write_text(BOM + text, encoding="utf-8")
        assert read_panel(tmp_path / name).genes == ("EPCAM", "GNAS")
    (tmp_path / "other.txt").write_text(f"{BOM}HER2 ERBB2\n", encoding="utf-8")
    assert read_aliases(tmp_path / "other.txt") == {"HER2": "ERBB2"}
    (tmp_path / "sets.gmt").write_text(f"{BOM}one\tof mine\tEPCAM\tGNAS\n", encoding="utf-8")
    assert read_gene_sets(tmp_path / "sets.gmt") == {"one": ("EPCAM", "GNAS")}


@pytest.mark.parametrize("values", [[[2.0**31]], [[1.0, 3e9]]])
def test_counts_beyond_an_int32_are_refused(values):
    one = anndata.AnnData(np.array(values))
    with pytest.raises(InputError, match=r"here: X holds .*expected raw counts below 2\^31"):
        contract.check_counts(one, "here")


@pytest.mark.parametrize("words", [{"widths_um": (112.0, 112.0)}, {"context_spots": (6, 6)}])
def test_the_same_input_twice_is_refused(words):
    with pytest.raises(InputError, match="must each differ"):
        Inputs(**words)


OWN = """
import torch
from torch import nn

FACTS = {"input_px": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}

def missing():
    raise FileNotFoundError("weights.pt")

def needs(path):
    return nn.Identity(), FACTS

def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(7, 2)), FACTS
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_one:missing", r"called with no arguments, ends in FileNotFoundError \(weights.pt\)"),
        ("own_one:needs", "called with no arguments, ends in TypeError"),
        ("own_one:narrow", "takes no patch of 32 px: RuntimeError"),
        ("own_two:any", "importing own_two ends in NameError"),
        ("own_three:any", "importing own_three ends in SyntaxError"),
        ("timm/resnet18.bogus", "timm refuses it .*is its name, with the tag, right"),
    ],
)
def test_faults_of_a_users_encoder_are_told_in_a_line(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file, text in (("own_one", OWN), ("own_two", "undefined + 1\n"), ("own_three", "def (\n")):
        (tmp_path / f"{file}.py").write_text(text)
    with pytest.raises(InputError, match=f"encoder {name}: .*{message}") as raised:
        encoders.load_encoder(name)
    assert "\n" not in str(raised.value)
