"""Training on pixels: `genar train --input patches`, and prediction with what it made."""

import json
import re
from dataclasses import replace

import anndata
import numpy as np
import pytest
import torch

from commands import run
from genar import encoders, pixels
from genar.data import contract, read_sections
from genar.data.simulate import TissueConfig, write_tissue
from genar.data.slide import open_slide
from genar.errors import InputError
from genar.features import Inputs
from genar.models import Spots, model_class, model_names
from genar.models.checkpoint import load_checkpoint
from genar.models.st_net import STNet
from genar.models.triplex import Triplex
from genar.pixels import PixelRecipe, check_images, input_settings, no_features, read_pixels
from genar.training import fit, make_spots, train_config_from_dict

PX = 32
SET = ["--set", "max_epochs=20", "--set", "batch_size=13", "--set", "lr=0.01", "--n-genes", "6"]


class Tiny(torch.nn.Sequential):
    """In place of DenseNet-121."""

    n_outputs = 8

    def __init__(self):
        layers = torch.nn.Conv2d(3, 8, 5, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
        super().__init__(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


@pytest.fixture(scope="module")
def tissue(tmp_path_factory):
    config = TissueConfig(n_rows=5, n_cols=5, n_genes=80, counts_per_nucleus=20)
    return write_tissue(tmp_path_factory.mktemp("tissue"), ("A", "B"), seed=1, config=config)


@pytest.fixture(autouse=True)
def _small_patches(monkeypatch):
    for model in (STNet, Triplex):
        monkeypatch.setattr(model, "crop_px", PX)


@pytest.fixture
def no_encoder(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(encoders, "load_encoder", refuse)


def train(monkeypatch, tissue, out, *words):
    return run(monkeypatch, "train", tissue, "--test", "B", "--out", out, *SET, *words)


@pytest.mark.usefixtures("no_encoder")
def test_st_net_end_to_end_by_the_command(tissue, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("genar.models.st_net.PatchNet", Tiny)
    monkeypatch.setattr("genar.models.st_net._FEW_GENES", 1)  # six are enough here
    monkeypatch.setattr(pixels, "IN_MEMORY_BYTES", 1000)  # so that the patches lie in a file
    out, again = tmp_path / "run", tmp_path / "again.h5ad"
    assert train(monkeypatch, tissue, out, "--model", "st_net", "--input", "patches") == 0
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+) nats", capsys.readouterr().out)]
    assert len(losses) == 20
    assert losses[-1] < 0.95 * losses[0]
    assert not (out / "resume").exists()

    facts = json.loads((out / "run.json").read_text())
    assert facts["input"] == "patches"
    assert facts["features"] == {}
    expected = {"input": "patches", "patch": "hest", "width_um": 112.0, "crops": [1.0], "crop_px": PX}
    assert facts["patches"] == expected == load_checkpoint(out).features
    assert set(json.loads((out / "metrics.json").read_text())["B"]) == {"st_net", "mean"}

    section = tissue / "st" / "B.h5ad"
    assert run(monkeypatch, "predict", section, "--model", out, "--out", again) == 0
    one, two = (anndata.read_h5ad(path) for path in (out / "predictions" / "B.h5ad", again))
    assert contract.layer_names(one) == contract.layer_names(two)
    for name in contract.layer_names(one):
        assert np.array_equal(one.layers[name], two.layers[name])
    assert (one.X != two.X).nnz == 0
    assert not list(tmp_path.glob("genar-*"))
    assert np.ptp(one.layers["log1p_mean"], axis=0).max() > 0  # it looks at the patch


def test_triplex_trains_on_patches_alone(tissue):
    section = read_sections(tissue)[0]
    recipe = PixelRecipe.of(Triplex)
    genes = list(section.var_names[:4])
    patches = read_pixels([section], recipe, tissue)
    spots = make_spots(section, no_features(section.n_obs), genes, patches=patches)
    settings = {"width": 16, "heads": (2, 2, 2), "spots_per_step": 8, "input": "patches"}
    torch.manual_seed(0)
    model = Triplex.create(0, spots, "small", settings)
    before = model.own.trunk.conv1.weight.detach().clone()
    fit(model, spots, train_config_from_dict({"max_epochs": 2}, own=Triplex.train_defaults))
    assert not torch.equal(model.own.trunk.conv1.weight, before)
    batch = spots.batch()
    predicted = model(batch)
    assert torch.isfinite(predicted).all()
    changed = batch.patches.clone()
    changed[0] = 255 - changed[0]  # the wider views hear of it
    assert not torch.equal(model(replace(batch, patches=changed))[1], predicted[1])


def test_patches_are_the_slides_own(tissue):
    section = read_sections(tissue)[1]
    recipe = PixelRecipe(crops=(1.0, 2.5), crop_px=PX)
    read = read_pixels([section], recipe, tissue, workers=1)
    assert read.shape == (section.n_obs, 2, 3, PX, PX)
    assert torch.equal(read, read_pixels([section], recipe, tissue, workers=0))
    slide, mpp = open_slide(contract.slide_path(section)), contract.mpp(section)
    for number, width_um in enumerate((112, 280)):
        expected = slide.read_patch(contract.coords_px(section)[7], width_um, PX, mpp=mpp)
        assert np.array_equal(read[7, number].permute(1, 2, 0).numpy(), expected)


def test_sections_come_one_after_the_other_in_memory_or_in_a_file(tissue, tmp_path, monkeypatch):
    sections, recipe = read_sections(tissue), PixelRecipe(crop_px=8)
    together = read_pixels(sections, recipe, tmp_path)
    assert not list(tmp_path.iterdir())
    assert torch.equal(together, torch.cat([read_pixels([s], recipe, tmp_path) for s in sections]))
    monkeypatch.setattr(pixels, "IN_MEMORY_BYTES", 0)
    assert torch.equal(together, read_pixels(sections, recipe, tmp_path))
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [together.numel()]
    monkeypatch.setattr(pixels.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(InputError, match="GiB are free"):
        read_pixels(sections, recipe, tmp_path)
    assert len(read_pixels([], recipe, tmp_path).split([])) == 0


def toy(n=16):
    torch.manual_seed(0)
    patches = torch.randint(256, (n, 2, 3, 4, 4), dtype=torch.uint8)
    xy = torch.rand(n, 2)
    features = torch.from_numpy(no_features(n))
    return Spots(features, xy, xy, torch.arange(n), torch.zeros(n).long(), patches=patches)


def test_the_drawn_views_are_the_eight_of_the_features():
    spots = toy()
    views = torch.arange(16) % 8
    batch = spots.batch(slice(None), views)
    assert batch.features.shape == (16, 0)
    for row, view in enumerate(views.tolist()):
        image = spots.patches[row].permute(0, 2, 3, 1).numpy()  # crops, height, width, colour
        expected = np.rot90(image, view % 4, (1, 2))
        expected = expected[:, :, ::-1] if view >= 4 else expected
        assert np.array_equal(batch.patches[row].permute(0, 2, 3, 1).numpy(), expected)
    assert torch.equal(spots.batch(slice(2, 4)).patches, spots.patches[2:4])  # at prediction upright


def test_choosing_spots_leaves_the_patches_where_they_are():
    spots = toy()
    some = spots.rows(torch.tensor([5, 3, 9])).rows(torch.tensor([2, 0]))
    assert some.patches is spots.patches
    assert torch.equal(some.batch().patches, spots.patches[[9, 5]])
    assert torch.equal(some.batch(torch.tensor([1])).patches, spots.patches[[5]])
    assert Spots.join([some, some]).patches is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "ridge", "--input", "patches"], r"ridge takes features, not patches; choose one of .*st_net"),
        (["--model", "st_net", "--input", "sound"], "features, patches"),
        (["--model", "st_net", "--preset", "official"], "pass --input patches"),
        (["--model", "st_net", "--input", "patches", "--set", "input=features"], "pass --input features"),
        (["--model", "st_net", "--input", "patches", "--set", "context_spots=4"], "context_spots are of features"),
        (["--model", "st_net", "--input", "patches", "--patch", "round"], "patch convention"),
        (
            ["--model", "st_net", "--input", "patches", "--encoder", "resnet18", "--views", "8", "--features", "f"],
            "--encoder, --views, --features would do nothing here",
        ),
    ],
)
def test_refusals_are_one_line_before_any_work(words, told, tissue, tmp_path, monkeypatch, capsys):
    assert train(monkeypatch, tissue, tmp_path / "run", *words) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(told, error)
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_section_without_image_is_refused(tissue):
    section = read_sections(tissue)[0]
    section.uns[contract.GENAR][contract.SLIDE] = ""
    check_images([section])
    with pytest.raises(InputError, match=r"section A: no slide image .*--input patches"):
        read_pixels([section], PixelRecipe(crop_px=8), tissue)


def test_settings_name_the_input():
    named = input_settings("patches", "st_net", "official", {}, Inputs())
    assert named == {"input": "patches"} == input_settings("patches", "st_net", "small", {}, Inputs())
    assert input_settings("patches", "triplex", "small", {}, Inputs())["spots_per_step"] == 48
    assert input_settings("patches", "triplex", "small", {"spots_per_step": 9}, Inputs())["spots_per_step"] == 9
    assert "spots_per_step" not in input_settings("patches", "triplex", "official", {}, Inputs())
    assert input_settings("features", "ridge", "small", {}, Inputs(context_spots=(4,))) == {}


def test_a_recipe_comes_back_from_its_facts():
    recipe = PixelRecipe("genar", crops=(1.0, 2.0, 4.0), crop_px=112)
    assert PixelRecipe.from_facts(json.loads(json.dumps(recipe.facts))) == recipe
    with pytest.raises(InputError, match="above 0"):
        PixelRecipe(crops=(1.0, 0.0))


@pytest.mark.parametrize("name", [name for name in model_names() if "patches" in model_class(name).inputs])
def test_every_model_of_pixels_learns_from_patches_alone(name):
    cls, n = model_class(name), 4
    torch.manual_seed(0)
    xy = torch.tensor([[0.0, 0.0], [200.0, 0.0], [0.0, 200.0], [200.0, 200.0]])
    patches = torch.randint(256, (n, len(cls.crops), 3, cls.crop_px, cls.crop_px), dtype=torch.uint8)
    where = xy, xy / 200, torch.arange(n), torch.zeros(n).long()
    spots = Spots(torch.from_numpy(no_features(n)), *where, torch.randint(9, (n, 3)), patches=patches)
    model = cls.create(0, spots, "small", {"input": "patches"})
    model.prepare(spots)
    loss = model.train().loss(spots.batch(slice(None), torch.tensor([0, 3, 5, 7]))).total
    loss.backward()
    assert loss.isfinite()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with torch.inference_mode():
        assert model.eval().predict(spots.batch()).point.shape == (n, 3)
