"""Commands on formats that must be told more: an image (Space Ranger), the width of spots (Visium HD), the pixel size
(SpatialData)."""

import pytest

from genar import bench
from genar.errors import InputError
from toy_bench import write_recipe


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_runs_keep_their_place_where_nothing_is_told(tmp_path):
    """The names are those of runs that were made before anything could be told."""
    recipe = bench.read_recipe(str(write_recipe(tmp_path)))

    def folder(recipe=recipe, **read):
        (name,) = {run.plan.out.parent.name for run in bench.plan_runs(recipe, None, tmp_path, read=read).runs}
        return name

    plain = folder()
    assert plain == "ridge-996f3388"
    assert folder(mpp=None, image=tmp_path, bin_um=56.0) == plain
    views = bench.read_recipe(str(write_recipe(tmp_path, **{"n_genes: 3": "n_genes: 3\nviews: 8"})))
    assert len({plain, folder(mpp=0.5), folder(bin_um=32.0), folder(views)}) == 4


def test_a_recipe_says_how_many_views(tmp_path):
    own = "{name: ridge, model: ridge}\n  - {name: upright, model: ridge, views: 1}\nviews: 8"
    recipe = bench.read_recipe(str(write_recipe(tmp_path, **{"{name: ridge, model: ridge}": own})))
    found = {run.method.name: run.plan.views for run in bench.plan_runs(recipe, None, tmp_path).runs}
    assert found == {"ridge": 8, "upright": 1}
    for wrong in ("2", "true", "many"):
        path = write_recipe(tmp_path, **{"model: ridge}": f"model: ridge, views: {wrong}}}"})
        with pytest.raises(InputError, match="method 'ridge': views must be 1 or 8, found"):
            bench.read_recipe(str(path))
