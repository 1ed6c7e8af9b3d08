"""Looks at every board through the one NVML adapter and writes nothing: what it is, how it is set, what its meters do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pals.core.diagnosis import BoardFacts, MeterFacts, NvmlFacts, PrivilegeFacts
from pals.core.errors import ConfigError, PalsError
from pals.hardware.metering import judge_meters
from pals.hardware.nvml import open_each
from pals.hardware.nvml_board import NvmlBoard

EVERY_S = 0.005
CAP_SYS_ADMIN = 21


def probe_nvml(
    *,
    emulated: Path | None,
    emulator_pid: int | None = None,
    emulator_alive: bool = False,
    watch_s: float = 2.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    proc: Path = Path("/proc"),
) -> NvmlFacts:
    """Look at NVML and all boards; watch their meters for `watch_s` seconds (0: not). Never raises for what is missing."""
    error: str | None = None
    may_write, boards = False, tuple[BoardFacts, ...]()
    try:
        with open_each(emulated=emulated, clock=clock, sleep=sleep) as (opened, may_write):
            boards = look_at(opened, watch_s=watch_s, clock=clock, sleep=sleep)
    except ConfigError as e:
        error = str(e)
    return NvmlFacts(
        emulated=str(emulated) if emulated else None,
        emulator_pid=emulator_pid,
        emulator_alive=emulator_alive,
        error=error,
        kernel_driver=first_line(proc / "driver/nvidia/version"),
        boards=boards,
        may_write=may_write,
    )


def look_at(
    opened: Sequence[NvmlBoard | Exception],
    *,
    watch_s: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> tuple[BoardFacts, ...]:
    """Facts of each board, in NVML's order."""
    watched = {b.info.index: watch for b, watch in watch_meters(opened, watch_s, clock, sleep)}
    facts = []
    for index, board in enumerate(opened):
        if isinstance(board, Exception):
            facts.append(BoardFacts(index=index, error=str(board)))
            continue
        try:
            facts.append(
                BoardFacts(
                    index=index, info=board.info, now=board.read(), settings=board.settings(), meter=watched.get(index)
                )
            )
        except (PalsError, ValueError) as e:
            facts.append(BoardFacts(index=index, error=str(e)))
    return tuple(facts)


def watch_meters(
    opened: Sequence[NvmlBoard | Exception], watch_s: float, clock: Callable[[], float], sleep: Callable[[float], None]
) -> list[tuple[NvmlBoard, MeterFacts]]:
    """Read all boards' meters in turn for `watch_s` seconds; a board whose meters fail is left out."""
    readings: dict[NvmlBoard, list[tuple[float, float, float]]] = {
        b: [] for b in opened if not isinstance(b, Exception)
    }
    end_s = clock() + watch_s
    while readings and clock() < end_s:
        for board in list(readings):
            try:
                readings[board].append(board.read_meters())
            except (PalsError, ValueError):
                del readings[board]  # `look_at` reads it once more and says why
        sleep(EVERY_S)
    return [(board, judge_meters(seen)) for board, seen in readings.items() if len(seen) >= 2]


def probe_privilege(proc: Path = Path("/proc")) -> PrivilegeFacts:
    """What this process may do; nothing is tried."""
    sys_admin = None
    try:
        for line in (proc / "self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                sys_admin = bool(int(line.split()[1], 16) >> CAP_SYS_ADMIN & 1)
    except OSError:
        sys_admin = None
    return PrivilegeFacts(euid=os.geteuid(), sys_admin=sys_admin)


def first_line(path: Path) -> str | None:
    """The first line of a file; None where there is none."""
    try:
        return path.read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
