"""A server of the retrieval contract for tests, of the standard library alone."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


class Server(ThreadingHTTPServer):
    """Answers every request as ``answer`` says (a status and a body), and remembers what it was asked."""

    answer: Answer
    asked: list[dict[str, Any]]
    keys: list[str | None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append({"path": self.path, **request})
        self.server.keys.append(self.headers["authorization"])
        status, body = self.server.answer(request)
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    """A server that runs within the block."""
    running = Server(("127.0.0.1", 0), Handler)
    running.answer, running.asked, running.keys = answer, [], []
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    try:
        yield running
    finally:
        running.shutdown()
        running.server_close()
