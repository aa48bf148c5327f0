"""Bring one file here: go on where a broken transfer stopped, verify size and hash, then rename into place.

The hub's own client names its partial files at random and throws them away when a transfer fails, so a slide of
gigabytes would start anew after every drop. Here a partial file is named by the hash of what it shall become: it is
found again by the next start, and never mixed with another revision.
"""

import hashlib
import http.client
import json
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from genar.errors import InputError

SHA256, GIT = "sha256", "git"
_CHUNK = 1 << 20
_TIMEOUT_S = 30.0
# Waits between tries that brought nothing; a try that brought bytes starts the row anew.
_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)
_LONGEST_WAIT_S = 60.0
_TRY_AGAIN = {408, 429, 500, 502, 503, 504}

_THIS_MACHINE = {"127.0.0.1", "::1", "localhost"}
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}")

Tick = Callable[[int], None]
"""Told of every bytes more (or, where a file starts anew, fewer)."""


def check_url(url: str) -> str:
    """The address, where bytes may come from it: ``https``, or ``http`` of this very machine (a mirror or a test).

    Raises ``InputError`` for all others, and for one that holds a password: it would stand in messages and records.
    """
    try:
        parts = urlsplit(url)
        host, secret = parts.hostname, parts.password or parts.username
    except ValueError:
        raise InputError(f"{url[:100]!r} is no address; expected https://HOST/…") from None
    if secret is not None:
        raise InputError(f"an address of {host} holds a name or password; leave it out, and set HF_TOKEN for the hub")
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and host in _THIS_MACHINE)):
        raise InputError(
            f"{parts.scheme or 'an address'}://{host or ''} is not safe to fetch from; expected https://HOST/…"
        )
    return url


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch, as the source's own list describes it."""

    path: str
    """Where it goes, below the folder; forward slashes."""
    url: str
    size: int
    """Bytes."""
    digest: str
    """``sha256:<hex>`` of the bytes, or ``git:<hex>``: git's SHA-1 of the blob."""

    def __post_init__(self):
        parts = PurePosixPath(self.path)
        if parts.is_absolute() or ".." in parts.parts or re.search(r"[\\:\0]", self.path) or not parts.name:
            raise InputError(
                f"the source lists a file {self.path!r}, which leads out of the folder; it cannot be trusted"
            )
        if not _DIGEST.fullmatch(self.digest) or type(self.size) is not int or self.size < 0:
            raise InputError(
                f"the source lists {self.path} of {self.size} bytes and hash {self.digest[:80]!r}; no such hash"
            )


@dataclass(frozen=True)
class Access:
    """How to ask a source: its headers, and what to tell a user whom it refuses."""

    headers: Mapping[str, str]
    refused: str
    """What to do, as the end of a line."""


class _DroppedError(Exception):
    """The transfer ended for a reason that may pass; ``wait_s`` is what the server asks for."""

    def __init__(self, reason: str, wait_s: float = 0.0):
        super().__init__(reason)
        self.wait_s = wait_s


def digest_of(path: Path, kind: str = SHA256) -> str:
    """``sha256:<hex>`` or ``git:<hex>`` of a file."""
    with path.open("rb") as file:
        if kind == SHA256:
            return f"{kind}:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return f"{kind}:{digest.hexdigest()}"


def matches(path: Path, file: RemoteFile) -> bool:
    """Whether ``path`` holds exactly the bytes of ``file``."""
    return path.is_file() and path.stat().st_size == file.size and digest_of(path, _kind(file.digest)) == file.digest


def part_of(file: RemoteFile, parts: Path) -> Path:
    """The partial file of ``file`` in the folder ``parts``."""
    return parts / f"{file.digest.replace(':', '-')}.part"


def download(file: RemoteFile, target: Path, *, parts: Path, access: Access, tick: Tick) -> None:
    """Fetch ``file`` to ``target``, which appears only once size and hash are verified.

    What a broken transfer left in ``parts`` is gone on with. Raises ``InputError`` with one line where the source
    refuses, has no such file, states another size, sends other bytes, or cannot be reached after several tries.
    """
    check_url(file.url)
    part = part_of(file, parts)
    parts.mkdir(parents=True, exist_ok=True)
    while True:
        resumed = _size(part) > 0
        _fill(file, part, access, tick)
        found = digest_of(part, _kind(file.digest))
        if found == file.digest:
            break
        tick(-_size(part))
        part.unlink()
        if not resumed:  # bytes of an earlier, broken transfer may be to blame, once
            raise InputError(
                f"{file.path}: expected {_short(file.digest)}, the bytes received have {_short(found)}: they were "
                "altered on the way (a proxy or a mirror?); nothing was kept, try again or from another network"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, target)


def read_json(url: str, access: Access, what: str) -> Any:
    """The JSON answer of ``url``; ``InputError`` as :func:`download` raises it."""
    check_url(url)
    for pause in (*_PAUSES_S[:2], None):
        try:
            with _open(urllib.request.Request(url, headers=dict(access.headers)), what, access) as response:
                return json.loads(b"".join(iter(lambda: _read(response), b"")))
        except _DroppedError as error:
            if pause is None:
                raise InputError(
                    f"{what}: {urlsplit(url).netloc} cannot be reached ({error}); is there a network?"
                ) from error
            time.sleep(max(pause, error.wait_s))
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            where = urlsplit(url)
            raise InputError(
                f"{what}: {where.netloc}{where.path} answered no JSON ({error}); is it the right address?"
            ) from error
    raise AssertionError  # the last try returns or raises


def _fill(file: RemoteFile, part: Path, access: Access, tick: Tick) -> None:
    """Append to ``part`` until it has the file's size."""
    idle = 0
    while (have := _size(part)) < file.size:
        wait_s = 0.0
        try:
            _append(file, part, have, access, tick)
            reason = "the connection ended early"
        except _DroppedError as error:
            reason, wait_s = str(error), error.wait_s
        if _size(part) == file.size:
            return
        idle = 0 if _size(part) > have else idle + 1
        if idle > len(_PAUSES_S):
            raise InputError(
                f"{file.path}: {urlsplit(file.url).netloc} gave nothing in {idle} tries ({reason}); the same command "
                f"goes on at {_size(part):,} of {file.size:,} bytes"
            )
        time.sleep(max(_PAUSES_S[max(0, idle - 1)], wait_s))
    part.touch()  # an empty file is asked for by no request


def _append(file: RemoteFile, part: Path, have: int, access: Access, tick: Tick) -> None:
    """One request: what comes, from byte ``have`` on, goes to the end of ``part``."""
    headers = {**access.headers, "Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with _open(urllib.request.Request(file.url, headers=headers), file.path, access) as response:
        start = _start(response, file, have)
        if start != have:
            tick(start - have)
            os.truncate(part, start)
        try:
            with part.open("ab") as out:
                while (chunk := _read(response)) and start + len(chunk) <= file.size:
                    out.write(chunk)
                    start += len(chunk)
                    tick(len(chunk))
        except OSError as error:  # the network's are _DroppedErrors
            raise InputError(f"{part}: cannot write ({error.strerror}); free some space and go on") from error
    if chunk:
        part.unlink()
        raise _other_size(file, f"more than {file.size:,}")


def _start(response, file: RemoteFile, have: int) -> int:
    """The byte at which the answer starts, after a look at the size that it states."""
    if response.status == 206:
        span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        first = span.partition("-")[0]
        if not first.isdigit() or int(first) != have:
            raise InputError(
                f"{file.path}: asked for bytes from {have:,} on, the server answered {span or 'an unnamed range'!r}; "
                "it cannot be gone on with from there, try another network or mirror"
            )
        if total.isdigit() and int(total) != file.size:
            raise _other_size(file, f"{int(total):,}")
        return have
    length = response.headers.get("Content-Length")
    if length is not None and length.isdigit() and int(length) != file.size:
        raise _other_size(file, f"{int(length):,}")
    return 0  # the server does not know ranges: from the start


def _other_size(file: RemoteFile, found: str) -> InputError:
    return InputError(
        f"{file.path}: expected {file.size:,} bytes by the source's list, the server sends {found}; nothing was kept, "
        "try again or from another network"
    )


class _SameHostRedirect(urllib.request.HTTPRedirectHandler):
    """Follow redirects over TLS, but show the token to no other host (files lie on storage with signed addresses), and
    let no host of the network lead back to this machine."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        old, there = urlsplit(req.full_url).hostname, urlsplit(check_url(newurl)).hostname
        if there in _THIS_MACHINE and old not in _THIS_MACHINE:
            raise InputError(f"{old} redirects to this machine; it cannot be trusted")
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            new.remove_header("Authorization")
        return new


@cache
def _opener() -> urllib.request.OpenerDirector:
    context = ssl.create_default_context()
    if find_spec("certifi"):  # beside the system's certificates, which some Pythons do not find
        context.load_verify_locations(import_module("certifi").where())
    return urllib.request.build_opener(_SameHostRedirect, urllib.request.HTTPSHandler(context=context))


def _open(request: urllib.request.Request, what: str, access: Access) -> http.client.HTTPResponse:
    check_url(request.full_url)
    try:
        return _opener().open(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(error, what, access) from error
    except (OSError, http.client.HTTPException) as error:
        raise _DroppedError(_reason(error)) from error


def _refusal(error: urllib.error.HTTPError, what: str, access: Access) -> Exception:
    """What an answer other than success means: pass it on to the user, or try again."""
    host = urlsplit(error.url or "").netloc
    limited = error.headers.get("X-RateLimit-Remaining") == "0"
    if limited and error.code in (403, 429):
        return InputError(f"{what}: {host} allows no more requests from this address for now; try again in an hour")
    if error.code in (401, 403):
        return InputError(f"{what}: {host} refuses access ({error.code}); {access.refused}")
    if error.code == 404:
        return InputError(f"{what}: {host} has no such file or revision (404); is the address or revision right?")
    if error.code not in _TRY_AGAIN:
        return InputError(f"{what}: {host} answered {error.code} {error.reason}; try again later")
    wait = error.headers.get("Retry-After", "")
    return _DroppedError(f"{error.code} {error.reason}", min(float(wait), _LONGEST_WAIT_S) if wait.isdigit() else 0.0)


def _read(response: http.client.HTTPResponse) -> bytes:
    """What has come, at most a chunk: not to wait for a full one keeps every byte when the connection breaks."""
    try:
        return response.read1(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _DroppedError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    cause = getattr(error, "reason", error)
    return str(cause) or type(cause).__name__


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _kind(digest: str) -> str:
    return digest.partition(":")[0]


def _short(digest: str) -> str:
    kind, _, value = digest.partition(":")
    return f"{kind} {value[:12]}…"
