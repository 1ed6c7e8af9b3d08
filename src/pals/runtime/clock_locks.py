"""What becomes of the SM-clock locks asked for: a lock has no getter, so this remembers what each board accepted.

Before the first lock is written, `write_ahead` is called once: whoever finds a killed agent's record must know that
locks may be left. A board that refuses a lock is held by its power limit alone from then on, and one whose clock runs
above an accepted lock is told to lock again, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pals.core.quantities import OperatingPoint, PowerSample

SETTLE_S = 1.0  # a lock takes tens of ms; earlier than this a high clock says nothing
MARGIN_MHZ = 30  # two steps


class ClockLocks:
    """The locks of one rig's boards, by position."""

    def __init__(self, write_ahead: Callable[[], None] = lambda: None) -> None:
        self.write_ahead = write_ahead
        self._written_ahead = False
        self._accepted: dict[int, tuple[int, float]] = {}  # MHz, since when
        self._refusing: set[int] = set()
        self._locked_again: set[int] = set()

    def allowed(self, i: int, wanted: OperatingPoint) -> OperatingPoint:
        """`wanted`, without the lock where board `i` refuses them."""
        if wanted.sm_clock_mhz is None or i in self._refusing:
            return replace(wanted, sm_clock_mhz=None)
        self.prepare(wanted)
        return wanted

    def prepare(self, wanted: OperatingPoint) -> None:
        """Whoever writes `wanted` calls this before: the first lock is announced ahead."""
        if wanted.sm_clock_mhz is not None and not self._written_ahead:
            self.write_ahead()
            self._written_ahead = True

    def accepted(self, i: int, sm_clock_mhz: int | None, now_s: float) -> None:
        """The driver accepted this lock, or the release."""
        if sm_clock_mhz is None:
            self._accepted.pop(i, None)
        elif self._accepted.get(i, (None,))[0] != sm_clock_mhz:
            self._accepted[i] = (sm_clock_mhz, now_s)

    def in_force_mhz(self, i: int) -> int | None:
        """The lock board `i` accepted last; None where none is."""
        return self._accepted[i][0] if i in self._accepted else None

    def refuse(self, i: int) -> None:
        """Board `i` is not asked for a lock again."""
        self._refusing.add(i)
        self._accepted.pop(i, None)

    def check(self, i: int, board: PowerSample, now_s: float) -> str | None:
        """Why board `i`'s lock must be written again, or is given up; None while it holds."""
        if i not in self._accepted:
            return None
        lock_mhz, since_s = self._accepted[i]
        if board.sm_clock_mhz <= lock_mhz + MARGIN_MHZ:
            self._locked_again.discard(i)
            return None
        if now_s - since_s < SETTLE_S:
            return None
        told = f"board {i}: locked at {lock_mhz} MHz, {board.sm_clock_mhz} MHz measured: "
        self._accepted.pop(i)
        if i in self._locked_again:
            self.refuse(i)
            return told + "its clock lock does not hold; from here on it is held by its power limit alone"
        self._locked_again.add(i)
        return told + "something else released the lock; it is locked again"
