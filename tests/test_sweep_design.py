"""The design of a sweep: corners always, then the points that teach most per second, in a balance of mixes, with repeats."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.core.errors import ConfigError
from pals.core.load import Mix
from pals.core.quantities import OperatingPoint
from pals.models.engine_facts import EngineFacts
from pals.models.row import ProfileRow
from pals.profiler.chooser import Chooser
from pals.profiler.costs import drain_steps, generation_steps, seconds_of
from pals.profiler.design import Candidate, Space, gains, next_corner, scores
from pals.profiler.plan import (
    SweepPlan,
    default_clocks,
    default_limits_w,
    default_mixes,
    default_sequences,
    fitting,
)
from pals.profiler.repeats import EVERY, drift_of, due_repeat
from pals.profiler.visit import Visited
from tests.linear_model import NOISE, linear_fit

FACTS = EngineFacts(
    board="Test board", boards=2, min_limit_w=100.0, max_limit_w=400.0, min_sm_clock_mhz=210, max_sm_clock_mhz=1410,
    launch_sequences=64,
)  # fmt: skip
PLAN = SweepPlan(
    mixes=default_mixes(8192),
    limits_w=default_limits_w(100.0, 400.0),
    sequences=default_sequences(64),
    clocks_mhz=default_clocks(range(210, 1411, 15)),
    error=1e-6,
)
SPACE = Space.of(PLAN, FACTS)


def row(candidate: Candidate, *, at_s: float = 0.0, running: float | None = None, noise: float = 0.0) -> ProfileRow:
    """What a plain world measures: power follows the limit up to 320 W a board, steps slow down with batch and clock."""
    point, n = candidate.point, candidate.sequences
    share = PLAN.mixes[candidate.mix].prefill_share
    clock_mhz = min(point.sm_clock_mhz or 1410, 1410 * (point.power_limit_w / 320.0) ** 0.5, 1410)
    steps_per_s = 50.0 * (clock_mhz / 1410) / (1 + 0.01 * n + 2 * share)
    return ProfileRow(
        power_limit_w=point.power_limit_w, sm_clock_lock_mhz=point.sm_clock_mhz, active_sequences=n, mix=candidate.mix,
        running=float(n) if running is None else running,
        power_w=2 * min(point.power_limit_w, 320.0 * (clock_mhz / 1410) ** 2) * (1 + noise),
        tokens_per_s=steps_per_s * n * (1 + noise), prefill_tokens_per_s=10.0, steps_per_s=steps_per_s,
        sm_clock_mhz=clock_mhz, window_s=8.0, at_s=at_s, temperature_c=50.0 + at_s / 100,
    )  # fmt: skip


def designed(plan: SweepPlan) -> list[ProfileRow]:
    """The rows of a sweep in that world, each taking as long as the design expects."""
    chooser, rows, now_s, last = Chooser(plan, FACTS, linear_fit), list[ProfileRow](), 0.0, None
    while (wanted := chooser.next(rows, plan.seconds - now_s)) is not None:
        space = chooser.space
        now_s += seconds_of(space, rows, plan, FACTS, last)[space.candidates.index(wanted)]
        rows.append(row(wanted, at_s=now_s))
        chooser.visited(wanted, Visited(row=rows[-1], notes=()))
        last = wanted
    return rows


def summed_variance(rows: list[ProfileRow]) -> float:
    model = linear_fit(rows, PLAN.mixes, FACTS)
    return float((model.relative_sd(SPACE.points, SPACE.loads) ** 2 / NOISE**2).sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 4), st.integers(1, 6))
def test_a_gain_is_the_variance_that_measuring_takes_away(seed: int, n: int, outputs: int, parameters: int) -> None:
    rng = np.random.default_rng(seed)
    s = rng.normal(size=(n, outputs, parameters))
    root = rng.normal(size=(parameters, parameters))
    precision = root @ root.T + np.eye(parameters)
    counted = rng.random(n) < 0.7

    def total(p: np.ndarray) -> float:
        return float(np.einsum("nop,pq,noq->", s[counted], np.linalg.inv(p), s[counted]))

    expected = [total(precision) - total(precision + s[i].T @ s[i]) for i in range(n)]

    found = gains(s, np.asarray(np.linalg.inv(precision), dtype=float), counted)

    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    assert np.all(found > -1e-9)


def test_the_corners_come_first_whatever_the_model_says() -> None:
    rows = list[ProfileRow]()
    while (corner := next_corner(SPACE, rows, (), FACTS)) is not None:
        rows.append(row(corner))

    levels = [(r.power_limit_w, r.sm_clock_lock_mhz, r.active_sequences, r.mix) for r in rows]
    assert levels[0] == (400.0, None, 64, 0)  # no limit at the largest batch: natural draw
    assert (100.0, None, 64, 0) in levels  # the clock floor, by limit
    assert (400.0, min(PLAN.clocks_mhz), 64, 0) in levels  # and by lock
    near = [w for w, mhz, n, mix in levels if (mhz, n, mix) == (None, 64, 0) and w not in (100.0, 400.0)]
    assert near == [max(w for w in PLAN.limits_w if w < 0.97 * 320.0)]  # just below what the first row drew
    assert (400.0, None, 1, 0) in levels
    assert {r.mix for r in rows} == {0, 1, 2}
    assert len(rows) == 7


def test_corners_of_a_plan_with_one_of_everything_are_one_point() -> None:
    plan = replace(PLAN, mixes=PLAN.mixes[:1], limits_w=(300.0,), sequences=(16,), clocks_mhz=())
    space = Space.of(plan, FACTS)

    first = next_corner(space, [], (), FACTS)

    assert first == Candidate(OperatingPoint(power_limit_w=300.0, active_sequences=16), 0)
    assert next_corner(space, [row(first)], (), FACTS) is None
    assert len(designed(plan)) == 1


def test_candidates_are_limits_without_lock_and_locks_at_the_found_limit() -> None:
    locked = [c for c in SPACE.candidates if c.point.sm_clock_mhz is not None]

    assert {c.point.power_limit_w for c in locked} == {400.0}
    assert len(SPACE.candidates) == (len(PLAN.limits_w) + len(PLAN.clocks_mhz)) * len(PLAN.sequences) * 3
    assert len(set(SPACE.candidates)) == len(SPACE.candidates)


def test_the_design_learns_more_in_its_time_than_points_drawn_at_random() -> None:
    rows = designed(PLAN)
    rng = np.random.default_rng(0)

    def at_random() -> float:
        """Any order of candidates, until the same time is used up."""
        now_s, drawn, last = 0.0, list[ProfileRow](), None
        for i in rng.permutation(len(SPACE.candidates)):
            now_s += seconds_of(SPACE, drawn, PLAN, FACTS, last)[i]
            if now_s > rows[-1].at_s or len(drawn) == len(rows):
                break
            last = SPACE.candidates[i]
            drawn.append(row(last))
        return summed_variance(drawn)

    assert summed_variance(rows) < 0.8 * np.median([at_random() for _ in range(20)])


def test_mixes_are_balanced_and_points_differ_but_for_repeats() -> None:
    rows = designed(PLAN)

    counts = np.bincount([r.mix for r in rows], minlength=3)
    assert 35 <= len(rows) <= PLAN.points
    assert counts.min() >= 0.2 * len(rows)
    repeats = len(rows) // EVERY
    assert len({(r.point, r.mix) for r in rows}) == len(rows) - repeats
    assert all(r.at_s <= PLAN.seconds for r in rows)


def test_the_design_stays_in_its_budgets_and_stops_at_the_error_asked_for() -> None:
    short = designed(replace(PLAN, seconds=300.0))
    coarse = designed(replace(PLAN, error=0.05))

    assert 7 < len(short) < PLAN.points
    assert short[-1].at_s <= 300.0
    assert 7 <= len(coarse) < PLAN.points
    assert len(designed(replace(PLAN, points=5))) == 5


def test_where_the_engine_ran_fewer_sequences_more_are_not_tried() -> None:
    starved = row(Candidate(OperatingPoint(power_limit_w=400.0, active_sequences=64), 1), running=17.0)

    possible = SPACE.possible([starved])

    allowed = {c.sequences for c, ok in zip(SPACE.candidates, possible, strict=True) if ok and c.mix == 1}
    assert allowed == {1, 2, 4, 8, 16}
    assert all(ok for c, ok in zip(SPACE.candidates, possible, strict=True) if c.mix != 1)


def test_no_more_sequences_are_tried_than_steps_can_prefill_for() -> None:
    small = replace(FACTS, step_tokens=2048)  # one prompt of 2000 a step, 16 steps each: 16 run

    possible = Space.of(PLAN, small).possible([])

    allowed = {c.sequences for c, ok in zip(SPACE.candidates, possible, strict=True) if ok and c.mix == 1}
    assert allowed == {1, 2, 4, 8, 16}


def test_a_slow_point_costs_more_and_a_change_of_mix_lets_the_last_requests_end() -> None:
    fast, slow = (
        next(
            c
            for c in SPACE.candidates
            if c.point == OperatingPoint(power_limit_w=w, active_sequences=64) and c.mix == 0
        )
        for w in (400.0, 100.0)
    )
    rows = [row(fast), replace(row(slow), steps_per_s=8.0)]

    seconds = seconds_of(SPACE, rows, PLAN, FACTS, fast)

    assert seconds[SPACE.candidates.index(slow)] > 1.3 * seconds[SPACE.candidates.index(fast)]
    assert np.all(seconds >= PLAN.settle_s + PLAN.window_s)
    chat, prefill, _ = PLAN.mixes
    assert generation_steps(prefill, 1, FACTS) < chat.output_tokens
    assert (drain_steps(prefill, chat), drain_steps(chat, chat)) == (1.5 * chat.output_tokens, 0.0)


def test_points_beside_measured_ones_count_less() -> None:
    corner = Candidate(OperatingPoint(power_limit_w=400.0, active_sequences=64), 0)
    flat = np.ones(len(SPACE.candidates))

    score = scores(SPACE, [row(corner)], flat, flat)

    of = dict(zip(SPACE.candidates, score, strict=True))
    far = replace(corner.point, power_limit_w=100.0, active_sequences=1)
    assert of[corner] == 0.0
    assert of[Candidate(far, 0)] > of[Candidate(replace(corner.point, active_sequences=32), 0)] > 0.0
    assert of[Candidate(corner.point, 1)] > of[Candidate(far, 0)]  # nothing was measured under that mix


def test_every_eighth_measurement_repeats_an_early_one_and_the_ratio_tells_drift() -> None:
    rows = [row(c) for c in SPACE.candidates[: EVERY - 1]]
    repeat = due_repeat(rows)
    assert repeat == rows[0]
    assert due_repeat(rows[:-1]) is None
    assert drift_of(rows) is None

    again = replace(row(SPACE.candidates[0], at_s=500.0, noise=0.02), active_sequences=rows[0].active_sequences)
    drift = drift_of([*rows, again])

    assert drift is not None
    assert (drift.points, drift.temperature_k) == (1, 5.0)
    assert drift.power == pytest.approx(1.02)
    assert drift.tokens_per_s == pytest.approx(1.02)
    assert due_repeat([*rows, again, *rows]) == rows[1]  # the first was measured three times by now


@given(st.floats(80.0, 300.0), st.floats(1.0, 800.0), st.integers(1, 1024), st.integers(300, 2500))
def test_default_levels_stay_inside_board_and_batch(min_w: float, more_w: float, launch: int, top_mhz: int) -> None:
    limits_w, sequences = default_limits_w(min_w, min_w + more_w), default_sequences(launch)
    lockable = tuple(sorted(range(top_mhz, 209, -15)))
    clocks = default_clocks(lockable)

    assert (limits_w[0], limits_w[-1]) == (min_w, min_w + more_w)
    assert len(limits_w) <= 8
    assert (sequences[0], sequences[-1]) == (1, launch)
    assert set(clocks) <= set(lockable)
    assert max(clocks) < top_mhz or len(lockable) < 3
    assert default_clocks(()) == ()


@given(st.integers(64, 200_000))
def test_default_mixes_fit_the_models_context(context: int) -> None:
    mixes = default_mixes(context)

    assert all((1 + m.spread) * (m.prompt_tokens + m.output_tokens) <= context for m in mixes)
    shares = [m.prefill_share for m in mixes]
    assert shares[2] < shares[0] < shares[1]


def test_a_plan_that_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 to 50 points"):
        replace(PLAN, points=51)
    with pytest.raises(ConfigError, match="at least one mix"):
        replace(PLAN, sequences=())
    with pytest.raises(ConfigError, match="readings"):
        replace(PLAN, window_s=1.0)
    with pytest.raises(ConfigError, match="does not fit a context of 3 tokens"):
        fitting(Mix(name="long", prompt_tokens=1000, output_tokens=100), 3)
