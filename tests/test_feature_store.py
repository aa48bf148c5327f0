"""Features in their store: killed, shared, read by processes of their own, in little memory."""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from filelock import FileLock

from commands import run
from genar.data import contract, open_slide, read_section, read_sections
from genar.data.patches import Readers
from genar.encoders import Encoder, load_encoder
from genar.errors import InputError
from genar.features import Busy, embed, embed_sections, embed_widths, read_features, recipe_of, store_path

HOLD = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


OWN = """
import os, time
import torch

class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 8, 5, stride=3)
    def forward(self, x):
        time.sleep(float(os.environ.get("SLOW", "0")))
        return torch.relu(self.conv(x)).mean(dim=(2, 3))

def tiny():
    return Slow(), {"input_px": 32, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "views": 8}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_store_encoder.py").write_text(OWN)
    return folder


@pytest.fixture
def encoder(place, monkeypatch):
    monkeypatch.chdir(place)
    return load_encoder("own_store_encoder:tiny")


def start(place, tissue, store, *more, slow="0"):
    """`genar features` in a process of its own."""
    words = ["features", tissue, "--encoder", "own_store_encoder:tiny", "--widths-um", 112, "--out", store, "--json"]
    env = {**os.environ, "SLOW": slow, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "genar.cli", *map(str, (*words, *more))],
        cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def contents(folder):
    """Every file below, by path: its hash."""
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def ps(what, *which):
    """What `ps` says, however long: by itself it may cut a command line at 80 characters."""
    return subprocess.run(["ps", "-ww", "-o", f"{what}=", *map(str, which)], capture_output=True, text=True).stdout


def children(pid):
    return [int(word) for word in ps("pid", "--ppid", pid).split()]


def told_by_ps(pid, what):
    return ps(what, "-p", pid).strip()


def alive(pid):
    state = told_by_ps(pid, "stat")
    return bool(state) and not state.startswith("Z")


# -- killed, shared, resumed ----------------------------------------------------------------------------------------


def test_killed_and_started_again_it_ends_with_the_same_bits(place, tissue, encoder, tmp_path):
    whole = embed_widths(read_sections(tissue), encoder, tmp_path / "whole", workers=0)
    store = tmp_path / "killed"
    process = start(place, tissue, store, "--workers", 1, slow="0.05")
    chunks = lambda: len(list(store.glob("*.partial/features/c/*")))  # noqa: E731
    until(lambda: chunks() >= 2 or process.poll() is not None)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    (partial,) = store.glob("*.partial")
    n_done = json.loads((partial / "zarr.json").read_text())["attributes"]["n_done"]
    assert 0 < n_done < 60
    assert workers
    until(lambda: not any(alive(pid) for pid in workers), 20)  # no reader outlives it
    made = embed_widths(read_sections(tissue), encoder, store, workers=0)
    assert [path.name for path in made.values()] == [path.name for path in whole.values()]
    assert contents(store) == contents(tmp_path / "whole")


def test_a_killed_worker_ends_the_command_in_a_line_and_it_goes_on(place, tissue, encoder, tmp_path):
    store = tmp_path / "store"
    process = start(place, tissue, store, "--workers", 1, slow="0.05")
    until(lambda: len(list(store.glob("*.partial/features/c/*"))) >= 2 or process.poll() is not None)
    worker = next(pid for pid in children(process.pid) if "spawn_main" in told_by_ps(pid, "command"))
    os.kill(worker, signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = error.splitlines()
    assert line.startswith("error: a process that reads patches is gone")
    assert line.endswith("start the same command again to go on")
    made = embed_widths(read_sections(tissue), encoder, store, workers=0)
    embed_widths(read_sections(tissue), encoder, tmp_path / "whole", workers=0)
    assert contents(store) == contents(tmp_path / "whole")
    assert len(made) == 2


class CountCalls(Encoder):
    def __init__(self, encoder, calls):
        super().__init__(encoder.row, encoder._network, weights_sha256=encoder.weights_sha256)
        self.calls = calls

    def __call__(self, patches):
        self.calls.append(len(patches))
        return super().__call__(patches)


def test_two_processes_share_the_sections(place, tissue, encoder, tmp_path):
    alone = embed_widths(read_sections(tissue), encoder, tmp_path / "alone", workers=0)
    store = tmp_path / "shared"
    first = start(place, tissue, store, "--workers", 0, slow="0.05")
    until(lambda: list(store.glob("SIM1-*.partial")) or first.poll() is not None)
    calls = []
    counting = CountCalls(encoder, calls)
    made = embed_sections(read_sections(tissue), counting, recipe_of(encoder), store)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    assert json.loads(out)["outputs"] == {name: str(path) for name, path in made.items()}
    assert sum(calls) == 60 * 8  # this process made one of the two, the other was left to the first
    assert contents(store) == contents(tmp_path / "alone")
    assert set(made) == set(alone)


@pytest.fixture
def section(tissue):
    return read_section(f"{tissue}:SIM1")


def test_lock_of_a_living_process_is_respected_and_a_dead_ones_taken_over(section, encoder, tmp_path):
    recipe = recipe_of(encoder, views=1)
    lock = store_path(section, recipe, tmp_path).with_suffix(".lock")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(Busy):
        embed(section, encoder, recipe, tmp_path, wait=False)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert lock.exists()  # stale
    path = embed(section, encoder, recipe, tmp_path, wait=False)
    assert list(tmp_path.iterdir()) == [path]


def test_waiting_finds_what_the_other_made(section, encoder, tmp_path):
    recipe, calls = recipe_of(encoder, views=1), []
    path = store_path(section, recipe, tmp_path)
    lock = FileLock(path.with_suffix(".lock"))
    lock.acquire()
    waiter = threading.Thread(target=embed, args=(section, CountCalls(encoder, calls), recipe, tmp_path))
    waiter.start()
    time.sleep(0.5)
    assert waiter.is_alive()
    made = embed(section, encoder, recipe, tmp_path / "other")
    made.rename(path)
    lock.release()
    waiter.join(20)
    assert not waiter.is_alive()
    assert calls == []


@pytest.mark.parametrize("batch_size", [1, 5, 16, 40])
def test_batches_do_not_change_what_is_stored(section, encoder, tmp_path, batch_size):
    recipe = recipe_of(encoder)
    one = read_features(embed(section, encoder, recipe, tmp_path / "a"), section)
    other = read_features(embed(section, encoder, recipe, tmp_path / "b", batch_size=batch_size), section)
    np.testing.assert_allclose(other, one, atol=2e-3)
    calls = []
    embed(section, CountCalls(encoder, calls), recipe, tmp_path / "c", batch_size=batch_size)
    assert max(calls) == min(batch_size, 60)


# -- readers --------------------------------------------------------------------------------------------------------


def test_worker_processes_read_what_a_thread_reads_without_torch(section):
    slide = open_slide(contract.slide_path(section))
    centers = contract.coords_px(section)[:40]
    with Readers(0) as thread, Readers(2) as processes:
        here, there = (list(r.patches(slide, centers, 160, 64, start=16, per_step=32)) for r in (thread, processes))
        loaded = [processes._processes.submit(eval, "set(__import__('sys').modules)").result() for _ in range(4)]
    slide.close()
    assert [first for first, _ in here] == [first for first, _ in there] == [16]
    np.testing.assert_array_equal(here[0][1], there[0][1])
    assert len(here[0][1]) == 24
    for modules in loaded:
        assert "genar.data.slide" in modules
        assert "torch" not in modules
    assert not multiprocessing.active_children()


def test_image_in_memory_is_not_opened_twice(tmp_path):
    from PIL import Image

    path = tmp_path / "plain.png"
    Image.fromarray(np.zeros((80, 80, 3), np.uint8)).save(path)
    slide = open_slide(path)
    with Readers(2) as readers:
        list(readers.patches(slide, np.full((20, 2), 40.0), 32, 32))
        assert readers._processes is None
    slide.close()


def test_damage_found_by_a_worker_is_told_in_one_line(tissue, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    section = read_section(f"{tissue}:SIM1")
    slide = tmp_path / "slide.tif"
    slide.write_bytes(Path(contract.slide_path(section)).read_bytes())
    with tifffile.TiffFile(slide) as tiff:
        offsets = [offset for page in tiff.pages for offset in page.dataoffsets]
    with slide.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            file.write(bytes(200))
    section.uns[contract.GENAR][contract.SLIDE] = str(slide)
    encoder = load_encoder("own_store_encoder:tiny")
    with Readers(1) as readers, pytest.raises(InputError, match="the image is damaged") as caught:
        embed(section, encoder, recipe_of(encoder), tmp_path / "store", readers=readers)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "store").glob("*.zarr"))


# -- the command ----------------------------------------------------------------------------------------------------


def test_command_takes_widths_views_precision_and_batches(tissue, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    words = ["features", f"{tissue}:SIM2", "--encoder", "own_store_encoder:tiny", "--out", tmp_path, "--json"]
    more = ["--widths-um", "112,309", "--views", 8, "--precision", "bf16", "--batch-size", 3, "--workers", 0]
    assert run(monkeypatch, *words, *more) == 0
    outputs = json.loads(capsys.readouterr().out)["outputs"]
    assert list(outputs) == ["SIM2 112 um", "SIM2 309 um"]
    for path, width in zip(outputs.values(), (112, 309), strict=True):
        attributes = zarr.open_group(path, mode="r").attrs
        assert (attributes["width_um"], attributes["precision"], attributes["views"]) == (width, "bf16", 8)
    section = read_section(f"{tissue}:SIM2")
    half = read_features(Path(outputs["SIM2 112 um"]), section)
    full = load_encoder("own_store_encoder:tiny")
    whole = read_features(embed(section, full, recipe_of(full), tmp_path), section)
    assert half.shape == whole.shape == (60, 8, 8)
    assert 0 < np.abs(half - whole).max() < 0.05


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--widths-um", "112,wide"], "--widths-um: expected numbers"),
        (["--widths-um", "112", "--patch", "genar"], "needs patch convention hest"),
        (["--precision", "int8"], "fp32, bf16, fp16"),
        (["--batch-size", "0"], "batch size must be at least 1"),
        (["--workers", "-1"], "workers at least 0"),
        (["--views", "3"], "views must be 1 or 8"),
    ],
)
def test_bad_options_end_with_2_and_one_line(tissue, place, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(place)
    out = tmp_path / "store"
    begin = ["features", tissue, "--encoder", "own_store_encoder:tiny", "--out", out]
    assert run(monkeypatch, *begin, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not out.exists()


MEASURE = """
import sys
import numpy as np
from anndata import AnnData
from scipy import sparse
import torch
from genar.data import contract
from genar.data.patches import Readers
from genar.encoders import Encoder, EncoderRow
from genar.features import embed, recipe_of

path, out, side, n = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)

class Pool(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)

def peak():  # MiB; getrusage would count what the parent held when it started this process
    status = open("/proc/self/status").read()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))

if __name__ == "__main__":
    encoder = Encoder(EncoderRow("pool", "", "", 48, 32, (0.5,) * 3, (0.5,) * 3, "MIT", library=""), Pool())
    encoder(np.zeros((16, 32, 32, 3), np.uint8))
    adata = AnnData(sparse.csr_matrix((n, 5), dtype=np.float32))
    adata.obs_names = [f"s{i}" for i in range(n)]
    adata.obsm["spatial"] = np.random.default_rng(0).uniform(200, side - 200, (n, 2))
    contract.new_section(adata, section="BIG", slide=path, mpp=0.5, spot_diameter_um=55, source="test")
    before = peak()
    embed(adata, encoder, recipe_of(encoder, views=1), out and __import__("pathlib").Path(out))
    print(before, peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_is_not_that_of_the_image(tmp_path):
    side = 20_000  # 1.2 GB as RGB
    slide = tmp_path / "big.tif"
    with tifffile.TiffWriter(slide, bigtiff=True) as tiff:
        for level in range(3):
            size = side >> level
            tile = np.random.default_rng(level).integers(0, 255, (512, 512, 3), np.uint8)
            n_tiles = (-(-size // 512)) ** 2
            tiles = (tile if i % 97 == 0 else None for i in range(n_tiles))  # the others are left out of the file
            tiff.write(
                tiles, shape=(size, size, 3), dtype=np.uint8, tile=(512, 512), photometric="rgb",
                subfiletype=int(level > 0), compression="zlib",
            )  # fmt: skip
    assert slide.stat().st_size < 50e6
    (tmp_path / "measure.py").write_text(MEASURE)
    words = [sys.executable, tmp_path / "measure.py", slide, tmp_path / "store", side, 800]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = map(float, done.stdout.split())
    assert after - before < 250  # MiB
