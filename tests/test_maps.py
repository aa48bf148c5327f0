"""Maps of genes: the names they bear, the room they have, and that scores do not wait for them."""

from functools import partial

import pytest

from genar.assess import evaluate_run
from genar.report import maps
from genar.runs import train_run
from genar.train_plan import TrainPlan
from homes import pair_of_one_gene


@pytest.fixture
def pair(ridge_home):
    return partial(pair_of_one_gene, ridge_home)


@pytest.mark.parametrize(
    "gene", ["../../../outside", "HLA-DRB3/4", "A" * 300, "µ" * 90, "a$b$c", r"$\frac$", "x\ny", ".."]
)
def test_a_genes_name_is_no_path_and_no_formula(gene, pair, tmp_path):
    predicted, truth = pair(gene, section=r"$\section$")
    evaluate_run(predicted, truth, tmp_path / "deep/er/out", resamples=0)
    made = sorted(tmp_path.rglob("*.png"))
    assert len(made) == 4
    assert {path.parent for path in made} == {tmp_path / "deep/er/out/maps"}


def test_long_names_of_methods_stay_within_their_map(pair, tmp_path, monkeypatch):
    predicted, truth = pair("G" * 60)
    figures = []
    monkeypatch.setattr(maps, "_save", lambda figure, path: figures.append(figure))
    names = ["GenAR, default of this package, as it was trained for all of that", "50 nearest spots on GenAR's inputs"]
    maps.write_method_maps(truth, dict.fromkeys(names, predicted), [("G" * 60, "")], tmp_path / "x.png")
    figures[0].canvas.draw()
    for axis in figures[0].axes[:3]:
        width = axis.title.get_window_extent().width
        assert width < figures[0].bbox.width / 3
        assert max(map(len, axis.get_title().splitlines())) <= 40


def test_scores_are_written_before_a_picture_can_fail(ridge_home, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no picture")

    monkeypatch.setattr(maps, "write_section_maps", fail)
    plan = TrainPlan(
        ridge_home / "tissue",
        ("B",),
        tmp_path / "run",
        "ridge",
        n_genes=8,
        views=1,
        features=ridge_home / "store",
        beside=(),
    )
    with pytest.raises(RuntimeError, match="no picture"):
        train_run(plan, say=lambda line: None)
    assert {"metrics.json", "intervals.json"} <= {path.name for path in (tmp_path / "run").iterdir()}
