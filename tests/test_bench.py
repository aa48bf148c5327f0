""""""


def test_weights_are_looked_for_without_the_network(tmp_path, monkeypatch):
    from huggingface_hub import constants

    from genar import encoders

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
