"""Encoders that are not in the table: any of timm's, and a user's own function."""

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from genar.data.door import reason_of
from genar.encoders.networks import Encoder, hash_state
from genar.encoders.table import OWN, EncoderRow
from genar.encoders.weights import find_weights, fit_weights, read_state, unreachable
from genar.errors import InputError

_TIMM = "timm/"
_FACTS = ("input_px", "mean", "std")
_MORE_FACTS = ("mpp", "licence", "views")


def is_function(name: str) -> bool:
    """Whether ``name`` reads ``module:function``."""
    module, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def is_timm(name: str) -> bool:
    """Whether timm knows a network of this name (``timm/NAME`` or ``NAME``, with or without the tag of its
    weights)."""
    import timm

    return timm.is_model(name.removeprefix(_TIMM))


def timm_name(name: str) -> str:
    """``timm/NAME``, however it was given."""
    return _TIMM + name.removeprefix(_TIMM)


def load_timm(name: str, *, weights: Path | None, device: str, precision: str) -> Encoder:
    """Any network of timm with its pretrained weights, or those given; mean, std and input size are timm's for it.

    Raises ``InputError`` where timm has no weights for it, or they cannot be had.
    """
    import timm

    row = timm_row(name)
    if weights is None and not row.hub_id:
        raise InputError(f"encoder {name}: timm has no pretrained weights for it; pass --weights FILE")
    try:
        network = timm.create_model(row.architecture, pretrained=weights is None, num_classes=0)
    except OSError as error:
        raise unreachable(row, error) from error
    except RuntimeError as error:
        raise _refused_by_timm(name, error) from error
    if weights is not None:
        file, _ = find_weights(row, weights)
        fit_weights(network, read_state(file), f"encoder {name}: {file}")
    row = replace(row, width=_width(network, row, f"encoder {name}"))
    return Encoder(row, network, device, precision=precision, weights_sha256=_identity(row, network), fold=True)


def timm_row(name: str) -> EncoderRow:
    """What timm says of a network, without its weights; ``width`` is not known yet."""
    import timm
    from timm.data.config import resolve_data_config

    short = name.removeprefix(_TIMM)
    try:
        facts = timm.get_pretrained_cfg(short)
    except RuntimeError as error:
        raise _refused_by_timm(name, error) from error
    config = resolve_data_config(pretrained_cfg=facts.to_dict() if facts else {}, use_test_size=False)
    licence = (facts and facts.license) or "see the page of its weights"
    where = str((facts and (facts.hf_hub_id or facts.url)) or "")
    return EncoderRow(
        timm_name(short), short, where, 0, config["input_size"][1], tuple(config["mean"]), tuple(config["std"]),
        licence, pooling=OWN, views=1, source="timm",
    )  # fmt: skip


def _refused_by_timm(name: str, error: RuntimeError) -> InputError:
    return InputError(f"encoder {name}: timm refuses it ({reason_of(error)}); is its name, with the tag, right?")


def load_function(name: str, *, weights: Path | None, device: str, precision: str) -> Encoder:
    """What the user's ``module:function`` returns: an :class:`Encoder`, or a pair of a torch module and its facts.

    The function is called without arguments, or with the path of ``--weights``. The module takes patches
    [B, 3, px, px], normalised by the facts' mean and std, and returns [B, F]; the facts are a dict with ``input_px``,
    ``mean`` and ``std`` and, if wished, ``mpp``, ``licence`` and ``views``. Raises ``InputError`` for anything else.
    """
    function, given = _function(name), [weights] if weights is not None else []
    try:
        made = function(*given)
    except Exception as error:  # whatever their code raises
        takes = "the path of --weights" if given else "no arguments"
        raise InputError(
            f"encoder {name}: the function, called with {takes}, ends in {type(error).__name__} ({reason_of(error)})"
        ) from error
    if isinstance(made, Encoder):
        made.row = replace(made.row, name=name)
        made.weights_sha256 = _identity(made.row, made._network)
        return made
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise InputError(
            f"encoder {name}: expected an Encoder or a pair (torch module, facts), found {type(made).__name__}"
        )
    network, row = made[0].eval(), _own_row(name, made[1])
    row = replace(row, width=_width(network, row, f"encoder {name}"))
    return Encoder(row, network, device, precision=precision, weights_sha256=_identity(row, network))


def _own_row(name: str, facts) -> EncoderRow:
    known = (*_FACTS, *_MORE_FACTS)
    found = set(facts) if isinstance(facts, Mapping) else set()
    if not set(_FACTS) <= found <= set(known):
        raise InputError(
            f"encoder {name}: expected the facts {', '.join(_FACTS)} (and perhaps {', '.join(_MORE_FACTS)}), "
            f"found {', '.join(sorted(map(str, found))) or type(facts).__name__}"
        )
    wrong = InputError(
        f"encoder {name}: mean and std must be three numbers each, std and input_px positive, views 1 or 8"
    )
    try:
        mean, std = (tuple(float(value) for value in facts[key]) for key in ("mean", "std"))
        input_px, views = int(facts["input_px"]), int(facts.get("views", 1))
        mpp = float(facts.get("mpp", 0.5))
    except (TypeError, ValueError) as error:
        raise wrong from error
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0 or input_px < 1 or views not in (1, 8):
        raise wrong
    licence = str(facts.get("licence", "own"))
    return EncoderRow(
        name, "", "", 0, input_px, mean, std, licence, mpp, pooling=OWN, views=views, source="own function", library=""
    )  # fmt: skip


def _function(name: str):
    """The function; its module is looked for in the working folder, too."""
    module_name, _, function_name = name.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"encoder {name}: module {module_name} cannot be imported ({error}); run where it lies, or install it"
        ) from error
    except Exception as error:  # whatever their code raises
        raise InputError(
            f"encoder {name}: importing {module_name} ends in {type(error).__name__} ({reason_of(error)})"
        ) from error
    finally:
        sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"encoder {name}: {module_name} has no function {function_name}")
    return function


@torch.inference_mode()
def _width(network: nn.Module, row: EncoderRow, where: str) -> int:
    """F, as the network itself says."""
    try:
        features = network.eval()(torch.zeros(1, 3, row.input_px, row.input_px))
    except Exception as error:  # whatever their code raises
        raise InputError(
            f"{where}: the network takes no patch of {row.input_px} px: {type(error).__name__} ({reason_of(error)})"
        ) from error
    if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != 1:
        found = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise InputError(f"{where}: expected features [B, F] for patches [B, 3, px, px], found {found} for B = 1")
    return features.shape[1]


def _identity(row: EncoderRow, network: nn.Module) -> str:
    """Weights and the facts that no table fixes: another normalisation is another store."""
    facts = json.dumps([row.input_px, row.mean, row.std, row.pooling, row.architecture])
    return hashlib.sha256((hash_state(network.state_dict()) + facts).encode()).hexdigest()
