"""The loop: calls `tick` on a drift-free grid until told to stop, and leaves every board as found.

What was found, and whatever is written, goes first to a small file beside the channels (`found.py`), so that after a
crash the next agent, or `pals restore`, can put the boards back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pals.core.errors import NotPutBackError, PalsError
from pals.core.protocols import PowerActuator, PowerMeter
from pals.core.quantities import Slo
from pals.runtime.budgets import BudgetSchedule
from pals.runtime.found import add_found, forget_found, note_writes, read_found
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
def boards_as_found(meters: Sequence[PowerMeter], actuators: Sequence[PowerActuator], record: Path) -> Iterator[None]:
    """Write down the limits found, and each write before it is made; on the way out put all back, whatever happened inside.

    Several engines of one agent share `record`: each adds its boards and takes them out again.

    Raises:
        NotPutBackError: some boards could not be put back; the others are.
    """
    if not actuators:
        yield
        return
    add_found(record, meters)
    for actuator in actuators:
        actuator.announce_to(lambda write: note_writes(record, [write]))
    try:
        yield
    finally:
        refused = _put_back(meters, actuators, record)
        if refused:
            raise NotPutBackError(
                f"{len(refused)} of {len(meters)} boards could not be put back: {'; '.join(refused)}{_told_kept(record)}"
            )
        log.info(
            "boards put back as found: %s",
            ", ".join(_left_at(m, a) for m, a in zip(meters, actuators, strict=True)),
        )


def _told_kept(record: Path) -> str:
    """What to do, where the record says how to undo what was written; whoever writes for us may keep a record of its own."""
    try:
        found = read_found(record)
        if found is None or not any(b.written_w or b.clock_locked for b in found.boards.values()):
            return ""
    except PalsError:
        pass  # written, and damaged since: `pals restore` says so
    return f" {record} keeps what was found: run `pals restore` with the rights to write"


def _left_at(meter: PowerMeter, actuator: PowerActuator) -> str:
    other_w = actuator.other_hand_w
    if other_w is not None:
        return f"{other_w:.0f} W (set by somebody else meanwhile)"
    return f"{meter.info.found_limit_w:.0f} W"


def _put_back(meters: Sequence[PowerMeter], actuators: Sequence[PowerActuator], record: Path) -> list[str]:
    """Put every board back; return what those that could not be say."""
    refused, done = [], []
    for meter, actuator in zip(meters, actuators, strict=True):
        try:
            actuator.restore()
            done.append(meter.info.uuid)
        except (PalsError, ValueError) as e:  # one board's refusal must not keep the others limited
            refused.append(str(e))
    try:
        forget_found(record, done)
    except PalsError as e:  # the boards are back all the same
        log.error("%s", e)
    return refused
