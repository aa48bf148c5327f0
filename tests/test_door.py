"""The look at a file before its library reads it: loops, links out of it, claims of size."""

import os
import threading

import h5py
import pytest

from genar.data import read_section
from genar.data.door import room
from genar.errors import InputError
from section_files import write_h5ad


def heap_without_end(path):
    """A piece of free room of no bytes in the heap of texts: HDF5 1.14 steps over it for ever."""
    content = bytearray(path.read_bytes())
    at = content.index(b"GCOL") + 16
    while any(content[at : at + 2]):
        at += 16 + -(-int.from_bytes(content[at + 8 : at + 16], "little") // 8) * 8
    content[at + 8 : at + 16] = bytes(8)
    path.write_bytes(content)


def group_in_itself(path):
    with h5py.File(path, "r+") as file:
        file["obs/again"] = file["obs"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [(heap_without_end, "damaged heap of texts"), (group_in_itself, "group /obs/again holds itself")],
)
def test_an_h5ad_that_its_library_would_never_leave_is_refused(tmp_path, damage, says):
    write_h5ad(tmp_path / "one.h5ad")
    read_section(tmp_path / "one.h5ad", mpp=0.5)
    damage(tmp_path / "one.h5ad")
    with pytest.raises(InputError, match=rf"one\.h5ad: .*{says}"):
        read_section(tmp_path / "one.h5ad", mpp=0.5)


def with_dataset(path, **how):
    write_h5ad(path)
    with h5py.File(path, "r+") as file:
        how.pop("add")(file["uns"], **how)


def external(group, secret):
    group.create_dataset("note", (8,), "S1", external=[(str(secret), 0, 8)])


def virtual(group, secret):
    layout = h5py.VirtualLayout((8,), "i4")
    layout[:] = h5py.VirtualSource(str(secret), "data", (8,))
    group.create_virtual_dataset("note", layout)


def linked(group, secret):
    group["note"] = h5py.ExternalLink(str(secret), "/data")


@pytest.mark.parametrize("add", [external, virtual, linked])
def test_an_hdf5_file_that_reaches_into_another_is_refused(tmp_path, add):
    secret = tmp_path / "secret"
    secret.write_bytes(b"hf_token")
    with_dataset(tmp_path / "s.h5ad", add=add, secret=secret)
    with pytest.raises(InputError, match=r"s\.h5ad: its note lies in another file; expected all of it in this one"):
        read_section(tmp_path / "s.h5ad", mpp=0.5)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_link_to_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with_dataset(tmp_path / "s.h5ad", add=linked, secret=tmp_path / "pipe")
    found = []

    def read():
        with pytest.raises(InputError, match="its note lies in another file"):
            read_section(tmp_path / "s.h5ad", mpp=0.5)
        found.append(True)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert found


def test_a_dense_matrix_of_real_counts_has_room():
    assert room(6_900_000) > 1000 * 36_601 * 4  # a shallow section, packed
    assert room(6_500_000) > 1000 * 33_000 * 8  # the same as int64
    assert room(3_400_000) > 60_000 * 200 * 12  # what model mean predicts, the same at every spot
    assert room(9_999_999) < 1 << 30
