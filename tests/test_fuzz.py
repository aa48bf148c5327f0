"""Bad input: some thousand damaged files in the time that a check may take, and each that was once answered wrongly."""

import gzip
import json
import os
import shutil
import struct
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from numcodecs import Zstd
from PIL import Image

pytest.importorskip("resource")

from fuzz.runner import make_seeds, run_all, run_case
from fuzz.targets import TARGETS
from genar.errors import InputError

SECONDS = float(os.environ.get("GENAR_FUZZ_SECONDS", "60"))
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are watched through /proc")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return make_seeds(tmp_path_factory.mktemp("fuzz") / "seeds", TARGETS)


@pytest.fixture
def seed(seeds, tmp_path):
    def copy(name):
        return Path(shutil.copytree(seeds / name, tmp_path / name))

    return copy


@pytest.mark.parametrize("name", TARGETS)
def test_the_undamaged_seed_is_accepted(name, seed):
    assert run_case(name, seed(name)) == "accepted"


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_in_a_line_and_nothing_else(seeds, tmp_path):
    findings, counts = run_all(list(TARGETS), seeds, tmp_path, SECONDS)
    assert not findings, "\n".join(map(str, findings))
    assert all(count.cases for count in counts.values())
    assert sum(count.refused for count in counts.values()) > 100


# --- what was once answered wrongly: by a traceback, a crash, a hang, or all of the memory


def edit_json(**values):
    """Set keys, at whatever depth a path of them leads to."""

    def edit(path):
        facts = json.loads(path.read_text())
        for key, value in values.items():
            inner, names = facts, key.split("__")
            for name in names[:-1]:
                inner = inner[name]
            inner[names[-1]] = value
        path.write_text(json.dumps(facts))

    return edit


def edit_hdf5(change):
    def edit(path):
        with h5py.File(path, "r+") as file:
            change(file)

    return edit


def put(name, value):
    """Another value in the place of a dataset, its attributes kept."""

    def change(file):
        attrs = dict(file[name].attrs)
        del file[name]
        file[name] = value
        file[name].attrs.update(attrs)

    return edit_hdf5(change)


def declare(name, shape, dtype):
    """A dataset that says to be huge and holds nothing."""

    def change(file):
        attrs = dict(file[name].attrs)
        del file[name]
        file.create_dataset(name, shape, dtype, chunks=tuple(min(n, 100) for n in shape)).attrs.update(attrs)

    return edit_hdf5(change)


def narrowed(file):
    starts = file["X/indptr"][()]
    del file["X/indptr"]
    file["X/indptr"] = starts.astype(np.int8)


def loop(file):
    del file["uns"]
    file["uns"] = h5py.SoftLink("/uns")


def no_library(file):
    del file["uns/spatial/lib"]
    file["uns/spatial/lib"] = 3


def text(content):
    return lambda path: path.write_text(content)


def bomb(piece):
    packed = gzip.compress(piece * (1 << 20), 9)
    return lambda path: path.write_bytes(packed * (2_000_000_000 // (len(piece) << 20)))


def tag(code, value, at=8, form="I"):
    """Overwrite the value of a TIFF's tag, or with ``at`` 4 its count, or 2 its type."""

    def edit(path):
        data = bytearray(path.read_bytes())
        first = struct.unpack_from("<I", data, 4)[0]
        for entry in range(first + 2, first + 2 + 12 * struct.unpack_from("<H", data, first)[0], 12):
            if struct.unpack_from("<H", data, entry)[0] == code:
                struct.pack_into("<" + form, data, entry + at, value)
        path.write_bytes(bytes(data))

    return edit


def circle(path):
    """The chain of pages ends where it begins."""
    data = bytearray(path.read_bytes())
    first = struct.unpack_from("<I", data, 4)[0]
    struct.pack_into("<I", data, first + 2 + 12 * struct.unpack_from("<H", data, first)[0], first)
    path.write_bytes(bytes(data))


def inflated(path):
    """A TIFF of one strip that unpacks to a hundred times what it says."""
    tifffile.imwrite(path, np.zeros((100, 100, 3), np.uint8), photometric="rgb", compression="zlib", rowsperstrip=100)
    data, packed = path.read_bytes(), zlib.compress(bytes(200_000_000), 1)
    path.write_bytes(data + packed)
    tag(273, len(data))(path)  # where the strip lies
    tag(279, len(packed))(path)


DEEP = "[" * 100_000
NPY = b"\x93NUMPY\x01\0"
WRONG_ONCE = [
    ("hest", "metadata/A1.json", text(DEEP), "A1.json"),
    ("hest", "metadata/A1.json", edit_json(inter_spot_dist=["x"]), "inter_spot_dist must be"),
    ("hest", "metadata/A1.json", edit_json(spot_diameter={}), "spot_diameter must be"),
    ("hest", "metadata/A1.json", edit_json(pixel_size_um_estimated=-1), "pixel_size_um_estimated must be"),
    ("hest", "metadata/A1.json", edit_json(pixel_size_um_estimated=1e-9), "cannot be right"),
    ("hest", "st/A1.h5ad", edit_hdf5(lambda f: f["X"].attrs.update({"encoding-type": "array"})), "not a readable"),
    ("hest", "st/A1.h5ad", edit_hdf5(lambda f: f["var"].attrs.update({"encoding-type": 1})), "not a readable"),
    ("hest", "st/A1.h5ad", edit_hdf5(loop), "not a readable"),
    ("hest", "st/A1.h5ad", put("X/data", np.ones(3, np.float32)), "not a readable"),
    ("hest", "st/A1.h5ad", put("X/indices", np.full(211, np.nan)), "must be whole numbers"),
    ("hest", "st/A1.h5ad", edit_hdf5(narrowed), "must grow"),
    ("hest", "st/A1.h5ad", declare("X/data", (10**12,), "f4"), "arrays of"),
    ("h5ad", "A1.h5ad", put("layers/counts/indices", np.full(99999, 2**31 - 1, np.int32)), "not a readable"),
    ("h5ad", "A1.h5ad", put("layers/counts/indptr", np.array([0, 9**9, 5, 1, 7, 2, 0], np.int32)), "not a readable"),
    ("h5ad", "A1.h5ad", put("obsm/spatial", np.full((40, 2), b"x")), "not a readable"),
    ("h5ad", "A1.h5ad", edit_hdf5(no_library), "as scanpy has it"),
    ("h5ad", "A1.h5ad", put("uns/genar/mpp", float("nan")), r"\['mpp'\] must be"),
    ("h5ad", "A1.h5ad", declare("obsm/spatial", (40, 10**9), "f8"), "arrays of"),
    ("visium", "P1/filtered_feature_bc_matrix.h5", put("matrix/indices", np.full(240, 10**6, np.uint32)), "10x"),
    ("visium", "P1/filtered_feature_bc_matrix.h5", put("matrix/shape", [2**63 - 1, 2**63 - 1]), "10x"),
    ("visium", "P1/filtered_feature_bc_matrix.h5", declare("matrix/data", (10**11,), "u4"), "arrays of"),
    ("visium", "P1/filtered_feature_bc_matrix.h5", put("matrix/features/id", np.array([b"x"])), "10x"),
    ("visium", "P1/spatial/scalefactors_json.json", text(DEEP), "scale factors"),
    ("visium_mtx", "P1/filtered_feature_bc_matrix/barcodes.tsv.gz", bomb(b"A\n"), "text of"),
    ("visium_mtx", "P1/filtered_feature_bc_matrix/matrix.mtx.gz", bomb(b"%"), "matrix"),
    ("legacy_st", "X1_selection.tsv", text("x\ty\tpixel_x\tpixel_y\t" * 200_000), "columns"),
    ("legacy_st", "X1.tsv.gz", bomb(b"1\t"), "text of"),
    ("legacy_st", "X1.tsv.gz", bomb(b"\0"), "text of"),
    ("tiff_flat", "a.tif", tag(256, 2**32 - 1), "px in"),
    ("tiff_striped", "a.tif", tag(257, 10**6), "px in"),
    ("tiff_pyramid", "a.tif", tag(322, 65520), "a.tif"),
    ("tiff_pyramid", "a.tif", tag(256, 2, at=4), "TIFF"),
    ("tiff_striped", "a.tif", tag(256, 0), "a.tif"),
    ("tiff_striped", "a.tif", circle, "a.tif"),
    ("tiff_flat", "a.tif", inflated, "a.tif"),
    ("panels", "panel.json", text(DEEP), "not a readable panel"),
    ("panels", "panel.json", edit_json(sections=[["x"]]), "not a panel"),
    ("panels", "panel.txt", text("\n".join([*map(str, range(700_000)), "699999"])), "more than once"),
    ("settings", "config.yaml", text("a: &a [x,x]\nb: &b [*a,*a]\n" + "c: &c [*b,*b]\n"), "is not known"),
    ("settings", "config.yaml", text("seed: " + "9" * 6000), "not a readable YAML"),
    ("settings", "config.yaml", text("seed: 2001-99-99"), "not a readable YAML"),
    ("settings", "config.yaml", text(DEEP), "characters|YAML"),
    ("settings", "config.yaml", text("lr: .nan"), "setting lr: expected float"),
    ("recipe", "recipe.yaml", text("sections: [A]\nmethods: 3\n"), "not a readable recipe"),
    ("recipe", "recipe.yaml", text("sections: &a [*a]\nmethods: []\n"), "repeat each other"),
    ("checkpoint", "genar/config.json", text(DEEP), "JSON of a checkpoint"),
    ("checkpoint", "genar/config.json", edit_json(model__config__width=10**6), "shape|tensors|width"),
    ("checkpoint", "genar/config.json", edit_json(model__config__depth=10**6), "asks for more"),
    ("checkpoint", "genar/config.json", edit_json(model__config__max_count=2**60), "config.json|shape"),
    ("checkpoint", "genar/config.json", edit_json(features=3), "config.json"),
    ("rivals", "histogene/config.json", edit_json(model__config=7), "config.json"),
    ("features", "A1.zarr/zarr.json", text("[]"), "delete it and embed again"),
    ("features", "A1.zarr/features/zarr.json", edit_json(shape=[16, 1, 10**12]), "arrays of"),
    ("features", "A1.zarr/barcode/c/0", lambda p: p.write_bytes(Zstd().encode(b"\0\0\0\x18" + bytes(8))), "texts of a"),
    ("imports", "npy/A1.npy", lambda p: p.write_bytes(NPY + b"\xa0\x0f" + b"(40, " * 800), "npy"),
    ("prediction", "p.h5ad", edit_hdf5(lambda f: f["uns/genar"].pop("mpp")), "no pixel size"),
    ("run", "run.json", text(DEEP), "record of a run"),
    ("run", "checkpoint/config.json", edit_json(model=3), "run"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "file", "damage", "says"), WRONG_ONCE)
def test_what_was_once_answered_wrongly_is_a_line(name, file, damage, says, seed):
    folder = seed(name)
    damage(folder / file)
    with pytest.raises(InputError, match=says) as caught:
        TARGETS[name].enter(folder)
    assert len(str(caught.value)) < 2000


def test_references_that_grow_without_end_are_not_followed(tmp_path):
    from fuzz.mutate import YAML_BOMBS
    from genar.data.yaml_text import load_yaml

    for bomb_ in YAML_BOMBS[:2]:
        with pytest.raises(InputError, match="repeat each other"):
            load_yaml(bomb_)
    assert load_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a\n") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": {"x": 1},
    }


def test_a_picture_that_says_to_be_huge_is_not_decoded(tmp_path):
    from genar.data import open_slide

    Image.new("L", (30, 30)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(bytes(data))
    with pytest.raises(InputError, match="px in one plain image"):
        open_slide(tmp_path / "a.png")


def test_a_patch_is_not_wider_than_any_is(tmp_path):
    from genar.data import open_slide

    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="is --mpp right"):
        open_slide(tmp_path / "a.png").read_patch((5, 5), 112, 224, mpp=1e-7)
