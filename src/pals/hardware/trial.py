"""Writes to one board for a moment, to see what it obeys: a clock, a limit, how long a write takes; then all is as before.

Whoever calls holds the boards to being put back (`boards_as_found`); here each step is undone by the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from pals.core.diagnosis_writing import BoardTrial, ClockTrial, LatencyTrial, LimitTrial
from pals.core.errors import PalsError
from pals.core.quantities import SAME_LIMIT_W, BoardInfo, OperatingPoint, PowerSample

LOWER_W = 5.0
WRITES = 20
SAME_CLOCK_MHZ = 30  # two clock steps are noise
RISE_MHZ = 120
SETTLE_S = 1.0  # a lock acts within tens of ms
RAISED_S = 1.5  # capd may hold a raise back for a second
LOOK_S = 0.02
AT_WORK = 0.05  # busy this share of the time


class Writable(Protocol):
    """A board that can be tried."""

    @property
    def info(self) -> BoardInfo:
        """What it is and accepts."""
        ...

    def read(self) -> PowerSample:
        """A fresh reading."""
        ...

    def apply(self, wanted: OperatingPoint) -> OperatingPoint:
        """Ask for a limit, and a lock or none."""
        ...

    def pin_clock(self, mhz: int) -> None:
        """Lock the SM clock at this one."""
        ...

    def write_again(self) -> None:
        """Ask once more for the limit that is asked for."""
        ...


def work_of(sample: PowerSample, clock_reasons: Sequence[str]) -> str | None:
    """What a board is at; None: it is idle."""
    if sample.busy_ratio is None:
        return None if "idle" in clock_reasons else "whether it is idle cannot be read"
    return f"busy {sample.busy_ratio:.0%} of the time" if sample.busy_ratio >= AT_WORK else None


def try_board(
    board: Writable,
    *,
    limit_w: float,
    writer: str,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> BoardTrial:
    """Lock the clock for less than two seconds, lower the limit by 5 W, ask for the same 20 times; leave it at `limit_w`."""
    before = board.read()
    locked, limit, latency, error, after_mhz = None, None, None, None, None
    try:
        locked = _try_clock(board, before, clock, sleep)
        limit = _try_limit(board, limit_w, clock, sleep)
        latency = _try_latency(board, clock)
    except (PalsError, ValueError) as e:
        error = str(e)
    finally:  # also where Ctrl-C came in between
        try:
            board.apply(OperatingPoint(power_limit_w=limit_w))
        except (PalsError, ValueError) as e:
            error = error or str(e)
    try:
        _wait(
            lambda: abs(board.read().enforced_limit_w - before.enforced_limit_w) < SAME_LIMIT_W, RAISED_S, clock, sleep
        )
        after_mhz = board.read().sm_clock_mhz
    except (PalsError, ValueError) as e:
        error = error or str(e)
    return BoardTrial(
        index=board.info.index, writer=writer, clock=None if locked is None else replace(locked, after_mhz=after_mhz),
        limit=limit, latency=latency, error=error, found_w=before.enforced_limit_w,
    )  # fmt: skip


def pin_target_mhz(present_mhz: int, lockable_mhz: Sequence[int]) -> int:
    """A clock that can be told from the present one: a tenth below it, or a little above where it rests near the bottom."""
    low = lockable_mhz[0]
    wish = (
        0.9 * present_mhz
        if 0.1 * present_mhz > 2 * SAME_CLOCK_MHZ and 0.9 * present_mhz > low
        else present_mhz + RISE_MHZ
    )
    return min(lockable_mhz, key=lambda mhz: abs(mhz - wish))


def _try_clock(
    board: Writable, before: PowerSample, clock: Callable[[], float], sleep: Callable[[float], None]
) -> ClockTrial:
    target = pin_target_mhz(before.sm_clock_mhz, board.info.lockable_clocks_mhz)
    idle = (before.busy_ratio or 0.0) < AT_WORK
    began_s = clock()
    try:
        board.pin_clock(target)
    except (PalsError, ValueError) as e:
        return ClockTrial(before_mhz=before.sm_clock_mhz, target_mhz=target, measured_mhz=None, idle=idle, error=str(e))
    seen = [board.read()]

    def there() -> bool:
        seen.append(board.read())
        return abs(seen[-1].sm_clock_mhz - target) <= SAME_CLOCK_MHZ

    took = _wait(there, SETTLE_S, clock, sleep)
    nearest = min(seen, key=lambda s: abs(s.sm_clock_mhz - target))
    return ClockTrial(
        before_mhz=before.sm_clock_mhz, target_mhz=target, measured_mhz=nearest.sm_clock_mhz, idle=idle,
        took_s=clock() - began_s if took else None,
        capped=nearest.throttled_by_power and nearest.sm_clock_mhz < target,
    )  # fmt: skip


def _try_limit(
    board: Writable, limit_w: float, clock: Callable[[], float], sleep: Callable[[float], None]
) -> LimitTrial:
    """Also ends the lock: it is asked for with none."""
    asked_w = limit_w - LOWER_W
    if asked_w < board.info.min_limit_w:
        board.apply(OperatingPoint(power_limit_w=limit_w))
        return LimitTrial(before_w=limit_w, asked_w=None)
    try:
        board.apply(OperatingPoint(power_limit_w=asked_w))
    except (PalsError, ValueError) as e:
        return LimitTrial(before_w=limit_w, asked_w=asked_w, error=str(e))
    _wait(lambda: board.read().enforced_limit_w <= asked_w + SAME_LIMIT_W, SETTLE_S, clock, sleep)
    return LimitTrial(before_w=limit_w, asked_w=asked_w, enforced_w=board.read().enforced_limit_w)


def _try_latency(board: Writable, clock: Callable[[], float]) -> LatencyTrial:
    took_s = []
    for _ in range(WRITES):
        began_s = clock()
        board.write_again()
        took_s.append(clock() - began_s)
    took_s.sort()
    p50, p99 = (took_s[min(WRITES - 1, WRITES * p // 100)] for p in (50, 99))
    return LatencyTrial(writes=WRITES, p50_s=p50, p99_s=p99)


def _wait(so: Callable[[], bool], seconds: float, clock: Callable[[], float], sleep: Callable[[float], None]) -> bool:
    """Look until something is so, for `seconds` at most."""
    end_s = clock() + seconds
    while not so():
        if clock() >= end_s:
            return False
        sleep(LOOK_S)
    return True
