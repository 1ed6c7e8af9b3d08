"""The budget in force: the newest one put while it lives, else the schedule, else the default; each change of hand is said once.

Whoever puts a budget does so from another thread than the one that ticks; both see one state, under one lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from pals.core.quantities import Budget
from pals.runtime.budgets import BudgetSchedule, InForce


@dataclass(frozen=True, slots=True, kw_only=True)
class _Put:
    power_w: float
    until_s: float  # of the clock, not since start
    by: str


class LiveBudget:
    """See the module. Times are `now_s`'s, so it also works on a virtual clock; `wall_s` is for people only."""

    def __init__(
        self,
        schedule: BudgetSchedule,
        *,
        now_s: Callable[[], float],
        say: Callable[[str], None],
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._schedule, self._now_s, self._say, self._wall_s = schedule, now_s, say, wall_s
        self._lock = threading.Lock()
        self._start_s: float | None = None
        self._least_w: float | None = None
        self._put: _Put | None = None
        self._before: InForce | None = None  # at the last tick

    @property
    def least_w(self) -> float | None:
        """The lowest budget that can be promised: every board at its minimum limit. None: not known, or nothing is steered."""
        return self._least_w

    @least_w.setter
    def least_w(self, value: float | None) -> None:
        with self._lock:
            self._least_w = value

    def at(self, elapsed_s: float) -> Budget:
        """The budget for the tick `elapsed_s` seconds after the start; says what has expired since the tick before."""
        with self._lock:
            now_s = self._now_s()
            if self._start_s is None:
                self._start_s = now_s - elapsed_s
            expired = self._put if self._put is not None and self._put.until_s <= now_s else None
            if expired is not None:
                self._put = None
            before, now = self._before, self._in_force(now_s)
            self._before = now
        if expired is not None:
            self._say(
                f"the budget of {expired.power_w:g} W that {expired.by} put has expired; now in force: {told(now)}"
            )
        elif before is not None and before.source == "schedule" and now.source in ("default", "none"):
            self._say(f"the schedule's {told(before)} has expired; now in force: {told(now)}")
        return Budget(power_w=now.power_w)

    def in_force(self) -> InForce:
        """What holds now."""
        with self._lock:
            return self._in_force(self._now_s())

    def remaining_s(self, now: InForce) -> float | None:
        """How much longer that is known to hold, seconds; None: open."""
        if now.until_s is None:
            return None
        return max(0.0, now.until_s - self._elapsed_s(self._now_s()))

    def put(self, power_w: float, *, ttl_s: float, by: str) -> str | None:
        """From now on, for `ttl_s` seconds, `power_w` holds; or why it does not, and then nothing has changed."""
        with self._lock:
            if self._least_w is None:
                return "no engine is steered now, so nothing can be promised; nothing was changed, try again"
            if power_w < self._least_w:
                return (
                    f"{power_w:g} W is less than these boards can keep: {self._least_w:g} W is the lowest budget that can be promised, "
                    "with every board at its minimum limit; nothing was changed"
                )
            now_s = self._now_s()
            old = self._in_force(now_s)
            self._put = _Put(power_w=power_w, until_s=now_s + ttl_s, by=by)
        until = datetime.fromtimestamp(self._wall_s() + ttl_s).strftime("%Y-%m-%d %H:%M:%S")
        self._say(f"budget of {power_w:g} W put by {by} for {ttl_s:g} s, until {until}; before: {told(old)}")
        return None

    def withdraw(self, *, by: str) -> bool:
        """Forget what was put; whether there was anything to forget."""
        with self._lock:
            now_s = self._now_s()
            put = self._put
            if put is None or put.until_s <= now_s:  # one that has expired is told of at the next tick
                return False
            self._put = None
            now = self._in_force(now_s)
        self._say(f"the budget of {put.power_w:g} W that {put.by} put was withdrawn by {by}; now in force: {told(now)}")
        return True

    def _elapsed_s(self, now_s: float) -> float:
        return 0.0 if self._start_s is None else now_s - self._start_s

    def _in_force(self, now_s: float) -> InForce:
        elapsed_s = self._elapsed_s(now_s)
        if self._put is not None and self._put.until_s > now_s:
            until_s = elapsed_s + self._put.until_s - now_s
            return InForce(power_w=self._put.power_w, source="put", until_s=until_s, by=self._put.by)
        return self._schedule.in_force(elapsed_s)


def told(now: InForce) -> str:
    """ "1600 W (schedule)", "1600 W (put by 127.0.0.1:4711)" or "no budget (default)"."""
    watts = "no budget" if now.power_w is None else f"{now.power_w:g} W"
    return watts if now.source == "none" else f"{watts} ({now.source}{f' by {now.by}' if now.by else ''})"
