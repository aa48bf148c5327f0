"""Files of ``torch.save``, read as data: their pickle is looked through op by op; nothing that it names is called.

PyTorch's own reader (``weights_only``) has been made to run code by files more than once (CVE-2025-32434,
CVE-2026-24747). Here tensors and plain containers are made, every length is held against the file, and all else is
refused.
"""

import io
import math
import mmap
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from genar.data.door import check_archive

_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.storage.UntypedStorage": torch.uint8,
}
_SMALL_DTYPES = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")  # have no storage of their own
_NAMES = {
    "collections.OrderedDict",
    "torch.Size",
    *(f"torch._utils._rebuild_{what}" for what in ("tensor_v2", "tensor_v3", "parameter")),
    *(f"torch.{name}" for name in _SMALL_DTYPES),
    *_DTYPES,
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TAKEN = {"APPEND": 1, "SETITEM": 2, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}  # values of the stack; others: to the mark
_MOST_OPS = 2_000_000  # seconds; a number in a list is one of them, the head of a tensor forty
_CHUNK_BYTES = 1 << 20
_MAGIC = 0x1950A86A20F9469CFC6C  # begins a file of before PyTorch 1.6


class _Name(NamedTuple):
    """A name that the pickle would import; here it stays a name."""

    name: str


class _Storage(NamedTuple):
    """The numbers below a tensor, by their key in the file: ``numel`` of ``dtype``."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def n_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


_Numbers = Callable[[_Storage], torch.Tensor]


def read_torch(path: Path) -> Any:
    """What ``torch.save`` wrote: tensors (on the CPU) in dicts, lists and tuples, with text and numbers between them.

    Parameters come as tensors, sizes as tuples, attributes of an ``OrderedDict`` (versions of modules) are left out.
    Raises ``ValueError``, or what the reader of zip archives raises, where the file is cut or damaged, or holds more
    than that; call it inside of ``door``.
    """
    if zipfile.is_zipfile(path):
        return _read_archive(path, _filled)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return _read_legacy(mapped)


def check_torch(path: Path) -> None:
    """Raise as ``read_torch`` does, from the heads alone: no number is read. Archives (PyTorch 1.6 and later) only."""
    _read_archive(path, _unfilled)


def _read_archive(path: Path, fill: Callable[[zipfile.ZipFile, str, _Storage], torch.Tensor]) -> Any:
    check_archive(path)
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"expected one data.pkl in it, found {len(pickles)}")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are written with the high byte first")
        named, made = {}, {}

        def numbers(storage: _Storage) -> torch.Tensor:
            _note(storage, named)
            if storage.key not in made:
                made[storage.key] = fill(archive, f"{root}data/{storage.key}", storage)
            return made[storage.key]

        return _Pickle(numbers).object(io.BytesIO(archive.read(pickles[0])))


def _note(storage: _Storage, named: dict[str, _Storage]) -> None:
    """Keep ``storage`` by its key; one key has one type and length."""
    if named.setdefault(storage.key, storage) != storage:
        raise ValueError(f"storage {storage.key} has two types")


def _unfilled(archive: zipfile.ZipFile, member: str, storage: _Storage) -> torch.Tensor:
    if archive.getinfo(member).file_size != storage.n_bytes:
        raise ValueError(f"{member} holds {archive.getinfo(member).file_size} bytes, {storage.n_bytes} are named")
    return torch.empty(storage.numel, dtype=storage.dtype, device="meta")


def _filled(archive: zipfile.ZipFile, member: str, storage: _Storage) -> torch.Tensor:
    _unfilled(archive, member, storage)
    room = bytearray(storage.n_bytes)
    with archive.open(member) as file:
        at = 0
        while part := file.read(_CHUNK_BYTES):
            room[at : at + len(part)] = part
            at += len(part)
    return _as_tensor(room, storage)


def _read_legacy(file: mmap.mmap) -> Any:
    """Pickles one after another (magic number, version, machine, object, keys), then the numbers of each key."""

    def plain() -> Any:
        return _Pickle(_no_numbers).object(file)

    if plain() != _MAGIC:
        raise ValueError("not a file of torch.save")
    plain()  # the version
    if plain().get("little_endian") is not True:
        raise ValueError("its numbers are written with the high byte first")
    begin, named = file.tell(), {}

    def noted(storage: _Storage) -> torch.Tensor:
        _note(storage, named)
        return torch.empty(storage.numel, dtype=storage.dtype, device="meta")

    _Pickle(noted).object(file)
    made: dict[str, torch.Tensor] = {}
    for key in plain():
        storage = named[key]
        if struct.unpack("<q", file.read(8))[0] != storage.numel:
            raise ValueError(f"storage {key} is of another length than named")
        room = bytearray(file.read(storage.n_bytes))
        if len(room) != storage.n_bytes:
            raise ValueError("it ends early")
        made[key] = _as_tensor(room, storage)
    file.seek(begin)
    return _Pickle(lambda storage: made[storage.key]).object(file)


def _no_numbers(storage: _Storage) -> torch.Tensor:
    raise ValueError(f"storage {storage.key} stands where none may be")


def _as_tensor(room: bytearray, storage: _Storage) -> torch.Tensor:
    if not room:
        return torch.empty(0, dtype=storage.dtype)
    if storage.dtype is torch.bool:  # a byte may hold more than 0 and 1
        return torch.frombuffer(room, dtype=torch.uint8).ne(0)
    return torch.frombuffer(room, dtype=storage.dtype)


class _Pickle:
    """What a pickle makes, op by op: its stack, the marks on it, and the values that it refers back to."""

    def __init__(self, numbers: _Numbers) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.numbers = numbers

    def object(self, stream: IO[bytes] | mmap.mmap) -> Any:
        """The object that the next pickle of ``stream`` stands for."""
        for i, (op, argument, _) in enumerate(pickletools.genops(stream)):  # pyright: ignore
            if op.name == "STOP":
                return self._top()
            if i >= _MOST_OPS:
                raise ValueError(f"more than {_MOST_OPS:,} parts in its pickle")
            self._step(op.name, argument)
        raise ValueError("its pickle has no end")

    def _step(self, name: str, argument: Any) -> None:
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(self.stack))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self._top()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self._top()
            case "APPEND" | "APPENDS":
                values = self._pop(_TAKEN.get(name))
                self._top(list).extend(values)
            case "SETITEM" | "SETITEMS":
                pairs = self._pop(_TAKEN.get(name))
                self._top(dict, OrderedDict).update(_items(pairs))
            case "BUILD":
                self._pop(1)
                self._top(OrderedDict)
            case _:
                self.stack.append(self._made(name, argument))

    def _made(self, name: str, argument: Any) -> Any:
        """The value that an op puts on the stack."""
        if name in _LITERALS:
            return argument
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if name in _EMPTY:
            return _EMPTY[name]()
        match name:
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                return tuple(self._pop(_TAKEN.get(name)))
            case "BINGET" | "LONG_BINGET":
                return self.memo[argument]
            case "GLOBAL":
                return _known_name(str(argument).replace(" ", "."))
            case "STACK_GLOBAL":
                return _known_name(".".join(map(str, self._pop(2))))
            case "BINPERSID":
                (named,) = self._pop(1)
                return _storage(named)
            case "REDUCE":
                function, arguments = self._pop(2)
                return _called(function, arguments, self.numbers)
        raise ValueError(f"its pickle holds {name}, more than tensors and plain values")

    def _pop(self, n: int | None) -> list[Any]:
        """The last ``n`` values, or those since the last mark."""
        begin = self.marks.pop() if n is None else len(self.stack) - n
        if begin < (self.marks[-1] if self.marks else 0):
            raise ValueError("its pickle takes more than it gave")
        taken = self.stack[begin:]
        del self.stack[begin:]
        return taken

    def _top(self, *kinds: type) -> Any:
        if kinds and type(self.stack[-1]) not in kinds:
            raise ValueError(f"its pickle treats a {type(self.stack[-1]).__name__} as {kinds[-1].__name__}")
        return self.stack[-1]


def _known_name(name: str) -> _Name:
    if name not in _NAMES:
        raise ValueError(f"its pickle names {name}, which is not run")
    return _Name(name)


def _items(pairs: list[Any]) -> list[tuple[str | int, Any]]:
    keys, values = pairs[::2], pairs[1::2]
    if not all(type(key) in (str, int) for key in keys):  # others may be made to take for ever
        raise ValueError("its pickle has keys that are neither text nor whole numbers")
    return list(zip(keys, values, strict=True))


def _storage(named: Any) -> _Storage:
    """What a reference names: ("storage", type, key, device, numel), and None where the file is of before 1.6."""
    what, kind, key, _, numel, *view = named if type(named) is tuple else (named, None, None, None, None)
    if what != "storage" or not isinstance(kind, _Name) or kind.name not in _DTYPES or view not in ([], [None]):
        raise ValueError(f"its pickle refers to {kind.name if isinstance(kind, _Name) else what}")
    if type(key) is not str or type(numel) is not int or numel < 0:
        raise ValueError("its pickle refers to numbers without name or length")
    return _Storage(key, _DTYPES[kind.name], numel)


def _called(function: Any, arguments: Any, numbers: _Numbers) -> Any:
    """What the few functions that ``torch.save`` writes down would make; no other is known."""
    match function, arguments:
        case _Name("collections.OrderedDict"), ():
            return OrderedDict()
        case _Name("torch.Size"), (tuple(sizes),):
            return _whole(sizes)
        case _Name("torch._utils._rebuild_parameter"), (torch.Tensor() as tensor, *_):
            return tensor
        case _Name("torch._utils._rebuild_tensor_v2"), (_Storage() as storage, offset, size, stride, *_):
            return _view(numbers(storage), offset, size, stride)
        case _Name("torch._utils._rebuild_tensor_v3"), (_Storage() as storage, offset, size, stride, _, _, dtype):
            return _view(numbers(storage).view(_dtype(dtype)), offset, size, stride)
    called = function.name if isinstance(function, _Name) else type(function).__name__
    raise ValueError(f"its pickle calls {called} as torch.save does not")


def _dtype(named: Any) -> torch.dtype:
    name = named.name.removeprefix("torch.") if isinstance(named, _Name) else ""
    if name not in _SMALL_DTYPES:
        raise ValueError("its pickle names no type of numbers that is known here")
    return getattr(torch, name)


def _whole(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError("its pickle has sizes that are no whole numbers")
    return values


def _view(numbers: torch.Tensor, offset: Any, size: Any, stride: Any) -> torch.Tensor:
    """A tensor over a storage's numbers, no larger than they are."""
    (begin,), size, stride = _whole((offset,)), _whole(size), _whole(stride)
    last = begin + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > len(numbers) or (math.prod(size) and last >= len(numbers)):
        raise ValueError(f"a tensor of {size} over {len(numbers)} numbers")
    return numbers.as_strided(size, stride, begin)
