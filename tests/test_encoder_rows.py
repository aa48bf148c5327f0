"""Every row of the table of encoders, its poolers, and the files that its weights come in."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

from commands import run
from genar.encoders import ENCODERS, Encoder, build_network, load_encoder
from genar.encoders.networks import load_transformers, pooled
from genar.encoders.table import CLASS, CLASS_AND_MEAN
from genar.encoders.towers import POOLERS
from genar.encoders.weights import read_state
from genar.errors import InputError
from small_encoders import BIG, random_network, random_patches, small

TOWERS = [name for name, row in ENCODERS.items() if row.pooler]


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


def test_encoders_command_lists_the_rows(monkeypatch, capsys):
    assert run(monkeypatch, "encoders", "--json") == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)["encoders"]}
    assert set(listed) == set(ENCODERS)
    assert listed["virchow2"]["pooling"] == CLASS_AND_MEAN
    assert listed["virchow2"]["gated"] is True
    assert listed["midnight12k"]["licence"] == "MIT"
