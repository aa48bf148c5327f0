"""Encoders outside the table: any name of timm, and functions of a user's own."""

import os
import sys

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

from genar import encoders
from genar.encoders import EncoderRow, load_encoder
from genar.errors import InputError
from small_encoders import random_patches


@pytest.mark.parametrize("name", ["timm/resnet10t", "test_vit2"])
def test_any_timm_name_is_an_encoder(name, tmp_path):
    short = name.removeprefix("timm/")
    network = timm.create_model(short, pretrained=False, num_classes=0).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    encoder = load_encoder(name, weights=tmp_path)
    facts = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(short).to_dict())
    assert (encoder.row.mean, encoder.row.std) == (tuple(facts["mean"]), tuple(facts["std"]))
    assert encoder.row.input_px == facts["input_size"][1]
    patch = random_patches(encoder.row, 1)
    transform = create_transform(**{**facts, "crop_pct": 1.0})
    with torch.no_grad():
        expected = network(transform(Image.fromarray(patch[0]))[None])
    torch.testing.assert_close(encoder(patch), expected, rtol=1e-4, atol=1e-4)
    assert encoder.width == expected.shape[1]


OWN = """
import torch
from genar.encoders import Encoder, EncoderRow

class Mean(torch.nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))
    def forward(self, x):
        return self.scale * x.mean(dim=(2, 3))

FACTS = {"input_px": 32, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

def pair():
    return Mean(), FACTS

def darker():
    return Mean(), {**FACTS, "mean": (0.4, 0.4, 0.4), "licence": "MIT", "views": 8, "mpp": 0.25}

def whole():
    row = EncoderRow("x", "", "", 3, 32, (0.5,) * 3, (0.5,) * 3, "MIT", library="")
    return Encoder(row, Mean())

def with_weights(path):
    return Mean(float(path.read_text())), FACTS

def nothing():
    return 3

def no_facts():
    return Mean(), {"mean": (0.5, 0.5, 0.5)}

def image():
    return torch.nn.Identity(), FACTS
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_encoder.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_encoder", None)


def test_own_function_may_return_a_module_with_facts_or_an_encoder(own):
    patch = random_patches(EncoderRow("", "", "", 3, 32, (0,) * 3, (1,) * 3, ""), 2)
    expected = torch.from_numpy((patch / 255 - 0.5) / 0.5).float().mean(dim=(1, 2))
    for function in ("pair", "whole"):
        encoder = load_encoder(f"own_encoder:{function}")
        assert encoder.row.name == f"own_encoder:{function}"
        torch.testing.assert_close(encoder(patch), expected, rtol=1e-5, atol=1e-5)
    assert os.getcwd() not in sys.path


def test_own_facts_are_part_of_the_identity(own):
    pair, darker = (load_encoder(f"own_encoder:{name}") for name in ("pair", "darker"))
    assert pair.weights_sha256 != darker.weights_sha256
    assert (darker.row.licence, darker.row.views, darker.row.mpp) == ("MIT", 8, 0.25)
    (own / "scale.txt").write_text("2")
    scaled = load_encoder("own_encoder:with_weights", weights=own / "scale.txt")
    assert scaled.weights_sha256 != pair.weights_sha256


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("own_encoder:missing", "has no function missing"),
        ("no_such_module:f", "cannot be imported"),
        ("own_encoder:nothing", "expected an Encoder or a pair"),
        ("own_encoder:no_facts", "expected the facts input_px, mean, std"),
        ("own_encoder:image", r"expected features \[B, F\]"),
        ("resnet19", "not known"),
        ("timm/resnet19", "not known"),
    ],
)
def test_what_is_no_encoder_is_refused(own, name, says):
    with pytest.raises(InputError, match=says) as caught:
        load_encoder(name)
    assert "\n" not in str(caught.value)


FAULTY = """
import torch
from torch import nn

FACTS = {"input_px": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}

def missing():
    raise FileNotFoundError("weights.pt")

def needs(path):
    return nn.Identity(), FACTS

def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(7, 2)), FACTS
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_one:missing", r"called with no arguments, ends in FileNotFoundError \(weights.pt\)"),
        ("own_one:needs", "called with no arguments, ends in TypeError"),
        ("own_one:narrow", "takes no patch of 32 px: RuntimeError"),
        ("own_two:any", "importing own_two ends in NameError"),
        ("own_three:any", "importing own_three ends in SyntaxError"),
        ("timm/resnet18.bogus", "timm refuses it .*is its name, with the tag, right"),
    ],
)
def test_faults_of_a_users_encoder_are_told_in_a_line(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file, text in (("own_one", FAULTY), ("own_two", "undefined + 1\n"), ("own_three", "def (\n")):
        (tmp_path / f"{file}.py").write_text(text)
    with pytest.raises(InputError, match=f"encoder {name}: .*{message}") as raised:
        encoders.load_encoder(name)
    assert "\n" not in str(raised.value)
