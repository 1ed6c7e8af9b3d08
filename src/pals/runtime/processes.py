"""Who a process is: its id together with its start time, since the kernel gives an id to somebody else once it is free."""

from __future__ import annotations

from pathlib import Path

PROC = Path("/proc")
_STATE, _STARTED = 0, 19  # fields 3 and 22 of /proc/PID/stat, counted behind the command's closing parenthesis


def process_started(pid: int, *, proc: Path = PROC) -> int | None:
    """When process `pid` started, in the kernel's clock ticks since boot; None where it is gone or a zombie."""
    try:
        fields = (proc / str(pid) / "stat").read_text(errors="replace").rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[_STATE] == "Z" else int(fields[_STARTED])


def same_process(pid: int, started: int, *, proc: Path = PROC) -> bool:
    """Whether the process that had the id `pid` and started at `started` still lives."""
    return process_started(pid, proc=proc) == started


def process_alive(pid: int) -> bool:
    """Whether a process with this id exists and is not a zombie."""
    return process_started(pid) is not None
