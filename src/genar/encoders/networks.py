"""Build a row's network and call it: patches in, feature vectors out."""

import hashlib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

from genar.encoders.folding import fold_norms
from genar.encoders.table import CLASS, CLASS_AND_MEAN, IMPORTED, EncoderRow
from genar.encoders.towers import VisionTower
from genar.errors import InputError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str) -> None:
    """Refuse another precision than ``PRECISIONS``."""
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is not known; expected one of {', '.join(PRECISIONS)}")


class Encoder:
    """A frozen encoder with its weights.

    Called with patches uint8 [B, px, px, 3] it returns features float32 [B, F], the same for any batch size up to
    rounding. ``weights_sha256`` identifies the weights in the feature store. ``precision`` is that of the arithmetic
    (``fp32``, ``bf16`` or ``fp16`` by autocast); the features come out as float32 in any case. ``fold``: the network is
    one of timm's, and its batch norms may be folded into the convolutions before them (in float32 alone).
    """

    def __init__(
        self,
        row: EncoderRow,
        network: nn.Module,
        device: str = "cpu",
        *,
        precision: str = "fp32",
        weights_sha256: str | None = None,
        fold: bool = False,
    ):
        check_precision(precision)
        self.row, self.precision = row, precision
        self.weights_sha256 = weights_sha256 or hash_state(network.state_dict())
        if fold and precision == "fp32":
            network = fold_norms(network, row.input_px)
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
        with self._arithmetic():
            return pooled(self._network, self.row, x).float().cpu()

    def _arithmetic(self) -> AbstractContextManager:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, PRECISIONS[self.precision])


class ImportedFeatures(Encoder):
    """Stands for an encoder whose features were made elsewhere: its stores are found, new ones cannot be made."""

    def __init__(self, name: str):
        row = EncoderRow(
            name, "", "", 0, 0, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0), "that of the features", views=1, library=""
        )
        super().__init__(row, nn.Identity(), weights_sha256="imported")

    def __call__(self, patches):
        """There is nothing to call: ``InputError``."""
        raise self.refusal("a patch")

    def refusal(self, section: str) -> InputError:
        """What to do where the features of ``section`` are not in the store."""
        return InputError(
            f"encoder {self.row.name}: its features were made elsewhere, and those of {section} are not in the store; "
            f"`genar features DIR --import FOLDER --encoder {self.row.name.removeprefix(IMPORTED)}` brings them in"
        )


def build_network(row: EncoderRow, *, empty: bool = False) -> nn.Module:
    """The row's network with random weights, or ``empty``, without the memory and time they take, to be filled.

    Raises ``InputError`` where ``transformers`` is needed and missing.
    """
    if empty:
        import timm  # before the numbers go: PyTorch 2.6 computes with some as it is imported

        with torch.device("meta"):
            return build_network(row)
    if row.library == "transformers":
        return transformers_class(row)(transformers_config(row), **_no_pooler(row))
    import timm
    from timm import layers

    arguments = dict(row.arguments)
    if "mlp_layer" in arguments:
        arguments["mlp_layer"] = getattr(layers, arguments["mlp_layer"])
    if "act_layer" in arguments:
        arguments["act_layer"] = layers.get_act_layer(arguments["act_layer"])  # pyright: ignore
    network = timm.create_model(row.architecture, pretrained=False, num_classes=0, **arguments)
    return VisionTower(network, row.pooler, row.width) if row.pooler else network


def transformers_class(row: EncoderRow):
    """The class of the row's network."""
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            f"encoder {row.name} is loaded by the package transformers, which is not installed; "
            "pip install 'genar[transformers]'"
        ) from error
    return getattr(transformers, row.architecture)


def transformers_config(row: EncoderRow, file: Path | None = None):
    """Its configuration: the ``config.json`` that came with the weights, or the row's."""
    cls = transformers_class(row).config_class
    return cls.from_json_file(file) if file else cls(**row.arguments)


def _no_pooler(row: EncoderRow) -> dict:
    return {"add_pooling_layer": False} if row.architecture == "ViTModel" else {}


def load_transformers(row: EncoderRow, state: dict[str, torch.Tensor], config_file: Path | None, where: str):
    """A ``transformers`` network with the weights of ``state``; ``InputError`` where they are not this network's."""
    from transformers.utils import logging

    config = transformers_config(row, config_file)
    state = {name: tensor for name, tensor in state.items() if not name.startswith("pooler.")}
    logging.set_verbosity_error()  # what does not fit is told by our own message
    logging.disable_progress_bar()
    try:
        network, told = transformers_class(row).from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **_no_pooler(row)
        )
    except RuntimeError as error:  # shapes that differ
        reason = " ".join(str(error).split())[:150]
        raise InputError(f"{where}: not weights of this network ({reason}); pass those of this very encoder") from error
    wrong = sorted(map(str, (*told["missing_keys"], *told["unexpected_keys"], *told["mismatched_keys"])))
    if wrong:
        raise InputError(
            f"{where}: not weights of this network: {len(wrong)} tensors are missing, unknown or of another shape "
            f"(first: {wrong[0]}); pass the weights of this very encoder"
        )
    return network


def pooled(network: nn.Module, row: EncoderRow, x: torch.Tensor) -> torch.Tensor:
    """Feature vectors [B, F] of normalised patches [B, 3, px, px], by the row's pooling."""
    if row.pooling not in (CLASS, CLASS_AND_MEAN):
        return network(x)
    if row.library == "transformers":
        n_prefix = 1 + getattr(network.config, "num_register_tokens", 0)
        tokens = network(pixel_values=x).last_hidden_state
    else:
        tokens, n_prefix = network.forward_features(x), network.num_prefix_tokens  # pyright: ignore
    if row.pooling == CLASS:
        return tokens[:, 0]
    return torch.cat([tokens[:, 0], tokens[:, n_prefix:].mean(dim=1)], dim=1)  # registers are no patches


def hash_state(state: dict[str, torch.Tensor]) -> str:
    """sha256 of names and values of all tensors but the batch counters."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)  # bf16, too
    return digest.hexdigest()
