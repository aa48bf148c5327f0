"""Patch encoders: histology patch -> feature vector. One row per encoder (``table.py``); adding one adds a row.

The default, EfficientNet-Lite0, is embedded: its ImageNet weights come with a package that GenAR depends on, so that
everything runs offline. Other weights are fetched from the Hugging Face hub when an encoder is first used. Beyond the
table: any network of timm, a user's own function, features made elsewhere.
"""

from pathlib import Path

from genar.encoders import weights as _weights
from genar.encoders.networks import (
    PRECISIONS,
    Encoder,
    ImportedFeatures,
    build_network,
    check_precision,
    hash_state,
    load_transformers,
)
from genar.encoders.outside import is_function, is_timm, load_function, load_timm, timm_name, timm_row
from genar.encoders.table import DEFAULT, ENCODERS, IMPORTED, EncoderRow, encoder_row
from genar.encoders.weights import embedded_lite0, find_weights, fit_weights, read_state
from genar.errors import InputError

__all__ = [
    "DEFAULT",
    "ENCODERS",
    "IMPORTED",
    "PRECISIONS",
    "Encoder",
    "EncoderRow",
    "ImportedFeatures",
    "build_network",
    "check_name",
    "check_precision",
    "encoder_row",
    "hub_of",
    "load_encoder",
    "runs_code",
    "weights_state",
]


def _of_precision(encoder: Encoder, asked: str) -> Encoder:
    """``InputError`` where features come in another precision than was asked for: made elsewhere, or by own code."""
    if encoder.precision != asked:
        raise InputError(f"encoder {encoder.row.name}: computes in {encoder.precision}, not in {asked}; leave it out")
    return encoder


def load_encoder(
    name: str = DEFAULT, *, weights: str | Path | None = None, device: str = "cpu", precision: str = "fp32"
) -> Encoder:
    """Load an encoder with its pretrained weights.

    ``name`` is a row of the table, ``timm/NAME`` (or timm's plain name), ``module:function`` (see
    :func:`genar.encoders.outside.load_function`), or ``import:NAME`` for features made elsewhere. ``weights`` names a
    local file (.safetensors, .bin, .pt) or a folder instead of the hub's. Raises ``InputError`` where the name is
    unknown, access is refused, or the weights cannot be had or do not fit.

    >>> encoder = genar.load_encoder()
    >>> encoder.row.name, encoder.width
    ('efficientnet_lite0', 1280)
    """
    check_name(name)
    given = Path(weights) if weights is not None else None
    if name.startswith(IMPORTED):
        return _of_precision(ImportedFeatures(name), precision)
    if name not in ENCODERS:
        load = load_function if is_function(name) else load_timm
        return _of_precision(load(name, weights=given, device=device, precision=precision), precision)
    row = ENCODERS[name]
    if row.library == "transformers":
        return _load_transformers(row, given, device, precision)
    if given is None and not row.hub_id:
        network = build_network(row)
        fit_weights(network, embedded_lite0(network), f"encoder {name}: embedded weights")
    else:
        file, _ = find_weights(row, given)  # before a network of gigabytes is built
        network = build_network(row, empty=True)
        fit_weights(network, read_state(file), f"encoder {name}: {given or row.hub_id}")
    return Encoder(row, network, device, precision=precision, fold=True)


def _load_transformers(row: EncoderRow, given: Path | None, device: str, precision: str) -> Encoder:
    from genar.encoders.networks import transformers_class

    transformers_class(row)  # before gigabytes are fetched
    file, config = find_weights(row, given)
    state = read_state(file)
    network = load_transformers(row, state, config, f"encoder {row.name}: {given or row.hub_id}")
    # Of the file, not the network: releases of transformers name the same tensors differently.
    return Encoder(row, network, device, precision=precision, weights_sha256=hash_state(dict(sorted(state.items()))))


def check_name(name: str) -> None:
    """Refuse a name that :func:`load_encoder` could not understand; ``InputError`` with the known ones."""
    if name in ENCODERS or name.startswith(IMPORTED) or is_function(name) or is_timm(name):
        return
    encoder_row(name)


def canonical(name: str) -> str:
    """The name under which features are stored: a network of timm is called ``timm/NAME``, with or without that."""
    check_name(name)
    foreign = name in ENCODERS or name.startswith(IMPORTED) or is_function(name)
    return name if foreign else timm_name(name)


def runs_code(name: str) -> bool:
    """Whether it names a function of somebody's (``module:function``), which :func:`load_encoder` imports and calls."""
    return name not in ENCODERS and not name.startswith(IMPORTED) and is_function(name)


def hub_of(name: str) -> str:
    """Repository of the weights on the Hugging Face hub; "" where they are embedded, imported or a user's own."""
    if name in ENCODERS:
        return ENCODERS[name].hub_id
    return "" if name.startswith(IMPORTED) or is_function(name) else timm_row(name).hub_id


def weights_state(name: str) -> str:
    """Whether an encoder's weights are at hand, without asking the network: ``embedded`` (also imported features and a
    user's own function), ``cached``, ``open``, ``gated`` or ``offline`` (see :mod:`genar.encoders.weights`)."""
    if name.startswith(IMPORTED) or (name not in ENCODERS and is_function(name)):
        return "embedded"
    return _weights.weights_state(ENCODERS[name] if name in ENCODERS else timm_row(name))
