"""Models on the Hugging Face hub: a checkpoint's folder down from it, or up to it."""

import re
from pathlib import Path

import genar
from genar.errors import InputError
from genar.fetch.hub import hub_endpoint, in_one_line, verified

FILES = ("model.safetensors", "config.json", "README.md")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOG_IN = "check the name; where it is private or gated, ask for access, then `hf auth login` (or set HF_TOKEN)"


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form ``organisation/name`` and no file of this machine lies there.

    >>> is_hub_id("org/model"), is_hub_id("runs/first/checkpoint"), is_hub_id("model")
    (True, False, False)
    """
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def download_model(hub_id: str, revision: str | None = None) -> Path:
    """Folder of the hub client's cache with the checkpoint of ``hub_id``; what is there already is not fetched again.

    ``revision`` is a branch, tag or commit. Only weights, configuration and card come: no code. Without a network, or
    with ``HF_HUB_OFFLINE=1``, what was fetched before serves. Raises ``InputError`` with one line where the hub is out
    of reach and nothing is kept, the repository or revision is unknown or closed, or it holds no checkpoint.
    """
    from huggingface_hub import snapshot_download

    endpoint = hub_endpoint()
    with in_one_line(endpoint, hub_id, revision or "main", _LOG_IN):
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=list(FILES), endpoint=endpoint, library_name="genar",
            library_version=genar.__version__,
        )  # fmt: skip
    for name in FILES[:2]:
        if not (Path(folder) / name).is_file():
            raise InputError(f"{hub_id} on {endpoint}: not a GenAR checkpoint: it has no {name}")
    verified(Path(folder) / FILES[0])
    return Path(folder)


def upload_model(folder: Path, hub_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Write a checkpoint's folder to the hub as one commit, making the repository where there is none; returns its
    address. Raises ``InputError`` where the hub is out of reach or refuses, or where ``private`` is asked for and the
    repository is public."""
    from huggingface_hub import HfApi, constants

    if _HUB_ID.fullmatch(hub_id) is None:
        raise InputError(f"{hub_id!r}: expected organisation/name")
    if constants.HF_HUB_OFFLINE:
        raise InputError("the hub is switched off by HF_HUB_OFFLINE; unset it to write there")
    endpoint = hub_endpoint()
    api = HfApi(endpoint=endpoint, library_name="genar", library_version=genar.__version__)
    with in_one_line(endpoint, hub_id, revision or "main", _LOG_IN):
        api.create_repo(hub_id, private=private, exist_ok=True)
        is_public = private and not api.repo_info(hub_id).private  # one that was there before stays as it is
    if is_public:
        raise InputError(
            f"{hub_id} on {endpoint} is public, and nothing was written; make it private in its settings, choose "
            "another name, or push without --private"
        )
    with in_one_line(endpoint, hub_id, revision or "main", _LOG_IN):
        if revision is not None:
            api.create_branch(hub_id, branch=revision, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=hub_id, revision=revision, allow_patterns=list(FILES),
            commit_message=f"Checkpoint of GenAR {genar.__version__}",
        )  # fmt: skip
    return f"{endpoint}/{hub_id}"
