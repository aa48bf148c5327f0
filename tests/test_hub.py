"""Models shared on a hub: a server on 127.0.0.1 that speaks as much of the hub's language as the client needs."""

import base64
import hashlib
import json
import re
import shutil
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from huggingface_hub import file_download

import genar
from commands import run
from genar.errors import InputError
from genar.fetch.models import is_hub_id
from genar.models import Batch, Decoding, Spots, model_class
from genar.models._card import card_markdown
from genar.models.checkpoint import Checkpoint, load_checkpoint, rewrite_card, save_checkpoint
from serving import Quiet, start_server, stop_server

DATA = Path(__file__).parent / "data"
COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_secretsecretsecret"
NAME = "lab/breast"


class Hub:
    """Repositories of models: name -> path -> bytes; everything lies at one commit."""

    def __init__(self):
        self.repositories, self.private, self.asked, self.tokens = {}, set(), [], set()
        self.own = set()  # of the one who asks
        hub = self

        class Handler(Quiet, BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.get(self)

            def do_HEAD(self):
                hub.get(self)

            def do_POST(self):
                hub.post(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))

        self.server = start_server(Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def get(self, request):
        path = unquote(request.path.partition("?")[0])
        self.asked.append(path)
        self.tokens.add(request.headers.get("Authorization"))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            name, revision = found.groups()
            if name not in self.repositories or name in self.private - self.own:
                return self.answer(request, 401, b"{}", {"X-Error-Code": "RepoNotFound"})
            if revision not in (None, "main", COMMIT):
                return self.answer(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            files = [{"rfilename": file} for file in self.repositories[name]]
            facts = {"id": name, "modelId": name, "sha": COMMIT, "siblings": files, "tags": []}
            facts["private"] = name in self.private
            return self.answer(request, 200, json.dumps(facts).encode())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            files = self.repositories[found[1]]
            rows = [{"type": "file", "path": f, "size": len(d), "oid": etag(d)} for f, d in files.items()]
            return self.answer(request, 200, json.dumps(rows).encode())
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            data = self.repositories.get(found[1], {}).get(found[2])
            if data is None:
                return self.answer(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
            return self.answer(request, 200, data, {"ETag": f'"{etag(data)}"', "X-Repo-Commit": COMMIT})
        return self.answer(request, 404, b"{}")

    def post(self, request, body):
        path = unquote(request.path.partition("?")[0])
        self.tokens.add(request.headers.get("Authorization"))
        if path == "/api/repos/create":
            facts = json.loads(body)
            name = "/".join(filter(None, (facts.get("organization"), facts["name"])))
            if name not in self.repositories:
                self.own.add(name)
                is_private = facts.get("private") or facts.get("visibility") == "private"  # by the client's release
                self.private |= {name} if is_private else set()
            self.repositories.setdefault(name, {})
            return self.answer(request, 200, json.dumps({"url": f"{self.url}/{name}", "name": name}).encode())
        if path == "/api/validate-yaml":
            return self.answer(request, 200, json.dumps({"errors": [], "warnings": []}).encode())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", path):
            rows = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self.answer(request, 200, json.dumps({"files": rows}).encode())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    self.repositories[found[1]][row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            told = {"commitUrl": f"{self.url}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            return self.answer(request, 200, json.dumps(told).encode())
        return self.answer(request, 404, b"{}")

    def answer(self, request, status, body, headers=()):
        request.send_response(status)
        for name, value in dict(headers).items():
            request.send_header(name, value)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


def etag(data):
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path, online):
    served = Hub()
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    for name, value in {
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "ENDPOINT": served.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": served.url + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
        if hasattr(file_download, name):  # releases before 1.0 read some there
            monkeypatch.setattr(file_download, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield served
    stop_server(served.server)


@pytest.fixture
def saved(tmp_path):
    return Path(shutil.copytree(DATA / "checkpoint_format1", tmp_path / "saved"))


def asked_batch():
    facts = json.loads((DATA / "format1_expected.json").read_text())
    features = torch.tensor(facts["features"])
    xy = torch.tensor(facts["coords_um"])
    return Batch(features, xy, xy / 1000, torch.arange(5)), facts


def check_predicts(checkpoint):
    batch, facts = asked_batch()
    made = checkpoint.model.predict(batch, Decoding(samples=1, layers=("mean",)))
    np.testing.assert_array_equal(made.point.numpy(), facts["counts"])
    np.testing.assert_allclose(made.layers["mean"].numpy(), facts["mean"], rtol=1e-3, atol=1e-3)


def test_a_checkpoint_of_the_first_format_predicts_as_it_did():
    check_predicts(load_checkpoint(DATA / "checkpoint_format1"))


def test_pushed_and_fetched_it_is_the_same(hub, saved, monkeypatch, capsys):
    card = "---\nlicense: mit\n---\nwritten by hand\n"
    (saved / "README.md").write_text(card)
    assert run(monkeypatch, "push", saved, NAME, "--json") == 0
    assert json.loads(capsys.readouterr().out)["outputs"]["model"] == f"{hub.url}/{NAME}"
    assert set(hub.repositories[NAME]) >= {"model.safetensors", "config.json", "README.md"}
    assert hub.repositories[NAME]["README.md"].decode() == card
    checkpoint = genar.GenAR.from_pretrained(NAME)
    check_predicts(checkpoint)
    assert checkpoint.panel == load_checkpoint(saved).panel
    assert f"Bearer {TOKEN}" in hub.tokens


def test_a_public_repository_is_not_taken_for_a_private_one(hub, saved, monkeypatch, capsys):
    assert run(monkeypatch, "push", saved, NAME) == 0
    kept = dict(hub.repositories[NAME])
    (saved / "README.md").write_text("secret")
    assert run(monkeypatch, "push", saved, NAME, "--private") == 2
    assert "is public, and nothing was written" in capsys.readouterr().err
    assert hub.repositories[NAME] == kept
    for _ in range(2):  # made private, it stays so
        assert run(monkeypatch, "push", saved, "lab/new", "--private") == 0
    assert hub.private == {"lab/new"}
    assert hub.repositories["lab/new"]["README.md"] == b"secret"


def test_only_weights_configuration_and_card_come(hub, saved):
    hub.repositories[NAME] = {path.name: path.read_bytes() for path in saved.iterdir()} | {"modeling.py": b"evil"}
    load_checkpoint(NAME, revision=COMMIT)
    assert not any("modeling.py" in path for path in hub.asked)


def test_offline_what_was_fetched_serves_and_the_rest_is_refused(hub, saved, online):
    hub.repositories[NAME] = {path.name: path.read_bytes() for path in saved.iterdir()}
    load_checkpoint(NAME)
    n_asked = len(hub.asked)
    online(False)
    check_predicts(load_checkpoint(NAME))
    assert len(hub.asked) == n_asked
    with pytest.raises(InputError, match="was not fetched before"):
        load_checkpoint("lab/other")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        load_checkpoint(saved).push_to_hub(NAME)


@pytest.mark.parametrize(
    ("name", "revision", "says"),
    [
        (NAME, "v9", "has no revision 'v9'"),
        ("lab/nothing", None, "check the name"),
        ("lab/closed", None, "hf auth login"),
        ("lab/other-kind", None, "it has no model.safetensors"),
    ],
)
def test_what_the_hub_refuses_is_told_in_a_line(
    hub, saved, name, revision, says, tissue, monkeypatch, capsys, tmp_path
):
    hub.repositories[NAME] = {path.name: path.read_bytes() for path in saved.iterdir()}
    hub.repositories["lab/closed"], hub.repositories["lab/other-kind"] = {}, {"config.json": b"{}"}
    hub.private.add("lab/closed")
    words = ["predict", f"{tissue}:SIM2", "--model", name, "--out", tmp_path / "pred.h5ad"]
    assert run(monkeypatch, *words, *(["--revision", revision] if revision else [])) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("error: ") == 1
    assert TOKEN not in error
    assert not (tmp_path / "pred.h5ad").exists()


def test_an_altered_file_is_refused(hub, saved):
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    weights = bytearray(files["model.safetensors"])
    weights[-1] ^= 1
    hub.repositories[NAME] = {**files, "model.safetensors": bytes(weights)}
    with pytest.raises(InputError, match="altered since it was saved"):
        load_checkpoint(NAME)


def test_a_dead_hub_is_told_in_a_line(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="cannot be reached"):
        load_checkpoint(NAME)


def test_predict_takes_a_model_of_the_hub(hub, tissue, feature_store, tmp_path, monkeypatch):
    """Trained on features of the embedded encoder, shared, and used by name."""
    from genar.data import read_sections
    from genar.encoders import load_encoder
    from genar.features import embed, read_features, recipe_of

    section = read_sections(tissue)[0]
    recipe = recipe_of(load_encoder("efficientnet_lite0"), views=1)
    stored = embed(section, load_encoder("efficientnet_lite0"), recipe, feature_store)
    features = torch.from_numpy(read_features(stored, section))
    xy = torch.rand(section.n_obs, 2)
    panel = genar.Panel(tuple(section.var_names[:10]), "named")
    counts = torch.from_numpy(section[:, list(panel.genes)].X.toarray()).long()
    spots = Spots(features, xy, xy, torch.arange(section.n_obs), torch.zeros(section.n_obs, dtype=torch.long), counts)
    model = model_class("ridge").create(features.shape[2], spots, "", {})
    model.prepare(spots)
    checkpoint = Checkpoint("ridge", model, panel, {**vars(recipe), "widths_um": [], "context_spots": []})
    assert checkpoint.push_to_hub(NAME, private=False) == f"{hub.url}/{NAME}"
    out = tmp_path / "pred.h5ad"
    words = ["predict", f"{tissue}:SIM1", "--model", NAME, "--out", out]
    assert run(monkeypatch, *words) == 0
    assert out.is_file()
    with pytest.raises(InputError, match="holds a model ridge, not GenAR"):
        genar.GenAR.from_pretrained(NAME)


def test_what_lies_here_wins_over_the_hub(hub, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path / "lab" / "breast")
    assert not is_hub_id(NAME)
    load_checkpoint(NAME)
    assert hub.asked == []
    with pytest.raises(InputError, match="has no revisions"):
        load_checkpoint(NAME, revision="main")


def test_the_card_tells_what_is_known_and_breaks_nothing(saved):
    rewrite_card(saved, {"SPA|138\n<b>": {"genar_mean": {"mse": (0.9641, 0.9, 1.03), "coverage_90": 0.94}}})
    card = (saved / "README.md").read_text()
    assert "| SPA?138??b? | genar_mean | 0.964 (0.900 to 1.030) | 0.940 |" in card
    assert card.startswith("---\nlibrary_name: genar\n")
    for words in ("12, recipe named", "SIM1", "Not for clinical decisions", "efficientnet_lite0 (licence"):
        assert words in card
    facts = json.loads((saved / "config.json").read_text())
    facts["features"]["encoder"] = "uni2_h"
    assert "access must be asked for" in card_markdown(facts, 1, {})
    facts["training"]["held_out"] = []
    assert "nothing is known of how well it does" in card_markdown(facts, 1, {})
    facts["training"]["held_out"] = ["SPA|1"]
    assert "Held out were SPA?1; the scores on them are not recorded here" in card_markdown(facts, 1, {})


def test_saved_and_loaded_by_the_names_of_the_hub(saved, tmp_path):
    checkpoint = genar.GenAR.from_pretrained(saved)
    check_predicts(genar.GenAR.from_pretrained(checkpoint.save_pretrained(tmp_path / "again")))
    save_checkpoint(tmp_path / "again", checkpoint)


def test_the_card_of_the_same_weights_is_kept(saved, tmp_path):
    card = "---\nlicense: mit\n---\nwritten by hand, größer\n"
    (saved / "README.md").write_text(card, encoding="utf-8")
    for folder in (tmp_path / "again", tmp_path / "once more"):  # of format 1, then of this one
        saved = load_checkpoint(saved).save_pretrained(folder)
        assert (folder / "README.md").read_text(encoding="utf-8") == card
    other = load_checkpoint(saved)
    with torch.no_grad():
        next(other.model.parameters()).add_(1)
    other.save_pretrained(saved)
    assert "license: unknown" in (saved / "README.md").read_text()


def test_what_else_lies_in_the_folder_stays(saved, tmp_path):
    """A clone of a repository, another model, a training run, a source folder."""
    checkpoint = load_checkpoint(saved)
    clone = tmp_path / "clone"
    (clone / ".git").mkdir(parents=True)
    (clone / ".git" / "HEAD").write_text("ref")
    (clone / "README.md").write_text("my own")
    for _ in range(2):
        check_predicts(load_checkpoint(checkpoint.save_pretrained(clone)))
        assert (clone / ".git" / "HEAD").read_text() == "ref"
        assert {path.name for path in clone.iterdir()} == {".git", "README.md", "config.json", "model.safetensors"}
        assert {path.name for path in tmp_path.iterdir()} == {"saved", "clone"}
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"architectures": ["Bert"]}')
    with pytest.raises(InputError, match=r"its config\.json is not of a GenAR checkpoint"):
        checkpoint.save_pretrained(str(other))
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    with pytest.raises(InputError, match="holds a training run"):
        checkpoint.save_pretrained(tmp_path / "run")
    assert (other / "config.json").read_text() == '{"architectures": ["Bert"]}'
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a file lies there"):
        checkpoint.save_pretrained(tmp_path / "file")
