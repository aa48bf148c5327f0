"""A held-out section, planted so that knowing anything of it would show, changes a run by not one bit.

Sections A and C train; B and D are held out. B is planted, with counts, genes, spots or features that would pull a
panel, an order, a constant, an epoch or a key of a retrieval far away. The run is compared with one in which B does
not exist; D is where its prediction is looked at.
"""

import json
import shutil
from functools import cache
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from commands import run
from genar.bench.toy import TINY
from genar.data import contract, read_sections
from genar.data.simulate import TissueConfig, write_tissue
from genar.features import import_sections
from genar.genes import RECIPES, select_panel
from genar.models import model_class, model_names
from genar.models.checkpoint import load_checkpoint
from genar.runs import train_run
from genar.settings import Settings
from genar.train_plan import TrainPlan

N_GENES, N_FEATURES = 20, 12
SMALL = {**TINY, "genar": {"width": 16, "depth": 1, "heads": 2, "components": 4}}
TRAIN = {"max_epochs": 2, "validate_every": 1, "validation_samples": 1, "validation_share": 0.2, "batch_size": 16}
FEATURES = "npy"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Sums over several threads may round another way from one call to the next."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    """Four sections without images, and beside them features made elsewhere that tell of a spot's depth."""
    config = TissueConfig(n_rows=5, n_cols=6, n_genes=110, mpp=2.0, counts_per_nucleus=20.0)  # few classes of counts
    folder = write_tissue(tmp_path_factory.mktemp("tissue"), tuple("ABCD"), seed=1, config=config)
    shutil.rmtree(folder / "wsis")
    (folder / FEATURES).mkdir()
    for number, section in enumerate(read_sections(folder)):
        features = np.random.default_rng(number).normal(size=(section.n_obs, N_FEATURES)).astype(np.float32)
        features[:, 0] += np.log1p(section.obs["library_size"])
        np.save(folder / FEATURES / f"{'ABCD'[number]}.npy", features)
    return folder


# -- what is planted in a section: (section, its features, features of D, genes of the honest panel) -> the first two --


def other_counts(adata: AnnData, features, bait, panel):
    """Huge, and of other genes and other spots than they were."""
    x = adata.X.toarray()[::-1, ::-1]
    adata.X = sparse.csr_matrix(x * 977 + 13 * (x > 0))
    return adata, features


def other_genes(adata: AnnData, features, bait, panel):
    """Three new genes of large counts, none of the genes beside the panel, another order."""
    kept = adata[:, [gene for gene in adata.var_names[::-1] if gene in panel]].copy()
    new = np.random.default_rng(0).poisson(5000, (adata.n_obs, 3)) * (np.arange(adata.n_obs)[:, None] % 3)
    var = pd.DataFrame(index=pd.Index(["AAA1", "AAA2", "ZZZ1", *kept.var_names]))
    x = sparse.hstack([sparse.csr_matrix(new, dtype=np.float32), kept.X]).tocsr()
    return AnnData(x, adata.obs, var, adata.uns, adata.obsm), features


def other_spots(adata: AnnData, features, bait, panel):
    """A third of the spots is gone, the others are there twice."""
    rows = np.repeat(np.arange(0, adata.n_obs, 3), 2)
    adata = adata[rows].copy()
    adata.obs_names = [f"spot{i}" for i in range(len(rows))]
    adata.obsm["spatial"] = adata.obsm["spatial"] + (np.arange(len(rows)) % 2)[:, None]
    adata.obs["array_col"] = 2 * adata.obs["array_col"].to_numpy() + np.arange(len(rows)) % 2
    return adata, features[rows]


def other_features(adata: AnnData, features, bait, panel):
    """Those of D: as keys of a retrieval, they would be the nearest to every spot of D."""
    return adata, np.resize(bait, features.shape)


def everything(adata: AnnData, features, bait, panel):
    for plant in (other_counts, other_genes, other_spots, other_features):
        adata, features = plant(adata, features, bait, panel)
    return adata, features


def planted(sections: Path, out: Path, change, panel=(), where="B") -> Path:
    """A copy of the sections with a changed one, and in ``store`` their features."""
    shutil.copytree(sections, out)
    if change is not None:
        file, own = out / "st" / f"{where}.h5ad", out / FEATURES / f"{where}.npy"
        adata, features = change(
            anndata.read_h5ad(file), np.load(own), np.load(out / FEATURES / "D.npy"), frozenset(panel)
        )
        adata.write_h5ad(file)
        np.save(own, features)
    import_sections(read_sections(out), out / FEATURES, "toy", out / "store")
    return out


def trained(folder: Path, out: Path, model="genar", *, test=("B", "D"), only=(), panel="clean", beside=(), said=None):
    """The folder of a run on the sections."""
    settings = Settings(SMALL.get(model, {}), TRAIN, {"samples": 2, "steps": 2})
    n_genes = None if Path(panel).is_file() else N_GENES
    plan = TrainPlan(
        folder, test, out, model, panel=panel, n_genes=n_genes, encoder="import:toy", features=folder / "store",
        settings=settings, beside=beside, maps=False, only=only or ("A", "C", *test),
    )  # fmt: skip
    train_run(plan, say=(lambda line: None) if said is None else said.append)
    return out


def prints(out: Path) -> dict:
    """All that a leak could change: panel, configuration, facts of training, weights; of D prediction and scores."""
    facts = json.loads((out / "checkpoint" / "config.json").read_text())
    assert "D" in facts["training"].pop("held_out")  # names alone, which differ where B is held out, too
    predicted = anndata.read_h5ad(out / "predictions" / "D.h5ad")
    found = {name: predicted.layers[name].tobytes() for name in contract.layer_names(predicted)}
    found |= {f"var {name}": predicted.var[name].to_numpy().tobytes() for name in predicted.var}
    return {
        **facts,
        "panel file": (out / "panel.json").read_text(),
        "weights": facts["sha256"],
        "counts": predicted.X.toarray().tobytes(),
        "genes": list(predicted.var_names),
        "made": repr(predicted.uns["genar"]["prediction"]),
        "scores": json.loads((out / "metrics.json").read_text())["D"],
        **found,
    }


def assert_same(first: dict, second: dict):
    assert set(first) == set(second)
    assert [name for name in first if first[name] != second[name]] == []


@pytest.fixture(scope="module")
def as_they_are(sections, tmp_path_factory):
    return planted(sections, tmp_path_factory.mktemp("plain") / "sections", None)


@pytest.fixture(scope="module")
def without_b(as_they_are, tmp_path_factory):
    """The prints of a model's run in which B does not exist."""

    @cache
    def prints_of(model="genar", **how):
        return prints(trained(as_they_are, tmp_path_factory.mktemp("run") / "run", model, test=("D",), **how))

    return prints_of


@pytest.fixture(scope="module")
def panel(without_b):
    return without_b("mean")["genes"]


@pytest.fixture(scope="module")
def all_planted(sections, panel, tmp_path_factory):
    return planted(sections, tmp_path_factory.mktemp("planted") / "sections", everything, panel)


BESIDE = ("ridge",)


@pytest.mark.parametrize("change", [other_counts, other_genes, other_spots, other_features])
def test_what_is_planted_in_a_held_out_section_changes_nothing(change, sections, without_b, panel, tmp_path):
    folder = planted(sections, tmp_path / "sections", change, panel)
    found = prints(trained(folder, tmp_path / "run", beside=BESIDE))
    assert len(found["training"]["history"]) == 2  # an epoch was chosen
    assert found["model"]["config"]["max_count"] > 0  # and counts were capped
    assert set(found["scores"]) == {"genar", "genar_mean", *BESIDE}
    assert_same(found, without_b(beside=BESIDE))


@pytest.mark.parametrize("model", model_names())
def test_no_model_knows_the_held_out_section(model, without_b, all_planted, as_they_are, tmp_path):
    """Planted in every way at once, it changes nothing; in training, as it is, it does."""
    if "features" not in model_class(model).inputs:
        pytest.skip(f"{model} is not trained on features")
    expected = without_b(model)
    assert_same(prints(trained(all_planted, tmp_path / "run", model)), expected)
    other = prints(trained(as_they_are, tmp_path / "leak", model, test=("D",), only=("A", "B", "C", "D")))
    assert other["weights"] != expected["weights"]
    assert other["log1p_mean"] != expected["log1p_mean"]


@pytest.mark.parametrize("change", [other_counts, other_spots, other_features])
def test_each_plant_would_show(change, sections, without_b, tmp_path):
    """Each by itself, in a section that may be known, changes what ridge learns."""
    folder = planted(sections, tmp_path / "sections", change, where="C")
    found, expected = prints(trained(folder, tmp_path / "run", "ridge", test=("D",))), without_b("ridge")
    assert found["weights"] != expected["weights"]
    assert found["log1p_mean"] != expected["log1p_mean"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_panel_recipe_sees_the_held_out_section(recipe, without_b, sections, tmp_path):
    expected = without_b("mean", panel=recipe)
    every = read_sections(sections)[0].var_names  # a recipe may choose any, so B keeps them all
    all_planted = planted(sections, tmp_path / "planted", everything, every)
    assert_same(prints(trained(all_planted, tmp_path / "run", "mean", panel=recipe)), expected)
    assert expected["panel"]["sections"] == ["A", "C"]
    read = [section for section in read_sections(all_planted) if contract.name(section) != "D"]
    if recipe != "paper":  # these sections have fewer genes than its cut, of which it takes the first by alphabet
        assert select_panel(read, n_genes=N_GENES, recipe=recipe).genes != tuple(expected["genes"])  # it would show


def test_keys_of_a_retrieval_are_the_training_spots(as_they_are, all_planted, tmp_path):
    model = load_checkpoint(trained(all_planted, tmp_path / "run", "knn")).model
    of_training = np.concatenate([np.load(as_they_are / FEATURES / f"{name}.npy") for name in "AC"])
    keys = (model.features * model.feature_scale + model.feature_mean).numpy()
    np.testing.assert_allclose(keys, of_training, atol=1e-5)


# -- panels that have seen what is held out say so ------------------------------------------------------------------


def test_a_panel_from_all_sections_says_so(as_they_are, tmp_path, monkeypatch, capsys):
    """Recipe ``paper`` sees every section, as the paper's own lists did: told when it is made and when it is used."""
    panel = tmp_path / "panel.json"
    assert run(monkeypatch, "panel", as_they_are, "--recipe", "paper", "--n-top", "60", "--out", panel) == 0
    assert "note: the choice has seen A, B, C, D: hold none of them out" in capsys.readouterr().out
    said = []
    trained(as_they_are, tmp_path / "run", "mean", panel=str(panel), said=said)
    assert [line for line in said if "selected with B, D among its sections" in line]


def test_a_panel_from_training_sections_or_a_list_has_no_such_note(without_b, as_they_are, tmp_path):
    honest = without_b("mean")["panel"]
    (tmp_path / "panel.json").write_text(json.dumps(honest))
    (tmp_path / "panel.txt").write_text("\n".join(honest["genes"]))
    for name in ("panel.json", "panel.txt"):
        said = []
        trained(as_they_are, tmp_path / f"run {name}", "mean", panel=str(tmp_path / name), said=said)
        assert not [line for line in said if "among its sections" in line]
