"""What users hand over from Python and what lies where they point: whole objects of any make are taken, or refused in a
line, and nothing of theirs is lost, run or believed unseen."""

import json
import re
import shutil

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

import genar
from commands import run
from genar.assess import evaluate_run
from genar.data import contract
from genar.data.simulate import TissueConfig, write_tissue
from genar.errors import InputError
from genar.export import refuse_foreign, write_export
from genar.genes import RECIPES
from genar.models.checkpoint import load_checkpoint
from genar.prediction import write_prediction
from genar.report.index import write_report


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


def test_sparse_layers_are_scored_shown_and_exported(lite0, held_out, held_out_prediction, tmp_path):
    made = held_out_prediction.copy()
    for name in list(made.layers):
        made.layers[name] = sparse.csr_matrix(made.layers[name])
    whole, thin = (
        evaluate_run(p, held_out, tmp_path / "scores", resamples=0).scores["B"] for p in (held_out_prediction, made)
    )
    assert thin["prediction_mean"].summary == pytest.approx(whole["prediction_mean"].summary, nan_ok=True)
    file = write_prediction(made, tmp_path / "sparse.h5ad")
    write_report(str(file), tmp_path / "report.html", truth=str(lite0 / "tissue" / "st" / "B.h5ad"))
    for name in ("p.geojson", "p.tmap"):
        write_export(made, str(tmp_path / name))
        write_export(held_out_prediction, tmp_path / f"dense-{name}")
    assert (tmp_path / "p.geojson").read_bytes() == (tmp_path / "dense-p.geojson").read_bytes()
    assert (tmp_path / "p_tmap.csv").read_bytes() == (tmp_path / "dense-p_tmap.csv").read_bytes()
    pytest.importorskip("spatialdata", reason="spatialdata is not installed: its stores are not tried")
    write_export(made, str(tmp_path / "p.zarr"))


def nan_mean(predicted):
    predicted.layers["mean"][0, 0] = np.nan


def slashed_column(predicted):
    predicted.var["a/b"] = 1


def slashed_layer(predicted):
    predicted.layers["x/y"] = predicted.layers["mean"]


@pytest.mark.parametrize(
    ("spoil", "name", "says"),
    [
        (nan_mean, "p.geojson", r"layers\['mean'\] holds NaN"),
        (deep, "p.geojson", r"must be spot centres \[N, 2\]"),
        (slashed_column, "p.zarr", "SpatialData refuses a column or layer.*a/b"),
        (slashed_layer, "p.zarr", "SpatialData refuses a column or layer.*x/y"),
        (empty, "p.geojson", "no X"),
    ],
)
def test_what_a_format_cannot_hold_is_told(spoil, name, says, held_out_prediction, tmp_path):
    if name.endswith(".zarr"):
        pytest.importorskip("spatialdata", reason="spatialdata is not installed: its stores are not tried")
    spoil(held_out_prediction)
    with pytest.raises(InputError, match=says):
        write_export(held_out_prediction, tmp_path / name)
    assert not list(tmp_path.iterdir())


def words_of_export(home, *words):
    return ["export", home / "run" / "predictions" / "B.h5ad", *words]


@pytest.mark.parametrize(
    ("out", "words", "says"),
    [
        ("A.tif", ["--format", "geojson"], "name it A.geojson"),
        ("A.tif", ["--format", "spatialdata"], "name it A.zarr"),
        ("A.tif", ["--format", "vitessce"], "a file lies there"),
        ("panel.json", [], "no prediction of GenAR's"),
        ("mine.tmap", [], "no prediction of GenAR's"),
        ("file.zarr", [], "a file lies there"),
        ("view", ["--format", "vitessce"], "no prediction of GenAR's"),
    ],
)
def test_an_export_overwrites_nothing_of_the_users(lite0, out, words, says, tmp_path, monkeypatch, capsys):
    if out in ("view", "file.zarr") or words:
        pytest.importorskip("vitessce", reason="vitessce is not installed: its folders are not tried")
    shutil.copy(lite0 / "run" / "panel.json", tmp_path / "panel.json")
    (tmp_path / "view").mkdir()
    for name in ("A.tif", "mine.tmap", "file.zarr", "view/vitessce.json", "view/notes.txt"):
        (tmp_path / name).write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(monkeypatch, *words_of_export(lite0, "--out", tmp_path / out, *words)) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_genar_exported_is_written_again(held_out_prediction, tmp_path):
    for name in ("p.geojson", "p.json", "p.tmap"):
        for _ in range(2):
            write_export(held_out_prediction, tmp_path / name)
    pytest.importorskip("spatialdata", reason="spatialdata is not installed: its stores are not tried")
    store = write_export(held_out_prediction, tmp_path / "p.zarr")["spatialdata"]
    refuse_foreign(store)
    (store / "shapes" / "annotations").mkdir()
    with pytest.raises(InputError, match="no prediction of GenAR's"):
        refuse_foreign(store)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["predict", "TISSUE:B", "--model", "RUN", "--format", "h5ad", "--out", "TISSUE/wsis/B.tif"],
            "name it B.h5ad",
        ),
        (["panel", "TISSUE", "--n-genes", "5", "--out", "TISSUE/st/A.h5ad"], "name it A.json"),
        (["panel", "TISSUE", "--n-genes", "5", "--out", "TISSUE/metadata/A.json"], "no panel"),
    ],
)
def test_no_result_takes_the_place_of_a_section(lite0, words, says, tmp_path, monkeypatch, capsys):
    tissue = shutil.copytree(lite0 / "tissue", tmp_path / "tissue")
    before = {path: path.read_bytes() for path in tissue.rglob("*") if path.is_file()}
    words = [word.replace("TISSUE", str(tissue)).replace("RUN", str(lite0 / "run")) for word in words]
    assert run(monkeypatch, *words) == 2
    assert says in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tissue.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("mine", ["st/A.h5ad", "wsis/A.tif"])
def test_simulated_tissue_takes_the_place_of_no_measured_one(mine, held_out, tmp_path):
    config = TissueConfig(n_rows=4, n_cols=4, n_genes=80, mpp=2.0, counts_per_nucleus=20)
    for _ in range(2):  # its own it may write again
        write_tissue(tmp_path, ("A",), config=config)
    shutil.rmtree(tmp_path / ("wsis" if mine.startswith("st") else "st"))
    if mine.startswith("st"):
        del held_out.uns["simulated"]
        held_out.write_h5ad(tmp_path / mine)
    else:
        from tifffile import imwrite

        imwrite(tmp_path / mine, np.zeros((8, 8), np.uint8))
    before = (tmp_path / mine).read_bytes()
    with pytest.raises(InputError, match="not simulated"):
        write_tissue(tmp_path, ("B", "A"), config=config)
    assert (tmp_path / mine).read_bytes() == before
    assert not (tmp_path / "st" / "B.h5ad").exists()


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


def test_a_prediction_records_what_was_used_and_tells_what_was_not(lite0, held_out, capsys, monkeypatch, tmp_path):
    out = tmp_path / "p.h5ad"
    words = [
        "predict",
        f"{lite0 / 'tissue'}:B",
        "--model",
        lite0 / "ridge",
        "--out",
        out,
        "--features",
        lite0 / "store",
    ]
    assert (
        run(monkeypatch, *words, "--samples", "9", "--set", "temperature=0.2", "--set", "layers=[log1p_mean,sd]") == 0
    )
    assert "does not use, or have, temperature, samples, layer sd" in capsys.readouterr().out
    made = anndata.read_h5ad(out).uns["genar"]["prediction"]
    assert list(made["layers"]) == ["log1p_mean"]
    assert not {"samples", "temperature", "seed"} & set(made)
    made = genar.predict(held_out, lite0 / "run", features=lite0 / "store", samples=2, progress=False)
    told = made.uns["genar"]["prediction"]
    assert (told["samples"], set(told["layers"])) == (2, set(contract.layer_names(made)))


@pytest.mark.parametrize("words", [["--preset", "nonsense"], ["--set", "width=3"]])
def test_a_closed_form_refuses_what_it_does_not_know(words, lite0, tmp_path, monkeypatch, capsys):
    command = ["train", lite0 / "tissue", "--test", "B", "--model", "ridge", "--out", tmp_path / "run"]
    assert run(monkeypatch, *command, *words) == 2
    assert re.search("nonsense|width", capsys.readouterr().err)


def test_training_settings_of_a_model_that_is_not_trained_are_told(lite0, tmp_path, monkeypatch, capsys):
    words = ["train", lite0 / "tissue", "--test", "B", "--model", "ridge", "--out", tmp_path / "run", "--views", "1"]
    more = ["--n-genes", "5", "--features", lite0 / "store", "--set", "lr=5", "--set", "samples=3"]
    assert run(monkeypatch, *words, *more) == 0
    told = capsys.readouterr().out
    assert "is fitted at once, and does not use lr" in told
    assert "does not use, or have, samples" in told
