"""Settings and decodings of models: what their pages offer is taken, what makes no sense is refused."""

import pytest

from genar.errors import InputError
from genar.models import Decoding, model_class
from genar.settings import read_settings


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
