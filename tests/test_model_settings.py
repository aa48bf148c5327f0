"""Settings and decodings of models: what their pages offer is taken, what makes no sense is refused."""

import pytest

from genar.errors import InputError
from genar.models import Decoding, model_class
from genar.settings import read_settings
from toy_training import few_spots


@pytest.mark.parametrize(
    ("model", "setting"),
    [("triplex", "dropouts=[0.4, 0.1, 0.3]"), ("foundation", "max_count=0"), ("foundation", "blocks=0"),
     ("egn", "refinements=0"), ("hist2st", "copies=0"), ("hist2st", "neighbours=0")],
)  # fmt: skip
def test_what_the_pages_offer_is_taken(model, setting):
    given = read_settings(None, [setting], model)
    model_class(model).check_settings("small", given.model)


@pytest.mark.parametrize(
    ("model", "setting", "told"),
    [("triplex", "heads=[0, 4, 4]", "heads must be at least 1"), ("triplex", "depths=[-1, 2, 1]", "depths must be at"),
     ("triplex", "dropouts=[1.0, 0, 0]", r"dropouts must be in \[0, 1\)"), ("triplex", "alpha=2", r"alpha must be in"),
     ("hist2st", "neighbours=-1", "neighbours must be at least 0"), ("hist2st", "radius=-1", "radius must be at least"),
     ("hist2st", "zinb_weight=-1", "zinb_weight must be at least 0"), ("egn", "exemplars=0", "exemplars must be at")],
)  # fmt: skip
def test_what_cannot_be_is_told(model, setting, told):
    with pytest.raises(InputError, match=told):
        model_class(model).check_settings("small", read_settings(None, [setting], model).model)


@pytest.mark.parametrize(
    ("model", "settings", "says"),
    [
        ("genar", {"scale_weights": (1.0, 2.0)}, "one a scale, 4 of them, found 2"),
        ("genar", {"scale_weights": (0.0,) * 4}, "not all zero"),
        ("genar", {"mlp_ratio": -1.0}, "mlp_ratio"),
        ("genar", {"sigma_slope": -0.1}, "sigma_slope"),
        ("genar", {"group_temperature": -1.0}, "group_temperature"),
        ("histogene", {"n_positions": 0}, "at least 1"),
        ("histogene", {"dropout": 1.5}, "in \\[0, 1\\)"),
        ("hist2st", {"graph_layers": 0}, "at least 1"),
        ("m2ost", {"spots_per_step": 0}, "at least 1"),
    ],
)
def test_settings_of_models_that_make_no_sense(model, settings, says):
    with pytest.raises(InputError, match=says):
        model_class(model).check_settings("small", settings, n_genes=20)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("umpire", {"depth": 24}, "depth are the rank tower's; set tower=ranks"),
        ("hist2st", {"radius": 0.1}, "radius must be 0 or at least 1 pitch"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(name, settings, message):
    with pytest.raises(InputError, match=message):
        model_class(name).check_settings("small", settings)


@pytest.mark.parametrize(
    ("model", "settings", "how", "says"),
    [
        ("stem", {}, {"decode": "greedy"}, "decodes by mean"),
        ("stem", {}, {"decode": "mean", "steps": 2000}, "steps must be at most"),
        ("genar", {"output": "continuous", "final_loss": "squared_error"}, {"decode": "median"}, "squared error"),
    ],
)
def test_a_decoding_that_the_model_has_not_is_refused_before_training(model, settings, how, says, tmp_path, capsys):
    with pytest.raises(InputError, match=says):
        model_class(model).check_decoding("small", settings, Decoding(**how))


def test_settings_that_do_nothing_beside_others_are_known():
    idle = model_class("genar").idle_settings
    assert idle("small", {"final_loss": "cross_entropy", "sigma_slope": 0.1}) == {
        "sigma_slope": "final_loss cross_entropy"
    }
    assert idle("small", {"final_loss": "gaussian_nll", "sigma_base": 0.5}) == {}  # its counts are spread by them
    continuous = {"output": "continuous", "final_loss": "gaussian_nll", "group_temperature": 1.0, "sigma_base": 1.0}
    assert set(idle("small", continuous)) == {"group_temperature", "sigma_base"}
    assert set(idle("small", {"scales": (200,), "group_temperature": 1.0})) == {"group_temperature"}
    assert set(idle("small", {"depth": 1, "drop_path": 0.5})) == {"drop_path"}
    hist2st = model_class("hist2st").idle_settings
    assert hist2st("small", {"input": "patches", "width": 64}) == {"width": "patches"}
    assert hist2st("small", {"width": 64}) == {}


def test_one_bump_for_all_counts_is_refused():
    with pytest.raises(InputError, match="count_basis must be 0 or at least 2, found 1"):
        model_class("genar").check_settings("small", {"count_basis": 1})


@pytest.mark.parametrize("name", ["genar", "foundation"])
def test_counts_above_the_classes_are_told(name):
    spots = few_spots()
    most = int(spots.counts.max())
    settings = {"max_count": 3} | ({"scales": (1, 12)} if name == "genar" else {})
    told = rf"counts of \d+ of 12 genes are above max_count 3 and taken for it .the largest is {most}"
    with pytest.warns(UserWarning, match=told):
        model_class(name).create(6, spots, "small", settings)
