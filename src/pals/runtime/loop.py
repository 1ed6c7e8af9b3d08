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


class Ticker:
    """The ticks of one rig on a drift-free grid; whoever calls it decides how time passes."""

    def __init__(
        self, rig: Rig, *, budget: BudgetSchedule, slo: Slo, sink: Callable[[TickRecord], None], start_s: float
    ) -> None:
        self._rig, self._budget, self._slo, self._sink, self._start_s = rig, budget, slo, sink, start_s
        self._state = TickState(controller=rig.controller.initial())
        self._slot = 0

    @property
    def count(self) -> int:
        """Ticks so far."""
        return self._state.index

    def tick(self, now_s: float) -> None:
        """Run one control period and hand its record on.

        Raises:
            EngineGoneError: the engine ended.
        """
        budget = self._budget.at(now_s - self._start_s)
        record, self._state = tick(self._rig, self._state, budget, self._slo, now_s)
        self._sink(record)

    def due_s(self, now_s: float) -> float:
        """When the next tick is due: the next grid point, or, after a late tick, the first one not yet missed."""
        period_s = self._rig.period_s
        self._slot = max(self._slot + 1, int((now_s - self._start_s) / period_s) + 1)
        return self._start_s + self._slot * period_s


def run(rig: Rig, *, budget: BudgetSchedule, slo: Slo, clock: GridClock, sink: Callable[[TickRecord], None]) -> int:
    """Tick until the clock says stop; return the number of ticks. A late tick skips grid points, never drifts.

    Raises:
        EngineGoneError: the engine ended.
    """
    ticker = Ticker(rig, budget=budget, slo=slo, sink=sink, start_s=clock.now_s())
    while True:
        ticker.tick(clock.now_s())
        due_s = ticker.due_s(clock.now_s())
        if clock.wait(due_s - clock.now_s()):
            return ticker.count


@contextmanager
def boards_as_found(
    meters: Sequence[PowerMeter], actuators: Sequence[PowerActuator], record: Path
) -> Iterator[Callable[[], None]]:
    """Write down the limits found, and on the way out put them back, whatever happened inside.

    Yields what must be called before the first clock lock is written: it says so in the record.
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
            record.unlink(missing_ok=True)
            log.info("boards put back as found: %s", ", ".join(f"{m.info.found_limit_w:.0f} W" for m in meters))


def write_found(record: Path, meters: Sequence[PowerMeter], *, clocks_locked: bool = False) -> None:
    """Write the limits found, and whether clock locks were or may have been written, to `record`, atomically."""
    record.parent.mkdir(parents=True, exist_ok=True)
    fresh = record.with_suffix(".tmp")
    found = {m.info.uuid: m.info.found_limit_w for m in meters}
    fresh.write_text(json.dumps({"pid": os.getpid(), "limits_w": found, "clocks_locked": clocks_locked}))
    fresh.replace(record)


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
