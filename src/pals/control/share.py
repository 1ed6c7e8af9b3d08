"""One budget, several engines: what each may draw, so that the sum never exceeds the budget.

Shares go in proportion to the boards, at least what the boards' minimum limits need, at most what their limits can use;
what an idle engine does not need goes to the busy ones. A share is lowered at once and raised only into watts that the
other engines' limits, as read back, have already left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pals.core.quantities import Checked

SLACK_W = 0.5  # a driver's rounding, per board


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim(Checked):
    """What one engine's boards can do with watts."""

    boards: int
    least_w: float  # the share at which every board stands at its minimum limit
    most_w: float  # the share above which no limit rises any more
    idle: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding(Checked):
    """What one engine may draw now."""

    claim: Claim
    granted_w: float | None  # its share at its last tick; None: never had one
    limits_w: float  # the smallest share that allows the limits now in force

    @property
    def obeys(self) -> bool:
        """Whether the limits in force lie within the share granted."""
        return self.granted_w is not None and self.limits_w <= self.granted_w + SLACK_W * self.claim.boards

    @property
    def held_w(self) -> float:
        """Watts that nobody else may have: the share, or the limits in force where they exceed it."""
        return max(self.granted_w or 0.0, self.limits_w)


def split(budget_w: float, claims: Sequence[Claim]) -> tuple[float, ...]:
    """Divide `budget_w`; the shares add up to it. Below the sum of the minima, in proportion to the minima."""
    if len(claims) <= 1:
        return (budget_w,) * len(claims)
    least_w = [c.least_w for c in claims]
    if budget_w <= sum(least_w):
        return tuple(budget_w * w / sum(least_w) for w in least_w)
    most_w = [max(c.most_w, c.least_w) for c in claims]
    awake_w = [low if c.idle else high for c, low, high in zip(claims, least_w, most_w, strict=True)]
    boards = [c.boards for c in claims]
    for low, high in ((least_w, awake_w), (awake_w, most_w), (most_w, [budget_w + w for w in most_w])):
        if budget_w <= sum(high):
            return _fill(budget_w, boards, low, high)
    raise ValueError(f"a budget of {budget_w} W cannot be divided")  # the last `high` alone exceeds every budget


def _fill(budget_w: float, boards: Sequence[int], low_w: Sequence[float], high_w: Sequence[float]) -> tuple[float, ...]:
    """One level of watts per board, clamped to each engine's range, such that the shares add up to the budget."""

    def shares(level_w: float) -> list[float]:
        return [min(h, max(lo, level_w * n)) for n, lo, h in zip(boards, low_w, high_w, strict=True)]

    edges_w = sorted({w / n for ws in (low_w, high_w) for w, n in zip(ws, boards, strict=True)})
    below_w = max(e for e in edges_w if sum(shares(e)) <= budget_w or e == edges_w[0])
    rising = sum(
        n for n, lo, h in zip(boards, low_w, high_w, strict=True) if lo <= below_w * n + 1e-9 and below_w * n < h
    )
    level_w = below_w + (budget_w - sum(shares(below_w))) / rising if rising else below_w
    return tuple(shares(level_w))


def targets(budget_w: float, holdings: Sequence[Holding]) -> tuple[float, ...]:
    """The share each engine should come to.

    An engine whose limits stay above its share (it refuses, or only advises) keeps what it takes; the others divide the
    rest, and it is still told its fair share.
    """
    fair_w = split(budget_w, [h.claim for h in holdings])
    stuck = [h.granted_w is not None and not h.obeys for h in holdings]
    left_w = max(0.0, budget_w - sum(h.held_w for h, s in zip(holdings, stuck, strict=True) if s))
    rest = iter(split(left_w, [h.claim for h, s in zip(holdings, stuck, strict=True) if not s]))
    return tuple(w if s else next(rest) for w, s in zip(fair_w, stuck, strict=True))


def grant(target_w: float, mine: Holding, others: Sequence[Holding], budget_w: float) -> float:
    """The share for the next tick: `target_w` at once where that lowers limits, else as far as the others leave room."""
    return min(target_w, max(mine.limits_w, budget_w - sum(h.held_w for h in others)))
