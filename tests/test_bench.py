import json

import numpy as np
import pandas as pd
import pytest

from genar import bench
from genar.data.simulate import TissueConfig, write_tissue
from genar.errors import InputError

RECIPE = """
title: toy
sections: [A, B]
n_genes: 12
encoder: genar.bench.toy:wide_encoder
seeds: [1, 2]
methods:
  - {name: "ridge!", model: ridge}
  - {name: knn, model: knn}
  - name: tiny
    model: genar
    set: {width: 16, depth: 1, heads: 2, components: 4, max_epochs: 1, samples: 2, validation_share: 0, scales: [3, 12]}
compare:
  - [tiny, ridge!]
"""


@pytest.fixture(scope="module")
def tissue(tmp_path_factory):
    config = TissueConfig(n_rows=6, n_cols=6, n_genes=80)
    return write_tissue(tmp_path_factory.mktemp("tissue"), ("A", "B", "C"), seed=1, config=config)


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "toy.yaml").write_text(RECIPE)
    return bench.read_recipe(str(tmp_path / "toy.yaml"))


def test_a_recipe_runs_once_and_writes_its_tables(recipe, tissue, tmp_path):
    said = []
    out = tmp_path / "out"
    options = {"features": tmp_path / "features", "say": said.append}
    assert bench.bench_run(recipe, tissue, out, dry_run=True, **options) is None
    assert not out.exists()
    assert len(said) == 1 + 2 + 2 + 4  # closed forms have no seeds
    result = bench.bench_run(recipe, tissue, out, **options)
    assert list(result.table.index) == ["ridge!", "knn", "tiny"]
    table = pd.read_csv(out / "table.csv", index_col=0)
    assert (table["mse_low"] <= table["mse"]).all()
    assert (table["mse"] <= table["mse_high"]).all()
    difference = table.loc["tiny", "mse"] - table.loc["ridge!", "mse"]
    assert result.differences.loc["tiny minus ridge!", "mse"] == pytest.approx(difference, abs=1e-5)
    assert "| tiny minus ridge! |" in (out / "table.md").read_text()
    run = next((out / "runs").glob("genar-*")) / "A-2"
    facts = json.loads((run / "run.json").read_text())
    assert facts["seeds"]["training"] == 2
    assert set(facts["data"]) == {"A", "B"}  # C is not of the recipe
    told = json.loads((run / "metrics.json").read_text())["A"]["tiny" if "tiny" in facts else "genar"]
    by_section = pd.read_csv(out / "by_section.csv", index_col=[0, 1])
    mse = [json.loads(p.read_text())["A"]["genar"]["mse"] for p in (run.parent).glob("A-*/metrics.json")]
    assert by_section.loc[("tiny", "A"), "mse"] == pytest.approx(np.mean(mse), rel=1e-4)
    assert 0 < told["coverage_90"] <= 1
    said.clear()
    bench.bench_run(recipe, tissue, out, **options)
    assert len(said) == 1
    assert "8 of them there already" in said[0]


def test_recipes_of_the_package_are_sound():
    for name in bench.recipe_names():
        recipe = bench.read_recipe(f"recipes/{name}.yaml")
        assert recipe.methods
        assert len({method.folder for method in recipe.methods}) == len(recipe.methods)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("model: knn", "model: magic"), "magic"),
        (("[tiny, ridge!]", "[tiny, rigde]"), "rigde"),
        (("seeds:", "seedz:"), "seeds"),
        (("width: 16", "widht: 16"), "width"),
        (("sections: [A, B]", "sections: [A, Z]"), "Z"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(change, says, tissue, tmp_path):
    (tmp_path / "toy.yaml").write_text(RECIPE.replace(*change))
    with pytest.raises(InputError, match=says):
        bench.bench_run(bench.read_recipe(str(tmp_path / "toy.yaml")), tissue, tmp_path / "out", say=lambda line: None)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="her2st_small"):
        bench.read_recipe("nowhere.yaml")
