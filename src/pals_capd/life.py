"""How a capd process begins and ends: one lock, the service manager's notifications, a watchdog of its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pals_capd.refused import ConfigError

EXIT_WATCHDOG = 70


def take_lock(state: Path, wait_s: float) -> int:
    """The lock that makes this process the only writer, held as long as it lives; waits for the one before to be gone.

    Raises:
        ConfigError: another holds it, or the folder cannot be used.
    """
    handle, end_s = _lock_file(state), time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if time.monotonic() >= end_s:
                holder = _signed(handle)
                os.close(handle)
                raise ConfigError(
                    f"another capd{holder} holds {state}/lock; two would fight. Nothing was changed: stop it first"
                ) from e
            time.sleep(0.02)
        else:
            _sign(handle)
            return handle


def _lock_file(state: Path) -> int:
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(state / "lock", os.O_RDWR | os.O_CREAT | flags, 0o600)
    except OSError as e:  # a read-only folder: whoever only wants to release needs the lock all the same
        for path in (state / "lock", state):  # the same file where there is one, or a living capd would not be seen
            with contextlib.suppress(OSError):
                return os.open(path, os.O_RDONLY | flags)
        raise ConfigError(f"the state folder {state} cannot be used ({e}); nothing was changed") from e


def _sign(handle: int) -> None:
    """Leave this process's number to whoever finds the lock taken; where that cannot be written, nobody's."""
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)


def _signed(handle: int) -> str:
    with contextlib.suppress(OSError, ValueError):
        return f" (process {int(os.pread(handle, 20, 0))})"
    return ""


class ServiceManager:
    """systemd, or whoever set $NOTIFY_SOCKET; nobody where it is unset."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "").replace("@", "\0", 1)

    def tell(self, text: str) -> None:
        """Send e.g. READY=1; what cannot be sent is let go."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
            s.setblocking(False)
            try:
                s.sendto(text.encode(), self._address)
            except OSError:
                return


class Watchdog:
    """Ends the process where its loop has not turned for so long; a release of the boards is started on the way out."""

    def __init__(self, after_s: float, release: Callable[[], None]) -> None:
        self._after_s, self._release, self._turned_s = after_s, release, time.monotonic()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def turned(self) -> None:
        """The loop is alive."""
        self._turned_s = time.monotonic()

    def _watch(self) -> None:
        seen_s = time.monotonic()
        while True:
            time.sleep(self._after_s / 8)
            now_s, slept_s = time.monotonic(), time.monotonic() - seen_s
            seen_s = now_s
            if slept_s > self._after_s / 2:  # all of this process was stopped, the loop is not to blame
                self._turned_s = now_s
            elif now_s - self._turned_s > self._after_s:
                print(
                    f"pals-capd: no turn for {self._after_s:g} s, the driver hangs; ending, boards are released",
                    file=sys.stderr,
                    flush=True,
                )
                self._release()
                os._exit(EXIT_WATCHDOG)
