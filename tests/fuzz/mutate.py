"""Damage files: structure by structure where the form is known, else byte by byte."""

# ruff: noqa: E501

import gzip
import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import h5py
import numpy as np

from genar.data.door import check_heaps

HUGE = 10**12
VALUES = (
    None, True, False, "", "x", "../../x", "é\u202e\0", "nan", -1, 0, 1, 2**31, -(2**63), HUGE, 10**30, 1e308, 0.5, math.nan,
    math.inf, [], {}, [[]], [None], ["x", "x"], [1, "x"], {"a": 1}, {"": {"": {}}}, "x" * 5000, [0] * 5000,
)  # fmt: skip
CELLS = ("", "x", "-1", "nan", "inf", "1e400", "0.5", "9" * 30, "é", '"', "\0", "\t", " ", "0x1", "x" * 3000)
WORDS = (b"\0" * 4, b"\xff" * 4, b"\xff" * 8, b"\0\0\0\x80", b"\xff\xff\xff\x7f", b"\0\x01", b"\x01", b"\0")


# --- bytes


def some_bytes(data: bytes, rng: Random) -> bytes:
    """The bytes with one to eight places flipped, cut, doubled, moved or overwritten."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, n = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 64, 1000))
        kind = rng.randrange(8)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + n]
        elif kind == 3:
            data[at:at] = data[at : at + n] * rng.choice((1, 2, 50))
        elif kind == 4:
            data[at:at] = rng.randbytes(n)
        elif kind == 5:
            word = rng.choice(WORDS)
            data[at : at + len(word)] = word
        elif kind == 6:
            data[at : at + n] = bytes(n)
        else:
            other = rng.randrange(len(data) + 1)
            data[at : at + n] = data[other : other + n]
    return bytes(data)


def change_bytes(path: Path, rng: Random) -> None:
    data = path.read_bytes()
    # headers say most: half of the damage is done to them
    cut = rng.choice((len(data), min(len(data), 512)))
    path.write_bytes(some_bytes(data[:cut], rng) + data[cut:])


def empty(path: Path, rng: Random) -> None:
    path.write_bytes(b"")


# --- trees of plain values


def _places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def change_tree(value, rng: Random):
    """The tree of dicts and lists with a value replaced, a key renamed, dropped or doubled."""
    places = list(_places(value))
    place = rng.choice(places)
    if not place:
        return rng.choice(VALUES) if rng.random() < 0.2 else value
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    key, kind = place[-1], rng.randrange(5)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(("", "x", "é", "type", "name"))] = parent.pop(key)
    elif kind == 2:
        parent[key] = nested(rng.choice((5, 3000)))
    else:
        parent[key] = _larger(parent[key], rng) if rng.random() < 0.3 else rng.choice(VALUES)
    return value


def _larger(value, rng: Random):
    if isinstance(value, int | float) and not isinstance(value, bool):
        return rng.choice((-value, value * 1000, value * 10**9, value + 1, value - 1))
    if isinstance(value, list):
        return value * rng.choice((2, 1000))
    return rng.choice(VALUES)


def nested(depth: int):
    inner = []
    for _ in range(depth):
        inner = [inner]
    return inner


def change_json(path: Path, rng: Random) -> None:
    try:
        value = change_tree(json.loads(path.read_text(encoding="utf-8")), rng)
        path.write_text(json.dumps(value), encoding="utf-8")
    except (ValueError, RecursionError):  # damaged before, or too deep to write: text as deep instead
        path.write_text("[" * 100_000 if rng.random() < 0.5 else '{"a":' * 100_000)


def change_yaml(path: Path, rng: Random) -> None:
    import yaml

    if rng.random() < 0.25:
        path.write_text(rng.choice(YAML_BOMBS) + (path.read_text(errors="replace") if rng.random() < 0.5 else ""))
        return
    try:
        text = path.read_text(encoding="utf-8")
        if "*" in text:  # a bomb, which would go off here
            return change_bytes(path, rng)
        value = change_tree(yaml.safe_load(text), rng)
        path.write_text(yaml.safe_dump(value, allow_unicode=True), encoding="utf-8")
    except (yaml.YAMLError, ValueError, RecursionError):
        change_bytes(path, rng)


def _laughs(join: str) -> str:
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]" if join == "list" else "a: &a0 {x: 1}"]
    for i in range(1, 12):
        names = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"{'abcdefghijklmn'[i]}: &a{i} " + (f"[{names}]" if join == "list" else f"{{<<: [{names}]}}"))
    return "\n".join(lines) + "\n"


YAML_BOMBS = (
    _laughs("list"), _laughs("merge"), "sections: " + _laughs("list").replace("\n", "\n  ")[3:] + "\n", "a: &a [*a]\n", "? [[]]\n: 1\n", "[" * 5000,
    "a: " + "{a: " * 3000, "seed: " + "9" * 6000 + "\n", "seed: 2001-99-99\n", "!!python/object/apply:os.system ['x']\n", "seed: " + "1:" * 20000 + "1\n",
    "seed: .inf\nwidth: .nan\n", "seed: 0x\n", "- - -\n", "<<: 1\n", "a: !!binary x\n", "%YAML 9.9\n---\n", "seed: [1]\n",
)  # fmt: skip


# --- tables of text


def _unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    try:
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, ValueError):
        return data


def _pack(path: Path, data: bytes) -> None:
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)


_LARGEST_TABLE = 8_000_000  # bytes; what a small file may cost is the question


def change_cells(path: Path, rng: Random) -> None:
    """A cell replaced, a line dropped, doubled or cut, the separator changed."""
    lines = _unpacked(path).split(b"\n")
    at = rng.choice((0, rng.randrange(len(lines)))) if lines else 0
    separator = next((s for s in (b"\t", b",", b" ") if s in lines[at]), b"\t")
    cells, kind = lines[at].split(separator), rng.randrange(7)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines[at:at] = [lines[at]] * rng.choice((1, 2, 300))
    elif kind == 2:
        lines = [line.replace(separator, b";") for line in lines]
    elif kind == 3:
        lines[at] = separator.join(cells * rng.choice((2, 2000)))
    else:
        cells[rng.randrange(len(cells))] = rng.choice(CELLS).encode()
        lines[at] = separator.join(cells)
    _pack(path, b"\n".join(lines)[:_LARGEST_TABLE])


def bomb(path: Path, rng: Random) -> None:
    """3 GB of text in 3 MB of gzip, after what the file held."""
    piece = rng.choice((b"\0", b"1\t", b"x", b"1x1\t1\n", b"%")) * (1 << 20)
    head = path.read_bytes()[: rng.choice((0, 1 << 20))]
    path.write_bytes(head + gzip.compress(piece, 9) * (3_000_000_000 // len(piece)))


# --- HDF5


def change_hdf5(path: Path, rng: Random) -> None:
    """A dataset, group or attribute dropped, moved, retyped, resized, or declared huge and left empty."""
    check_heaps(path)  # else this very process would never come back
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        if not names:
            return
        name = rng.choice(names)
        if file[name].attrs and rng.random() < 0.35:
            _change_attribute(file[name].attrs, rng)
        elif isinstance(file[name], h5py.Group):
            _change_group(file, name, rng)
        else:
            _change_dataset(file, name, rng)


def _change_attribute(attrs, rng: Random) -> None:
    key = rng.choice(sorted(attrs))
    del attrs[key]
    if rng.random() < 0.7:
        attrs[key] = rng.choice(
            ("", "x", "csr_matrix", "dataframe", "dict", 1, -1, HUGE, math.nan, np.zeros(3), np.array([HUGE, HUGE]), [b"a", b"a"])
        )  # fmt: skip


def _change_group(file, name: str, rng: Random) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        del file[name]
    elif kind == 1:
        file.move(name, f"{name}_x")
    elif kind == 2:
        del file[name]
        file[name] = rng.choice((1, "x", np.zeros((3, 2))))
    elif kind == 3:
        del file[name]
        file[name] = h5py.SoftLink(f"/{name}" if rng.random() < 0.5 else "/")
    else:
        file[name]["é" * 10] = np.zeros(2)


def _change_dataset(file, name: str, rng: Random) -> None:
    old, attrs = file[name][()], dict(file[name].attrs)
    del file[name]
    kind = rng.randrange(9)
    if kind == 0:
        return
    if kind == 1:
        shape = tuple(rng.choice((HUGE, 200_000, 30_000)) for _ in range(np.ndim(old) or 1))
        made = file.create_dataset(name, shape, np.asarray(old).dtype if np.asarray(old).dtype.kind != "O" else h5py.string_dtype(),
                                   chunks=tuple(min(n, 100) for n in shape))  # fmt: skip
    else:
        made = file.create_dataset(name, data=_retyped(old, kind, rng))
    made.attrs.update(attrs)


def _retyped(old, kind: int, rng: Random):
    array = np.asarray(old)
    if kind == 2:
        return rng.choice((0, -1, "x", math.nan, h5py.Empty("f4")))
    if kind == 3 and array.ndim:
        return array[: len(array) // 2] if array.dtype.kind != "O" else list(array[: len(array) // 2])
    if kind == 4 and array.dtype.kind in "if":
        return np.full(array.shape, rng.choice((math.nan, math.inf, -1, 1e30, 0.5)))
    if kind == 5 and array.dtype.kind in "iu" and array.size:
        array = array.copy()
        array.flat[rng.randrange(array.size)] = rng.choice((-1, np.iinfo(array.dtype).max, 0))
        return array
    if kind == 6:
        return np.array([b"x"] * max(1, array.size if array.ndim else 1))
    if kind == 7 and array.dtype.kind in "if":
        return array.reshape(-1)
    if kind == 8 and array.dtype.kind in "if":
        return array.astype(rng.choice(("i1", "f2", "u8", "c8")))
    return np.zeros((0, 0))


def bomb_hdf5(path: Path, rng: Random) -> None:
    """A dataset made ten thousand times as long, every value written, and compressed."""
    check_heaps(path)  # else this very process would never come back
    with h5py.File(path, "r+") as file:
        names = []
        file.visititems(
            lambda name, item: (
                names.append(name)
                if isinstance(item, h5py.Dataset) and item.ndim and item.dtype.kind in "iuf"
                else None
            )
        )
        if not names:
            return
        name = rng.choice(names)
        dtype, shape, attrs = file[name].dtype, list(file[name].shape), dict(file[name].attrs)
        shape[0] = min(max(shape[0], 1) * 10_000, 400_000_000 // max(1, math.prod(shape[1:])) // dtype.itemsize)
        del file[name]
        file.create_dataset(name, tuple(shape), dtype, fillvalue=1, compression="gzip", chunks=True).attrs.update(attrs)


# --- TIFF


def change_tiff(path: Path, rng: Random) -> None:
    """A tag's type, count or value replaced, or the chain of pages bent into a loop."""
    data = bytearray(path.read_bytes())
    try:
        (first,) = struct.unpack_from("<I", data, 4)
        (n,) = struct.unpack_from("<H", data, first)
        entry = first + 2 + 12 * rng.randrange(n)
        if rng.random() < 0.15:
            struct.pack_into("<I", data, first + 2 + 12 * n, rng.choice((first, 4, 0, len(data) - 4, 2**31)))
        else:
            at, form = rng.choice(((0, "<H"), (2, "<H"), (4, "<I"), (8, "<I"), (8, "<I"), (8, "<I"), (8, "<H")))
            limit = 2 ** (16 if form == "<H" else 32)
            struct.pack_into(
                form,
                data,
                entry + at,
                rng.choice((0, 1, 3, 7, 255, 256, 40_000, 65_535, 10**6, 2**31, 2**32 - 1)) % limit,
            )
    except (struct.error, ValueError):
        return change_bytes(path, rng)
    path.write_bytes(bytes(data))


# --- others


def change_head(path: Path, rng: Random) -> None:
    """safetensors: eight bytes say how long the JSON head is."""
    data = path.read_bytes()
    try:
        (n,) = struct.unpack_from("<Q", data)
        text = json.dumps(change_tree(json.loads(data[8 : 8 + n]), rng)).encode()
        size = rng.choice((len(text), len(text), len(text), len(text) + 1, 2**63, 10**8))
        path.write_bytes(struct.pack("<Q", size) + text + data[8 + n :])
    except (struct.error, ValueError, RecursionError):
        change_bytes(path, rng)


def change_npy(path: Path, rng: Random) -> None:
    head = rng.choice((f"({HUGE}, 4)", "(-1, 4)", "(40, 4, 1)", "(1000000000,)", "()", "'x'", "(40, " * 400))
    text = f"{{'descr': '{rng.choice(('<f4', '|O', '<U9999999', '|V1', '>f8', 'x'))}', 'fortran_order': False, 'shape': {head}, }}\n"
    path.write_bytes(b"\x93NUMPY\x01\0" + struct.pack("<H", len(text) % 65536) + text.encode() + bytes(640))


Mutator = Callable[[Path, Random], None]
BY_SUFFIX: dict[str, tuple[Mutator, ...]] = {
    ".json": (change_json, change_json, change_json, change_bytes),
    ".yaml": (change_yaml, change_yaml, change_yaml, change_bytes),
    ".h5ad": (change_hdf5, change_hdf5, change_hdf5, bomb_hdf5, change_bytes),
    ".h5": (change_hdf5, change_hdf5, change_hdf5, bomb_hdf5, change_bytes),
    ".tsv": (change_cells, change_cells, change_bytes),
    ".csv": (change_cells, change_cells, change_bytes),
    ".txt": (change_cells, change_bytes),
    ".gmt": (change_cells, change_bytes),
    ".mtx": (change_cells, change_cells, change_bytes),
    ".gz": (change_cells, change_cells, change_cells, change_bytes, bomb),
    ".tif": (change_tiff, change_tiff, change_tiff, change_bytes),
    ".safetensors": (change_head, change_bytes),
    ".npy": (change_npy, change_bytes),
}


def change_folder(folder: Path, rng: Random) -> str:
    """Damage one to three things in a folder; says what was done where."""
    told = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            break
        path = rng.choice(files)
        where = path.relative_to(folder)
        if rng.random() < 0.04:
            path.unlink()
            if rng.random() < 0.5:
                path.mkdir()
            told.append(f"{where}: gone")
            continue
        change = empty if rng.random() < 0.02 else rng.choice(BY_SUFFIX.get(path.suffix, (change_bytes,)))
        try:
            change(path, rng)
        except Exception:  # whatever a library makes of it
            change_bytes(path, rng)  # damaged before, so that its own form is no longer found
        told.append(f"{where}: {change.__name__}")
    return "; ".join(told)


def fresh(seed: Path, work: Path) -> Path:
    """A copy of the seed to damage."""
    shutil.rmtree(work, ignore_errors=True)
    return Path(shutil.copytree(seed, work))
