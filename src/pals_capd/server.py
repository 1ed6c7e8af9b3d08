"""The socket: many clients, one thread; nobody can keep the boards from their turn, by talking too much or by not listening."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pals_capd.keeper import Keeper, Peer
from pals_capd.protocol import LONGEST_LINE, parse_request
from pals_capd.refused import ConfigError, Refused

TURN_S = 0.05
MOST_CLIENTS = 256
LINES_A_TURN = 16  # of one client, before the others and the boards have their turn
MOST_MALFORMED = 100
MOST_UNREAD = 64 << 10
READ_BYTES = 16 << 10


@dataclass(slots=True, kw_only=True)
class _Client:
    sock: socket.socket
    peer: Peer
    received: bytearray = field(default_factory=bytearray)
    to_send: bytearray = field(default_factory=bytearray)
    malformed: int = 0
    ended: bool = False  # nothing more will come


class Server:
    """Serves a keeper's boards on a listening socket."""

    def __init__(self, keeper: Keeper, listening: socket.socket, now_s: Callable[[], float] = time.monotonic) -> None:
        self._keeper, self._listening, self._now_s = keeper, listening, now_s
        self._clients: dict[int, _Client] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(listening, selectors.EVENT_READ)
        self._waiting = False  # some client's lines wait for the next round

    def round(self) -> None:
        """Wait for at most one turn's time, give the boards their turn, then each client a few lines."""
        ready = self._selector.select(0.0 if self._waiting else TURN_S)
        self._keeper.turn(self._now_s())
        self._keeper.counters["clients"] = len(self._clients)
        for key, mask in ready:
            if key.fileobj is self._listening:
                self._accept()
            elif (client := self._clients.get(key.fd)) is not None:
                self._transfer(client, mask)
        self._waiting = False
        for client in list(self._clients.values()):
            self._answer(client)

    def close(self) -> None:
        """Let all clients go."""
        for client in list(self._clients.values()):
            self._drop(client)
        self._selector.close()
        self._listening.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listening.accept()
        except OSError:  # gone again, or no file descriptor is left
            return
        sock.setblocking(False)
        pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        client = _Client(sock=sock, peer=Peer(uid=uid, pid=pid))
        if len(self._clients) >= MOST_CLIENTS:
            self._turn_away(client, Refused("busy", f"capd serves {MOST_CLIENTS} clients already. Nothing was changed"))
        elif not self._keeper.policy.may(uid, "read"):
            self._keeper.counters["turned_away"] += 1
            told = f"user {uid} has no rights in capd's policy file ([rights]). Nothing was changed"
            self._turn_away(client, Refused("rights", told))
        else:
            self._clients[sock.fileno()] = client
            self._selector.register(sock, selectors.EVENT_READ)

    def _turn_away(self, client: _Client, why: Refused) -> None:
        with contextlib.suppress(OSError):
            client.sock.send(_line({"ok": False, "error": why.word, "message": str(why)}))
        client.sock.close()

    def _transfer(self, client: _Client, mask: int) -> None:
        try:
            if mask & selectors.EVENT_WRITE and client.to_send:
                del client.to_send[: client.sock.send(client.to_send)]
            if mask & selectors.EVENT_READ and len(client.received) < READ_BYTES:
                data = client.sock.recv(READ_BYTES)
                client.ended = not data
                client.received += data
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)

    def _answer(self, client: _Client) -> None:
        """Answer a few of its lines; drop it where it is hopeless."""
        for _ in range(LINES_A_TURN):
            line, found, rest = client.received.partition(b"\n")
            if not found or len(line) > LONGEST_LINE:
                break
            client.received = rest
            client.to_send += _line(self._reply(client, bytes(line)))
        line, more, _ = client.received.partition(b"\n")
        hopeless = len(line) > LONGEST_LINE or client.malformed >= MOST_MALFORMED or len(client.to_send) > MOST_UNREAD
        if client.to_send and not hopeless:
            self._transfer(client, selectors.EVENT_WRITE)
        if hopeless or (client.ended and not more):
            self._keeper.counters["dropped"] += hopeless
            self._drop(client)
        elif client.sock.fileno() >= 0:
            self._waiting = self._waiting or bool(more)
            wants = selectors.EVENT_WRITE if client.to_send else 0
            reads = selectors.EVENT_READ if not client.ended and len(client.received) < READ_BYTES else 0
            self._watch(client, wants | reads)

    def _watch(self, client: _Client, events: int) -> None:
        known = self._selector.get_map().get(client.sock.fileno())
        if events and known is None:
            self._selector.register(client.sock, events)
        elif events and known is not None and known.events != events:
            self._selector.modify(client.sock, events)
        elif not events and known is not None:
            self._selector.unregister(client.sock)

    def _reply(self, client: _Client, line: bytes) -> dict[str, Any]:
        try:
            request = parse_request(line)
        except Refused as e:
            client.malformed += 1
            self._keeper.counters["malformed"] += 1
            return {"ok": False, "error": e.word, "message": str(e)}
        return self._keeper.handle(client.peer, request, self._now_s())

    def _drop(self, client: _Client) -> None:
        fd = client.sock.fileno()
        if fd >= 0:
            self._clients.pop(fd, None)
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(client.sock)
            client.sock.close()


def _line(reply: dict[str, Any]) -> bytes:
    return json.dumps(reply, allow_nan=False).encode() + b"\n"


def listen(path: Path, gid: int | None) -> socket.socket:
    """A socket at `path`, for this user and the group; whoever calls holds the lock, so one that is there is left over.

    Raises:
        ConfigError: it cannot be made.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if path.is_socket():
            path.unlink()
        sock.bind(str(path))
        if gid is not None:
            os.chown(path, -1, gid)
            path.chmod(0o660)
        sock.listen(128)
        sock.setblocking(False)
    except OSError as e:
        sock.close()
        raise ConfigError(f"the socket {path} cannot be made ({e}); nothing was changed") from e
    finally:
        os.umask(before)
    return sock
