"""vLLM's own server as a child process: started, waited for, and stopped so that accepted requests are answered."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from pals.core.errors import EngineGoneError

PR_SET_PDEATHSIG = 1
DRAIN_S = 60
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """In the child, before exec: SIGTERM when the parent dies, however it dies."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def launch_vllm(
    model_path: str,
    *,
    served_names: Sequence[str],
    port: int,
    extra_args: Sequence[str],
    environ: Mapping[str, str],
    log_path: Path,
) -> subprocess.Popen[bytes]:
    """Start `vllm serve`, in a process group of its own, its output in `log_path`."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model_path]
    given = {a.split("=")[0] for a in extra_args}
    if "--served-model-name" not in given:
        command += ["--served-model-name", *served_names]
    for flag, value in (
        ("--port", str(port)),
        ("--host", "127.0.0.1"),
        ("--shutdown-timeout", str(DRAIN_S)),
    ):
        if flag not in given:
            command += [flag, value]
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("wb") as log:
        return subprocess.Popen(
            [*command, *extra_args],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", **environ},
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def wait_ready(process: subprocess.Popen[bytes], url: str, timeout_s: float, log_path: Path) -> None:
    """Wait until the server answers /health.

    Raises:
        EngineGoneError: it ended first, or did not answer in time.
    """
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if process.poll() is not None:
            raise EngineGoneError(
                f"vLLM ended while starting (exit code {process.returncode}); the last lines of {log_path}:\n{tail(log_path)}"
            )
        with (
            contextlib.suppress(OSError, urllib.error.URLError),
            urllib.request.urlopen(f"{url}/health", timeout=2),
        ):
            return
        time.sleep(0.2)
    raise EngineGoneError(
        f"vLLM did not answer within {timeout_s:.0f} s; it is stopped. See {log_path}:\n{tail(log_path)}"
    )


def tail(path: Path, lines: int = 12) -> str:
    """The last lines that say something."""
    text = path.read_text(errors="replace").splitlines() if path.exists() else []
    return "\n".join(f"  {line}" for line in [t for t in text if t.strip()][-lines:])


def stop(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """SIGTERM, wait for the drain, and SIGKILL to whatever is left of the group; a second Ctrl-C skips the wait."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=timeout_s)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
