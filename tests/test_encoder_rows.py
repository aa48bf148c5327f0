"""Every row of the table of encoders, its poolers, and the files that its weights come in."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

from commands import run
from genar.encoders import ENCODERS, Encoder, EncoderRow, build_network, load_encoder
from genar.encoders.networks import load_transformers, pooled
from genar.encoders.table import CLASS, CLASS_AND_MEAN
from genar.encoders.towers import POOLERS
from genar.encoders.weights import read_state
from genar.errors import InputError
from small_encoders import BIG, random_network, random_patches, small

TOWERS = [name for name, row in ENCODERS.items() if row.pooler]
GATED = ("/MahmoodLab/", "/paige-ai/", "/bioptimus/")
ALL = (
    "/timm/resnet18.tv_in1k/resolve/main/model.safetensors",
    "/owkin/phikon/resolve/main/model.safetensors",
    "/owkin/phikon/resolve/main/config.json",
)


# -- every row ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_row_gives_features_of_its_width_the_same_in_any_batch(name):
    row = small(name)
    encoder = Encoder(row, random_network(row))
    patches = random_patches(row, 8)
    together = encoder(patches)
    assert together.shape == (8, row.width)
    assert encoder.width == row.width
    assert together.dtype == torch.float32
    assert together.isfinite().all()
    assert not together.requires_grad
    apart = torch.cat([encoder(patch[None]) for patch in patches[:3]])
    scale = together.abs().max().item()
    torch.testing.assert_close(apart, together[:3], rtol=0, atol=1e-5 * max(1, scale))
    assert (together[0] - together[1]).abs().max() > 3e-5 * scale  # patches differ, so do their features


@pytest.mark.parametrize("name", ENCODERS)
def test_row_normalises_as_timm_does_for_its_facts(name):
    row, seen = ENCODERS[name], []

    class Spy(torch.nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.mean(dim=(2, 3))

    patch = random_patches(row, 1)
    Encoder(replace(row, pooling="own"), Spy())(patch)
    facts = {"input_size": (3, row.input_px, row.input_px), "mean": row.mean, "std": row.std, "crop_pct": 1.0}
    transform = create_transform(**resolve_data_config(pretrained_cfg=facts))
    torch.testing.assert_close(seen[0][0], transform(Image.fromarray(patch[0])), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BIG)
def test_whole_row_has_the_published_parameters_and_shape(name):
    """At full size, without numbers: shapes alone."""
    row = ENCODERS[name]
    with torch.device("meta"):
        network = build_network(row)
        features = pooled(network, row, torch.empty(2, 3, row.input_px, row.input_px))
    n_parameters = sum(parameter.numel() for parameter in network.parameters())
    assert n_parameters == pytest.approx(row.n_parameters, rel=5e-3)
    assert features.shape == (2, row.width)


def test_gigapath_has_exactly_its_published_parameters():
    with torch.device("meta"):
        network = build_network(ENCODERS["prov_gigapath"])
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_134_953_984


@pytest.mark.parametrize("name", ENCODERS)
def test_row_names_licence_access_and_source(name):
    row = ENCODERS[name]
    assert row.name == name
    assert row.licence
    assert row.source
    assert row.views in (1, 8)
    assert row.mpp == 0.5
    assert (row.hub_id == "") == (name == "efficientnet_lite0")
    json.dumps(row.facts())


@pytest.mark.parametrize("name", ["virchow2", "h0_mini", "uni2_h"])
@pytest.mark.parametrize("pooling", [CLASS, CLASS_AND_MEAN])
def test_pooling_takes_the_class_token_and_no_register(name, pooling):
    row = replace(small(name), pooling=pooling)
    network = random_network(row).eval()
    x = torch.randn(1, 3, row.input_px, row.input_px)
    n_registers = {"virchow2": 4, "h0_mini": 4, "uni2_h": 8}[name]
    with torch.no_grad():
        tokens, vector = network.forward_features(x), pooled(network, row, x)
    assert tokens.shape[1] == 1 + n_registers + 16
    width = tokens.shape[2]
    torch.testing.assert_close(vector[:, :width], tokens[:, 0])
    if pooling == CLASS_AND_MEAN:
        torch.testing.assert_close(vector[:, width:], tokens[:, 1 + n_registers :].mean(dim=1))
    else:
        assert vector.shape[1] == width


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["resnet18", "uni", "phikon_v2"])
def test_half_precision_is_close_and_not_the_same(name, precision):
    row = small(name)
    network, patches = random_network(row), random_patches(row, 2)
    full, half = (Encoder(row, network, precision=p)(patches) for p in ("fp32", precision))
    assert half.dtype == torch.float32
    difference = (full - half).abs().max() / full.abs().max()
    assert 1e-7 < difference < 0.05


def test_unknown_precision_is_refused():
    with pytest.raises(InputError, match="fp32, bf16, fp16"):
        load_encoder(precision="int8")


def by_hand(q, k, v, out):
    """Eight heads of attention of one query, head after head."""
    width, parts = q.shape[-1] // 8, []
    for head in range(8):
        part = slice(head * width, (head + 1) * width)
        weight = (k[:, :, part] @ q[:, part, None] / width**0.5).softmax(dim=1)
        parts.append((weight * v[:, :, part]).sum(dim=1))
    return out(torch.cat(parts, dim=1))


@pytest.mark.parametrize("kind", POOLERS)
def test_pooler_is_attention_of_one_query(kind):
    torch.manual_seed(0)
    pooler, tokens = POOLERS[kind](16, 24).eval(), torch.randn(3, 5, 24)
    for norm in (pooler.ln_q, pooler.ln_k):
        torch.nn.init.normal_(norm.weight)
    query, x = pooler.ln_q(pooler.query).expand(3, -1), pooler.ln_k(tokens)
    if kind == "joint":
        attn, bias = pooler.attn, pooler.attn.in_proj_bias.data.normal_().chunk(3)
        weights = (attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight)
        q, k, v = (z @ w.T + b for z, w, b in zip((query, x, x), weights, bias, strict=True))
        expected = by_hand(q, k, v, attn.out_proj)
    else:
        expected = by_hand(pooler.to_q(query), *pooler.to_kv(x).chunk(2, dim=2), pooler.to_out)
    torch.testing.assert_close(pooler(tokens), expected)


@pytest.mark.parametrize("name", TOWERS)
def test_tower_is_read_from_a_file_of_the_whole_model(name, tmp_path, monkeypatch):
    row = small(name)
    monkeypatch.setitem(ENCODERS, name, row)
    network, x = random_network(row), random_patches(row, 2)
    state = {f"visual.{key}" if name == "conch" else key: tensor for key, tensor in network.state_dict().items()}
    beside = {"visual.proj_contrast": torch.ones(2, 2), "text.w": torch.ones(2), "logit_scale": torch.ones(())}
    torch.save(state | (beside if name == "conch" else {}), tmp_path / "pytorch_model_vision.bin")
    torch.testing.assert_close(load_encoder(name, weights=tmp_path)(x), Encoder(row, network)(x))
    state.popitem()
    torch.save(state, tmp_path / "pytorch_model_vision.bin")
    with pytest.raises(InputError, match="not weights of this network"):
        load_encoder(name, weights=tmp_path)


def test_positions_of_a_smaller_grid_are_stretched(tmp_path, monkeypatch):
    row = small("conch_v1_5")
    monkeypatch.setitem(ENCODERS, row.name, row)
    network = random_network(row)
    state, width = network.state_dict(), network.trunk.embed_dim
    plane = torch.arange(2.0)[None, :, None, None].expand(1, 2, 2, width)  # falls from row to row
    state["trunk.pos_embed"] = torch.cat([torch.full((1, 1, width), 7.0), plane.reshape(1, 4, width)], dim=1)
    torch.save(state, tmp_path / "weights.bin")
    stretched = load_encoder(row.name, weights=tmp_path)._network.trunk.pos_embed
    assert stretched.shape == (1, 17, width)
    assert (stretched[0, 0] == 7).all()
    rows = stretched[0, 1:, 0].reshape(4, 4)
    torch.testing.assert_close(rows, rows[:, :1].expand(4, 4))
    assert (rows[1:, 0] > rows[:-1, 0]).all()


# -- weights of transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["phikon", "phikon_v2", "hibou_l"])
def test_transformers_weights_are_read_from_file_and_folder(name, tmp_path, monkeypatch):
    row = small(name)
    monkeypatch.setitem(ENCODERS, name, row)
    network = random_network(row)
    network.save_pretrained(tmp_path)
    x = random_patches(row, 1)
    expected = Encoder(row, network)(x)
    from_folder = load_encoder(name, weights=tmp_path)
    from_file = load_encoder(name, weights=tmp_path / "model.safetensors")
    torch.testing.assert_close(from_folder(x), expected)
    torch.testing.assert_close(from_file(x), expected)
    assert from_folder.weights_sha256 == from_file.weights_sha256


def test_transformers_weights_that_do_not_fit_are_refused(tmp_path):
    row = small("phikon")
    random_network(row).save_pretrained(tmp_path)
    state = read_state(tmp_path / "model.safetensors")
    name = "embeddings.cls_token"
    for broken in (
        {key: value for key, value in state.items() if key != name},
        {**state, "surplus": torch.zeros(2)},
        {**state, name: torch.zeros(1, 1, 3)},
    ):
        with pytest.raises(InputError, match="not weights of this network") as caught:
            load_transformers(row, broken, None, "here")
        assert "\n" not in str(caught.value)


def test_missing_transformers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"encoder phikon .*pip install 'genar\[transformers\]'"):
        load_encoder("phikon")


# -- local weights --------------------------------------------------------------------------------------------------


def test_timm_rows_read_pickled_weights_without_running_them(tmp_path, monkeypatch):
    row = small("uni")
    monkeypatch.setitem(ENCODERS, "uni", row)
    network, x = random_network(row), random_patches(row, 1)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    for given in (tmp_path, tmp_path / "pytorch_model.bin"):
        torch.testing.assert_close(load_encoder("uni", weights=given)(x), Encoder(row, network)(x))
    torch.save({"code": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="not a readable file of PyTorch weights") as caught:
        load_encoder("uni", weights=tmp_path)
    assert "\n" not in str(caught.value)


def test_folder_of_the_hubs_cache_is_understood(tmp_path):
    network = random_network(ENCODERS["resnet18"])
    place = tmp_path / "models--timm--resnet18.tv_in1k" / "snapshots" / "abc"
    place.mkdir(parents=True)
    save_file(network.state_dict(), place / "model.safetensors")
    loaded = load_encoder("resnet18", weights=place.parent.parent)
    assert loaded.weights_sha256 == Encoder(ENCODERS["resnet18"], network).weights_sha256


def test_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"expected model\.safetensors or pytorch_model\.bin"):
        load_encoder("resnet18", weights=tmp_path)


# -- encoders outside the table -------------------------------------------------------------------------------------


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


@pytest.fixture
def hub(content):
    asked = []

    class Handler(BaseHTTPRequestHandler):
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

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


LOAD = """
import sys
from dataclasses import replace
from genar.encoders import ENCODERS, load_encoder
from genar.errors import InputError
h0_mini = ENCODERS["h0_mini"]
ENCODERS["h0_mini"] = replace(h0_mini, arguments={**h0_mini.arguments, "depth": 1, "img_size": 56})
for name in sys.argv[1:]:
    try:
        print(name, "loaded", load_encoder(name).weights_sha256[:8], sep="|")
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


def test_encoders_command_lists_the_rows(monkeypatch, capsys):
    assert run(monkeypatch, "encoders", "--json") == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)["encoders"]}
    assert set(listed) == set(ENCODERS)
    assert listed["virchow2"]["pooling"] == CLASS_AND_MEAN
    assert listed["virchow2"]["gated"] is True
    assert listed["midnight12k"]["licence"] == "MIT"
