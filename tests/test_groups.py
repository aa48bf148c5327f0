"""``genar groups``: groups of genes by sections, of a model, with gene sets."""

import json

import pandas as pd
import pytest
import torch

from commands import run
from genar.data import contract, read_sections
from genar.genes import Panel
from genar.models import Spots, model_class
from genar.models.checkpoint import Checkpoint, save_checkpoint
from genar.training import make_spots


@pytest.fixture
def told(monkeypatch, capsys):
    """Runs a command: its exit code, standard output and standard error."""

    def tell(*words):
        code = run(monkeypatch, *words)
        return code, *capsys.readouterr()

    return tell


@pytest.fixture(scope="module")
def genes(tissue):
    return tuple(read_sections(tissue)[0].var_names[:30])


@pytest.fixture(scope="module")
def checkpoints(tissue, genes, tmp_path_factory):
    """A model with groups and one without, untrained."""
    folder = tmp_path_factory.mktemp("groups")
    sections = read_sections(tissue)[:1]
    spots = Spots.join([make_spots(s, torch.randn(s.n_obs, 1, 6).numpy(), genes) for s in sections])
    for name, settings in (("genar", {"width": 16, "depth": 1, "heads": 2, "scales": (1, 3, 30)}), ("mean", {})):
        model = model_class(name).create(6, spots, "small", settings)
        model.prepare(spots)
        save_checkpoint(folder / name, Checkpoint(name, model, Panel(genes, "given"), {"encoder": "none"}))
    return folder


def test_groups_of_sections_with_gene_sets(tissue, genes, tmp_path, told):
    (tmp_path / "panel.txt").write_text("\n".join(genes))
    (tmp_path / "sets.gmt").write_text(f"mine\t-\t{genes[0]}\t{genes[1]}\nother\t-\tNOWHERE\n")
    words = ["groups", tissue, "--panel", tmp_path / "panel.txt", "--gmt", tmp_path / "sets.gmt"]
    facts = json.loads(told(*words, "--out", tmp_path / "g", "--json")[1].splitlines()[-1])
    assert sorted(gene for group in facts["groups"] for gene in group) == sorted(genes)
    table = pd.read_csv(tmp_path / "g" / "groups.csv")
    assert [set(row.split()) for row in table["genes"]] == [set(group) for group in facts["groups"]]
    sets = pd.read_csv(tmp_path / "g" / "sets.csv")
    assert set(sets["set"]) == {"mine"}
    assert sets["n_shared"].sum() == 2
    assert "gene set" in told(*words, "--out", tmp_path / "g")[1]


def test_groups_of_sections_without_a_pixel_size(tissue, genes, tmp_path, told):
    section = read_sections(tissue)[0]
    del section.uns[contract.GENAR]
    section.uns.pop("spatial", None)
    (tmp_path / "own").mkdir()
    section.write_h5ad(tmp_path / "own" / "A.h5ad")
    (tmp_path / "panel.txt").write_text("\n".join(genes))
    words = ["groups", tmp_path / "own", "--panel", tmp_path / "panel.txt", "--out", tmp_path / "g"]
    code, _, error = told(*words)
    assert (code, "--mpp" in error) == (2, True)
    assert told(*words, "--mpp", 0.7)[0] == 0


def test_groups_of_a_model_and_of_one_scale(checkpoints, genes, tmp_path, told):
    code, out, _ = told("groups", checkpoints / "genar", "--scale", 1, "--out", tmp_path, "--json")
    assert code == 0
    groups = json.loads(out)["groups"]
    assert [len(group) for group in groups] == [10, 10, 10]
    assert sorted(gene for group in groups for gene in group) == sorted(genes)


def test_groups_depend_on_no_excluded_section(tissue, genes, tmp_path, told):
    (tmp_path / "panel.txt").write_text("\n".join(genes))
    names = [contract.name(section) for section in read_sections(tissue)]
    words = ["groups", tissue, "--panel", tmp_path / "panel.txt", "--out", tmp_path / "g"]
    code, _, err = told(*words, "--exclude", ",".join(names))
    assert (code, "every section is excluded" in err) == (2, True)
    assert told(*words, "--exclude", names[0])[0] == 0


def test_a_model_without_groups_is_refused(checkpoints, tmp_path, told):
    code, _, err = told("groups", checkpoints / "mean", "--out", tmp_path / "g")
    assert (code, "model mean has no groups" in err) == (2, True)
    assert not (tmp_path / "g").exists()
