"""Data sets from the hub: verified, gone on with, refused in one line."""

import json
import os
import subprocess
import sys
import time

import huggingface_hub.constants
import pytest
from filelock import FileLock

from commands import run_fetch
from genar import fetch
from genar.data import read_sections
from genar.data.files import LOCK
from genar.errors import InputError, SectionWarning
from genar.fetch import transfer
from genar.fetch.transfer import RemoteFile
from source_server import COMMIT, FIRST, SECOND, TOKEN, left, sha256


@pytest.fixture
def hest(source, tissue):
    """Two simulated sections under the names of real ones."""
    for section, simulated in ((FIRST, "SIM1"), (SECOND, "SIM2")):
        for kind, suffix in (("st", "h5ad"), ("wsis", "tif"), ("metadata", "json")):
            source.hub[f"{kind}/{section}.{suffix}"] = (tissue / kind / f"{simulated}.{suffix}").read_bytes()
    source.hub[f"patches/{FIRST}.h5"] = b"patches"
    return source


def test_fetch_from_the_hub(hest, fetch_, tmp_path):
    code, _, told = fetch_("--json")
    out = tmp_path / "out"
    assert code == 0
    names = [path for path in hest.hub if "patches" not in path]
    assert left(out) == sorted([*names, "fetch.json"])
    assert all((out / path).read_bytes() == hest.hub[path] for path in names)
    assert not any(path.is_symlink() for path in out.rglob("*"))
    facts = json.loads(told.splitlines()[-1])
    size = sum(len(hest.hub[path]) for path in names)
    assert facts["outputs"] == {"sections": str(out)}
    assert (facts["n_bytes"], facts["n_files_new"], facts["n_files_kept"]) == (size, 6, 0)
    assert facts["revision"] == COMMIT
    assert [section.n_obs for section in read_sections(out)] == [60, 60]
    record = json.loads((out / "fetch.json").read_text())
    assert record["files"][f"wsis/{FIRST}.tif"]["digest"] == f"sha256:{sha256(hest.hub[f'wsis/{FIRST}.tif'])}"
    assert record["licence"].startswith("CC BY-NC-SA 4.0")


def test_terms_and_size_are_told_before_a_byte_comes(hest, fetch_):
    hest.faults[f"metadata/{FIRST}.json"] = [("always", "status", (401, {}))]
    code, line, told = fetch_()
    assert code == 2
    assert "2 sections of HEST-1k (https://huggingface.co/datasets/MahmoodLab/hest at c0ffee00)" in told
    assert "CC BY-NC-SA 4.0" in told
    assert "hf auth login" in told
    assert "6 files to come" in told
    assert line.startswith("error: ")


def test_the_token_is_shown_to_the_hub_alone(hest, fetch_):
    assert fetch_()[0] == 0
    shown = {(asked[0].startswith(("resolve", "metadata")), asked[2]) for asked in hest.asked}
    assert shown == {(True, f"Bearer {TOKEN}"), (False, None)}  # the storage it redirects to gets none
    assert {asked[3] for asked in hest.asked if asked[2] is None} == {f"localhost:{hest.port}"}


def test_what_is_there_is_verified_and_kept(hest, fetch_, tmp_path):
    fetch_(sections=FIRST)
    before = {path: os.stat(tmp_path / "out" / path).st_mtime_ns for path in left(tmp_path / "out")}
    hest.asked.clear()
    code, _, told = fetch_("--json", "--with", "patches")
    assert code == 0
    facts = json.loads(told.splitlines()[-1])
    assert (facts["n_files_new"], facts["n_files_kept"]) == (4, 3)
    assert not hest.requests(f"wsis/{FIRST}.tif")
    assert (tmp_path / "out/patches" / f"{FIRST}.h5").read_bytes() == b"patches"
    for path, when in before.items():
        assert path == "fetch.json" or os.stat(tmp_path / "out" / path).st_mtime_ns == when


def test_something_else_under_the_name_is_not_replaced(hest, fetch_, tmp_path):
    mine = tmp_path / "out/st" / f"{FIRST}.h5ad"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"my own")
    code, line, _ = fetch_()
    assert code == 2
    assert f"{mine}: there already, but not as fetched" in line
    assert left(tmp_path / "out") == [f"st/{FIRST}.h5ad"]
    assert not hest.asked


def test_an_older_revision_is_replaced(hest, fetch_, tmp_path):
    fetch_()
    hest.commit, path = "beef" * 10, f"metadata/{FIRST}.json"
    hest.hub[path] += b"\n"
    assert fetch_()[0] == 0
    assert (tmp_path / "out" / path).read_bytes() == hest.hub[path]
    assert json.loads((tmp_path / "out/fetch.json").read_text())["revision"] == hest.commit


def test_a_dropped_transfer_goes_on(hest, fetch_, tmp_path):
    path = f"wsis/{FIRST}.tif"
    size = len(hest.hub[path])
    hest.faults[path] = [("drop", size // 3), ("status", (503, {})), ("drop", 0), ("drop", size // 3), ("none", 0)]
    assert fetch_()[0] == 0
    third = size // 3
    ranges = [None, *[f"bytes={third}-"] * 3, f"bytes={2 * third}-"]
    assert [asked[1] for asked in hest.requests(path)] == ranges
    assert (tmp_path / "out" / path).read_bytes() == hest.hub[path]


def test_a_server_without_ranges_starts_anew(hest, fetch_, tmp_path):
    path = f"wsis/{FIRST}.tif"
    hest.faults[path] = [("drop", 1000), ("no ranges", 0)]
    assert fetch_()[0] == 0
    assert (tmp_path / "out" / path).read_bytes() == hest.hub[path]


def test_a_dead_source_is_given_up_and_gone_on_with(hest, fetch_, tmp_path):
    path = f"st/{SECOND}.h5ad"
    hest.faults[path] = [("drop", 1000), ("always", "drop", 0)]
    code, line, _ = fetch_()
    assert code == 2
    assert f"{path}: 127.0.0.1:{hest.port} gave nothing in 4 tries" in line
    assert f"goes on at 1,000 of {len(hest.hub[path]):,} bytes" in line
    assert not (tmp_path / "out" / path).exists()
    with pytest.warns(SectionWarning, match=f"left out are {SECOND} .no st/{SECOND}.h5ad.: is the copy complete"):
        assert [section.n_obs for section in read_sections(tmp_path / "out")] == [60]  # the first is whole
    hest.asked.clear()
    hest.faults.clear()
    code, _, told = fetch_("--json")
    assert code == 0
    assert [asked[:2] for asked in hest.asked] == [(f"resolve {path}", "bytes=1000-"), (path, "bytes=1000-")]
    assert json.loads(told.splitlines()[-1])["n_bytes"] == len(hest.hub[path]) - 1000
    assert ".fetch" not in os.listdir(tmp_path / "out")


def test_killed_and_started_again(hest, fetch_, tmp_path):
    path = f"wsis/{FIRST}.tif"
    half = len(hest.hub[path]) // 2
    hest.faults[path] = [("stall", half), ("none", 0)]
    words = ["her2st", "--out", tmp_path / "out", "--sections", FIRST]
    env = {**os.environ, "HF_HUB_OFFLINE": "0"}
    process = subprocess.Popen([sys.executable, "-m", "genar.cli", "fetch", *map(str, words)], env=env)
    assert hest.stalled.wait(60)
    parts = tmp_path / "out/.fetch"
    deadline = time.monotonic() + 10
    while sum(part.stat().st_size for part in parts.glob("*.part")) < half and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert left(tmp_path / "out/metadata") == [f"{FIRST}.json"]
    assert not (tmp_path / "out" / path).exists()
    assert fetch_(sections=FIRST)[0] == 0
    assert [asked[1] for asked in hest.requests(path)] == [None, f"bytes={half}-"]
    assert left(tmp_path / "out") == sorted(["fetch.json", *(p for p in hest.hub if FIRST in p and "patches" not in p)])


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (("altered", 0), "altered on the way"),
        (("size", 1), "the server sends"),
        (("size", -1), "the server sends"),
        (("status", (404, {})), "has no such file or revision (404)"),
        (("status", (401, {})), "refuses access (401); accept its terms on https://huggingface.co/datasets/Mahmood"),
        (("status", (403, {"X-Error-Code": "GatedRepo"})), "then log in with `hf auth login` (or set HF_TOKEN)"),
        (("status", (403, {"X-RateLimit-Remaining": "0"})), "try again in an hour"),
        (("status", (410, {})), "answered 410"),
        (("status", (503, {"Retry-After": "0"})), "gave nothing in 4 tries (503 Service Unavailable)"),
    ],
)
def test_refusals_are_one_line_and_keep_nothing(hest, fetch_, tmp_path, fault, says):
    path = f"st/{FIRST}.h5ad"
    hest.faults[path] = [("always", *fault)]
    code, line, _ = fetch_(sections=FIRST)
    assert code == 2
    assert line.startswith(f"error: {path}: ")
    assert says in line
    assert left(tmp_path / "out") == ["fetch.json", f"metadata/{FIRST}.json", f"wsis/{FIRST}.tif"]
    hest.faults.clear()
    assert fetch_(sections=FIRST)[0] == 0


def test_a_lie_about_the_size_found_in_a_resumed_transfer(hest, fetch_):
    path = f"st/{FIRST}.h5ad"
    hest.faults[path] = [("drop", 1000), ("size", 7)]
    code, line, _ = fetch_(sections=FIRST)
    assert code == 2
    assert (
        f"expected {len(hest.hub[path]):,} bytes by the source's list, the server sends {len(hest.hub[path]) + 7:,}"
        in line
    )


def test_an_answer_from_another_byte_is_refused(hest, fetch_):
    path = f"st/{FIRST}.h5ad"
    hest.faults[path] = [("drop", 1000), ("shifted", 5)]
    code, line, _ = fetch_(sections=FIRST)
    assert code == 2
    assert "asked for bytes from 1,000 on, the server answered" in line


def test_a_damaged_part_is_thrown_away_once(hest, fetch_, tmp_path):
    path = f"st/{FIRST}.h5ad"
    data = hest.hub[path]
    remote = RemoteFile(path, "", len(data), f"sha256:{sha256(data)}")
    part = transfer.part_of(remote, tmp_path / "out/.fetch")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 1000)
    assert fetch_(sections=FIRST)[0] == 0
    assert [asked[1] for asked in hest.requests(path)] == ["bytes=1000-", None]
    assert (tmp_path / "out" / path).read_bytes() == data


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["liver"], "data set 'liver' is not known; expected one of her2st, prad"),
        (["her2st", "--sections", "SPA1"], "'SPA1' is no section of her2st"),
        (["her2st", "--source", "ftp"], "source 'ftp' is not known; expected one of hub, github"),
        (["prad", "--source", "github"], "prad: its raw files are not on GitHub"),
        (["her2st", "--with", "masks"], "--with 'masks' is not known; expected tissue_seg, patches"),
        (["her2st", "--source", "github", "--with", "patches"], "fetch from the hub"),
        (["her2st", "--sections", "A1"], "has no metadata/SPA154.json; name another --revision, or leave SPA154 out"),
        (["her2st", "--revision", "v9"], "has no revision 'v9'; expected a branch, tag or commit"),
    ],
)
def test_wrong_words(hest, monkeypatch, capsys, tmp_path, words, says):
    code, line, _ = run_fetch(monkeypatch, capsys, *words, "--out", tmp_path / "out")
    assert (code, line.startswith("error: ")) == (2, True)
    assert says in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("status", "says"), [(401, "hf auth login"), (403, "accept its terms"), (500, "answered 500")])
def test_a_hub_that_refuses_the_list(hest, fetch_, tmp_path, status, says):
    hest.refuse = status
    code, line, _ = fetch_()
    assert code == 2
    assert says in line
    assert not (tmp_path / "out").exists()


def test_no_network_and_offline(source, fetch_, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, line, _ = fetch_()
    assert (code, "http://127.0.0.1:9 cannot be reached" in line) == (2, True)
    monkeypatch.setenv("GENAR_GITHUB_API", "http://127.0.0.1:9")
    code, line, _ = fetch_("--source", "github")
    assert (code, "127.0.0.1:9 cannot be reached" in line) == (2, True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, line, _ = fetch_()
    assert (code, "HF_HUB_OFFLINE" in line) == (2, True)
    assert not (tmp_path / "out").exists()


def test_too_small_a_disk(hest, fetch_, monkeypatch, tmp_path):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5_000_000})())
    code, line, _ = fetch_()
    assert code == 2
    assert "needed, 5.0 MB free; free some space, or fetch fewer sections" in line
    assert not hest.asked
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_disk_that_fills_up(hest, fetch_, tmp_path):
    path = f"st/{FIRST}.h5ad"
    part = tmp_path / f"out/.fetch/sha256-{sha256(hest.hub[path])}.part"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    code, line, _ = fetch_(sections=FIRST)
    assert code == 2
    assert f"{part}: cannot write (No space left on device); free some space and go on" in line
    assert not (tmp_path / "out" / path).exists()


def test_more_bytes_than_were_stated(source, tmp_path):
    source.hub["st/a"], source.faults["st/a"] = b"x" * 1000, [("no length", 500)]
    remote = RemoteFile("st/a", f"{source.url}/cdn/st/a", 1000, f"sha256:{sha256(b'x' * 1000)}")
    with pytest.raises(InputError, match="the server sends more than 1,000"):
        transfer.download(
            remote, tmp_path / "a", parts=tmp_path, access=transfer.Access({}, ""), tick=lambda more: None
        )
    assert not left(tmp_path)


def test_one_fetch_a_folder(hest, fetch_, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / LOCK):
        code, line, _ = fetch_()
    assert (code, "another fetch is writing there" in line) == (2, True)
    assert fetch_()[0] == 0
    code, line, _ = fetch_("--source", "github")
    assert (code, "holds her2st from source hub, asked for her2st from github" in line) == (2, True)
