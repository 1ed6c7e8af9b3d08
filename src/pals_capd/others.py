"""Who else on this node is made to write power limits or clocks: known daemons, seen by name in /proc."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

#: Words of a command line's program, or of the module it runs, and what they are.
WRITERS = {
    "zeusd": "zeusd",
    "nv-hostengine": "DCGM host engine, whose policies and profiles can set limits",
    "dcgmi": "dcgmi",
    "power-agent": "Dynamo power agent",
    "power_agent": "Dynamo power agent",
    "nvidia-powerd": "nvidia-powerd",
}


def other_writers(proc: Path = Path("/proc")) -> list[str]:
    """ "zeusd (process 12)" of each that runs; empty where /proc cannot be read."""
    return sorted(f"{told} (process {pid})" for pid, told in _seen(proc))


def _seen(proc: Path) -> Iterator[tuple[int, str]]:
    try:
        folders = [p for p in proc.iterdir() if p.name.isdigit()]
    except OSError:
        return
    for folder in folders:
        try:
            words = (folder / "cmdline").read_bytes()[:4096].decode(errors="replace").split("\0")
        except OSError:  # it ended, or is hidden
            continue
        names = {w.rpartition("/")[2] for w in words[:3]} | {w.rpartition(".")[2] for w in words[2:3]}
        yield from (
            (int(folder.name), told) for name, told in WRITERS.items() if any(n.startswith(name) for n in names)
        )
