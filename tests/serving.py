"""Little servers on 127.0.0.1."""

import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer


class Quiet:
    """A handler that says nothing of requests."""

    def log_message(self, *_):
        pass


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_):  # a client that is killed breaks its connection
        pass


def start_server(handler):
    """In a thread of its own; who started it shuts it down."""
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


def stop_server(server):
    server.shutdown()
    server.server_close()


@contextmanager
def serving(handler):
    """The address of a server."""
    server = start_server(handler)
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        stop_server(server)
