"""A slow hub on 127.0.0.1 that holds two simulated sections under the names of real ones."""

import hashlib
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

COMMIT = "c0ffee" + "0" * 34
SECTIONS = {"SPA119": "SIM1", "SPA148": "SIM2"}
_HEST = "/datasets/MahmoodLab/hest/resolve/"
_KINDS = {"st": "h5ad", "wsis": "tif", "metadata": "json"}
_PIECE, _PAUSE_S = 1 << 14, 0.01


def files(tissue: Path) -> dict[str, bytes]:
    """Path on the hub -> bytes."""
    return {
        f"{kind}/{name}.{suffix}": (tissue / kind / f"{simulated}.{suffix}").read_bytes()
        for name, simulated in SECTIONS.items()
        for kind, suffix in _KINDS.items()
    }


def make_server(held: dict[str, bytes]) -> ThreadingHTTPServer:
    """It answers what ``huggingface_hub`` and GenAR ask for, and sends files piece by piece, from any byte on."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_POST(self):
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            _answer(self, json.dumps([_entry(path, held[path]) for path in form["paths"] if path in held]).encode())

        def do_GET(self):
            path = unquote(self.path.partition("?")[0])
            if path.startswith("/api/"):
                return _answer(self, json.dumps({"id": "MahmoodLab/hest", "sha": COMMIT}).encode())
            _send(self, held[path.removeprefix(f"{_HEST}{COMMIT}/")])

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):  # a client that is killed breaks its connection
            pass

    return Server(("127.0.0.1", 0), Handler)


def _entry(path: str, data: bytes) -> dict:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"type": "file", "path": path, "size": len(data), "oid": oid}
    if not path.startswith("metadata/"):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def _answer(request, body: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def _send(request, data: bytes) -> None:
    start = int((request.headers.get("Range") or "bytes=0-")[6:-1])
    request.send_response(206 if start else 200)
    if start:
        request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
    request.send_header("Content-Length", str(len(data) - start))
    request.end_headers()
    for first in range(start, len(data), _PIECE):
        request.wfile.write(data[first : min(first + _PIECE, len(data))])
        time.sleep(_PAUSE_S)
