"""The guard has the last word: whatever a policy wants leaves here inside the boards' range, the launch batch and the budget.

The sum of the power limits never exceeds the budget less `margin`, so the budget rests on the board's own firmware
and not on a prediction. Where the boards' minimum limit stands above the budget, the guard says so.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pals.core.errors import ConfigError
from pals.core.quantities import BoardInfo, Budget, Decision, OperatingPoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """What may be asked of these boards and this engine."""

    min_limit_w: float
    max_limit_w: float
    boards: int
    launch_sequences: int
    sm_clocks_mhz: tuple[int, ...] = ()  # a lock may name these, rising; empty: none is allowed
    board: str = ""  # the boards' name; of several kinds, the first
    default_limit_w: float | None = None  # the lowest of the boards'; None: not known
    margin: float = 0.02  # a mean may exceed a limit near natural draw by up to 3 %, measured; the clamp is soft

    @staticmethod
    def of(boards: Sequence[BoardInfo], launch_sequences: int) -> Guard:
        """The guard of a group of boards that move together; the ceiling is the lowest limit *found*, not the maximum.

        Whoever set a limit before PALS came had a reason; PALS goes down from there and back, never above.

        Raises:
            ConfigError: no board.
        """
        if not boards:
            raise ConfigError(
                "an engine without boards cannot be guarded: there is no limit to set. Nothing was changed"
            )
        return Guard(
            min_limit_w=max(b.min_limit_w for b in boards),
            max_limit_w=min(min(b.max_limit_w, b.found_limit_w) for b in boards),
            boards=len(boards),
            launch_sequences=launch_sequences,
            sm_clocks_mhz=tuple(sorted(set.intersection(*(set(b.lockable_clocks_mhz) for b in boards)))),
            board=boards[0].name,
            default_limit_w=min(b.default_limit_w for b in boards),
        )

    @property
    def least_budget_w(self) -> float:
        """The smallest whole-watt budget that leaves every board at its minimum limit, W."""
        return float(math.ceil(self.share_of([math.ceil(self.min_limit_w)] * self.boards) + 1e-6))

    @property
    def most_budget_w(self) -> float:
        """The budget above which no limit rises any more, W."""
        return float(math.ceil(self.share_of([math.ceil(self.max_limit_w)] * self.boards) + 1e-6))

    def share_of(self, limits_w: Sequence[float]) -> float:
        """The budget that allows these power limits, W."""
        return sum(limits_w) / (1 - self.margin)

    def limit_beside(
        self, stuck_w: Sequence[float], wanted_w: float, budget: Budget, absent_w: Sequence[float] = ()
    ) -> float:
        """The limit for the other boards of the group where some stand at `stuck_w` and do not follow, W.

        Boards of a group wait for the slowest, so the lowest limit in force suffices for all; what a board takes too much
        the others do without, down to their minimum. Boards that cannot be read may draw `absent_w`; nobody waits for them.
        """
        limit_w, rest = min((wanted_w, *stuck_w)), self.boards - len(stuck_w) - len(absent_w)
        if budget.power_w is not None and rest:
            left_w = budget.power_w * (1 - self.margin) - sum(stuck_w) - sum(absent_w)
            limit_w = min(limit_w, float(int(left_w / rest)))
        return max(self.min_limit_w, limit_w)

    def ceiling_w(self, budget: Budget) -> float:
        """The highest limit of a board that the budget and the limits found allow, W; it may lie below the boards' least."""
        if budget.power_w is None:
            return self.max_limit_w
        return min(self.max_limit_w, float(int(budget.power_w * (1 - self.margin) / self.boards)))

    def check(self, wanted: Decision, budget: Budget) -> Decision:
        """Return `wanted`, or the nearest decision that is allowed, with the reason changed to say so."""
        limit_w, reason, detail = wanted.point.power_limit_w, wanted.reason, wanted.detail
        clock_mhz = self.supported_clock_mhz(wanted.point.sm_clock_mhz)
        if clock_mhz != wanted.point.sm_clock_mhz:
            told = (
                "no lock is possible" if clock_mhz is None else f"{clock_mhz} MHz is the nearest supported from below"
            )
            reason, detail = "guard-clock", f"an SM clock of {wanted.point.sm_clock_mhz} MHz wanted, {told}"
        ceiling_w = self.ceiling_w(budget)
        if ceiling_w < self.min_limit_w:
            detail = (
                f"the budget of {budget.power_w or 0:.0f} W lies below {self.boards} boards' least limits "
                f"({self.min_limit_w:.0f} W each): limits stand at their minimum"
            )
            reason, ceiling_w = "guard-budget-below-minimum", self.min_limit_w
        if limit_w > ceiling_w:
            if not reason.startswith("guard"):
                reason = "guard-budget" if ceiling_w < self.max_limit_w else "guard-range"
                detail = f"{limit_w:.0f} W wanted, {ceiling_w:.0f} W allowed"
            limit_w = ceiling_w
        elif limit_w < self.min_limit_w:
            if reason != "guard-budget-below-minimum":  # that says why already
                reason = "guard-range"
                detail = f"{limit_w:.0f} W wanted, {self.min_limit_w:.0f} W is the board's minimum"
            limit_w = self.min_limit_w
        sequences = wanted.point.active_sequences
        if sequences is not None and not 1 <= sequences <= self.launch_sequences:
            detail = f"{sequences} active sequences wanted, 1..{self.launch_sequences} possible"
            reason, sequences = "guard-sequences", max(1, min(self.launch_sequences, sequences))
        most_waiting = wanted.most_waiting
        if most_waiting is not None and most_waiting < 0:
            reason, detail = "guard-waiting", f"{most_waiting} waiting requests wanted, 0 is the least"
            most_waiting = 0
        point = OperatingPoint(power_limit_w=limit_w, sm_clock_mhz=clock_mhz, active_sequences=sequences)
        return replace(wanted, point=point, reason=reason, detail=detail, most_waiting=most_waiting)

    def supported_clock_mhz(self, wanted_mhz: int | None) -> int | None:
        """The highest supported SM clock not above `wanted_mhz`, or the lowest of all; None: no lock."""
        if wanted_mhz is None or not self.sm_clocks_mhz:
            return None
        return self.sm_clocks_mhz[max(0, bisect_right(self.sm_clocks_mhz, wanted_mhz) - 1)]
