"""Clocks: the wall's, and a virtual one that moves only when somebody waits, firing on the way what was due.

Whatever must also run in virtual time takes a `Clock`, or its `now_s`, as an argument and never asks `time` itself.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds, and a way to wait."""

    def now_s(self) -> float:
        """The time, seconds from an arbitrary zero."""
        ...

    def wait_until(self, time_s: float) -> None:
        """Return when it is `time_s`, at once where that has passed."""
        ...


class WallClock:
    """CLOCK_MONOTONIC, and sleeping."""

    def now_s(self) -> float:
        """Seconds of CLOCK_MONOTONIC, which all processes of one machine share."""
        return time.monotonic()

    def wait_until(self, time_s: float) -> None:
        """Sleep until `time_s`."""
        remaining_s = time_s - time.monotonic()
        if remaining_s > 0:
            time.sleep(remaining_s)


class VirtualClock:
    """Time that passes only in `wait_until`; actions due on the way run at exactly their time, in order of time, then of asking."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._asked = itertools.count()

    def now_s(self) -> float:
        """Virtual seconds."""
        return self._now_s

    def next_due_s(self) -> float:
        """When the next action is due, seconds; infinity where there is none."""
        return self._due[0][0] if self._due else float("inf")

    def call_at(self, time_s: float, action: Callable[[], None]) -> None:
        """Run `action` when it is `time_s`; one due in the past runs at the next wait."""
        heapq.heappush(self._due, (time_s, next(self._asked), action))

    def drop_all(self) -> None:
        """Forget every action not yet run."""
        self._due.clear()

    def wait_until(self, time_s: float) -> None:
        """Move to `time_s`, running what is due until then; an action's exception ends the wait at that action's time.

        Raises:
            ValueError: `time_s` is not finite, so that the wait would never end.
        """
        if not time_s < float("inf"):
            raise ValueError(f"cannot wait until {time_s} s: nothing is due, and virtual time would never get there")
        while self._due and self._due[0][0] <= max(time_s, self._now_s):
            due_s, _, action = heapq.heappop(self._due)
            self._now_s = max(self._now_s, due_s)
            action()
        self._now_s = max(self._now_s, time_s)
