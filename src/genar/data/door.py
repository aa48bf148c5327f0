"""The door through which every file of a user comes in: what a library makes of a bad one becomes one line, and a small
file is not let grow large in memory.

Numbers: a file below 10 MB may unpack to 40 times its size and to 384 MiB in any case, a larger one to 200 times its
size. Real counts lie inside (sparse counts grow 3 to 10 times, a dense matrix of them up to 20, or 60 where it is
large); a bomb of zeros grows a thousand times.
"""

import gzip
import io
import json
import math
import mmap
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genar.errors import InputError

SMALL_BYTES = 10_000_000
_ROOM, _RATIO, _RATIO_SMALL = 384 << 20, 200, 40
_TEXT_BYTES = 64  # of a string in Python, and its place in an array
_MOST_PARTS = 100_000  # of an HDF5 file
_MOST_COLUMNS = 1000  # of a table of spots
_HEAP = b"GCOL\x01\0\0\0"  # begins a heap in which HDF5 keeps texts
_NO_CHUNK = 2**64 - 1  # in the index of a Zarr shard
_HEAP_HEAD = 16  # bytes of its head, and of the head of each part
_LONGEST = 200  # characters of a library's own words
# Exceptions of libraries that are none of Python's own kinds; looked up when something is raised: nothing is imported.
_OF_LIBRARIES = (
    ("_csv", "Error"),
    ("anndata._io.specs.registry", "IORegistryError"),
    ("imagecodecs", "DelayedImportError"),
    ("openslide", "OpenSlideError"),
    ("pickle", "PickleError"),
    ("pyarrow", "ArrowException"),
    ("safetensors", "SafetensorError"),
    ("shapely.errors", "ShapelyError"),
    ("tifffile", "TiffFileError"),
    ("tokenize", "TokenError"),
    ("yaml", "YAMLError"),
    ("zipfile", "BadZipFile"),
)


def _damage() -> tuple[type[Exception], ...]:
    """What readers raise where a file is damaged or another than expected."""
    loaded = ((sys.modules.get(module), name) for module, name in _OF_LIBRARIES)
    more = [getattr(module, name) for module, name in loaded if hasattr(module, name)]
    own = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError)
    return (*own, EOFError, SyntaxError, struct.error, zlib.error, *more)


@contextmanager
def door(path: str | Path, what: str, advice: str = "is it complete?") -> Iterator[None]:
    """Read ``path`` inside: whatever a library raises leaves as an ``InputError`` that names the file, ``what`` it
    should be, the reason and what to do. An ``InputError`` leaves as it is."""
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:  # the length of a part is known to its decoder alone
        raise InputError(f"{path}: a {what} that memory does not hold ({reason_of(error)}); {advice}") from error
    except _damage() as error:
        if isinstance(error, FileNotFoundError) and not Path(path).exists():
            raise InputError(f"{path}: no such file; expected a {what}") from error
        raise InputError(f"{path}: not a readable {what} ({reason_of(error)}); {advice}") from error


def reason_of(error: BaseException) -> str:
    """The first line of an exception, cut to a length that can be read; with its kind where the words alone say
    little."""
    text = " ".join(str(error).split("\n")[0].split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return text if text and isinstance(error, OSError | InputError) else f"{type(error).__name__}: {text}".rstrip(": ")


def room(n_bytes: int) -> int:
    """Bytes that a file of ``n_bytes`` may take in memory."""
    return max(_ROOM, (_RATIO_SMALL if n_bytes < SMALL_BYTES else _RATIO) * n_bytes)


def refuse_large(path: str | Path, what: str, unpacked: int, n_bytes: int) -> None:
    """``InputError`` where ``what`` of a file of ``n_bytes`` says to be far larger than that."""
    if unpacked > room(n_bytes):
        raise InputError(
            f"{path}: {what} of {unpacked / 2**20:,.0f} MiB in a file of {n_bytes / 2**20:,.1f} MiB; expected at most "
            f"{room(n_bytes) / 2**20:,.0f}: is it damaged? Counts are stored as a sparse matrix"
        )


def check_hdf5(path: Path) -> None:
    """Refuse an HDF5 file whose arrays say to be far larger than the file or lie in other files, whose groups hold
    themselves, or that its library would never come to an end with: by their heads alone, no array is read."""
    import h5py
    from h5py import h5o  # pyright: ignore

    check_heaps(path)
    n_bytes, total, seen = path.stat().st_size, 0, 0

    def add(group: h5py.Group, above: frozenset[int]) -> None:
        nonlocal total, seen
        for name in group:
            seen += 1
            if isinstance(group.get(name, getlink=True), h5py.ExternalLink):
                raise _elsewhere(path, str(name))
            item = group.get(name)  # None where a link leads nowhere
            if seen > _MOST_PARTS:
                raise InputError(f"{path}: more than {_MOST_PARTS:,} groups and arrays: is it damaged?")
            if isinstance(item, h5py.Dataset) and (item.external or item.is_virtual):
                raise _elsewhere(path, str(name))
            if isinstance(item, h5py.Dataset) and item.shape is not None:
                each = _TEXT_BYTES if item.dtype.kind == "O" else item.dtype.itemsize
                total += each * max(math.prod(item.shape), math.prod(item.chunks or ()))
                refuse_large(path, "arrays", total, n_bytes)
            elif isinstance(item, h5py.Group):
                place = h5o.get_info(item.id).addr
                if place in above:
                    raise InputError(f"{path}: its group {item.name} holds itself: is it damaged?")
                add(item, above | {place})

    with h5py.File(path, "r") as file:
        add(file, frozenset({h5o.get_info(file.id).addr}))


def _elsewhere(path: Path, name: str) -> InputError:
    return InputError(f"{path}: its {name} lies in another file; expected all of it in this one: copy it with its data")


def check_heaps(path: Path) -> None:
    """Refuse an HDF5 file with a piece of free room of no bytes in a global heap: its library (1.14) steps over such
    pieces one by one, without end."""
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(_HEAP)
        while at >= 0:
            step, end = at + _HEAP_HEAD, at
            if step <= len(content):
                end = min(at + struct.unpack_from("<Q", content, at + 8)[0], len(content))
            while step + _HEAP_HEAD <= end:
                index, _, n_bytes = struct.unpack_from("<HHxxxxQ", content, step)
                if index == 0 and n_bytes == 0:
                    raise InputError(f"{path}: a damaged heap of texts, at byte {at}; copy the file anew")
                step += n_bytes if index == 0 else _HEAP_HEAD + -(-n_bytes // 8) * 8
            at = content.find(_HEAP, at + 1)


def check_zarr(folder: Path, advice: str = "is it complete?") -> None:
    """Refuse a Zarr group whose arrays say to be far larger than its files: by its metadata alone."""
    total = stored = 0
    for path in folder.rglob("*"):
        if path.is_file():
            stored += path.stat().st_size
            if path.name in ("zarr.json", ".zarray"):
                facts = read_json(path, "metadata of a Zarr array", advice)
                total += _declared(facts)
                if "vlen-utf8" in json.dumps(facts.get("codecs", facts.get("filters"))):
                    _check_texts(path.parent, facts, advice)
    refuse_large(folder, "arrays", total, stored)


def _check_texts(folder: Path, facts: dict, advice: str) -> None:
    """Refuse chunks of texts that say to hold more of them than a chunk has: their decoder makes room for as many."""
    if "chunks" in facts:  # Zarr 2
        shape, packed = facts["chunks"], facts.get("compressor")
        codecs = [{"name": packed["id"], "configuration": packed}] if packed else []
    else:
        shape, codecs = facts["chunk_grid"]["configuration"]["chunk_shape"], facts["codecs"]
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in ("zarr.json", ".zarray", ".zattrs"):
            for content, most in _text_chunks(path.read_bytes(), shape, codecs):
                if int.from_bytes(content[:4], "little") > most:
                    raise InputError(f"{path}: says to hold more than the {most:,} texts of a chunk; {advice}")


def _text_chunks(content: bytes, shape: Sequence[int], codecs: Sequence[dict]) -> Iterator[tuple[bytes, int]]:
    """The chunks of texts in a file, unpacked, and how many texts each may hold: one chunk, or many in a shard, whose
    index tells where each begins and how long it is. Raises ``ValueError`` where a shard lacks its index."""
    import numcodecs

    if codecs and codecs[0]["name"] == "sharding_indexed":
        shard = codecs[0]["configuration"]
        n_chunks = math.prod(-(-int(side) // int(part)) for side, part in zip(shape, shard["chunk_shape"], strict=True))
        n_bytes = 16 * n_chunks + 4 * any(codec["name"] == "crc32c" for codec in shard["index_codecs"])
        if n_bytes > len(content):
            raise ValueError("a shard that is shorter than its index")
        first = 0 if shard.get("index_location") == "start" else len(content) - n_bytes
        for offset, length in struct.iter_unpack("<QQ", content[first : first + 16 * n_chunks]):
            if offset < _NO_CHUNK:
                yield from _text_chunks(content[offset : offset + length], shard["chunk_shape"], shard["codecs"])
        return
    for codec in reversed(codecs):
        if codec["name"] == "crc32c":
            content = content[:-4]
        elif codec["name"] not in ("vlen-utf8", "bytes"):
            packed: Any = numcodecs.get_codec({"id": codec["name"]})
            content = bytes(packed.decode(content))
    yield content, math.prod(map(int, shape))


def _declared(facts: dict) -> int:
    if "shape" not in facts:
        return 0
    chunks = facts.get("chunks") or facts.get("chunk_grid", {}).get("configuration", {}).get("chunk_shape", ())
    kind = str(facts.get("data_type", facts.get("dtype")))
    digits = "".join(c for c in kind if c.isdigit())
    each = _TEXT_BYTES if not digits else int(digits) // (8 if "data_type" in facts else 1)
    return max(each, 1) * max(math.prod(map(int, facts["shape"])), math.prod(map(int, chunks)))


def check_archive(path: Path) -> None:
    """Refuse a zip archive (a file of tensors is one) whose members say to be far larger than it."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            total = sum(member.file_size for member in archive.infolist())
        refuse_large(path, "members", total, path.stat().st_size)


def check_columns(path: Path, separator: str) -> str:
    """Refuse a table of spots with very many columns, by its first line: equal names are told apart in quadratic
    time. Returns that line."""
    with open_text(path) as file:
        head = file.readline()
    n = head.count(separator) + 1
    if n > _MOST_COLUMNS:
        raise InputError(
            f"{path}: {n:,} columns in a table of spots; expected at most {_MOST_COLUMNS:,}: is it damaged?"
        )
    return head


def open_text(path: Path, share: int = 2) -> io.TextIOWrapper:
    """Text, unpacked where the name ends in ``.gz``; ``InputError`` once more comes than a file of its size may hold.

    The ``share``-th part of that room: as numbers text takes twice its bytes, as short strings thirty times.
    """
    return io.TextIOWrapper(open_bytes(path, share), encoding="utf-8")


def open_bytes(path: Path, share: int = 1) -> io.BufferedReader:
    """As :func:`open_text`, as bytes; the ``share``-th part of the room."""
    file = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115
    return io.BufferedReader(_Limited(file, path, room(path.stat().st_size) // share), 1 << 16)


class _Limited(io.RawIOBase):
    """A stream that ends in an error where more comes than was allowed."""

    def __init__(self, file: Any, path: Path, limit: int):
        self._file, self._path, self._limit, self._n = file, path, limit, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        n = self._file.readinto(buffer)
        self._n += n
        if self._n > self._limit and self._path.suffix == ".gz":
            size = self._path.stat().st_size
            raise InputError(
                f"{self._path}: {size / 2**20:,.1f} MiB unpack to text of more than {self._limit / 2**20:,.0f} MiB; "
                "expected a table of counts: is it damaged?"
            )
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


def read_json(path: Path, what: str, advice: str = "is it complete?") -> dict:
    """A JSON object; NaN, which is none of JSON's, becomes ``None``. Raises ``InputError`` where it is no object."""
    with door(path, what, advice), open_text(path) as file:
        facts = json.load(file, parse_constant=lambda _: None)
    if not isinstance(facts, dict):
        raise InputError(f"{path}: expected a JSON object ({what}), found {type(facts).__name__}; {advice}")
    return facts


def number(path: str | Path, key: str, value) -> float:
    """The value of a key as a finite number >= 0, 0 where it is absent; ``InputError`` naming file and key."""
    if value is None:
        return 0.0
    found = float(value) if isinstance(value, int | float) and abs(value) < 1e300 else math.nan
    if isinstance(value, bool) or not found >= 0:
        raise InputError(f"{path}: {key} must be a finite number >= 0, found {str(value)[:60]!r}")
    return found
