"""Budgets over HTTP: GET, PUT and DELETE /v1/budget for whoever has the token; no client can hold the agent up.

One request a connection, few connections at once, each for a few seconds. A request that is refused changes nothing.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import math
import socket
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, NoReturn

from pals.core import units
from pals.core.errors import ConfigError
from pals.runtime.live_budget import LiveBudget

PATH = "/v1/budget"
TTL_S, MOST_TTL_S = 60.0, 86400.0
MOST_BODY = 4096  # bytes
MOST_CONNECTIONS = 8
CONNECTION_S = 5.0  # a request must have come, and its answer have gone, within so many seconds
LINGER_S = 1.0  # how long what is still sent is read and dropped, so that the client sees why it was refused
BUSY = b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
log = logging.getLogger("pals")


def serve_budget(
    budgets: LiveBudget, *, host: str, port: int, token: str, connection_s: float = CONNECTION_S
) -> Callable[[], None]:
    """Serve on `host`:`port`; return a function that stops it.

    Raises:
        ConfigError: the port cannot be bound.
    """
    try:
        server = _Server(budgets, host, port, token, connection_s)
    except (OSError, OverflowError) as e:
        raise ConfigError(
            f"budget port {port} on {host} cannot be used ({e}); nothing was started. Choose another with --budget-port, or 0 "
            "for none"
        ) from e
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.1), name="budget port", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(timeout=2)

    return stop


class Refused(Exception):
    """A request that is answered with an error, and changes nothing."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class _Server(ThreadingMixIn, TCPServer):
    """A thread a connection, few of them; those that take too long are cut."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 2 * MOST_CONNECTIONS

    def __init__(self, budgets: LiveBudget, host: str, port: int, token: str, connection_s: float) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.budgets, self._token, self._connection_s = budgets, token.encode(), connection_s
        self._open: dict[socket.socket, float] = {}  # since when
        self._lock = threading.Lock()
        super().__init__((host, port), _Handler)

    def allows(self, header: str) -> bool:
        """Whether an Authorization header carries the token; takes as long whatever it says."""
        scheme, _, given = header.partition(" ")
        same = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._token)
        return same and scheme.lower() == "bearer"

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Take a connection on, unless too many are open."""
        with self._lock:
            if len(self._open) < MOST_CONNECTIONS:
                self._open[request] = time.monotonic()
                return True
        with contextlib.suppress(OSError):
            request.setblocking(False)
            request.send(BUSY)
        return False

    def service_actions(self) -> None:
        """Cut connections that take too long; called every tenth of a second."""
        end_s = time.monotonic() - self._connection_s
        with self._lock:
            for request in [r for r, since_s in self._open.items() if since_s < end_s]:
                _cut(request)

    def shutdown_request(self, request: Any) -> None:
        """The connection ends."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Stop listening and cut what is open."""
        super().server_close()
        with self._lock:
            for request in self._open:
                _cut(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves, or was cut, in the middle is no news; everything else is a mistake of ours."""
        if not isinstance(sys.exc_info()[1], OSError):
            log.exception("a request to the budget port failed; the budget in force is unchanged, please report this")


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: _Server
    timeout = CONNECTION_S
    server_version, sys_version = "pals", ""

    def do_GET(self) -> None:
        """What is in force, where it comes from, and for how long."""
        self._answer(lambda: None)

    def do_PUT(self) -> None:
        """A budget for some time."""

        def put() -> None:
            power_w, ttl_s = wanted(self._body())
            why = self.server.budgets.put(power_w, ttl_s=ttl_s, by=self._peer)
            if why is not None:
                starting = self.server.budgets.least_w is None
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE if starting else HTTPStatus.CONFLICT, why)

        self._answer(put)

    def do_DELETE(self) -> None:
        """Back to the schedule, or the default."""
        self._answer(lambda: self.server.budgets.withdraw(by=self._peer))

    @property
    def _peer(self) -> str:
        host, port = self.client_address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _answer(self, act: Callable[[], object]) -> None:
        try:
            self._admit()
            act()
        except Refused as e:
            self.send_error(e.status, str(e))
        else:
            self._send(HTTPStatus.OK, state(self.server.budgets))

    def _admit(self) -> None:
        """Token before anything else: whoever has none learns nothing."""
        if not self.server.allows(self.headers.get("Authorization", "")):
            raise Refused(HTTPStatus.UNAUTHORIZED, "missing or wrong token: send Authorization: Bearer TOKEN")
        if self.path != PATH:
            raise Refused(HTTPStatus.NOT_FOUND, f"there is only {PATH} here")

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "say how long the body is (Content-Length)")
        if len(length) > 10 or int(length) > MOST_BODY:
            why = f"a budget needs no more than {MOST_BODY} bytes; nothing was changed"
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, why)
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refused(HTTPStatus.BAD_REQUEST, "the body ended early; nothing was changed")
        return body

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Every error is JSON with one sentence; http.server's own too."""
        self._send(HTTPStatus(code), {"error": message or HTTPStatus(code).phrase})
        self._linger()

    def _send(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body)

    def _linger(self) -> None:
        """Read and drop what is still being sent: closing at once could reset the connection before the answer is read."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)
        end_s = time.monotonic() + LINGER_S
        self.connection.settimeout(LINGER_S)
        while time.monotonic() < end_s and self.connection.recv(65536):
            pass

    def log_message(self, format: str, *args: Any) -> None:
        """What changes a budget is said by `LiveBudget`; the rest is no news."""


def state(budgets: LiveBudget) -> dict[str, Any]:
    """The answer to GET, and to what was accepted."""
    now = budgets.in_force()
    remaining_s = budgets.remaining_s(now)
    return {
        "power_w": now.power_w,
        "source": now.source,
        "by": now.by or None,
        "remaining_s": None if remaining_s is None else round(remaining_s, 3),
        "least_w": budgets.least_w,
    }


def wanted(body: bytes) -> tuple[float, float]:
    """The watts and seconds that a PUT asks for.

    Raises:
        Refused: anything but {"power_w": 1600} or {"power": "1.6kW"}, with perhaps "ttl_s".
    """
    try:
        data = json.loads(body, parse_constant=_no_constant, object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as e:  # also what is no UTF-8
        raise _bad(f"the body is not JSON ({e})") from e
    if not isinstance(data, dict):
        raise _bad('the body must be an object like {"power_w": 1600, "ttl_s": 60}')
    if unknown := [k for k in data if k not in ("power_w", "power", "ttl_s")]:
        raise _bad(f"unknown key {unknown[0]!r:.60}; known: power_w, power, ttl_s")
    if ("power_w" in data) == ("power" in data):
        raise _bad('give either "power_w": 1600 or "power": "1.6kW"')
    key = "power_w" if "power_w" in data else "power"
    if not isinstance(data[key], str if key == "power" else int | float):
        raise _bad(
            f'{key} must be a {"text" if key == "power" else "number"}: give "power_w": 1600 or "power": "1.6kW"'
        )
    return _number(units.watts, data[key], key), _ttl_s(data.get("ttl_s", TTL_S))


def _ttl_s(given: object) -> float:
    ttl_s = math.inf if isinstance(given, str) else _number(units.seconds, given, "ttl_s")
    if ttl_s > MOST_TTL_S:
        raise _bad(f"ttl_s must be a number of seconds, above 0 and at most {MOST_TTL_S:g} (a day)")
    return ttl_s


def _number(read: Callable[[object, str], float], given: object, key: str) -> float:
    try:
        return read(given, key)
    except ConfigError as e:
        raise _bad(str(e).removesuffix("; nothing was changed")) from e


def _bad(why: str) -> Refused:
    return Refused(HTTPStatus.BAD_REQUEST, f"{why}; nothing was changed")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(table := dict(pairs)) != len(pairs):
        raise ValueError("a key is given twice")
    return table


def _cut(request: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended by itself
        request.shutdown(socket.SHUT_RDWR)
