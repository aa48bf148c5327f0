import gc
import os
import socket
from pathlib import Path

import anndata
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # here, not in a fixture: the hub's client reads it once, when it is imported

import huggingface_hub.constants
import huggingface_hub.utils

import homes
from commands import run_fetch
from genar import machine
from genar.data import read_section, read_sections
from genar.data.simulate import TissueConfig, write_tissue
from genar.fetch import transfer
from launchers import LAUNCHERS
from serving import stop_server
from source_server import FIRST, SECOND, TOKEN, Source

machine.keep_freed_memory()  # as every command does: networks run half as fast again

_SHARED = Path(os.environ.get("GENAR_SHARED") or Path(__file__).resolve().parents[2] / "shared")
_LOCAL = {"127.0.0.1", "::1", "localhost"}

collect_ignore = ["windows"]  # looked through for examples it would be imported, and its rule hold in all tests


def pytest_report_header():
    found = "found at" if _SHARED.is_dir() else "not found, tests marked real are skipped; looked at"
    return f"real sections: {found} {_SHARED}"


def pytest_collection_finish():
    gc.freeze()  # two million objects of torch, sympy and the like, looked through at every collection otherwise


@pytest.fixture(scope="session")
def shared():
    if not _SHARED.is_dir():
        pytest.skip(f"real sections not found at {_SHARED}; set GENAR_SHARED")
    return _SHARED


@pytest.fixture(scope="session")
def tissue(tmp_path_factory):
    config = TissueConfig(n_rows=8, n_cols=8, n_genes=120, counts_per_nucleus=20)
    return write_tissue(tmp_path_factory.mktemp("tissue"), ("SIM1", "SIM2"), config=config)


@pytest.fixture(scope="session")
def _read_sections(tissue):
    return read_sections(tissue)


@pytest.fixture
def tissue_sections(_read_sections):
    return [section.copy() for section in _read_sections]


@pytest.fixture
def own_tissue(tmp_path):
    """Sections A and B, for a test to change."""
    return homes.write_sections(tmp_path / "t", "AB", 6, 80)


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    return homes.write_sections(tmp_path_factory.mktemp("two"), "AB", 6, 120, seed=1)


@pytest.fixture(scope="session")
def bench_tissue(tmp_path_factory):
    return homes.write_sections(tmp_path_factory.mktemp("three"), "ABC", 5, 80, seed=1)


@pytest.fixture(scope="session")
def four(tmp_path_factory):
    return homes.write_sections(tmp_path_factory.mktemp("four"), "ABCD", 4, 80, seed=1)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return homes.write_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def lite0(tmp_path_factory):
    return homes.write_lite0_home(tmp_path_factory.mktemp("lite0"))


@pytest.fixture
def held_out(lite0):
    return read_section(lite0 / "tissue" / "st" / "B.h5ad")


@pytest.fixture
def held_out_prediction(lite0):
    """By the GenAR."""
    return anndata.read_h5ad(lite0 / "run" / "predictions" / "B.h5ad")


@pytest.fixture(scope="session")
def ridge_home(tmp_path_factory):
    return homes.write_ridge_home(tmp_path_factory.mktemp("ridge"))


@pytest.fixture(scope="session")
def fine_home(tmp_path_factory):
    return homes.write_fine_home(tmp_path_factory.mktemp("fine"))


@pytest.fixture(scope="session")
def report_run(tissue, tmp_path_factory):
    return homes.write_report_run(tissue, tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="session")
def _prediction(_read_sections):
    return homes.predict_simulated(_read_sections)


@pytest.fixture
def prediction(_prediction):
    """Of SIM2, by ridge on random features."""
    return _prediction.copy()


@pytest.fixture
def _nobody_started_us(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def online(monkeypatch):
    """The hub's client may ask servers (of this machine, says ``_no_network``), until it is called with False."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", not on)
        forget()

    # releases before 1.0 keep sessions, with what they knew of being offline
    forget = getattr(huggingface_hub.utils, "reset_sessions", lambda: None)
    switch(True)
    yield switch
    forget()


@pytest.fixture
def source(monkeypatch, online):
    """A server that data sets are fetched from, without pauses."""
    source = Source()
    monkeypatch.setattr(transfer, "_PAUSES_S", (0.0, 0.0, 0.0))
    for name in ("HF_ENDPOINT", "GENAR_GITHUB_API", "GENAR_GITHUB_RAW"):
        monkeypatch.setenv(name, source.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    yield source
    stop_server(source.server)


@pytest.fixture
def fetch_(monkeypatch, capsys, tmp_path):
    def call(*words, dataset="her2st", sections=f"{FIRST},{SECOND}"):
        return run_fetch(monkeypatch, capsys, dataset, "--out", tmp_path / "out", "--sections", sections, *words)

    return call


@pytest.fixture(scope="session", autouse=True)
def _no_network():
    def guard(connect):
        def guarded(self, address):
            if self.family != getattr(socket, "AF_UNIX", None) and address[0] not in _LOCAL:
                raise PermissionError(f"tests must not reach the network: {address}")
            return connect(self, address)

        return guarded

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, guard(getattr(socket.socket, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def feature_store(tmp_path_factory):
    """Of all tests that name no other, as of a user's commands: what one has embedded, the next finds."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("features")
        patch.setenv("GENAR_FEATURES", str(folder))
        yield folder
