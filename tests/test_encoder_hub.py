"""Weights of encoders from a hub on 127.0.0.1: fetched once, refused, missing."""

import os
import subprocess
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from commands import run
from genar import encoders
from genar.encoders import ENCODERS, load_encoder
from genar.errors import InputError
from serving import Quiet, serving
from small_encoders import random_network, small, write_resnet18

GATED = ("/MahmoodLab/", "/paige-ai/", "/bioptimus/")
FILE = "/timm/resnet18.tv_in1k/resolve/main/model.safetensors"
ALL = (
    FILE,
    "/owkin/phikon/resolve/main/model.safetensors",
    "/owkin/phikon/resolve/main/config.json",
)


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A repository's files."""
    folder = tmp_path_factory.mktemp("hub")
    save_file(random_network(ENCODERS["resnet18"]).state_dict(), folder / "r18.safetensors")
    random_network(small("phikon")).save_pretrained(folder / "phikon")
    torch.save(random_network(small("h0_mini")).state_dict(), folder / "h0.bin")
    read = {
        "/timm/resnet18.tv_in1k/resolve/main/model.safetensors": (folder / "r18.safetensors").read_bytes(),
        "/bioptimus/H0-mini/resolve/main/pytorch_model.bin": (folder / "h0.bin").read_bytes(),
    }
    for name in ("config.json", "model.safetensors"):
        read[f"/owkin/phikon/resolve/main/{name}"] = (folder / "phikon" / name).read_bytes()
    return read


@contextmanager
def serve(content):
    """A hub of these files: its address, and what it was asked."""
    asked = []

    class Handler(Quiet, BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            asked.append((self.command, self.path, self.headers.get("Authorization")))
            if self.path.startswith(GATED) and self.headers.get("Authorization") != "Bearer hf_accepted":
                named = self.path.startswith("/MahmoodLab/")  # the others: a bare refusal, as of a proxy
                return self.refuse(401 if named else 403, "GatedRepo" if named else None)
            if self.path not in content:
                known = any(path.split("/resolve")[0] == self.path.split("/resolve")[0] for path in content)
                return self.refuse(404, "EntryNotFound" if known else "RepoNotFound")
            body = content[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{abs(hash(self.path)):x}"')
            self.send_header("X-Repo-Commit", "a" * 40)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def refuse(self, code, why):
            self.send_response(code)
            if why:
                self.send_header("X-Error-Code", why)
                self.send_header("X-Error-Message", f"{why}: told by the hub")
            self.send_header("Content-Length", "0")
            self.end_headers()

    with serving(Handler) as url:
        yield url, asked


@pytest.fixture
def hub(content):
    with serve(content) as served:
        yield served


LOAD = """
import sys
from dataclasses import replace
from genar import encoders
from genar.encoders import ENCODERS, load_encoder
from genar.errors import InputError
h0_mini = ENCODERS["h0_mini"]
ENCODERS["h0_mini"] = replace(h0_mini, arguments={**h0_mini.arguments, "depth": 1, "img_size": 56})
for name in sys.argv[1:]:
    try:
        print(name, "loaded", load_encoder(name).weights_sha256, sep="|")
    except InputError as error:
        print(name, "refused", error, sep="|")
"""


def load_elsewhere(endpoint, home, *names, token=None, offline="0"):
    """In a process of its own, as the hub's client reads its variables once: name -> what came of it."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": offline, "NO_PROXY": "*"}
    for name in ("HF_HUB_CACHE", "HF_TOKEN"):
        env.pop(name, None)
    if token:
        env["HF_TOKEN"] = token
    run = subprocess.run([sys.executable, "-c", LOAD, *names], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-2000:]
    return {line.split("|")[0]: line.split("|")[1:] for line in run.stdout.splitlines()}


def test_hub_gives_refuses_and_lacks(hub, tmp_path):
    endpoint, asked = hub
    told = load_elsewhere(endpoint, tmp_path, "resnet18", "phikon", "uni", "virchow", "resnet50", "timm/resnet34")
    assert told["resnet18"][0] == told["phikon"][0] == "loaded"
    for name, page in (("uni", "MahmoodLab/UNI"), ("virchow", "paige-ai/Virchow")):
        assert told[name][0] == "refused"
        assert f"https://huggingface.co/{page}" in told[name][1]
        assert "hf auth login" in told[name][1]
    assert "timm/resnet50.tv_in1k" in told["resnet50"][1]
    assert "encoder timm/resnet34: its weights" in told["timm/resnet34"][1]
    fetched = [path for command, path, _ in asked if command == "GET" and path in ALL]
    assert len(fetched) == len(set(fetched)) == 3
    again = load_elsewhere(endpoint, tmp_path, "resnet18", "phikon", "uni", offline="1")
    assert (again["resnet18"], again["phikon"]) == (told["resnet18"], told["phikon"])
    assert "https://huggingface.co/MahmoodLab/UNI" in again["uni"][1]
    assert len([path for command, path, _ in asked if command == "GET" and path in ALL]) == 3


def test_granted_access_is_used_and_a_pickled_file_found(hub, tmp_path):
    told = load_elsewhere(hub[0], tmp_path, "h0_mini", token="hf_accepted")
    assert told["h0_mini"][0] == "loaded"
    assert {token for _, path, token in hub[1] if path.endswith("pytorch_model.bin")} == {"Bearer hf_accepted"}


def test_command_refused_by_the_hub_ends_with_2_and_one_line(tmp_path, monkeypatch, capsys, tissue):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))  # offline, nothing in the cache
    assert run(monkeypatch, "features", tissue, "--encoder", "uni", "--out", tmp_path / "store") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "https://huggingface.co/MahmoodLab/UNI" in line
    assert "hf auth login" in line
    assert not (tmp_path / "store").exists()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_resnet18(tmp_path_factory.mktemp("weights"))


def test_weights_are_fetched_from_the_hub_once(weights, tmp_path, monkeypatch):
    expected = load_encoder("resnet18", weights=weights).weights_sha256
    with serve({FILE: weights.read_bytes()}) as (endpoint, asked):
        assert load_elsewhere(endpoint, tmp_path, "resnet18") == {"resnet18": ["loaded", expected]}
        assert asked.count(("GET", FILE, None)) == 1
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        assert load_encoder("resnet18").weights_sha256 == expected  # offline now
        assert asked.count(("GET", FILE, None)) == 1


def test_offline_hub_encoder_asks_for_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"encoder resnet18: .*timm/resnet18\.tv_in1k.*--weights FILE") as caught:
        load_encoder("resnet18")
    assert "\n" not in str(caught.value)


def test_weights_are_looked_for_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert encoders.weights_state("efficientnet_lite0") == "embedded"
    assert encoders.weights_state("genar.bench.toy:wide_encoder") == "embedded"
    assert encoders.weights_state("resnet18") == "offline"
    assert encoders.weights_state("timm/resnet18") == "offline"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert encoders.weights_state("resnet18") == "open"
    assert encoders.weights_state("uni") == "gated"
    assert encoders.hub_of("timm/resnet18").startswith("timm/resnet18")
    kept = tmp_path / "models--MahmoodLab--UNI"
    for file in ("refs/main", "snapshots/1/pytorch_model.bin"):
        (kept / file).parent.mkdir(parents=True)
        (kept / file).write_text("1")
    assert encoders.weights_state("uni") == "cached"
