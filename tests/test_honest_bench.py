"""A bench is of the data, files and recipe that it names, and says what its methods saw."""

import json
import shutil

import anndata
import pandas as pd
import pytest

from genar import bench
from genar.data.simulate import TissueConfig, write_tissue
from genar.errors import InputError

HEAD = """
title: toy
sections: [A, B]
held_out: [A]
n_genes: 12
encoder: genar.bench.toy:narrow_encoder
seeds: [1]
methods:
"""
RIDGE = "  - {name: ridge, model: ridge}\n"
TINY = "width: 16, depth: 1, heads: 2, components: 4, max_epochs: 1, samples: 2, scales: [3, 12]"
SMALL = TissueConfig(n_rows=5, n_cols=5, n_genes=80, counts_per_nucleus=20)


@pytest.fixture(scope="module")
def tissue(tmp_path_factory):
    return write_tissue(tmp_path_factory.mktemp("tissue"), ("A", "B", "C"), seed=1, config=SMALL)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


def read(tmp_path, text, name="toy"):
    (tmp_path / f"{name}.yaml").write_text(text)
    return bench.read_recipe(str(tmp_path / f"{name}.yaml"))


def run(recipe, data, out, features, said=None):
    return bench.bench_run(recipe, data, out, features=features, say=str if said is None else said.append)


@pytest.mark.parametrize("section", ["A", "B"])
def test_runs_made_with_other_sections_are_refused_before_anything_runs(section, tissue, features, tmp_path):
    """Held out or trained on: the runs that are there would stand beside runs of other data."""
    data = shutil.copytree(tissue, tmp_path / "data")
    run(read(tmp_path, HEAD + RIDGE), data, tmp_path / "out", features)
    edited = anndata.read_h5ad(data / "st" / f"{section}.h5ad")
    edited.X = edited.X * 2
    edited.write_h5ad(data / "st" / f"{section}.h5ad")
    said = []
    with pytest.raises(InputError, match=f"made with another section {section} than the data hold now"):
        run(read(tmp_path, HEAD + RIDGE + "  - {name: mean, model: mean}\n"), data, tmp_path / "out", features, said)
    assert len(said) == 1  # what was planned, and no run
    run(read(tmp_path, HEAD + RIDGE), tissue, tmp_path / "out", features)


def test_an_edited_file_of_gene_sets_is_another_run(tissue, features, tmp_path):
    recipe_text = f"{HEAD}  - {{name: sets, model: genar, set: {{order: {tmp_path / 'sets.gmt'}, {TINY}}}}}\n"
    genes = list(anndata.read_h5ad(tissue / "st" / "A.h5ad").var_names)
    (tmp_path / "sets.gmt").write_text("\t".join(["one", "-", *genes]) + "\n")
    first = read(tmp_path, recipe_text)
    run(first, tissue, tmp_path / "out", features)
    assert not bench.plan_runs(first, tissue, tmp_path / "out").waiting
    (tmp_path / "sets.gmt").write_text("\t".join(["one", "-", *genes[::-1]]) + "\n")
    assert len(bench.plan_runs(first, tissue, tmp_path / "out").waiting) == 1
    (tmp_path / "sets.gmt").unlink()
    with pytest.raises(InputError, match="method 'sets': .*sets.gmt: no such file"):
        read(tmp_path, recipe_text)


def test_folders_of_runs_without_gene_sets_keep_their_names(tmp_path):
    plan = bench.plan_runs(bench.read_recipe("table3"), None, tmp_path)
    assert plan.runs[0].plan.out.parent.name == "genar-f63c12ab"
    assert plan.runs[4].plan.out.parent.name == "genar-b5321264"
