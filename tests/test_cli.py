"""Commands one after the other on one tissue, and what they refuse in one line."""

import json
import shutil
import subprocess
import sys

import anndata
import numpy as np
import pytest
import tifffile

from commands import assert_one_error, run, sets
from genar.data import contract, read_section, read_sections
from genar.genes import Panel

SMALL = ["--n-genes", "20", "--views", "1", "--samples", "2"]
TINY = [
    "width=16",
    "depth=1",
    "heads=2",
    "components=4",
    "max_epochs=2",
    "validate_every=1",
    "batch_size=16",
    "max_count=63",
]
SET = sets(*TINY)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def trained(two, store, tmp_path_factory):
    """A run of `genar train` on the simulated sections, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "first"
    words = ["train", two, "--test", "B", "--out", out, "--features", store, *SMALL, *SET, "--json"]
    done = subprocess.run([sys.executable, "-m", "genar.cli", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout.splitlines()[-1]), done


def test_train_writes_what_it_promises(trained):
    out, told, _ = trained
    for name in ("checkpoint/model.safetensors", "panel.json", "metrics.json", "metrics.csv", "run.json"):
        assert (out / name).is_file(), name
    assert not (out / "resume").exists()
    assert len(list((out / "maps").glob("B_*.png"))) == 4
    prediction = anndata.read_h5ad(out / "predictions" / "B.h5ad")
    assert (prediction.X.data == np.rint(prediction.X.data)).all()
    assert prediction.obsm["spatial"].shape == (prediction.n_obs, 2)
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["B"]) == {"genar", "genar_mean", "mean", "ridge"}
    assert metrics["B"]["mean"]["n_undefined"] == 20
    assert metrics["B"]["mean"]["pcc_200"] is None
    for name in ("pcc_10", "pcc_50", "pcc_200", "pcc_fixed", "mse", "mae", "rvd", "n_undefined"):
        assert name in metrics["B"]["genar"]
    assert told["status"] == "done"
    assert told["scores"] == metrics
    found = json.loads((out / "intervals.json").read_text())["B"]
    assert set(found["methods"]) == set(metrics["B"])
    assert set(found["differences"]) == {"genar_mean minus mean", "genar_mean minus ridge"}
    value, low, high = found["methods"]["ridge"]["mse"]
    assert low < value < high
    assert value == pytest.approx(metrics["B"]["ridge"]["mse"])


def test_run_json_tells_how_it_was_made(trained):
    facts = json.loads((trained[0] / "run.json").read_text())
    assert facts["plan"]["test"] == ["B"]
    assert facts["model"]["config"]["width"] == 16
    assert facts["train"]["max_epochs"] == 2
    assert set(facts["data"]) == set(facts["features"]) == {"A", "B"}
    assert facts["environment"]["torch"]
    panel = json.loads((trained[0] / "panel.json").read_text())
    assert panel["sections"] == ["A"]
    assert panel["sha256"] == facts["panel_sha256"]


def test_a_finished_run_is_not_overwritten(trained, two, monkeypatch, capsys):
    before = (trained[0] / "run.json").read_bytes()
    assert run(monkeypatch, "train", two, "--test", "B", "--out", trained[0]) == 2
    assert "finished run" in capsys.readouterr().err
    assert (trained[0] / "run.json").read_bytes() == before


def test_predict_repeats_the_run_s_prediction(trained, two, store, tmp_path, monkeypatch):
    out = tmp_path / "again.h5ad"
    words = ["predict", f"{two}:B", "--model", trained[0], "--out", out, "--features", store, "--samples", 2]
    assert run(monkeypatch, *words) == 0
    one, two = anndata.read_h5ad(trained[0] / "predictions" / "B.h5ad"), anndata.read_h5ad(out)
    assert (one.X != two.X).nnz == 0
    np.testing.assert_allclose(one.layers["log1p_mean"], two.layers["log1p_mean"], atol=1e-5)


def test_evaluate_repeats_the_run_s_scores(trained, two, tmp_path, monkeypatch):
    words = ["evaluate", trained[0] / "predictions" / "B.h5ad", two / "st" / "B.h5ad", "--out", tmp_path / "scores"]
    assert run(monkeypatch, *words) == 0
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    of_run = json.loads((trained[0] / "metrics.json").read_text())
    assert metrics["B"]["prediction"] == of_run["B"]["genar"]
    assert metrics["B"]["prediction_mean"] == of_run["B"]["genar_mean"]
    # the prediction knows its training counts and its distribution
    told = {"pcc_top50_mean", "pcc_top50_variance", "coverage_50", "coverage_90", "crps", "nll_moments", "zero_brier"}
    assert told <= set(metrics["B"]["prediction_mean"])
    assert set(of_run["B"]["ridge"]) >= {"pcc_top50_mean", "moran_pcc", "gene_gene_pcc"}
    intervals = json.loads((tmp_path / "scores" / "intervals.json").read_text())["B"]["methods"]
    assert intervals["prediction_mean"]["mse"][0] == pytest.approx(of_run["B"]["genar_mean"]["mse"], rel=1e-5)


def test_check_draws_every_section(two, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "check", two, "--out", tmp_path, "--json") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["section"] for row in told["sections"]] == ["A", "B"]
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in "AB")


@pytest.mark.parametrize("model", ["ridge", "mean"])
def test_baselines_train_as_models(model, two, store, tmp_path, monkeypatch):
    words = ["train", two, "--test", "B", "--out", tmp_path / "run", "--model", model, "--features", store, *SMALL]
    assert run(monkeypatch, *words) == 0
    assert model in json.loads((tmp_path / "run" / "metrics.json").read_text())["B"]


@pytest.fixture
def broken(two, tmp_path):
    """A copy of the tissue to damage."""
    return shutil.copytree(two, tmp_path / "broken")


def damage_counts(kind):
    def damage(folder):
        path = folder / "st" / "A.h5ad"
        adata = anndata.read_h5ad(path)
        x = adata.X.toarray().astype(np.float32)
        if kind == "log":
            x = np.log1p(x)
        elif kind == "negative":
            x[0, 0] = -1
        else:
            x[0, 0] = np.nan
        adata.X = x
        adata.write_h5ad(path)

    return damage


def move_spots(folder):
    adata = anndata.read_h5ad(folder / "st" / "A.h5ad")
    adata.obsm["spatial"] = adata.obsm["spatial"] + 1e5
    adata.write_h5ad(folder / "st" / "A.h5ad")


def cut_image(folder):
    path = folder / "wsis" / "A.tif"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def not_an_image(folder):
    (folder / "wsis" / "A.tif").write_text("no image")


def odd_image(folder):
    tifffile.imwrite(folder / "wsis" / "A.tif", np.zeros((5, 300, 300), np.uint16))


FAULTS = {
    "log-transformed counts": (damage_counts("log"), "log-transformed"),
    "negative counts": (damage_counts("negative"), "negative"),
    "NaN counts": (damage_counts("nan"), "NaN"),
    "spots outside the image": (move_spots, "outside the image"),
    "truncated TIFF": (cut_image, "TIFF"),
    "no image": (not_an_image, "TIFF"),
    "image of 16 bits": (odd_image, "8-bit RGB"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_sections_are_refused_by_train_and_check(fault, broken, tmp_path, monkeypatch, capsys):
    damage, expected = FAULTS[fault]
    damage(broken)
    out = tmp_path / "run"
    assert run(monkeypatch, "train", broken, "--test", "B", "--out", out, *SMALL, *SET) == 2
    assert_one_error(capsys, expected)
    assert not list(out.rglob("*.safetensors"))
    assert not (out / "metrics.json").exists()
    assert run(monkeypatch, "check", broken, "--out", tmp_path / "overlays") == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "TISSUE", "--test", "Z", "--out", "OUT"], "'Z'"),
        (["train", "TISSUE", "--test", "A,B", "--out", "OUT"], "held out"),
        (["train", "TISSUE", "--test", "B", "--out", "OUT", "--panel", "PANEL"], "NOSUCHGENE"),
        (["train", "TISSUE", "--test", "B", "--out", "OUT", "--n-genes", "5000"], "5000"),
        (["train", "TISSUE", "--out", "OUT", "--panel", "PANEL", "--n-genes", "20"], "taken whole"),
        (["train", "TISSUE", "--test", "B", "--out", "OUT", "--set", "widht=3"], "width"),
        (["train", "TISSUE", "--test", "B", "--out", "OUT", "--set", "width=wide"], "expected int"),
        (["train", "TISSUE", "--test", "B", "--out", "OUT", "--set", "scales=[1,7]", "--n-genes", "20"], "scales"),
        (["train", "TISSUE", "--test", "B", "--out", "OUT", "--model", "magic"], "magic"),
        (["train", "TISSUE", "--test", "B", "--out", "OUT", "--preset", "huge"], "huge"),
        (["train", "TISSUE", "--test", "B", "--out", "OUT", "--encoder", "eye"], "efficientnet_lite0"),
        (["train", "TISSUE", "--test", "B", "--out", "OUT", "--patch", "square"], "hest"),
        (["train", "NOWHERE", "--test", "B", "--out", "OUT"], "NOWHERE"),
        (["predict", "TISSUE", "--model", "RUN", "--out", "OUT/p.h5ad"], "expected one section"),
        (["predict", "TISSUE:Z", "--model", "RUN", "--out", "OUT/p.h5ad"], "'Z'"),
        (["predict", "TISSUE:B", "--model", "NOWHERE", "--out", "OUT/p.h5ad"], "not a checkpoint"),
        (["predict", "TISSUE:B", "--model", "RUN", "--out", "OUT/p.h5ad", "--decode", "beam"], "beam"),
        (["evaluate", "NOWHERE", "TISSUE:B", "--out", "OUT"], "NOWHERE"),
        (["evaluate", "PANEL", "TISSUE:B", "--out", "OUT"], "h5ad"),
        (["evaluate", "RUN/predictions/B.h5ad", "TISSUE:A", "--out", "OUT"], "spots"),
        (["panel", "TISSUE", "--out", "OUT/panel.json", "--recipe", "best"], "clean"),
        (["check", "NOWHERE", "--out", "OUT"], "NOWHERE"),
    ],
)
def test_wrong_words_are_one_clear_line(words, expected, trained, two, store, tmp_path, monkeypatch, capsys):
    (tmp_path / "panel.txt").write_text("KRT8\nNOSUCHGENE\n")
    names = {"TISSUE": two, "OUT": tmp_path / "out", "RUN": trained[0], "PANEL": tmp_path / "panel.txt"}
    for name, path in names.items():
        words = [word.replace(name, str(path)) for word in words]
    if words[0] in ("train", "predict"):
        words += ["--features", str(store)]
    assert run(monkeypatch, *words) == 2
    assert_one_error(capsys, expected)
    left = [p for p in (tmp_path / "out").rglob("*") if p.is_file() and p.parent.name != "resume"]
    assert [p.name for p in left if p.name != "panel.json"] == []


def test_a_section_that_lacks_a_panel_gene_is_named(trained, broken, tmp_path, monkeypatch, capsys):
    adata = anndata.read_h5ad(broken / "st" / "B.h5ad")
    gene = json.loads((trained[0] / "panel.json").read_text())["genes"][3]
    adata[:, adata.var_names != gene].write_h5ad(broken / "st" / "B.h5ad")
    panel = trained[0] / "panel.json"
    words = ["train", broken, "--test", "B", "--out", tmp_path / "run", "--panel", panel, *SMALL[2:], *SET]
    assert run(monkeypatch, *words) == 2
    assert_one_error(capsys, f"section B: 1 of 20 panel genes missing ({gene})")


def test_predict_decodes_as_it_is_told(trained, two, store, tmp_path, monkeypatch, capsys):
    words = ["predict", f"{two}:B", "--model", trained[0], "--features", store, "--seed", "3"]
    drawn = [*words, "--decode", "sample", "--set", "top_k=1", "--set", "layers=[sd, q25]", "--samples", "2"]
    assert run(monkeypatch, *drawn, "--out", tmp_path / "a.h5ad") == 0
    assert run(monkeypatch, *words, "--decode", "greedy", "--out", tmp_path / "b.h5ad") == 0
    sampled, greedy = (anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in "ab")
    assert set(contract.layer_names(sampled)) == {"sd", "q25"}
    assert sampled.uns["genar"]["prediction"]["top_k"] == 1
    assert (sampled.X != greedy.X).nnz == 0  # the likeliest class alone is the likeliest class
    layers = {"mean", "log1p_mean", "p_zero", "sd", "q05", "q25", "q50", "q75", "q95"}
    assert set(contract.layer_names(greedy)) == layers
    assert run(monkeypatch, *words, "--set", "width=3", "--out", tmp_path / "c.h5ad") == 2
    assert_one_error(capsys, "width")


def test_train_takes_gene_sets_context_and_another_output(two, store, tmp_path, monkeypatch):
    section = read_section(f"{two}:A")
    genes = [str(gene) for gene in section.var_names[:20]]
    (tmp_path / "panel.txt").write_text("\n".join(genes))
    (tmp_path / "sets.gmt").write_text("one\tx\t" + "\t".join(genes[::-1]))
    words = ["train", two, "--test", "B", "--out", tmp_path / "run", "--features", store, *SMALL[2:], *SET]
    words += ["--panel", tmp_path / "panel.txt"]
    more = [f"order={tmp_path / 'sets.gmt'}", "output=continuous", "final_loss=squared_error"]
    more += ["widths_um=[112]", "context_spots=[3]"]
    assert run(monkeypatch, *words, *sets(*more)) == 0
    config = json.loads((tmp_path / "run" / "checkpoint" / "config.json").read_text())
    assert config["model"]["scales"]["order"] == list(range(20))[::-1]
    assert config["features"]["context_spots"] == [3]
    assert config["model"]["config"]["n_features"] == 2 * 1280
    out = tmp_path / "again.h5ad"
    again = ["predict", f"{two}:B", "--model", tmp_path / "run", "--features", store, "--out", out]
    assert run(monkeypatch, *again) == 0
    first = anndata.read_h5ad(tmp_path / "run" / "predictions" / "B.h5ad")
    assert (anndata.read_h5ad(out).X != first.X).nnz == 0


def test_check_tells_as_json_why_a_run_would_fail(broken, tmp_path, monkeypatch, capsys):
    damage_counts("log")(broken)
    assert run(monkeypatch, "check", broken, "--out", tmp_path / "overlays", "--json") == 2
    told = json.loads(capsys.readouterr().out)
    assert told["status"] == "wrong input"
    assert "log-transformed" in told["error"]
    assert [row["section"] for row in told["sections"]] == ["A", "B"]


def test_panel_and_features_commands(two, tmp_path, monkeypatch, capsys):
    panel = tmp_path / "panel.json"
    assert run(monkeypatch, "panel", two, "--out", panel, "--n-genes", "15", "--exclude", "B") == 0
    assert len(json.loads(panel.read_text())["genes"]) == 15
    for _ in range(2):  # the second reads what the first stored
        assert run(monkeypatch, "features", two, "--out", tmp_path / "features", "--views", "1") == 0
    assert len(list((tmp_path / "features").glob("*.zarr"))) == 4  # two widths
    toy = ("width=16", "depth=1", "heads=2", "max_epochs=1", "max_count=63")
    words = ["train", two, "--features", tmp_path / "features", "--views", "1", "--panel", panel]
    words += sets(*toy)
    assert run(monkeypatch, *words, "--out", tmp_path / "run") == 0
    assert len(list((tmp_path / "features").glob("*.zarr"))) == 4  # all that the default model reads was there


def test_predictions_open_in_scanpy(trained):
    import scanpy as sc

    prediction = sc.read_h5ad(trained[0] / "predictions" / "B.h5ad")
    sc.pp.normalize_total(prediction)
    sc.pp.log1p(prediction)
    assert np.isfinite(prediction.X.data).all()


@pytest.mark.real
def test_real_sections_pass_the_check(shared, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "check", shared / "data" / "her2st", "--json", "--out", tmp_path) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["sections"]
    assert [row["section"] for row in rows] == ["SPA138", "SPA139", "SPA140", "SPA141"]
    assert all(abs(row["mpp_by"]["image"] / row["mpp"] - 1) < 0.01 for row in rows)
    assert read_section(shared / "data" / "her2st" / "st" / "SPA138.h5ad").n_obs == 181


def test_train_reads_features_of_another_precision_and_predict_the_same(two, tmp_path, monkeypatch, capsys):
    store, encoder = tmp_path / "store", ("--encoder", "genar.bench.toy:narrow_encoder", "--views", 1)
    words = ["--out", store, *encoder, "--precision", "bf16", "--widths-um", 112]
    assert run(monkeypatch, "features", two, *words) == 0
    stores = sorted(path.name for path in store.glob("*.zarr"))
    words = ["--model", "ridge", "--features", store, *encoder, "--n-genes", 20, "--encoder-precision", "bf16"]
    assert run(monkeypatch, "train", two, "--test", "B", "--out", tmp_path / "run", *words) == 0
    again = ["predict", f"{two}:B", "--model", tmp_path / "run", "--out", tmp_path / "b.h5ad", "--features", store]
    assert run(monkeypatch, *again, *encoder[:2]) == 0
    assert stores
    assert sorted(path.name for path in store.glob("*.zarr")) == stores  # nothing was embedded anew
    first, second = (anndata.read_h5ad(p) for p in (tmp_path / "run/predictions/B.h5ad", tmp_path / "b.h5ad"))
    assert (first.X != second.X).nnz == 0
    capsys.readouterr()
    assert run(monkeypatch, "train", two, "--out", tmp_path / "x", "--encoder-precision", "int8") == 2
    assert "fp32, bf16, fp16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("check", "nowhere"), "no such file or folder"),
        (("report", "runs/frist"), "no such file or folder"),
        (("export", "nofile.h5ad", "--out", "x.geojson"), "nofile.h5ad: no such file"),
        (("train", "TISSUE", "--panel", "nofile.txt", "--out", "x"), "--panel nofile.txt: no such file"),
        (("predict", "TISSUE:SIM1", "--model", "runs/frst", "--out", "x.h5ad"), "no folder runs/frst here"),
        (("predict", "TISSUE:SIM1", "--model", "runs/first", "--out", "x.csv"), ".h5ad, .geojson"),
    ],
)
def test_what_is_not_there_is_told_so(words, says, tissue, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *(word.replace("TISSUE", str(tissue)) for word in words)) == 2
    assert says in capsys.readouterr().err


@pytest.fixture(scope="module")
def sections(tissue):
    return read_sections(tissue)


@pytest.mark.parametrize("command", ["panel", "groups"])
def test_a_section_to_exclude_that_is_not_there_is_told(command, tissue, sections, tmp_path, monkeypatch, capsys):
    Panel(tuple(sections[0].var_names[:10]), "given").write(tmp_path / "panel.json")
    more = ["--panel", tmp_path / "panel.json"] if command == "groups" else []
    assert run(monkeypatch, command, tissue, "--exclude", "SIM9", "--out", tmp_path / "x.json", *more) == 2
    assert "'SIM9' is no section" in capsys.readouterr().err
