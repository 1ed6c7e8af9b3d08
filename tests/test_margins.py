"""A margin comes to where the allowed share comes late, whatever the forecast gets wrong."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.control.demand import Late
from pals.control.margins import AIM, LEAST, MOST, START, learn


@pytest.mark.parametrize("wrong", [0.8, 1.0, 1.25])
def test_in_the_long_run_no_more_than_the_allowed_share_comes_late(wrong: float) -> None:
    """A controller that stands where its forecast, with the margin, meets the target; the forecast is off by `wrong`."""
    rng, margin, half, late, told = np.random.default_rng(1), START, 0.1, 0, 0
    for _ in range(4000):
        p95 = wrong * np.exp(-margin * half)  # of the target
        latencies = p95 * np.exp(0.2 * (rng.standard_normal(5) - 1.645))
        missed = int((latencies > 1.0).sum())
        margin = learn(margin, Late(5.0, float(missed)), 0.05, tested=True)
        late, told = late + missed, told + 5
    assert late / told < 0.05
    assert late / told > 0.5 * AIM * 0.05  # and is hardly wider than it must be


def test_a_margin_that_was_not_put_to_the_test_narrows_no_further_than_at_the_start() -> None:
    margin = 3.0
    for _ in range(5000):
        margin = learn(margin, Late(10.0, 0.0), 0.05, tested=False)
    assert margin == START


def test_requests_that_come_late_widen_it_tested_or_not() -> None:
    assert learn(START, Late(1.0, 1.0), 0.05, tested=False) > START
    assert learn(START, Late(1.0, 1.0), 0.01, tested=True) > learn(START, Late(1.0, 1.0), 0.05, tested=True)


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0.0, 1.0)), max_size=50), st.booleans())
def test_it_stays_in_its_range_and_moves_by_the_number_of_requests(
    periods: list[tuple[int, float]], tested: bool
) -> None:
    margins = [START]
    for n, share in periods:
        margins.append(learn(margins[-1], Late(float(n), n * share), 0.05, tested=tested))
    assert all(LEAST <= m <= MOST for m in margins)
    assert all(b == a for (a, b), (n, _) in zip(pairwise(margins), periods, strict=True) if n == 0)
