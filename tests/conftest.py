import gc
import os
import socket
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # here, not in a fixture: the hub's client reads it once, when it is imported

import huggingface_hub.constants
import huggingface_hub.utils

from genar import machine
from genar.data import read_sections
from genar.data.simulate import TissueConfig, write_tissue

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
