"""The client of capd, the root process that alone writes boards: JSON lines over one Unix socket, and nothing is waited for long.

An epoch belongs to the connection that got it; whoever steers with one asks again after each reconnect whether the
board is still his.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pals.core.errors import DeviceLostError, NotSupportedError, PalsError, PermissionDeniedError

SOCKET = "/run/pals/capd.sock"
TIMEOUT_S = 1.0
RETRY_S = 1.0  # a capd that did not answer is not waited for again before
LONGEST_REPLY = 1 << 20
_CLASSES: Mapping[str, type[Exception]] = {
    "rights": PermissionDeniedError,
    "permission": PermissionDeniedError,
    "lost": DeviceLostError,
    "not_supported": NotSupportedError,
    "board": NotSupportedError,
    "range": ValueError,
}

Reply = dict[str, Any]


class Hello(NamedTuple):
    """What capd said of itself when this connection began."""

    epoch: int
    rights: str  # "read", "set" or "admin"
    dry_run: bool
    max_ttl_s: float
    boards: Mapping[str, Reply]  # by UUID

    @property
    def may_set(self) -> bool:
        """Whether this user may steer."""
        return self.rights in ("set", "admin")


def socket_path(environ: Mapping[str, str]) -> Path:
    """Where capd listens: $PALS_CAPD_SOCKET, else /run/pals/capd.sock."""
    return Path(environ.get("PALS_CAPD_SOCKET") or SOCKET)


def refused(reply: Reply) -> Exception:
    """A refusal as an exception of ours; capd's message says what failed, what is in force and what to do."""
    kind = _CLASSES.get(str(reply.get("error")), PalsError)
    return kind(f"capd refused ({reply.get('error')}): {reply.get('message')}")


class CapdClient:
    """One connection, made when it is needed and made anew when it broke; not to be shared between threads."""

    def __init__(
        self, path: Path, *, timeout_s: float = TIMEOUT_S, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self.path, self.now_s = path, now_s
        self._timeout_s = timeout_s
        self._sock: socket.socket | None = None
        self._hello: Hello | None = None
        self._seq = 0
        self._silent_s: float | None = None  # when it did not answer

    @property
    def silent(self) -> bool:
        """Whether something listens there and did not answer in time: it may hang, and it may wake up again."""
        return self._silent_s is not None

    @property
    def hello(self) -> Hello:
        """What capd said when this connection got its epoch; says hello where it has none.

        Raises:
            PalsError: it does not answer, or turns this user away.
        """
        return self._hello if self._hello is not None else self.say_hello()

    def say_hello(self) -> Hello:
        """Get a new epoch, the newest of all.

        Raises:
            PalsError: as `hello`.
        """
        self._hello = None
        told = self.request("hello")
        self._hello = Hello(
            epoch=int(told["epoch"]), rights=str(told["rights"]), dry_run=bool(told["dry_run"]),
            max_ttl_s=float(told["max_ttl_s"]), boards={b["uuid"]: b for b in told["boards"]},
        )  # fmt: skip
        return self._hello

    def read(self) -> Reply:
        """Boards, counters and budget as capd's poller saw them last; needs no hello.

        Raises:
            PalsError: it does not answer, or turns this user away.
        """
        return self.request("read")

    def board(self, uuid: str) -> Reply | None:
        """One board as capd sees it now; None where it does not know it.

        Raises:
            PalsError: as `read`.
        """
        return next((b for b in self.read()["boards"] if b["uuid"] == uuid), None)

    def request(self, op: str, **fields: Any) -> Reply:
        """Ask for something that needs no epoch; a connection that broke meanwhile is made anew, once.

        Raises:
            PalsError, ValueError: it does not answer, or refused.
        """
        for _ in range(2):
            reply = self.ask(op, **fields)
            if reply is not None and reply["ok"]:
                return reply
            if reply is not None:
                raise refused(reply)
        raise self._gone("it closes every connection at once")

    def ask(self, op: str, **fields: Any) -> Reply | None:
        """One request and its reply, a refusal too; None where the connection broke, and with it the epoch ended.

        Raises:
            PalsError: nobody listens, nobody answers in time, or what answers is no capd.
        """
        if self._silent_s is not None and self.now_s() - self._silent_s < RETRY_S:
            raise self._gone("it did not answer just now")
        try:
            sock = self._connected()
            line = self._exchange(sock, json.dumps({"op": op, **fields}).encode() + b"\n")
        except TimeoutError as e:
            self.close()  # what comes late must not be taken for the next answer
            self._silent_s = self.now_s()
            raise self._gone(f"no answer within {self._timeout_s:g} s") from e
        self._silent_s = None
        if not line.endswith(b"\n"):
            self.close()
            return None
        try:
            reply = json.loads(line)
            if isinstance(reply, dict) and isinstance(reply.get("ok"), bool):
                return reply
        except ValueError:
            pass
        self.close()
        raise PalsError(f"what listens at {self.path} is no capd: it answered {line[:60]!r}. Nothing was asked of it")

    def ask_leased(self, op: str, **fields: Any) -> Reply | None:
        """The same with this connection's epoch and a sequence number that rises."""
        self._seq += 1
        return self.ask(op, epoch=self.hello.epoch, seq=self._seq, **fields)

    def close(self) -> None:
        """Let the connection go; leases end by themselves when nobody renews them."""
        if self._sock is not None:
            self._sock.close()
        self._sock = self._hello = None

    def _connected(self) -> socket.socket:
        if self._sock is not None:
            return self._sock
        self._hello = None
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(self._timeout_s)
        try:
            sock.connect(str(self.path))
        except TimeoutError:
            sock.close()
            raise
        except PermissionError as e:
            sock.close()
            raise PermissionDeniedError(
                f"user {os.geteuid()} may not open capd's socket {self.path}; nothing was asked of it. Join the group that owns it "
                "(usually pals), and have capd's policy file grant the right"
            ) from e
        except OSError as e:
            sock.close()
            raise self._gone(e.strerror or str(e)) from e
        self._sock = sock
        return sock

    def _exchange(self, sock: socket.socket, line: bytes) -> bytes:
        """What came back, up to the line's end; less than a line where the connection broke.

        Raises:
            TimeoutError: it took too long.
        """
        end_s, received = time.monotonic() + self._timeout_s, b""
        try:
            sock.settimeout(self._timeout_s)
            sock.sendall(line)
        except TimeoutError:
            raise
        except OSError:
            pass  # who is turned away finds the connection closed, and why waiting there
        while not received.endswith(b"\n") and len(received) < LONGEST_REPLY:
            sock.settimeout(max(0.001, end_s - time.monotonic()))
            try:
                part = sock.recv(1 << 16)
            except TimeoutError:
                raise
            except OSError:
                break
            if not part:
                break
            received += part
        return received

    def _gone(self, why: str) -> PalsError:
        return PalsError(
            f"capd does not answer at {self.path} ({why}); nothing more can be asked of it, and the boards it held for us go to "
            "their exit policy by themselves when their leases end, at most a few seconds from now. Start it again "
            "(systemctl restart pals-capd), or look why it hangs"
        )
