"""One budget, several engines: what each may draw, so that the sum never exceeds the budget.

Shares go in proportion to the boards, at least what the boards' minimum limits need, at most what their limits can use;
what an idle engine does not need goes to the busy ones. Engines that know what watts are worth to them divide what they
get together anew: first what their targets need, then where a watt brings most (water-filling). A share is lowered at once
and raised only into watts that the other engines' limits, as read back, have already left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import isfinite
from typing import NamedTuple

from pals.core.quantities import Checked

SLACK_W = 0.5  # a driver's rounding, per board


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim(Checked):
    """What one engine's boards can do with watts."""

    boards: int
    least_w: float  # the share at which every board stands at its minimum limit
    most_w: float  # the share above which no limit rises any more
    idle: bool = False
    worth: tuple[tuple[float, float], ...] = ()  # (share in W, what it is worth there); empty: not known
    needed_w: float | None = None  # the share its targets need; None: not known, or they cannot be kept

    @property
    def knows(self) -> bool:
        """Whether it says what watts are worth to it."""
        return bool(self.worth) or self.needed_w is not None


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


class Segment(NamedTuple):
    """A stretch of one claim's watts over which each watt brings the same."""

    worth_per_w: float
    claim: int  # its position
    width_w: float


def split(budget_w: float, claims: Sequence[Claim]) -> tuple[float, ...]:
    """Divide `budget_w`; the shares add up to it, and none falls when it rises.

    Below the sum of the minima, in proportion to the minima. Claims that know what watts are worth to them take no watt from
    those that do not: they divide among themselves what they would get without that knowledge.
    """
    shares_w = _by_boards(budget_w, claims)
    knowing = [i for i, c in enumerate(claims) if c.knows]
    pool_w = sum(shares_w[i] for i in knowing)
    if len(knowing) < 2 or pool_w <= sum(claims[i].least_w for i in knowing):
        return shares_w
    anew = dict(zip(knowing, _by_worth(pool_w, [claims[i] for i in knowing]), strict=True))
    return tuple(anew.get(i, w) for i, w in enumerate(shares_w))


def _by_boards(budget_w: float, claims: Sequence[Claim]) -> tuple[float, ...]:
    """In proportion to the boards, between what each needs and what it can use; the idle ones last."""
    if len(claims) <= 1:
        return (budget_w,) * len(claims)
    least_w = [c.least_w for c in claims]
    if budget_w <= sum(least_w):
        return tuple(budget_w * w / sum(least_w) for w in least_w)
    return _on_top(budget_w, claims, least_w)


def _by_worth(budget_w: float, claims: Sequence[Claim]) -> tuple[float, ...]:
    """The least to all, then what targets need, then to whom a watt brings most, then by boards; above the sum of the minima."""
    least_w = [c.least_w for c in claims]
    needed_w = [_needed_w(c) for c in claims]
    if budget_w <= sum(needed_w):
        return _few_short(budget_w, least_w, needed_w)
    shares_w, left_w = needed_w, budget_w - sum(needed_w)
    steepest_first = sorted(
        (s for i, c in enumerate(claims) for s in segments(c, i, needed_w[i])), key=lambda s: -s.worth_per_w
    )
    for _, equals in groupby(steepest_first, key=lambda s: s.worth_per_w):
        among = list(equals)  # equals are filled side by side: two engines of one kind get the same
        part = min(1.0, left_w / sum(s.width_w for s in among))
        for s in among:
            shares_w[s.claim] += part * s.width_w
        if part < 1.0:
            return tuple(shares_w)
        left_w = max(0.0, budget_w - sum(shares_w))
    return _on_top(budget_w, claims, shares_w)


def _few_short(budget_w: float, least_w: Sequence[float], needed_w: Sequence[float]) -> tuple[float, ...]:
    """Where not all needs can be met: those who need least above their least first, so that as few as possible fall short."""
    shares_w, left_w = list(least_w), budget_w - sum(least_w)
    for i in sorted(range(len(needed_w)), key=lambda i: needed_w[i] - least_w[i]):
        more_w = min(left_w, needed_w[i] - least_w[i])
        shares_w[i] += more_w
        left_w -= more_w
    return tuple(shares_w)


def _needed_w(claim: Claim) -> float:
    """What its targets need, within what its boards can use; of an idle engine the least."""
    if claim.idle or claim.needed_w is None:
        return claim.least_w
    return max(claim.least_w, min(claim.needed_w, claim.most_w))


def segments(claim: Claim, position: int, from_w: float) -> list[Segment]:
    """The rising stretches of the concave hull of a claim's worth above `from_w`, up to what its boards can use.

    Watts below the first point are taken to bring as much as those just above it.
    """
    if claim.idle:
        return []
    found: list[Segment] = []
    at_w = from_w
    for (low_w, low), (high_w, high) in pairwise(concave_hull(claim.worth)):
        slope, end_w = (high - low) / (high_w - low_w), min(high_w, claim.most_w)
        if slope <= 0:
            break
        if end_w > at_w:
            found.append(Segment(slope, position, end_w - at_w))
            at_w = end_w
    return found


def concave_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The upper concave hull of (watts, worth), by rising watts: slopes fall from one stretch to the next."""
    best: dict[float, float] = {}
    for x, y in points:
        if isfinite(x) and isfinite(y):
            best[x] = max(y, best.get(x, y))
    hull: list[tuple[float, float]] = []
    for x, y in sorted(best.items()):
        while len(hull) > 1 and _slope(hull[-1], (x, y)) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append((x, y))
    return hull


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _on_top(budget_w: float, claims: Sequence[Claim], low_w: Sequence[float]) -> tuple[float, ...]:
    """By boards above `low_w`: to those awake what they can use, then to the idle, then beyond use."""
    boards = [c.boards for c in claims]
    most_w = [max(c.most_w, low) for c, low in zip(claims, low_w, strict=True)]
    awake_w = [low if c.idle else high for c, low, high in zip(claims, low_w, most_w, strict=True)]
    for low, high in ((low_w, awake_w), (awake_w, most_w), (most_w, [budget_w + w for w in most_w])):
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
