"""Files of torch.save are read as data: what torch writes comes back equal, and what it would not write is refused."""

import pickle
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from genar.encoders import torch_files
from genar.encoders.torch_files import check_torch, read_torch
from genar.encoders.weights import read_state
from genar.errors import InputError

base = torch.arange(24.0).reshape(4, 6)
KINDS = {
    "turned": base.T,
    "cut": base[1:3, ::2],
    "scalar": torch.tensor(3.5),
    "none": torch.empty(0, 4),
    "bool": torch.tensor([True, False, True]),
    **{
        str(kind).removeprefix("torch."): torch.tensor([1, 2, 3]).to(kind)
        for kind in (
            *(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
            *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn),
        )
    },
}
SINCE_2_3 = ("uint16", "uint32", "uint64", "float8_e4m3fn")  # the old form has no name for them
PLAIN = {"n": [1, -2, 2**40, 2.5, "µm", None, True, (1, ("a", 2))], 7: {"size": torch.Size([3, 2])}}


def equal(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert ours.contiguous().view(-1).view(torch.uint8).equal(theirs.contiguous().view(-1).view(torch.uint8))
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for name in theirs:
            equal(ours[name], theirs[name])
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs, strict=True):
            equal(*pair)
    else:
        assert (type(ours), ours) == (type(theirs), theirs)


@pytest.mark.parametrize("new", [True, False], ids=["archive", "legacy"])
def test_what_torch_writes_comes_back(tmp_path, new):
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    tied = torch.randn(5)
    kinds = {name: kind for name, kind in KINDS.items() if new or name not in SINCE_2_3}
    values = {**kinds, **PLAIN, "network": network.state_dict(), "tied": [tied, tied[1:]], "weight": network[0].weight}
    torch.save(values, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    ours, theirs = read_torch(tmp_path / "a.pt"), torch.load(tmp_path / "a.pt", weights_only=True)
    assert isinstance(theirs.pop("weight"), nn.Parameter)
    weight = ours.pop("weight")
    assert (type(weight), weight.requires_grad) == (torch.Tensor, False)
    assert weight.equal(network[0].weight)
    equal(ours, theirs)
    assert type(ours["network"]) is OrderedDict
    assert ours["tied"][0][1:].data_ptr() == ours["tied"][1].data_ptr()
    if new:
        check_torch(tmp_path / "a.pt")


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_later_protocols_of_pickle_are_read(tmp_path, protocol):
    torch.save(KINDS | PLAIN, tmp_path / "a.pt", pickle_protocol=protocol)
    equal(read_torch(tmp_path / "a.pt"), torch.load(tmp_path / "a.pt", weights_only=False))  # torch's own knows 2 alone


@pytest.mark.parametrize("new", [True, False], ids=["archive", "legacy"])
def test_every_cut_file_is_refused(tmp_path, new):
    torch.save({"a": torch.ones(40), "b": torch.zeros(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    whole = (tmp_path / "a.pt").read_bytes()
    for end in range(0, len(whole), 7):
        (tmp_path / "cut.pt").write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"cut\.pt: not a readable file of PyTorch weights"):
            read_state(tmp_path / "cut.pt")


@pytest.mark.parametrize("new", [True, False], ids=["archive", "legacy"])
def test_damage_is_refused_or_changes_names_and_numbers_alone(tmp_path, new):
    state = {"a.weight": torch.randn(4, 3), "a.bias": torch.zeros(4)}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    whole, rng, read = np.fromfile(tmp_path / "a.pt", np.uint8), np.random.default_rng(0), 0
    for _ in range(400):
        damaged = whole.copy()
        damaged[rng.integers(len(whole), size=rng.integers(1, 4))] = rng.integers(256)
        damaged.tofile(tmp_path / "b.pt")
        try:
            ours = read_state(tmp_path / "b.pt")
        except InputError:
            continue
        assert all(tensor.numel() <= 12 for tensor in ours.values())
        read += 1
    assert read


def archived(path, stream, **storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", stream)
        archive.writestr("a/byteorder", b"little")
        archive.writestr("a/version", b"3\n")
        for key, content in storages.items():
            archive.writestr(f"a/data/{key}", content)
    return path


def storage(numel, kind="FloatStorage"):
    return b"(X\x07\0\0\0storagectorch\n" + kind.encode() + b"\nX\x01\0\0\0sX\x03\0\0\0cpuM" + numel + b"tQ"


def tensor(numel, offset, size, stride):
    """Ops of a tensor [size] over storage ``s`` of ``numel`` (all two bytes, low first)."""
    whole = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(numel)
    return whole + b"M" + offset + b"M" + size + b"\x85M" + stride + b"\x85\x89}tR"


ONE, TWO, FOUR, MANY = b"\x01\0", b"\x02\0", b"\x04\0", b"\xff\xff"
ZERO = b"\0\0"


def test_the_ops_above_make_a_tensor(tmp_path):
    path = archived(
        tmp_path / "a.pt", b"\x80\x02" + tensor(FOUR, ONE, TWO, ONE) + b".", s=np.arange(4, dtype="<f4").tobytes()
    )
    assert read_torch(path).tolist() == torch.load(path, weights_only=True).tolist() == [1, 2]


BAD = {
    "more numbers named than stored": tensor(MANY, ZERO, FOUR, ONE),
    "fewer numbers named than stored": tensor(TWO, ZERO, TWO, ONE),
    "a view beyond the numbers": tensor(FOUR, TWO, FOUR, ONE),
    "strides beyond the numbers": tensor(FOUR, ZERO, TWO, MANY),
    "a view larger than the numbers": tensor(FOUR, ZERO, MANY, ZERO),
    "an item set on a tensor": tensor(FOUR, ZERO, FOUR, ONE) + b"K\0K\x01s",
    "items set on a list": b"](K\0K\x01u",
    "values added to a dict": b"}K\x01a",
    "attributes set on a tensor": tensor(FOUR, ZERO, FOUR, ONE) + b"}b",
    "keys that are tuples": b"}K\x01\x85K\x01s",
    "a key without a value": b"}(K\x01u",
    "a call of print": b"cbuiltins\nprint\nX\x02\0\0\0hi\x85R",
    "a call of torch's": b"ctorch\nones\nK\x03\x85R",
    "a call of a value": b"K\x01)R",
    "an OrderedDict of something": b"ccollections\nOrderedDict\n]\x85R",
    "an instance": b"(cbuiltins\nlist\no",
    "a class of the registry": b"\x82\x01",
    "numbers of two types": b"]("
    + tensor(FOUR, ZERO, FOUR, ONE)
    + tensor(FOUR, ZERO, FOUR, ONE).replace(b"FloatStorage", b"IntStorage")
    + b"e",
    "another storage": storage(FOUR, "storage") + b"",
    "a reference to nothing": b"K\x01Q",
    "a memo that is empty": b"h\x05",
    "a tuple of more than there is": b"K\x01\x87",
    "a mark that is not there": b"K\x01t",
    "text of another form": b"S'text'\n",
    "nothing": b"",
}


@pytest.mark.parametrize("ops", BAD.values(), ids=BAD)
def test_what_torch_would_not_write_is_refused(tmp_path, ops):
    path = archived(tmp_path / "a.pt", b"\x80\x02" + ops + b".", s=bytes(16))
    for read in (read_torch, check_torch):
        with pytest.raises((ValueError, LookupError)):
            read(path)
    with pytest.raises(InputError, match=r"a\.pt: not a readable file of PyTorch weights"):
        read_state(path)


def test_numbers_missing_high_byte_first_or_of_two_archives_are_refused(tmp_path):
    whole = b"\x80\x02" + tensor(FOUR, ZERO, FOUR, ONE) + b"."
    with pytest.raises(KeyError):
        read_torch(archived(tmp_path / "a.pt", whole))
    path = archived(tmp_path / "b.pt", whole, s=bytes(16))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("b/data.pkl", whole)
    with pytest.raises(ValueError, match="found 2"):
        read_torch(path)
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
        archive.writestr("a/data.pkl", whole)
        archive.writestr("a/byteorder", b"big")
    with pytest.raises(ValueError, match="high byte first"):
        read_torch(tmp_path / "c.pt")


def test_a_key_that_takes_for_ever_to_hash_is_refused_at_once(tmp_path):
    nested = b"K\x01\x85" + b"q\0h\0\x86" * 60  # a tuple twice in a tuple, sixty times over
    path, started = archived(tmp_path / "a.pt", b"\x80\x02}" + nested + b"K\x01s."), time.monotonic()
    with pytest.raises(ValueError, match="neither text nor whole numbers"):
        read_torch(path)
    assert time.monotonic() - started < 5


def test_a_pickle_of_endless_parts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, "_MOST_OPS", 1000)
    torch.save({"n": list(range(990))}, tmp_path / "a.pt")
    assert len(read_torch(tmp_path / "a.pt")["n"]) == 990
    torch.save({"n": list(range(1000))}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="more than 1,000 parts"):
        read_torch(tmp_path / "a.pt")


def test_a_plain_pickle_is_no_file_of_torch(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"a": [1, 2]}, protocol=2))
    with pytest.raises(ValueError, match=r"not a file of torch\.save"):
        read_torch(tmp_path / "a.pt")
