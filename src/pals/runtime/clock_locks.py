"""What becomes of the SM-clock locks asked for: a lock has no getter, so this remembers what each board accepted.

A board that refuses a lock is held by its power limit alone from then on, and one whose clock runs
above an accepted lock is told to lock again, once.
"""

from __future__ import annotations

from dataclasses import replace

from pals.core.errors import NotSupportedError
from pals.core.protocols import PowerActuator
from pals.core.quantities import OperatingPoint, PowerSample

SETTLE_S = 1.0  # a lock takes tens of ms; earlier than this a high clock says nothing
MARGIN_MHZ = 30  # two steps


class ClockLocks:
    """The locks of one rig's boards, by position; the tick's way of writing to a board."""

    def __init__(self) -> None:
        self._accepted: dict[int, tuple[int, float]] = {}  # MHz, since when
        self._refusing: set[int] = set()
        self._locked_again: set[int] = set()

    def in_force_mhz(self, i: int) -> int | None:
        """The lock board `i` accepted last; None where none is."""
        return self._accepted[i][0] if i in self._accepted else None

    def released(self, i: int) -> None:
        """Board `i` was put back: it holds no lock of ours any more."""
        self._accepted.pop(i, None)

    def apply(
        self,
        i: int,
        actuator: PowerActuator,
        wanted: OperatingPoint,
        board: PowerSample,
        *,
        now_s: float,
        notes: list[str],
    ) -> OperatingPoint:
        """Write `wanted` to board `i`, without the lock where it refuses locks; `board` is its newest sample.

        Raises:
            What `actuator.apply` raises, except for a lock that is not supported: that is noted, once.
        """
        limit_only = wanted if wanted.sm_clock_mhz is None else replace(wanted, sm_clock_mhz=None)
        if lost := self._lost(i, board, now_s):
            notes.append(f"board {i}: {lost}")
            actuator.apply(limit_only)  # the adapter would skip a lock it believes in
        if i in self._refusing:
            wanted = limit_only
        try:
            accepted = actuator.apply(wanted)
        except (NotSupportedError, ValueError) as e:
            if wanted.sm_clock_mhz is None:
                raise
            notes.append(f"{e} From here on this board is held by its power limit alone.")
            self._refusing.add(i)
            accepted = actuator.apply(limit_only)
        self._accept(i, accepted.sm_clock_mhz, now_s)
        return accepted

    def _accept(self, i: int, sm_clock_mhz: int | None, now_s: float) -> None:
        if sm_clock_mhz is None:
            self._accepted.pop(i, None)
        elif self.in_force_mhz(i) != sm_clock_mhz:
            self._accepted[i] = (sm_clock_mhz, now_s)

    def _lost(self, i: int, board: PowerSample, now_s: float) -> str | None:
        """Why board `i`'s lock must be written again, or is given up; None while it holds."""
        if i not in self._accepted:
            return None
        lock_mhz, since_s = self._accepted[i]
        if board.sm_clock_mhz <= lock_mhz + MARGIN_MHZ:
            self._locked_again.discard(i)
            return None
        if now_s - since_s < SETTLE_S:
            return None
        told = f"locked at {lock_mhz} MHz, {board.sm_clock_mhz} MHz measured: "
        del self._accepted[i]
        if i in self._locked_again:
            self._refusing.add(i)
            return told + "its clock lock does not hold; from here on it is held by its power limit alone"
        self._locked_again.add(i)
        return told + "something else released the lock; it is locked again"
