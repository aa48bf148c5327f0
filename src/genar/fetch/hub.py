"""HEST-1k on the Hugging Face hub: which files a section has there, their sizes and hashes, and who may have them."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import genar
from genar.errors import InputError
from genar.fetch.transfer import GIT, SHA256, Access, RemoteFile, check_url, digest_of

REPOSITORY = "MahmoodLab/hest"
PAGE = f"https://huggingface.co/datasets/{REPOSITORY}"
LICENCE = "CC BY-NC-SA 4.0; each section's own in metadata/<id>.json"
TERMS = f"accept its terms on {PAGE}, then log in with `hf auth login`"
DEFAULT_REVISION = "main"

# The table's row first, as a refusal shows on the smallest file; the counts last, as readers list sections by them.
_NEEDED = ("metadata/{id}.json", "wsis/{id}.tif", "st/{id}.h5ad")
EXTRAS = {
    "tissue_seg": ("tissue_seg/{id}_contours.geojson", "tissue_seg/{id}_mask.jpg", "tissue_seg/{id}_vis.jpg"),
    "patches": ("patches/{id}.h5",),
}


@dataclass(frozen=True)
class Listing:
    """What a revision of the hub's data set holds of some sections."""

    commit: str
    files: list[RemoteFile]
    """In the order in which to fetch them."""
    access: Access


def list_files(sections: Iterable[str], revision: str | None = None, extras: Iterable[str] = ()) -> Listing:
    """Ask the hub for the files of ``sections``; ``extras`` names kinds of ``EXTRAS``, of which it takes what there is.

    Raises ``InputError`` with one line where the hub is out of reach or switched off, the revision is unknown, access
    is refused, or a section lacks a file that it needs.
    """
    from huggingface_hub import HfApi, constants, hf_hub_url
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import build_hf_headers

    if constants.HF_HUB_OFFLINE:
        raise InputError("the hub is switched off by HF_HUB_OFFLINE; unset it to fetch, or copy the sections by hand")
    endpoint = hub_endpoint()
    revision = revision or DEFAULT_REVISION
    api = HfApi(endpoint=endpoint, library_name="genar", library_version=genar.__version__)
    wanted = {section: _paths(section, extras) for section in sections}
    with in_one_line(endpoint, REPOSITORY, revision, TERMS):
        commit = api.dataset_info(REPOSITORY, revision=revision, expand=["sha"]).sha or revision
        paths = [path for needed, more in wanted.values() for path in needed + more]
        entries = api.get_paths_info(REPOSITORY, paths, revision=commit, repo_type="dataset")
    found = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def remote(path: str) -> RemoteFile:
        entry = found[path]
        digest = f"{SHA256}:{entry.lfs.sha256}" if entry.lfs else f"{GIT}:{entry.blob_id}"
        url = hf_hub_url(REPOSITORY, path, repo_type="dataset", revision=commit, endpoint=endpoint)
        return RemoteFile(path, url, entry.size, digest)

    files = []
    for section, (needed, more) in wanted.items():
        if missing := [path for path in needed if path not in found]:
            raise InputError(
                f"{REPOSITORY} at {revision} ({commit[:8]}) has no {missing[0]}; name another --revision, or leave "
                f"{section} out with --sections"
            )
        files += [remote(path) for path in (*needed[:-1], *more, needed[-1]) if path in found]
    headers = build_hf_headers(library_name="genar", library_version=genar.__version__)
    return Listing(commit, files, Access(headers, f"{TERMS} (or set HF_TOKEN)"))


def hub_endpoint() -> str:
    """Address of the hub, or of the mirror that ``HF_ENDPOINT`` names. Raises ``InputError`` as ``check_url`` does."""
    from huggingface_hub import constants

    return check_url(os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/"))


def verified(path: Path) -> Path:
    """A file of the hub client's cache, whose large files are named by their SHA-256: the client checks the size alone.

    Raises ``InputError`` where the bytes are others.
    """
    name = path.resolve().name
    if len(name) == 64 and digest_of(path) != f"{SHA256}:{name}":
        raise InputError(f"{path.resolve()}: other bytes than the hub has, by their SHA-256; delete it and fetch again")
    return path


def _paths(section: str, extras: Iterable[str]) -> tuple[list[str], list[str]]:
    kinds = list(extras)
    if unknown := [kind for kind in kinds if kind not in EXTRAS]:
        raise InputError(f"--with {unknown[0]!r} is not known; expected {', '.join(EXTRAS)}")
    more = [template for kind in kinds for template in EXTRAS[kind]]
    return [path.format(id=section) for path in _NEEDED], [path.format(id=section) for path in more]


@contextmanager
def in_one_line(endpoint: str, repository: str, revision: str, terms: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line for the user; ``terms`` says how to get access."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # the base of all errors of the HTTP library underneath, which is another one in other releases of the client
    network = (cast(type[Exception], HfHubHTTPError.__bases__[0]), OSError)
    try:
        yield
    except RevisionNotFoundError as error:
        raise InputError(f"{repository} has no revision {revision!r}; expected a branch, tag or commit") from error
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{repository} at {revision} was not fetched before, and {endpoint} cannot be reached or is switched off "
            "(HF_HUB_OFFLINE); fetch it once with a network"
        ) from error
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        if code in (401, 403) or isinstance(error, RepositoryNotFoundError):
            raise InputError(f"{endpoint} refuses access to {repository} ({code}); {terms}") from error
        raise InputError(f"{endpoint} answered {code} for {repository}; try again later") from error
    except network as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = re.sub(r"\?\S+", "?…", reason)  # signed addresses are secrets
        raise InputError(f"{endpoint} cannot be reached ({reason}); is there a network?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{endpoint} answered what no hub does ({error}); is HF_ENDPOINT right?") from error
