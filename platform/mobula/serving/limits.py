"""What every app checks before a request reaches it: origin, API key, rate and body size.

Plain ASGI, because Serve takes no middleware of its own (Ray 2.60) and a replica's port can be reached without
the proxy.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import math
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mobula import environment
from mobula.cluster.spec import is_loopback
from mobula.errors import ConfigError
from mobula.serving.errors import RequestRefused, response, route_path

HEALTH = "/healthz"
MIN_KEY_CHARACTERS = 16
CLIENTS = 10_000
# Basic lets a browser ask for the key (as the password) and open the console.
CHALLENGE = {"WWW-Authenticate": 'Bearer realm="mobula", Basic realm="mobula (the API key is the password)"'}


@dataclass(frozen=True)
class Limits:
    """Limits of one app. ``keys``: accepted API keys; empty means that none is asked for (loopback only).

    ``body_bytes`` are the limits of paths that differ from ``max_body_bytes``.
    """

    max_body_bytes: int = 262_144
    body_bytes: Mapping[str, int] = field(default_factory=dict)
    requests_per_s: float = 50.0
    burst: int = 100
    keys: tuple[bytes, ...] = ()

    def __repr__(self) -> str:
        """Without the keys: a repr ends up in logs."""
        return f"Limits(max_body_bytes={self.max_body_bytes}, requests_per_s={self.requests_per_s}, keys=***)"


def load_keys(required: bool, key_file: Path | None = None) -> tuple[bytes, ...]:
    """The API keys: MOBULA_API_KEY, or else the lines of ``key_file`` (one key per client).

    Raises:
        ConfigError: if a key is required and there is none, one is too short, or others can read the file.
    """
    text = environment.api_key()
    source = "MOBULA_API_KEY"
    if text is None and key_file is not None:
        text, source = _read_private(key_file), str(key_file)
    keys = tuple(line.strip().encode() for line in (text or "").splitlines() if line.strip())
    if required and not keys:
        raise ConfigError(
            ["a host that is not loopback requires an API key: set MOBULA_API_KEY, or key_file to a file of mode 600"],
            "serve",
        )
    if any(len(k) < MIN_KEY_CHARACTERS for k in keys):
        raise ConfigError([f"{source} holds a key of fewer than {MIN_KEY_CHARACTERS} characters"], "serve")
    return keys


class Guard:
    """ASGI layer that applies :class:`Limits`. Health is open to everyone."""

    def __init__(self, app: ASGIApp, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.app, self.limits = app, limits
        self.buckets = Buckets(limits.requests_per_s, limits.burst, clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, 403, 413 or 429, or pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        path = route_path(scope)
        try:
            if path != HEALTH:
                _check_origin(headers, keyed=bool(self.limits.keys))
                client = _authenticated(headers, self.limits.keys) or _peer(scope)
                self.buckets.take(client)
            limit = self.limits.body_bytes.get(path, self.limits.max_body_bytes)
            receive = await _bounded(headers, receive, limit)
        except RequestRefused as refusal:
            answer = response(scope, refusal.status, refusal.code, str(refusal), refusal.headers)
            await answer(scope, receive, send)
            return
        await self.app(scope, receive, send)


class Buckets:
    """A token bucket per client: ``rate`` requests per second on average, ``burst`` at once.

    The least recently seen of more than 10,000 clients are forgotten, so memory is bounded. Each replica counts
    for itself.
    """

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.burst, self.clock = rate, burst, clock
        self.levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> None:
        """Take one token.

        Raises:
            RequestRefused: 429 with Retry-After in whole seconds, if there is none.
        """
        now = self.clock()
        level, seen = self.levels.pop(client, (float(self.burst), now))
        level = min(self.burst, level + (now - seen) * self.rate)
        allowed = level >= 1
        self.levels[client] = (level - allowed, now)
        if len(self.levels) > CLIENTS:
            self.levels.popitem(last=False)
        if not allowed:
            wait = math.ceil((1 - level) / self.rate)
            message = f"more than {self.rate:g} requests per second; come back in {wait} s"
            raise RequestRefused(429, "too_many_requests", message, {"Retry-After": str(wait)})


def _check_origin(headers: Headers, keyed: bool) -> None:
    """Keep other web sites out: a page may not use the visitor's browser to reach this server.

    Without a key only loopback names are served, which stops a foreign name that is pointed at 127.0.0.1.
    """
    host = urlsplit(f"//{headers.get('host', '')}")
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host.netloc:
        raise RequestRefused(403, "foreign_origin", "requests from pages of other sites are not served")
    if not keyed and not is_loopback(host.hostname or "localhost"):
        raise RequestRefused(403, "foreign_host", "without an API key only localhost is served")


def _authenticated(headers: Headers, keys: Sequence[bytes]) -> str | None:
    """A name for the key's owner that does not reveal the key; None where no key is asked for."""
    if not keys:
        return None
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    given = _given_key(scheme.lower(), credentials.strip())
    if given is None:
        raise RequestRefused(401, "unauthorized", "send the API key as a bearer token", CHALLENGE)
    # Every key is compared, each in constant time, so timing tells neither the key nor which one matched.
    if not sum([hmac.compare_digest(given, k) for k in keys]):
        raise RequestRefused(401, "invalid_api_key", "this API key is not accepted", CHALLENGE)
    return hashlib.sha256(given).hexdigest()[:16]


def _given_key(scheme: str, credentials: str) -> bytes | None:
    if scheme == "bearer" and credentials:
        return credentials.encode("utf-8", "surrogateescape")
    if scheme != "basic":
        return None
    try:
        decoded = base64.b64decode(credentials, validate=True)
    except (binascii.Error, ValueError):
        return None
    return decoded.partition(b":")[2]


def _peer(scope: Scope) -> str:
    client = scope.get("client")
    return client[0] if client else "unknown"


async def _bounded(headers: Headers, receive: Receive, limit: int) -> Receive:
    """Read the whole body, at most ``limit`` bytes, and return a receive that replays it.

    Content-Length is only a hint (a chunked body has none), so the bytes are counted as well.
    """
    too_large = RequestRefused(413, "body_too_large", f"the body is larger than {limit} bytes")
    declared = headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > limit:
        raise too_large
    chunks: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
        more = message.get("more_body", False)
    pending: list[Message] = [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]
    if more:
        pending.append({"type": "http.disconnect"})

    async def replay() -> Message:
        return pending.pop(0) if pending else await receive()

    return replay


def _read_private(path: Path) -> str:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"key_file {path} cannot be read ({error.__class__.__name__})"], "serve") from error
    if mode & 0o077:
        raise ConfigError([f"key_file {path} has mode {mode:o}, others can read it; run chmod 600 {path}"], "serve")
    return text
