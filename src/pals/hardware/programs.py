"""Programs of this node that can set limits or clocks, seen by name in /proc; what they do with it cannot be seen."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pals.core.diagnosis_writing import Program

#: How a program's name, or that of the module it runs, begins; what it is, and whether it is there to write.
KNOWN: dict[str, tuple[str, bool | None]] = {
    "zeusd": ("zeusd", True),
    "nv-hostengine": ("DCGM host engine", None),
    "dcgmi": ("dcgmi", None),
    "power-agent": ("Dynamo power agent", True),
    "power_agent": ("Dynamo power agent", True),
    "nvidia-powerd": ("nvidia-powerd", True),
}
SETTING = (
    "-pl",
    "--power-limit",
    "-lgc",
    "--lock-gpu-clocks",
    "-rgc",
    "--reset-gpu-clocks",
    "-ac",
    "--applications-clocks",
)
LOOPING = ("-l", "--loop", "-lms", "--loop-ms", "dmon", "pmon")
INTERPRETER = "python"
PALS_AGENT = "another pals agent"


def programs(proc: Path = Path("/proc"), *, without: frozenset[int] | None = None) -> tuple[Program, ...]:
    """All that are seen, by process id; `without`: this process and its parents unless given. Empty where /proc is closed."""
    left_out = ancestors(proc, os.getpid()) if without is None else without
    try:
        pids = sorted(int(p.name) for p in proc.iterdir() if p.name.isdigit())
    except OSError:
        return ()
    return tuple(found for pid in pids if pid not in left_out and (found := _program(proc, pid)) is not None)


def ancestors(proc: Path, pid: int) -> frozenset[int]:
    """A process and its parents."""
    seen = set[int]()
    while pid > 0 and pid not in seen:
        seen.add(pid)
        try:
            pid = int((proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
    return frozenset(seen)


def _program(proc: Path, pid: int) -> Program | None:
    try:
        line = (proc / str(pid) / "cmdline").read_bytes()[:4096].decode(errors="replace")
    except OSError:  # it ended meanwhile, or is hidden
        return None
    words = [w for w in line.split("\0") if w]
    names = list(_names(words))
    for start, (told, writes) in KNOWN.items():
        if any(n.startswith(start) for n in names):
            return Program(pid=pid, name=told, writes=writes)
    if "pals" in names and "agent" in words:
        return Program(pid=pid, name=PALS_AGENT, writes=True)
    return _nvidia_smi(pid, words)


def _names(words: Sequence[str]) -> Iterator[str]:
    """The program's name, and of an interpreter the script's or the module's."""
    if not words:
        return
    first = words[0].rpartition("/")[2]
    yield first
    if first.startswith(INTERPRETER) and len(words) > 1:
        module = words[2] if words[1] == "-m" and len(words) > 2 else words[1]
        yield module.rpartition("/")[2]
        yield from module.split(".") if words[1] == "-m" else ()


def _nvidia_smi(pid: int, words: Sequence[str]) -> Program | None:
    """nvidia-smi that sets something, by itself or under `watch`, or that reads in a loop."""
    if not any(w.rpartition("/")[2] == "nvidia-smi" or "nvidia-smi " in w for w in words):
        return None
    options = {o.partition("=")[0] for w in words for o in w.split()}
    if options & set(SETTING):
        return Program(pid=pid, name="nvidia-smi that sets limits or clocks", writes=True)
    if options & set(LOOPING):
        return Program(pid=pid, name="nvidia-smi in a loop", writes=False)
    return None
