"""Nobody is let in: no pickle runs, transfers are TLS alone, names stay in their folder, secrets are told to nobody."""

import hashlib
import pickle
import shutil
import subprocess
import urllib.request
import warnings
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
import zarr
from PIL import Image

from commands import run
from genar.assess import read_prediction
from genar.data import open_slide, read_section
from genar.data.door import check_zarr
from genar.encoders.weights import read_state
from genar.errors import InputError
from genar.features.imports import read_foreign_features
from genar.fetch.hub import verified
from genar.fetch.transfer import Access, RemoteFile, _SameHostRedirect, check_url, download, read_json
from genar.models.checkpoint import load_checkpoint
from genar.resume import check_whole
from genar.settings import read_settings
from serving import Quiet, serving

CHECKPOINT = Path(__file__).parent / "data" / "checkpoint_format1"
ACCESS = Access({"Authorization": "Bearer hf_secret"}, "ask")


class Payload:
    """What writes a file where it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return Path.write_text, (Path(self.marker), "ran")


@pytest.fixture
def payload(tmp_path):
    return Payload(tmp_path / "marker")


def plain(path, payload):
    path.write_bytes(pickle.dumps(payload))


def zipped(path, payload):
    torch.save({"features": payload, "w": payload}, path)


def legacy(path, payload):
    torch.save({"features": payload}, path, _use_new_zipfile_serialization=False)


def array(path, payload):
    with path.open("wb") as file:
        np.save(file, np.array([payload, payload], dtype=object), allow_pickle=True)


def archive(path, payload):
    with path.open("wb") as file:
        np.savez(file, features=np.array([payload], dtype=object))


def as_dataset(path, payload):
    with h5py.File(path, "w") as file:
        for name in ("features", "X", "obs"):
            file[name] = np.void(pickle.dumps(payload))
        file.attrs["encoding-type"], file.attrs["encoding-version"] = "anndata", "0.1.0"


def test_the_payload_works(tmp_path, payload):
    for name, write in {"a.pkl": plain, "a.pt": zipped, "b.pt": legacy}.items():
        write(tmp_path / name, payload)
        if name == "a.pkl":
            pickle.loads((tmp_path / name).read_bytes())
        else:
            torch.load(tmp_path / name, weights_only=False)
        assert (tmp_path / "marker").read_text() == "ran"
        (tmp_path / "marker").unlink()
    array(tmp_path / "a.npy", payload)
    np.load(tmp_path / "a.npy", allow_pickle=True)
    assert (tmp_path / "marker").read_text() == "ran"


@pytest.mark.filterwarnings(
    "ignore:Element", "ignore:.*very old version of AnnData"
)  # what anndata says of the file, before it is refused
@pytest.mark.parametrize("write", [plain, zipped, legacy, array, archive, as_dataset], ids=lambda f: f.__name__)
def test_no_file_that_carries_a_pickle_runs_it(tmp_path, payload, write, tissue_sections):
    for suffix in (".pt", ".npy", ".h5"):
        write(tmp_path / f"SIM1{suffix}", payload)
        with pytest.raises(InputError, match=rf"SIM1\{suffix}"):
            read_foreign_features(tmp_path / f"SIM1{suffix}", tissue_sections[0])
    for suffix in (".pt", ".pth", ".bin", ".safetensors"):
        write(tmp_path / f"w{suffix}", payload)
        with pytest.raises(InputError, match=rf"w\{suffix}"):
            read_state(tmp_path / f"w{suffix}")
    write(tmp_path / "p.h5ad", payload)
    for read in (read_section, read_prediction):
        with pytest.raises(InputError, match="p"):
            read(tmp_path / "p.h5ad")
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    write(tmp_path / "model" / "model.safetensors", payload)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_checkpoint(tmp_path / "model")
    write(tmp_path / "model" / "config.json", payload)
    with pytest.raises(InputError, match=r"config\.json"):
        load_checkpoint(tmp_path / "model")
    write(tmp_path / "last.ckpt", payload)
    with pytest.raises(InputError, match=r"last\.ckpt: not .*; delete it, and the same command starts anew"):
        check_whole(tmp_path / "last.ckpt")
    assert not (tmp_path / "marker").exists()


def test_a_pickle_beside_a_checkpoint_is_not_looked_at(tmp_path, payload):
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    for name in ("last.ckpt", "pytorch_model.bin", "model.pkl", "training_args.bin"):
        plain(tmp_path / "model" / name, payload)
    load_checkpoint(tmp_path / "model")
    assert not (tmp_path / "marker").exists()


def test_yaml_makes_plain_values_alone(tmp_path):
    marker = tmp_path / "marker"
    text = f"lr: !!python/object/apply:os.mkdir ['{marker.as_posix()}']\n"
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=r"c\.yaml: not a readable YAML"):
        read_settings(tmp_path / "c.yaml", [])
    with pytest.raises(InputError, match="--set"):
        read_settings(None, ["lr=!!python/name:os.system"])
    assert not marker.exists()
    yaml.load(text, yaml.UnsafeLoader)  # a text that would
    assert marker.exists()


def test_an_image_starts_no_other_program(tmp_path, monkeypatch):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.eps")
    shutil.move(tmp_path / "a.eps", tmp_path / "a.png")  # Pillow goes by the contents, and hands these to Ghostscript
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(InputError, match=r"a\.png: not a readable image"):
        open_slide(tmp_path / "a.png")


# --- transfers


@pytest.mark.parametrize(
    "url",
    ["http://huggingface.co/x", "ftp://huggingface.co/x", "file:///etc/passwd", "huggingface.co/x", "https:///x",
     "data:,x", "http://10.0.0.1/x", "http://127.0.0.1.evil.org/x", "http://localhost.evil.org/x"],
)  # fmt: skip
def test_transfers_are_tls_alone(url, tmp_path):
    with pytest.raises(InputError, match="https"):
        check_url(url)
    with pytest.raises(InputError, match="https"):
        read_json(url, ACCESS, "the list")
    file = RemoteFile("a", url, 1, f"sha256:{'0' * 64}")
    with pytest.raises(InputError, match="https"):
        download(file, tmp_path / "a", parts=tmp_path / "parts", access=ACCESS, tick=lambda n: None)


@pytest.mark.parametrize(
    "url", ["https://huggingface.co/x", "http://127.0.0.1:80/x", "http://localhost/x", "http://[::1]/"]
)
def test_mirrors_on_this_machine_may_do_without(url):
    check_url(url)


@pytest.mark.parametrize("variable", ["HF_ENDPOINT", "GENAR_GITHUB_API", "GENAR_GITHUB_RAW"])
@pytest.mark.usefixtures("online")
def test_mirrors_elsewhere_may_not(variable, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(variable, "http://mirror.example")
    source = "hub" if variable == "HF_ENDPOINT" else "github"
    words = ["fetch", "her2st", "--source", source, "--sections", "SPA154", "--out", tmp_path / "out"]
    assert run(monkeypatch, *words) == 2
    assert "https" in capsys.readouterr().err
    if source == "hub":
        for words in (["push", CHECKPOINT, "lab/x"], ["predict", "x.tif", "--model", "lab/x", "--out", "p.h5ad"]):
            Image.new("RGB", (400, 400)).save(tmp_path / "x.png")
            assert run(monkeypatch, *words) == 2


def redirecting(to):
    """A server on this machine that sends everyone elsewhere."""

    class Handler(Quiet, BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", to)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return serving(Handler)


@pytest.mark.parametrize("to", ["http://elsewhere.example/x", "file:///etc/passwd", "ftp://elsewhere.example/x"])
def test_a_redirect_leads_out_of_tls_for_nobody(to, tmp_path):
    with redirecting(to) as place:
        url = f"{place}/list"
        with pytest.raises(InputError, match=r"https|not allowed"):
            read_json(url, ACCESS, "the list")
        file = RemoteFile("a", url, 1, f"sha256:{'0' * 64}")
        with pytest.raises(InputError, match=r"https|not allowed"):
            download(file, tmp_path / "a", parts=tmp_path / "parts", access=ACCESS, tick=lambda n: None)
    assert not (tmp_path / "a").exists()


def test_a_host_of_the_network_leads_nobody_back_to_this_machine():
    request = urllib.request.Request("https://elsewhere.example/x")
    with pytest.raises(InputError, match="this machine"):
        _SameHostRedirect().redirect_request(request, None, 302, "Found", {}, "http://127.0.0.1:8080/admin")


def test_a_file_of_the_hubs_cache_with_other_bytes_is_refused(tmp_path):
    right = hashlib.sha256(b"weights").hexdigest()
    (tmp_path / right).write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / right)
    assert verified(tmp_path / "model.safetensors").name == "model.safetensors"
    (tmp_path / right).write_bytes(b"wEights")
    with pytest.raises(InputError, match="other bytes than the hub has"):
        verified(tmp_path / "model.safetensors")


# --- names that lead elsewhere


@pytest.mark.parametrize(
    ("path", "digest"),
    [("../x", "0" * 64), ("a/../../x", "0" * 64), ("/etc/x", "0" * 64), ("C:\\x", "0" * 64), ("C:/x", "0" * 64),
     ("a\\..\\x", "0" * 64), ("", "0" * 64), ("a", "../../x"), ("a", ""), ("a", "0" * 63 + "/")],
)  # fmt: skip
def test_a_source_lists_no_file_outside_the_folder(path, digest):
    with pytest.raises(InputError, match="the source lists"):
        RemoteFile(path, "https://huggingface.co/x", 1, f"sha256:{digest}")


def test_a_list_of_github_that_leads_out_is_refused(tmp_path, monkeypatch, capsys):
    name = "A1"
    paths = [
        f"data/ST-cnts/{name}.tsv.gz",
        f"data/ST-spotfiles/{name}_selection.tsv",
        f"data/ST-imgs/A/{name}/../../../../x.jpg",
    ]
    tree = {"tree": [{"path": path, "type": "blob", "size": 1, "sha": "0" * 40} for path in paths]}
    monkeypatch.setattr("genar.fetch.her2st.read_json", lambda *_: tree)
    words = ["fetch", "her2st", "--source", "github", "--sections", "SPA154", "--out", tmp_path / "out"]
    assert run(monkeypatch, *words) == 2
    assert "leads out of the folder" in capsys.readouterr().err
    assert not (tmp_path / "x.jpg").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", ".", "", "C:\\x", "a\\b", "x\0y", "x\ny"])
def test_a_section_stays_in_its_folder(name, tissue_sections, tmp_path):
    from genar.data import contract
    from genar.prediction import write_prediction

    adata = tissue_sections[0].copy()
    with pytest.raises(InputError, match="section"):
        contract.new_section(adata, section=name, mpp=1, spot_diameter_um=55, source="h5ad")
    adata.uns["genar"]["section"] = name
    if "\0" not in name:
        write_prediction(adata, tmp_path / "p.h5ad")
        with pytest.raises(InputError, match="section"):
            read_prediction(tmp_path / "p.h5ad")


# --- secrets

TOKEN = "hf_verysecretverysecret"


def files_with(folder, secret):
    """Files that hold the secret, also within what HDF5 compresses."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            text = path.read_bytes()
            if path.suffix == ".h5ad":
                text += str(read_prediction(path).uns).encode()
            found += [path] if secret.encode() in text else []
    return found


@pytest.mark.usefixtures("online")
def test_the_token_is_told_to_nobody(tissue, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("genar.fetch.transfer._PAUSES_S", (0.0, 0.0))
    out = tmp_path / "run"
    words = ("--model", "mean", "--n-genes", "20", "--views", "1", "--out", out)
    assert run(monkeypatch, "train", tissue, "--test", "SIM2", *words) == 0
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert run(monkeypatch, "push", out, "lab/model") == 2
    assert run(monkeypatch, "fetch", "her2st", "--out", tmp_path / "data") == 2
    assert run(monkeypatch, "predict", f"{tissue}:SIM2", "--model", "lab/model", "--out", tmp_path / "p.h5ad") == 2
    assert run(monkeypatch, "train", tissue, "--test", "SIM2", "--set", "nonsense=1", "--out", tmp_path / "other") == 2
    told = capfd.readouterr()
    assert TOKEN not in told.out + told.err
    assert files_with(tmp_path, TOKEN) == []
    (tmp_path / "planted.json").write_text(TOKEN)
    assert files_with(tmp_path, TOKEN) == [tmp_path / "planted.json"]


@pytest.mark.usefixtures("online")
def test_a_password_in_an_address_is_refused_and_not_repeated(tmp_path, monkeypatch, capfd):
    for variable, source in (("HF_ENDPOINT", "hub"), ("GENAR_GITHUB_API", "github"), ("GENAR_GITHUB_RAW", "github")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, f"https://me:{TOKEN}@mirror.example")
            if variable.endswith("RAW"):
                patch.setattr("genar.fetch.her2st.read_json", lambda *_: {"tree": []})
            words = ["fetch", "her2st", "--source", source, "--sections", "SPA154", "--out", tmp_path / "out"]
            assert run(patch, *words) == 2
    told = capfd.readouterr()
    assert TOKEN not in told.out + told.err
    assert "holds a name or password" in told.err


@pytest.mark.parametrize("shards", [None, (8,)])
@pytest.mark.parametrize("compressors", ["auto", None, "gzip"])
def test_texts_of_a_zarr_store_that_claim_to_be_more_than_a_chunk_holds_are_refused(tmp_path, shards, compressors):
    """Each chunk by itself, also where many lie in one file (a shard), as anndata 0.13 writes them."""
    packers = zarr.codecs.GzipCodec() if compressors == "gzip" else compressors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr: texts have no specification yet
        names = zarr.create_array(
            tmp_path / "store", shape=(14,), chunks=(4,), shards=shards, dtype=str, compressors=packers
        )
        names[:] = np.array([f"spot {i}" for i in range(14)])
    check_zarr(tmp_path / "store")
    (path,) = (p for p in (tmp_path / "store").rglob("1") if p.is_file())  # the second chunk, or shard
    if compressors is None:
        content = bytearray(path.read_bytes())
        content[:4] = (5).to_bytes(4, "little")
        path.write_bytes(content)
        with pytest.raises(InputError, match="more than the 4 texts"):
            check_zarr(tmp_path / "store")
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises((InputError, ValueError, RuntimeError, OSError, EOFError)):  # callers stand in ``door``
        check_zarr(tmp_path / "store")
