"""Who else on this node is made to write power limits or clocks: known daemons, seen by name in /proc."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

EVERY_S = 30.0
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


class Watch:
    """Looks in a thread of its own: reading a process that hangs in the kernel can take for ever."""

    def __init__(self, look: Callable[[], Sequence[str]] = other_writers) -> None:
        self._look, self._seen = look, tuple[str, ...]()
        self._thread: threading.Thread | None = None
        self._began_s = -math.inf

    def seen(self) -> tuple[str, ...]:
        """What the last look that ended saw; where that is long ago, another one begins."""
        running = self._thread is not None and self._thread.is_alive()
        if not running and time.monotonic() - self._began_s >= EVERY_S:
            self._began_s = time.monotonic()
            self._thread = threading.Thread(target=self._again, daemon=True, name="others")
            self._thread.start()
        return self._seen

    def _again(self) -> None:
        self._seen = tuple(self._look())


def _seen(proc: Path) -> Iterator[tuple[int, str]]:
    try:
        folders = [p for p in proc.iterdir() if p.name.isdigit()]
    except OSError:
        return
    for folder in folders:
        try:
            with (folder / "cmdline").open("rb", buffering=0) as f:  # a process may say megabytes of itself
                words = f.read(4096).decode(errors="replace").split("\0")
        except OSError:  # it ended, or is hidden
            continue
        names = {w.rpartition("/")[2] for w in words[:3]} | {w.rpartition(".")[2] for w in words[2:3]}
        yield from (
            (int(folder.name), told) for name, told in WRITERS.items() if any(n.startswith(name) for n in names)
        )
