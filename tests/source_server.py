"""The places that data come from, as a server on 127.0.0.1."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote

from genar.fetch import hub
from serving import Quiet, start_server

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_ours"
FIRST, SECOND = "SPA119", "SPA148"  # H3, B1


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def git_sha(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def answer(request, status, body, headers=(), length=-1):
    length = len(body) if length == -1 else length
    request.send_response(status)
    for name, value in {"Content-Type": "application/json", **dict(headers)}.items():
        request.send_header(name, value)
    if length is not None:
        request.send_header("Content-Length", str(length))
    request.end_headers()
    request.wfile.write(body)
    request.wfile.flush()


def tree(files):
    rows = [{"path": path, "type": "blob", "size": len(data), "sha": git_sha(data)} for path, data in files.items()]
    return json.dumps({"sha": COMMIT, "tree": [*rows, {"path": "data", "type": "tree", "sha": "0"}]}).encode()


class Source:
    """The hub and GitHub in one, on 127.0.0.1, with whatever faults a test asks for."""

    def __init__(self):
        self.hub, self.github = {}, {}  # path -> bytes
        self.faults = {}  # path -> list of faults, one a request; ("always", ...) stays
        self.asked = []  # (path, Range, Authorization, host) of each request for a file
        self.refuse = None  # status of everything on the hub
        self.commit = COMMIT
        self.stalled = threading.Event()
        source = self

        class Handler(Quiet, BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                source.get(self, unquote(self.path.partition("?")[0]))

            def do_POST(self):
                form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                source.paths_info(self, form["paths"])

        self.server = start_server(Handler)
        self.port = self.server.server_port
        self.url, self.elsewhere = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}"

    def requests(self, path):
        return [asked for asked in self.asked if asked[0] == path]

    def get(self, request, path):
        if path.startswith("/api/datasets/MahmoodLab/hest"):
            if self.refuse:
                return answer(request, self.refuse, b"{}")
            if path.endswith(("/revision/main", f"/revision/{self.commit}", "/hest")):
                return answer(request, 200, json.dumps({"id": hub.REPOSITORY, "sha": self.commit}).encode())
            return answer(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/repos/almaan/her2st/git/trees/"):
            return self.send(request, "tree", tree(self.github))
        if path.startswith("/almaan/her2st/"):
            name = path.split("/", 4)[4]
            return self.send(request, name, self.github.get(name))
        _, mark, name = path.partition(f"/datasets/MahmoodLab/hest/resolve/{self.commit}/")
        if mark and name.startswith("metadata/"):  # small files come from the hub itself
            return self.send(request, name, self.hub.get(name))
        if mark:
            self.note(request, f"resolve {name}")
            return answer(request, 302, b"", {"Location": f"{self.elsewhere}/cdn/{name}"})
        if path.startswith("/cdn/"):
            return self.send(request, path.removeprefix("/cdn/"), self.hub.get(path.removeprefix("/cdn/")))
        return answer(request, 404, b"{}")

    def note(self, request, name):
        headers = request.headers
        self.asked.append((name, headers.get("Range"), headers.get("Authorization"), headers.get("Host")))

    def paths_info(self, request, paths):
        rows = []
        for path in paths:
            if (data := self.hub.get(path)) is None:
                continue
            row = {"type": "file", "path": path, "size": len(data), "oid": git_sha(data)}
            if not path.startswith("metadata/"):
                row["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
            rows.append(row)
        answer(request, 200, json.dumps(rows).encode())

    def send(self, request, name, data):
        """Send a file, as its next fault has it."""
        self.note(request, name)
        faults = self.faults.get(name) or [("none", 0)]
        fault, value = faults[0][-2:] if faults[0][0] == "always" else faults.pop(0)
        if fault == "status":
            return answer(request, value[0], b"no", value[1])
        if data is None:
            return answer(request, 404, b"")
        if fault == "altered":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault in ("size", "no length"):
            data = (data * 2)[: len(data) + value]
        start = int((request.headers.get("Range") or "bytes=0-")[6:-1])
        if fault == "no ranges":
            start = 0
        first = start + value if fault == "shifted" else start
        headers = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"} if start else {}
        stop = start + value if fault in ("drop", "stall") else len(data)
        answer(
            request,
            206 if start else 200,
            data[start:stop],
            headers,
            length=None if fault == "no length" else len(data) - start,
        )
        if fault == "stall":
            self.stalled.set()
            time.sleep(30)
        request.close_connection = fault in ("drop", "no length")


def left(folder):
    """Every file under ``folder``."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
