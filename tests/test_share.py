"""One budget, several engines: shares follow the boards, and no order of events takes the sum above the budget."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.control.guard import Guard
from pals.control.share import Claim, Holding, concave_hull, grant, segments, split, targets
from pals.core.quantities import Budget, Decision, OperatingPoint


def claim(boards: int, *, idle: bool = False) -> Claim:
    return Claim(boards=boards, least_w=100.0 * boards, most_w=400.0 * boards, idle=idle)


def knowing(boards: int, *worth: tuple[float, float], needed_w: float | None = None, idle: bool = False) -> Claim:
    return replace(claim(boards, idle=idle), worth=worth, needed_w=needed_w)


WORTH = st.one_of(
    st.just(()), st.lists(st.tuples(st.floats(0, 9000), st.floats(-1e4, 1e4)), min_size=1, max_size=6).map(tuple)
)
CLAIMS = st.lists(
    st.builds(
        lambda boards, least, span, idle, worth, needed_w: Claim(
            boards=boards, least_w=least * boards, most_w=(least + span) * boards, idle=idle, worth=worth, needed_w=needed_w
        ),
        st.integers(1, 8), st.floats(50, 300), st.floats(0, 900), st.booleans(), WORTH, st.none() | st.floats(0, 9000),
    ),
    min_size=1, max_size=5,
)  # fmt: skip


@pytest.mark.parametrize(
    ("budget_w", "claims", "shares_w"),
    [
        (1200.0, [claim(4), claim(2)], (800.0, 400.0)),
        (1200.0, [claim(4)], (1200.0,)),
        (9000.0, [claim(4)], (9000.0,)),  # alone: all of it, used or not
        (1200.0, [claim(4, idle=True), claim(2)], (400.0, 800.0)),  # the idle one keeps its boards' minimum
        (2000.0, [claim(4, idle=True), claim(2)], (1200.0, 800.0)),  # the busy one can use no more than 800 W
        (1200.0, [claim(4, idle=True), claim(2, idle=True)], (800.0, 400.0)),  # nobody needs it: as if all were busy
        (300.0, [claim(4), claim(2)], (200.0, 100.0)),  # below the minima
        (900.0, [claim(1), Claim(boards=1, least_w=700.0, most_w=800.0)], (200.0, 700.0)),
    ],
)
def test_shares_follow_boards_minima_and_load(
    budget_w: float, claims: list[Claim], shares_w: tuple[float, ...]
) -> None:
    assert split(budget_w, claims) == pytest.approx(shares_w)


@given(st.floats(1, 30000), CLAIMS)
def test_shares_add_up_and_leave_nobody_below_its_minimum(budget_w: float, claims: list[Claim]) -> None:
    shares_w = split(budget_w, claims)

    assert sum(shares_w) == pytest.approx(budget_w, rel=1e-9)
    if budget_w >= sum(c.least_w for c in claims):
        assert all(s >= c.least_w * (1 - 1e-9) for s, c in zip(shares_w, claims, strict=True))


@given(st.floats(1, 30000), st.floats(0, 5000), CLAIMS)
def test_no_share_falls_when_the_budget_rises(budget_w: float, more_w: float, claims: list[Claim]) -> None:
    for before_w, after_w in zip(split(budget_w, claims), split(budget_w + more_w, claims), strict=True):
        assert after_w >= before_w - 1e-6


@given(st.floats(1, 30000), CLAIMS)
def test_those_who_do_not_know_get_what_they_got_before(budget_w: float, claims: list[Claim]) -> None:
    plain = [replace(c, worth=(), needed_w=None) for c in claims]

    for c, share_w, plain_w in zip(claims, split(budget_w, claims), split(budget_w, plain), strict=True):
        assert c.knows or share_w == plain_w


@given(st.floats(1, 30000), st.lists(WORTH, min_size=2, max_size=4))
def test_no_watt_would_bring_more_elsewhere(budget_w: float, worths: list[tuple[tuple[float, float], ...]]) -> None:
    """Water-filling: whoever got a watt above its least values it at least as much as anybody values the next one."""
    claims = [knowing(2, *worth, needed_w=0.0) for worth in worths]
    shares_w = split(budget_w, claims)
    if budget_w <= sum(c.least_w for c in claims):
        return
    last = [_marginal(c, w, below=True) for c, w in zip(claims, shares_w, strict=True)]
    following = [_marginal(c, w, below=False) for c, w in zip(claims, shares_w, strict=True)]
    assert min(last) >= max(following) * (1 - 1e-9)


def _marginal(c: Claim, share_w: float, *, below: bool) -> float:
    """Worth of the last watt above the least (infinite: it got none), or of the next one (0: none)."""
    at_w = c.least_w
    for s in segments(c, 0, c.least_w):
        end_w = at_w + s.width_w
        if (below and at_w + 1e-6 < share_w <= end_w + 1e-6) or (not below and share_w < end_w - 1e-6):
            return s.worth_per_w
        at_w = end_w
    return float("inf") if below and share_w <= c.least_w + 1e-6 else 0.0


@given(st.lists(st.tuples(st.floats(0, 9000), st.floats(-1e4, 1e4)), max_size=8))
def test_the_hull_lies_above_every_point_and_its_slopes_fall(points: list[tuple[float, float]]) -> None:
    hull = concave_hull(points)

    at_w, worth = [x for x, _ in hull], [y for _, y in hull]
    for x, y in points:
        assert np.interp(x, at_w, worth) >= y - 1e-6 * (1 + abs(y))
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(hull)]
    assert all(b <= a for a, b in pairwise(slopes))


EFFICIENT = ((200.0, 1000.0), (400.0, 2000.0), (800.0, 2400.0))  # 5 a watt, then 1
WASTEFUL = ((200.0, 1000.0), (800.0, 2200.0))  # 2 a watt


@pytest.mark.parametrize(
    ("budget_w", "claims", "shares_w"),
    [
        (500.0, [knowing(2, *EFFICIENT), knowing(2, *WASTEFUL)], (300.0, 200.0)),  # the first watts where they bring 5
        (700.0, [knowing(2, *EFFICIENT), knowing(2, *WASTEFUL)], (400.0, 300.0)),  # then where they bring 2, not 1
        (1100.0, [knowing(2, *EFFICIENT), knowing(2, *WASTEFUL)], (400.0, 700.0)),
        (1400.0, [knowing(2, *EFFICIENT), knowing(2, *WASTEFUL)], (600.0, 800.0)),
        (1800.0, [knowing(2, *EFFICIENT), knowing(2, *WASTEFUL)], (900.0, 900.0)),  # beyond all use
        (700.0, [knowing(2, *EFFICIENT), knowing(2, *WASTEFUL, needed_w=450.0)], (250.0, 450.0)),  # targets first
        (600.0, [knowing(2, *EFFICIENT, needed_w=450.0), knowing(2, *WASTEFUL, needed_w=350.0)], (250.0, 350.0)),  # few fall short
        (700.0, [knowing(2, *WASTEFUL), knowing(2, *WASTEFUL)], (350.0, 350.0)),  # equals get the same
        (700.0, [knowing(2, *EFFICIENT, idle=True), knowing(2, *WASTEFUL)], (200.0, 500.0)),  # idle: it needs none
        (900.0, [knowing(2, *EFFICIENT), knowing(2, *WASTEFUL), claim(2)], (400.0, 200.0, 300.0)),  # who knows not: a third
        (700.0, [knowing(2, *EFFICIENT), claim(2)], (350.0, 350.0)),  # nobody to compare with
        (700.0, [knowing(2, needed_w=450.0), knowing(2, *WASTEFUL)], (450.0, 250.0)),
    ],
)  # fmt: skip
def test_watts_go_to_targets_first_and_then_where_they_bring_most(
    budget_w: float, claims: list[Claim], shares_w: tuple[float, ...]
) -> None:
    assert split(budget_w, claims) == pytest.approx(shares_w)


@given(
    CLAIMS,
    st.lists(st.tuples(st.floats(200, 20000), st.lists(st.tuples(st.booleans(), st.booleans()), min_size=5, max_size=5)), min_size=1, max_size=8),
)  # fmt: skip
def test_no_order_of_events_raises_the_sum_above_the_budget(
    claims: list[Claim], events: list[tuple[float, list[tuple[bool, bool]]]]
) -> None:
    """A world of engines that obey or refuse, go idle or not, under budgets that jump: checked after every single tick."""
    holdings = [Holding(claim=c, granted_w=None, limits_w=c.most_w) for c in claims]
    for budget_w, flags in events:
        holdings = [
            Holding(
                claim=replace(c, idle=flags[i][0]),
                granted_w=h.granted_w,
                limits_w=h.limits_w,
            )
            for i, (h, c) in enumerate(zip(holdings, claims, strict=True))
        ]
        wanted_w = targets(budget_w, holdings)
        for i in sorted(range(len(claims)), key=lambda i: wanted_w[i] - holdings[i].limits_w):
            others = [h for j, h in enumerate(holdings) if j != i]
            share_w = grant(wanted_w[i], holdings[i], others, budget_w)
            before_w = sum(h.limits_w for h in holdings)
            obeyed_w = min(max(share_w, claims[i].least_w), claims[i].most_w)  # a policy that takes all it may
            in_force_w = holdings[i].limits_w if flags[i][1] else obeyed_w
            holdings[i] = Holding(claim=holdings[i].claim, granted_w=share_w, limits_w=in_force_w)
            after_w = sum(h.limits_w for h in holdings)
            assert after_w <= max(budget_w, before_w) + 1e-6
        if not any(f[1] for f in flags):
            assert sum(h.granted_w or 0.0 for h in holdings) <= budget_w + 1e-6


def test_watts_move_only_after_the_other_engine_has_let_them_go() -> None:
    busy = Holding(claim=claim(4), granted_w=800.0, limits_w=800.0)
    deaf = Holding(claim=claim(4, idle=True), granted_w=400.0, limits_w=800.0)  # told 400 W, still at 800 W

    assert grant(targets(1600.0, [busy, deaf])[0], busy, [deaf], 1600.0) == 800.0
    quiet = Holding(claim=claim(4, idle=True), granted_w=400.0, limits_w=400.0)
    assert grant(targets(1600.0, [busy, quiet])[0], busy, [quiet], 1600.0) == 1200.0


@given(st.integers(1, 8), st.floats(50, 700), st.floats(0, 900))
def test_the_guard_can_use_exactly_what_it_claims(boards: int, min_w: float, span_w: float) -> None:
    guard = Guard(min_limit_w=min_w, max_limit_w=min_w + span_w, boards=boards, launch_sequences=8)
    top = Decision(point=OperatingPoint(power_limit_w=10000.0), reason="test")

    least = guard.check(top, Budget(power_w=guard.least_budget_w))
    most = guard.check(top, Budget(power_w=guard.most_budget_w))

    assert least.reason != "guard-budget-below-minimum"
    assert most.point.power_limit_w == guard.max_limit_w
    assert guard.share_of([least.point.power_limit_w] * boards) <= guard.least_budget_w + 1e-6
