"""vLLM's own server as a child process: started, waited for, and stopped so that accepted requests are answered."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from pals.core.errors import EngineGoneError

PR_SET_PDEATHSIG = 1
LOG_BYTES = 64 * 2**20
MIDDLEWARE = "pals.engines.admission_middleware.AdmissionMiddleware"
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
    drain_s: int,
) -> subprocess.Popen[bytes]:
    """Start `vllm serve`, in a process group of its own, its output in `log_path`; told to stop, it drains for `drain_s`.

    One API server: several of them, vLLM's default with data parallelism, end without draining.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model_path]
    given = {a.split("=")[0].replace("_", "-") for a in extra_args}
    if "--served-model-name" not in given:
        command += ["--served-model-name", *served_names]
    for flag, value in (
        ("--port", str(port)),
        ("--host", "127.0.0.1"),
        ("--shutdown-timeout", str(drain_s)),
        ("--api-server-count", "1"),
    ):
        if flag not in given and not (flag == "--api-server-count" and given & {"-asc", "--headless"}):
            command += [flag, value]
    if takes_middleware(given, extra_args, environ):
        command += ["--middleware", MIDDLEWARE]
    log_path.parent.mkdir(parents=True, exist_ok=True)
    log_path.open("wb").close()
    with log_path.open("ab") as log:  # appends, so that the log can be emptied beneath it
        return subprocess.Popen(
            [*command, *extra_args],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", **environ},
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def takes_middleware(given: Set[str], extra_args: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether vLLM's Python API server runs here, and was not told of PALS's middleware already."""
    rust = environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0")
    return not rust and "--headless" not in given and not any(MIDDLEWARE in a for a in extra_args)


def wait_ready(
    process: subprocess.Popen[bytes], url: str, timeout_s: float, log_path: Path, stop: threading.Event
) -> None:
    """Wait until the server answers /health.

    Raises:
        EngineGoneError: it ended first, did not answer in time, or `stop` was set.
    """
    own = ssl._create_unverified_context() if url.startswith("https") else None  # our own child: nobody to verify
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if process.poll() is not None:
            raise EngineGoneError(
                f"vLLM ended while starting (exit code {process.returncode}); the last lines of {log_path}:\n{tail(log_path)}"
            )
        with (
            contextlib.suppress(OSError, urllib.error.URLError),
            urllib.request.urlopen(f"{url}/health", timeout=2, context=own),
        ):
            return
        if stop.wait(0.2):
            raise EngineGoneError("stopped while vLLM was starting")
    raise EngineGoneError(
        f"vLLM did not answer within {timeout_s:.0f} s; it is stopped. See {log_path}:\n{tail(log_path)}"
    )


def tail(path: Path, lines: int = 12) -> str:
    """The last lines that say something."""
    text = path.read_text(errors="replace").splitlines() if path.exists() else []
    return "\n".join(f"  {line}" for line in [t for t in text if t.strip()][-lines:])


def stop(process: subprocess.Popen[bytes], timeout_s: float, dropped: threading.Event) -> bool:
    """SIGTERM, wait for the drain until `dropped` is set, and SIGKILL to whatever is left of the group.

    Returns whether it ended before it was killed.
    """
    in_time = False
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        end_s = time.monotonic() + timeout_s
        while process.poll() is None and time.monotonic() < end_s:
            if dropped.wait(0.05):
                break
        in_time = process.poll() is not None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
    return in_time


def keep_small(log_path: Path, limit_bytes: int = LOG_BYTES) -> None:
    """Move a log above `limit_bytes` to `.1` beside it and go on empty; a line written in between may be lost."""
    with contextlib.suppress(OSError):  # a full disk: emptied all the same
        if log_path.is_file() and log_path.stat().st_size > limit_bytes:
            try:
                shutil.copyfile(log_path, log_path.with_name(f"{log_path.name}.1"))
            finally:
                os.truncate(log_path, 0)
