"""How a capd process begins and ends: one lock, the service manager's notifications, a watchdog of its own."""

from __future__ import annotations

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
        ConfigError: another holds it, or the folder cannot be written.
    """
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as e:
        try:  # a read-only folder: whoever only wants to release needs the lock all the same
            handle = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            raise ConfigError(f"the state folder {state} cannot be used ({e}); nothing was changed") from e
    end_s = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except OSError as e:
            if time.monotonic() >= end_s:
                os.close(handle)
                raise ConfigError(
                    f"another capd holds {state}/lock; two would fight. Nothing was changed: stop it first"
                ) from e
        time.sleep(0.02)


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
