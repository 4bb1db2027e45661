"""A real HTTP server in a thread that answers as an OpenAI-compatible endpoint would."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Response = tuple[int, Any] | tuple[int, Any, dict[str, str]]


def completion(text: str | None, finish_reason: str = "stop") -> Response:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}


def refused(status: int, message: str = "no", **headers: str) -> Response:
    """An error, to be tried again after a millisecond."""
    return status, {"error": {"message": message}}, {"retry-after-ms": "1", **headers}


class Server:
    """Answers what ``respond`` makes of a request; keeps the requests and how many were open at once."""

    def __init__(self, respond: Callable[[dict[str, Any]], Response]) -> None:
        self.respond = respond
        self.models: Response = (200, {"object": "list", "data": [{"id": "judge"}, {"id": "other"}]})
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.open = self.most_open = 0
        self.lock = threading.Lock()
        self.url = ""

    def answer(self, path: str, body: dict[str, Any] | None, key: str | None) -> Response:
        if body is None:
            return self.models if path == "/v1/models" else (404, {"error": {"message": "no such page"}})
        with self.lock:
            self.requests.append(body)
            self.keys.append(key)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        try:
            return self.respond(body)
        finally:
            with self.lock:
                self.open -= 1


class Threads(ThreadingHTTPServer):
    """A thread for every connection, and room for many that come at once."""

    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no fault."""


@contextmanager
def serving(respond: Callable[[dict[str, Any]], Response]) -> Iterator[Server]:
    """A server within the block."""
    server = Server(respond)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send(server.answer(self.path, None, None))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send(server.answer(self.path, body, self.headers["Authorization"]))

        def send(self, response: Response) -> None:
            status, body, *more = response
            content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **dict(*more)}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Silence."""

    http = Threads(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
