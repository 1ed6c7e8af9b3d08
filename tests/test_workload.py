"""Scaling, repeating and cutting a workload: what each promises to keep."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.core.errors import ConfigError
from pals.plant.workload import (
    GAP_JITTER,
    SCALINGS,
    LengthHistogram,
    LengthPairs,
    Workload,
    at_rate,
    gamma_arrivals,
    generated,
    tiled,
)

LENGTHS = LengthPairs(
    name="three", prompt_tokens=np.array([10, 200, 3000], np.int32), output_tokens=np.array([1, 20, 300], np.int32)
)


def bursty(seed: int, *, rate: float = 2.0, cv: float = 2.5, hours: float = 1.0) -> Workload:
    rng = np.random.default_rng(seed)
    return generated("bursty", gamma_arrivals(rate, cv, 3600.0 * hours, rng), LENGTHS, rng)


SEEDS = st.integers(min_value=0, max_value=2**32 - 1)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, rate=st.floats(min_value=0.05, max_value=50.0))
def test_time_scaling_keeps_every_request_and_the_burstiness(seed: int, rate: float) -> None:
    before = bursty(seed)
    after = at_rate(before, rate, how="time", rng=np.random.default_rng(0))

    assert after.rate_per_s == pytest.approx(rate)
    assert after.gap_cv == pytest.approx(before.gap_cv)
    assert after.output_tokens.tolist() == before.output_tokens.tolist()


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, factor=st.floats(min_value=0.2, max_value=4.0))
def test_thinning_keeps_the_time_axis_and_moves_the_cv_towards_one(seed: int, factor: float) -> None:
    before = bursty(seed)
    after = at_rate(before, factor * before.rate_per_s, how="thin", rng=np.random.default_rng(seed))

    assert len(after) == pytest.approx(factor * len(before), abs=5 * np.sqrt(factor * len(before)))
    assert after.span_s == pytest.approx(before.span_s, rel=0.05)
    assert np.all(np.diff(after.arrival_s) >= 0)
    if factor < 1:  # of a renewal process: CV² - 1 shrinks by the share that is kept
        expected = np.sqrt(1 + factor * (before.gap_cv**2 - 1))
        assert after.gap_cv == pytest.approx(expected, rel=0.25)
    elif factor >= 2:
        assert 0.9 < after.gap_cv < before.gap_cv


def test_copies_laid_over_each_other_keep_the_course_of_the_day() -> None:
    quiet, busy = (
        gamma_arrivals(0.5, 1, 3600, np.random.default_rng(1)),
        gamma_arrivals(5, 1, 3600, np.random.default_rng(2)),
    )
    day = generated("day", np.concatenate([quiet, 3600 + busy]), LENGTHS, np.random.default_rng(3))
    more = at_rate(day, 3 * day.rate_per_s, how="thin", rng=np.random.default_rng(4))

    assert len(more.between(0, 3600)) == pytest.approx(3 * len(quiet), rel=0.25)
    assert len(more.between(3600, 7200)) == pytest.approx(3 * len(busy), rel=0.05)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, hours=st.floats(min_value=0.01, max_value=30.0))
def test_tiles_are_in_order_keep_the_rate_and_differ(seed: int, hours: float) -> None:
    tile = bursty(5)
    long = tiled(tile, hours * 3600.0, rng=np.random.default_rng(seed))

    assert np.all(np.diff(long.arrival_s) >= 0)
    assert long.arrival_s[-1] < hours * 3600.0
    if hours > 3:
        assert long.rate_per_s == pytest.approx(tile.rate_per_s, rel=0.2)
        assert long.gap_cv == pytest.approx(tile.gap_cv, rel=0.1)
        n = len(tile)
        first, second = np.diff(long.arrival_s[:n]), np.diff(long.arrival_s[n : 2 * n])
        assert np.array_equal(first, np.diff(tile.arrival_s))  # the first is as recorded
        assert not np.array_equal(first, second)
        assert np.all(np.abs(second - first) <= (2 * GAP_JITTER + 0.02) * first + 1e-6)
        assert long.prompt_tokens[n : 2 * n].tolist() == tile.prompt_tokens.tolist()


@settings(max_examples=25, deadline=None)
@given(cut_s=st.floats(min_value=0.0, max_value=3600.0))
def test_two_slices_side_by_side_hold_every_request_once(cut_s: float) -> None:
    whole = bursty(6)
    before, after = whole.between(0.0, cut_s), whole.between(cut_s, 3600.0)

    assert before.output_tokens.sum() + after.output_tokens.sum() == whole.output_tokens.sum()
    assert np.all(after.arrival_s >= 0.0)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, rate=st.floats(min_value=0.5, max_value=5.0), cv=st.floats(min_value=0.3, max_value=3.0))
def test_generated_arrivals_have_the_rate_and_cv_asked_for(seed: int, rate: float, cv: float) -> None:
    arrival_s = gamma_arrivals(rate, cv, 20000.0, np.random.default_rng(seed))
    gaps = np.diff(arrival_s)

    assert len(arrival_s) == pytest.approx(20000.0 * rate, rel=0.05 + 6 * cv / np.sqrt(20000.0 * rate))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.25)
    assert np.all((arrival_s >= 0) & (arrival_s < 20000.0))


def test_a_histogram_keeps_its_mean_and_a_seed_its_draws() -> None:
    exact = np.array([3.4, 100.0])
    point = LengthHistogram(low=exact, high=exact, weight=np.array([3.0, 1.0]))
    wide = LengthHistogram(low=np.array([10.0]), high=np.array([20.0]), weight=np.array([1.0]))
    drawn = point.draw(40000, np.random.default_rng(1))

    assert set(drawn.tolist()) == {3, 4, 100}
    assert drawn.mean() == pytest.approx(0.75 * 3.4 + 25.0, rel=0.02)
    assert wide.draw(40000, np.random.default_rng(1)).mean() == pytest.approx(15.0, rel=0.01)
    assert np.array_equal(drawn, point.draw(40000, np.random.default_rng(1)))


def test_what_a_server_refuses_for_its_length_is_left_out() -> None:
    whole = bursty(7)
    fitting = whole.within_context(3299)

    assert len(fitting) == int((whole.prompt_tokens != 3000).sum()) < len(whole)
    assert "requests in" in fitting.described()
    assert "no request" in whole.between(1e6, 2e6).described()


def test_impossible_wishes_are_refused() -> None:
    w, rng = bursty(8), np.random.default_rng(0)
    at_once = w.between(0.0, 0.0)

    for wish in (
        lambda: at_rate(w, 0.0, how="time", rng=rng),
        lambda: at_rate(w, 1.0, how="magic", rng=rng),
        lambda: at_rate(at_once, 1.0, how="time", rng=rng),
        lambda: tiled(at_once, 10.0, rng=rng),
        lambda: tiled(w, 0.0, rng=rng),
        lambda: gamma_arrivals(1.0, 0.0, 10.0, rng),
        lambda: gamma_arrivals(float("nan"), 1.0, 10.0, rng),
    ):
        with pytest.raises(ConfigError, match="Nothing was started"):
            wish()
    assert SCALINGS == ("time", "thin")


def test_a_workload_that_is_none_is_refused_at_birth() -> None:
    one = np.ones(2, np.int32)
    for arrival_s in (np.array([1.0, 0.5]), np.array([-1.0, 0.5]), np.array([1.0])):
        with pytest.raises(ValueError, match=r"arriv|shape"):
            Workload(name="x", arrival_s=arrival_s, prompt_tokens=one, output_tokens=one, prefix_tokens=one)
