"""Objects handed over from Python, of any make: sections, counts, features and models."""

import json

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

import genar
from genar.data import read_section
from genar.errors import InputError
from genar.genes import RECIPES
from genar.models.checkpoint import load_checkpoint
from genar.prediction import predict_section


def with_x(section, x):
    made = section.copy()
    made.X = x
    return made


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_panel_is_selected_from_counts_of_any_make(recipe, held_out, lite0):
    x, n = held_out.X, 15
    expected = genar.select_panel([held_out], n_genes=n, recipe=recipe, n_top=60).genes
    backed = anndata.read_h5ad(lite0 / "tissue" / "st" / "B.h5ad", backed="r")
    backed.uns["genar"] = held_out.uns["genar"]
    makes = [x.toarray(), x.toarray().astype(np.int32), sparse.csr_array(x), sparse.csc_matrix(x), x.astype(np.uint16)]
    for one in [*(with_x(held_out, make) for make in makes), backed]:
        assert genar.select_panel([one], n_genes=n, recipe=recipe, n_top=60).genes == expected


def plain(section):
    del section.uns["genar"]


def logged(section):
    section.X = section.X.log1p()


def twice(section):
    section.var_names = [section.var_names[1], *section.var_names[1:]]


def empty(section):
    section.X = None


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (plain, "genar.read_section"),
        (logged, "looks log-transformed"),
        (twice, "more than once"),
        (empty, "X is missing"),
    ],
)
def test_what_is_no_section_is_not_selected_from_or_scored_against(spoil, says, held_out, held_out_prediction):
    spoil(held_out)
    if spoil is not plain:  # the truth needs no more than counts
        with pytest.raises(InputError, match=says):
            genar.score(held_out_prediction, held_out)
    with pytest.raises(InputError, match=says):
        genar.select_panel([held_out], n_genes=5)


def placeless(section):
    del section.obsm["spatial"]


def deep(section):
    section.obsm["spatial"] = np.c_[section.obsm["spatial"], np.zeros(section.n_obs)]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [(plain, "genar.read_section"), (placeless, "without obsm"), (deep, r"\[N, 2\], \(x, y\), found shape \[34, 3\]")],
)
def test_what_has_no_name_or_place_is_not_predicted_or_embedded(spoil, says, lite0, held_out, tmp_path):
    spoil(held_out)
    with pytest.raises(InputError, match=says):
        genar.predict(held_out, lite0 / "ridge", features=lite0 / "store", progress=False)
    encoder = genar.load_encoder()
    with pytest.raises(InputError, match=says):
        genar.embed(held_out, encoder, genar.recipe_of(encoder, views=1), tmp_path)


def test_a_section_without_a_slide_says_so(held_out, tmp_path):
    del held_out.uns["genar"]["slide"]
    encoder = genar.load_encoder()
    with pytest.raises(InputError, match="no slide image"):
        genar.embed(held_out, encoder, genar.recipe_of(encoder, views=1), tmp_path)


def test_scales_are_fitted_to_sparse_counts():
    counts = np.random.default_rng(0).poisson(2, (40, 20))
    assert genar.fit_scales(sparse.csr_array(counts)) == genar.fit_scales(counts)
    with pytest.raises(InputError, match="found shape"):
        genar.fit_scales(np.zeros((0, 5)))


def test_features_are_of_the_model_s_width_and_of_any_type(lite0, held_out):
    checkpoint = load_checkpoint(lite0 / "run")
    width = checkpoint.model.n_features
    x = np.random.default_rng(0).normal(size=(held_out.n_obs, 1, width)).astype("f4")
    expected = genar.predict_section(checkpoint, held_out, x)
    for other in (x.astype("f8"), torch.from_numpy(x), np.asfortranarray(x)):
        made = genar.predict_section(checkpoint, held_out, other)
        np.testing.assert_array_equal(made.layers["mean"], expected.layers["mean"])
    for wrong in (x[:, :, :-1], x[:, 0]):
        with pytest.raises(InputError, match=rf"the model takes \[34, views, {width}\]"):
            genar.predict_section(checkpoint, held_out, wrong)
    with pytest.raises(InputError, match="at least one spot"):
        genar.predict_section(checkpoint, held_out[:0], x[:0])


def test_predict_takes_a_checkpoint_as_it_is(lite0, held_out):
    checkpoint = load_checkpoint(lite0 / "run")
    checkpoint.model.train()
    one, two = (
        genar.predict(held_out, model, features=lite0 / "store", samples=2, progress=False)
        for model in (checkpoint, lite0 / "run")
    )
    np.testing.assert_array_equal(one.layers["mean"], two.layers["mean"])
    with pytest.raises(InputError, match="is loaded already"):
        genar.predict(held_out, checkpoint, revision="v1", progress=False)


def test_a_model_left_in_training_predicts_as_ever(home):
    checkpoint, section = load_checkpoint(home / "run"), read_section(f"{home / 'tissue'}:S2")
    features = np.random.default_rng(0).normal(size=(section.n_obs, 1, checkpoint.model.n_features)).astype(np.float32)
    awake = checkpoint.model.train()
    made = predict_section(checkpoint, section, features).layers["mean"]
    assert awake.training  # as it was left
    awake.eval()
    np.testing.assert_array_equal(made, predict_section(checkpoint, section, features).layers["mean"])


def test_train_takes_what_the_command_takes(lite0, tmp_path):
    facts = json.loads((lite0 / "run" / "run.json").read_text())
    assert (facts["decoding"]["samples"], facts["train"]["seed"], facts["train"]["accumulate"]) == (2, 3, 2)
    (tmp_path / "set.yaml").write_text("max_epochs: 1\nlr: 0.01\nseed: 5\n")
    panel = genar.Panel(tuple(load_checkpoint(lite0 / "run").panel.genes[:6]), "by hand")
    run_of = genar.train(
        lite0 / "tissue", tmp_path / "run", model="foundation", panel=panel, config=tmp_path / "set.yaml",
        settings={"lr": 0.02}, precision="fp32", seed=6, views=1, features=lite0 / "store", progress=False,
    )  # fmt: skip
    facts = json.loads(run_of.outputs["run"].read_text())["train"]
    assert (facts["lr"], facts["seed"], facts["max_epochs"]) == (0.02, 6, 1)
    assert load_checkpoint(tmp_path / "run").panel.genes == panel.genes
    for wrong in ({"samples": "many"}, {"seed": 1.5}, {"panell": panel}):
        with pytest.raises(InputError):
            genar.train(lite0 / "tissue", tmp_path / "other", progress=False, **wrong)
