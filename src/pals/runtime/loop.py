"""The loop: calls `tick` on a drift-free grid until told to stop, and leaves every board as found.

What was found is first written to a small file beside the channels, so that after a crash the next agent, or
`pals restore`, can put the boards back.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pals.core.errors import ConfigError, PalsError
from pals.core.protocols import PowerActuator, PowerMeter
from pals.core.quantities import Slo
from pals.runtime.budgets import BudgetSchedule
from pals.runtime.channel import process_alive
from pals.runtime.tick import Rig, TickRecord, TickState, tick

log = logging.getLogger("pals")


@dataclass(frozen=True, slots=True, kw_only=True)
class GridClock:
    """A monotonic clock and a way to wait; tests give their own."""

    now_s: Callable[[], float]
    wait: Callable[[float], bool]  # wait so many seconds, return True when told to stop


def wall_clock(stop: threading.Event) -> GridClock:
    """The real clock; waiting ends early when `stop` is set."""
    return GridClock(now_s=time.monotonic, wait=lambda seconds: stop.wait(max(0.0, seconds)))


def on_grid(clock: GridClock, period_s: float, step: Callable[[float], None]) -> None:
    """Call `step` with the seconds since start on a drift-free grid, until told to stop. A late step skips grid points."""
    start_s = clock.now_s()
    slot = 0
    while True:
        step(clock.now_s() - start_s)
        elapsed_s = clock.now_s() - start_s
        slot = max(slot + 1, int(elapsed_s / period_s) + 1)
        if clock.wait(start_s + slot * period_s - clock.now_s()):
            return


def run(rig: Rig, *, budget: BudgetSchedule, slo: Slo, clock: GridClock, sink: Callable[[TickRecord], None]) -> int:
    """Tick one engine until the clock says stop; return the number of ticks.

    Raises:
        EngineGoneError: the engine ended.
    """
    state = TickState(controller=rig.controller.initial())

    def step(elapsed_s: float) -> None:
        nonlocal state
        record, state = tick(rig, state, budget.at(elapsed_s), slo, clock.now_s())
        sink(record)

    on_grid(clock, rig.period_s, step)
    return state.index


@contextmanager
def boards_as_found(
    meters: Sequence[PowerMeter], actuators: Sequence[PowerActuator], record: Path
) -> Iterator[Callable[[], None]]:
    """Write down the limits found, and on the way out put them back, whatever happened inside.

    Several engines of one agent share `record`: each adds its boards and takes them out again. Yields what must be
    called before the first clock lock is written: it says so in the record.
    """
    if not actuators:
        yield lambda: None
        return
    write_found(record, meters)
    try:
        yield lambda: write_found(record, meters, clocks_locked=True)
    finally:
        failed = 0
        for actuator in actuators:
            try:
                actuator.restore()
            except (PalsError, ValueError) as e:  # one board's refusal must not keep the others limited
                failed += 1
                log.error("%s", e)
        if failed:
            log.error("%d boards could not be put back; %s keeps what was found: run `pals restore`", failed, record)
        else:
            forget_found(record, meters)
            log.info("boards put back as found: %s", ", ".join(f"{m.info.found_limit_w:.0f} W" for m in meters))


def write_found(record: Path, meters: Sequence[PowerMeter], *, clocks_locked: bool = False) -> None:
    """Add the limits found, and whether clock locks may be written, to what `record` holds of this process, atomically."""
    record.parent.mkdir(parents=True, exist_ok=True)
    known_w, locked = _found_by_us(record)
    limits_w = {**known_w, **{m.info.uuid: m.info.found_limit_w for m in meters}}
    _replace_found(record, limits_w, clocks_locked=locked or clocks_locked)


def forget_found(record: Path, meters: Sequence[PowerMeter]) -> None:
    """Take boards that were put back out of `record`; the last one removes it."""
    ours = {m.info.uuid for m in meters}
    known_w, locked = _found_by_us(record)
    left_w = {uuid: w for uuid, w in known_w.items() if uuid not in ours}
    if left_w:
        _replace_found(record, left_w, clocks_locked=locked)
    else:
        record.unlink(missing_ok=True)


def _replace_found(record: Path, limits_w: dict[str, float], *, clocks_locked: bool) -> None:
    fresh = record.with_suffix(".tmp")
    fresh.write_text(json.dumps({"pid": os.getpid(), "limits_w": limits_w, "clocks_locked": clocks_locked}))
    fresh.replace(record)


def _found_by_us(record: Path) -> tuple[dict[str, float], bool]:
    """Limits by UUID that this process wrote down, and whether it may have locked clocks."""
    try:
        data = json.loads(record.read_text())
    except FileNotFoundError:
        return {}, False
    if data["pid"] != os.getpid():
        return {}, False
    return {str(k): float(v) for k, v in data["limits_w"].items()}, bool(data.get("clocks_locked", False))


def left_by_dead_agent(record: Path) -> dict[str, float]:
    """Limits by board UUID that an agent found and, killed, never put back; empty where there is nothing to mend.

    Raises:
        ConfigError: a living agent owns the boards.
    """
    try:
        data = json.loads(record.read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as e:
        raise ConfigError(f"{record} is damaged ({e}); check the limits with nvidia-smi, then remove it") from e
    pid = int(data["pid"])
    if pid != os.getpid() and process_alive(pid):
        raise ConfigError(
            f"another PALS agent (process {pid}) steers these boards; two would fight. Nothing was changed: stop it first"
        )
    return {str(k): float(v) for k, v in data["limits_w"].items()}


def clocks_left_locked(record: Path) -> bool:
    """Whether the agent that wrote `record` wrote clock locks; a lock older than that agent cannot be known."""
    try:
        return bool(json.loads(record.read_text()).get("clocks_locked", False))
    except FileNotFoundError:
        return False
