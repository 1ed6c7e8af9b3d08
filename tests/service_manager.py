"""Plays the service manager for capd in tests: starts it, heeds READY=1 and WATCHDOG=1, releases after every end, starts again.

What systemd does with `Type=notify`, `WatchdogSec=`, `ExecStopPost=capd-release` and `Restart=always`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

LOOK_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """One life of the daemon; times are CLOCK_MONOTONIC seconds."""

    pid: int
    ready_s: float | None  # None: it never was
    ended_s: float
    code: int
    by_watchdog: bool
    released_s: float  # when capd-release had ended
    release_code: int


@dataclass
class ServiceManager:
    """Keeps one capd alive until `close`."""

    folder: Path  # short: Unix sockets lie in it
    environ: Mapping[str, str]
    policy: Path
    state: Path
    watchdog_s: float = 1.0
    lives: list[Life] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.socket = self.folder / "capd.sock"
        self._log = (self.folder / "capd.log").open("ab")
        self._ready = threading.Event()
        self._closing = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name="service-manager", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """The daemon that lives now."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def wait_ready(self, timeout_s: float = 20.0) -> None:
        """Wait until the daemon of this moment has said READY=1."""
        assert self._ready.wait(timeout_s), self.log()

    def log(self) -> str:
        """What daemon and release wrote."""
        return (self.folder / "capd.log").read_text()

    def close(self) -> None:
        """Stop the daemon in order, release, start nothing more."""
        self._closing.set()
        if (pid := self.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGTERM)
        self._thread.join(30)
        self._log.close()

    def _keep(self) -> None:
        while not self._closing.is_set():
            self.lives.append(self._one_life())

    def _one_life(self) -> Life:
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as told:
            address = self.folder / "notify"
            address.unlink(missing_ok=True)
            told.bind(str(address))
            told.settimeout(LOOK_S)
            process = self._process = self._start("pals_capd.main", "--socket", str(self.socket), notify=address)
            ready_s, by_watchdog = self._attend(process, told)
        self._ready.clear()
        ended_s = time.monotonic()
        code = self._start("pals_capd.release").wait()
        return Life(
            pid=process.pid, ready_s=ready_s, ended_s=ended_s, code=process.wait(), by_watchdog=by_watchdog,
            released_s=time.monotonic(), release_code=code,
        )  # fmt: skip

    def _attend(self, process: subprocess.Popen[bytes], told: socket.socket) -> tuple[float | None, bool]:
        """Until it has ended: when it was ready, and whether the watchdog killed it."""
        ready_s, alive_s, by_watchdog = None, time.monotonic(), False
        while process.poll() is None:
            try:
                message = told.recv(4096).decode()
            except TimeoutError:
                message = ""
            if message:
                alive_s = time.monotonic()
            if "READY=1" in message:
                ready_s = alive_s
                self._ready.set()
            if ready_s is not None and time.monotonic() - alive_s > self.watchdog_s and not by_watchdog:
                by_watchdog = True
                self._ready.clear()
                process.kill()
        return ready_s, by_watchdog

    def _start(self, module: str, *more: str, notify: Path | None = None) -> subprocess.Popen[bytes]:
        environ = {**self.environ, **({"NOTIFY_SOCKET": str(notify)} if notify else {})}
        command = [sys.executable, "-m", module, "--policy", str(self.policy), "--state", str(self.state), *more]
        return subprocess.Popen(command, env=environ, stdout=self._log, stderr=self._log, start_new_session=True)
