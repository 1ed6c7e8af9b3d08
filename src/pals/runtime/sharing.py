"""One control period of several engines under one budget: who must come down goes first, and nobody takes watts that others still hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from pals.control.share import Holding, grant, targets
from pals.core.quantities import Budget


class Member(Protocol):
    """Whoever has a share of the budget."""

    def holding(self, now_s: float) -> Holding:
        """What it may draw now, and what it could use."""
        ...


M = TypeVar("M", bound=Member)


def lowering_first(members: Sequence[M], budget: Budget, now_s: float) -> list[tuple[M, float]]:
    """The members with the shares they should come to, W; those whose limits must fall are first. Without a budget, shares are 0."""
    if budget.power_w is None:
        return [(m, 0.0) for m in members]
    holdings = [m.holding(now_s) for m in members]
    wanted_w = targets(budget.power_w, holdings)
    order = sorted(range(len(holdings)), key=lambda i: wanted_w[i] - holdings[i].limits_w)
    return [(members[i], wanted_w[i]) for i in order]


def share_now(member: M, members: Sequence[M], target_w: float, budget: Budget, now_s: float) -> Budget:
    """The share for this period of `member`, one of `members`, which should come to `target_w`."""
    if budget.power_w is None:
        return budget
    others = [m.holding(now_s) for m in members if m is not member]
    return Budget(power_w=grant(target_w, member.holding(now_s), others, budget.power_w))
