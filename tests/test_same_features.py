"""One recipe has one store, however its encoder, its weights and its numbers are given."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from commands import run
from genar import encoders
from genar.errors import InputError
from genar.features import recipe_of, store_path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "r10.safetensors"
    save_file(timm.create_model("resnet10t", pretrained=False).state_dict(), path)
    return path


def test_a_network_of_timm_has_one_name(weights, tissue_sections, tmp_path):
    found = {name: recipe_of(encoders.load_encoder(name, weights=weights)) for name in ("resnet10t", "timm/resnet10t")}
    assert {recipe.encoder for recipe in found.values()} == {"timm/resnet10t"}
    assert len({store_path(tissue_sections[0], recipe, tmp_path) for recipe in found.values()}) == 1
    assert encoders.canonical("resnet18") == "resnet18"  # a row of the table
    assert encoders.canonical("genar.bench.toy:narrow_encoder") == "genar.bench.toy:narrow_encoder"


def test_numbers_of_any_kind_name_the_same_store(tissue_sections, tmp_path):
    encoder = encoders.load_encoder("genar.bench.toy:narrow_encoder")
    widths, views = (112, 112.0, np.float32(112), np.int64(112)), (8, np.int64(8))
    recipes = [recipe_of(encoder, width_um=width, views=n) for width in widths for n in views]
    assert len({store_path(tissue_sections[0], recipe, tmp_path) for recipe in recipes}) == 1
    with pytest.raises(InputError, match=r"views must be 1 or 8, found 1\.5"):
        recipe_of(encoder, views=1.5)  # pyright: ignore


def snapshot(cache, name):
    folder = cache / "snapshots" / name
    folder.mkdir(parents=True)
    save_file({"name": torch.tensor([float(len(name))])}, folder / "model.safetensors")
    return folder / "model.safetensors"


def test_of_a_hub_cache_the_snapshot_of_main_is_taken(tmp_path):
    from genar.encoders.weights import find_weights

    row = encoders.ENCODERS["resnet18"]
    first = snapshot(tmp_path, "aaaa")
    assert find_weights(row, tmp_path)[0] == first
    second = snapshot(tmp_path, "bbbb")
    with pytest.raises(InputError, match="holds 2 snapshots of a model; name one"):
        find_weights(row, tmp_path)
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("bbbb\n")
    assert find_weights(row, tmp_path)[0] == second


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--encoder", "nonsense"), "'nonsense' is not known"),
        (("--patch", "foo"), "patch convention 'foo' is not known"),
        (("--views", 3), "views must be 1 or 8, found 3"),
        (("--precision", "fp8"), "fp8"),
    ],
)
def test_what_is_wrong_with_the_encoder_is_said_before_sections_are_read(words, told, tmp_path, monkeypatch, capsys):
    (tmp_path / "st").mkdir()
    (tmp_path / "st" / "S1.h5ad").write_text("no AnnData")
    assert run(monkeypatch, "features", tmp_path, "--out", tmp_path / "store", *words) == 2
    assert told in capsys.readouterr().err
