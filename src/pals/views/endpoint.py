"""One way to expose text on 127.0.0.1: a WSGI application in a thread, and a message that names the port and its option."""

from __future__ import annotations

from collections.abc import Callable
from socketserver import ThreadingMixIn
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from pals.core.errors import ConfigError

Application = Callable[..., Any]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # a client that never finishes reading must not keep the agent from ending


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Requests of scrapers are no news."""


def serve(application: Application, port: int, *, what: str, flag: str) -> Callable[[], None]:
    """Serve `application` on 127.0.0.1:`port` (0: any free one); return a function that stops it.

    `what` and `flag` name the port in the error message.

    Raises:
        ConfigError: the port cannot be bound.
    """
    try:
        server = make_server("127.0.0.1", port, application, server_class=_Server, handler_class=_Quiet)
    except OSError as e:
        raise ConfigError(
            f"{what} {port} is in use ({e.strerror}); nothing was started. Choose another with {flag}, or 0 for none"
        ) from e
    thread = Thread(target=server.serve_forever, name=what, daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(timeout=2)

    return stop
