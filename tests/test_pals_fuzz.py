"""The pals policy under telemetry that is possible but absurd: it never raises, never leaves its bounds, always says why, and forgets nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.control.controller import PalsPolicy
from pals.control.guard import Guard
from pals.control.pals_state import PalsSettings
from pals.core.quantities import Budget, Decision, EngineSample, PowerSample, Slo, TelemetrySample
from tests.profile_world import whole_profile
from tests.worlds import BUCKETS

CLOCKS = tuple(range(210, 1411, 15))
HUGE = 10**15


class Shape(NamedTuple):
    """A group of boards, and the part of the profile that is known of them."""

    launch: int = 64
    clocks: tuple[int, ...] = CLOCKS
    lowest_w: float = 0.0  # of the profile's rows
    locks: bool = True  # whether rows lock clocks
    rows: bool = True

    @property
    def guard(self) -> Guard:
        return Guard(
            min_limit_w=100.0, max_limit_w=400.0, boards=4, launch_sequences=self.launch, sm_clocks_mhz=self.clocks
        )


SHAPES = (Shape(), Shape(launch=1), Shape(clocks=()), Shape(lowest_w=200.0), Shape(locks=False), Shape(rows=False))


@cache
def policy(shape: Shape, fresh: int = 0) -> PalsPolicy:
    """`fresh`: another object of the same kind, with caches of its own."""
    whole = whole_profile().model()
    rows = tuple(
        r
        for r in whole.rows
        if shape.rows and r.power_limit_w >= shape.lowest_w and (shape.locks or r.sm_clock_lock_mhz is None)
    )
    return PalsPolicy(replace(whole, rows=rows), shape.guard, PalsSettings())


def counts() -> st.SearchStrategy[int]:
    return st.one_of(st.integers(0, 3), st.integers(0, 200), st.sampled_from((10**4, HUGE)))


class Counters(NamedTuple):
    """By how much an engine's counters grow in one tick."""

    arrived: int
    prompt: int
    prefilled: int
    output: int
    finished: int
    steps: int
    refused: int
    latencies: tuple[int, ...]  # buckets, of TTFT and TPOT alike


class Tick(NamedTuple):
    """One sample as it is drawn: what grows, what stands, what is missing."""

    window_s: float
    grows: Counters
    fresh: bool  # another engine: counters begin anew
    falls: int  # a counter that alone falls, by its place; none where there is no such place
    silent: bool  # no engine
    absent: int
    running: int
    waiting: int
    oldest_s: float
    kv: float
    active: int
    power_w: float | None
    limit_w: float
    mhz: int
    busy: float
    budget_w: float | None
    drifted_s: float  # the clock of the decision beside the sample's


GROWS = st.one_of(
    st.builds(
        lambda n, p, o, slow: Counters(n, n * p, n * p, n * o, n, 10, 0, (slow,) * n),
        st.integers(0, 40), st.sampled_from((200, 1200)), st.sampled_from((50, 225)), st.integers(0, BUCKETS - 1),
    ),
    st.builds(Counters, *(counts() for _ in range(7)), st.lists(st.integers(0, BUCKETS - 1), max_size=4).map(tuple)),
)  # fmt: skip
TICKS = st.builds(
    Tick,
    window_s=st.one_of(st.just(0.5), st.sampled_from((0.0, 1e-9, 0.013, 20.0, 1e7, -0.5))),
    grows=GROWS,
    fresh=st.integers(0, 19).map(lambda x: x == 0),
    falls=st.integers(-60, 6),
    silent=st.integers(0, 19).map(lambda x: x == 0),
    absent=st.sampled_from((0, 0, 0, 0, 0, 0, 1, 4)),
    running=st.one_of(st.integers(0, 64), st.just(HUGE)),
    waiting=st.one_of(st.just(0), st.integers(0, 500), st.just(HUGE)),
    oldest_s=st.sampled_from((0.0, 0.4, 3.0, 1e6)),
    kv=st.sampled_from((0.0, 0.05, 0.3, 0.95, 1.0, 1.5)),
    active=st.sampled_from((64, 64, 40, 1)),
    power_w=st.one_of(st.just(900.0), st.none(), st.sampled_from((0.0, 1599.0, 1e9, -5.0))),
    limit_w=st.sampled_from((400.0, 400.0, 250.0, 100.0)),
    mhz=st.sampled_from((1410, 1005, 0)),
    busy=st.sampled_from((1.0, 0.9, 0.0)),
    budget_w=st.one_of(st.none(), st.sampled_from((1200.0, 500.0, 900.0, 300.0, 1.0, 1e7))),
    drifted_s=st.just(0.0),
)
TARGETS = st.one_of(st.none(), st.sampled_from((1e-6, 0.05, 1.0, 1e4)))
SLOS = st.builds(
    Slo,
    throughput_tokens_s=st.one_of(st.none(), st.sampled_from((1e-3, 800.0, 1e9))),
    ttft_p95_s=TARGETS,
    tpot_p95_s=TARGETS,
    ttft_p99_s=TARGETS,
    tpot_p99_s=TARGETS,
    throughput_share=st.one_of(st.none(), st.sampled_from((0.01, 0.9, 1.0))),
)
NOTHING = EngineSample(
    time_s=0.0, steps=0, running=0, waiting=0, arrived_requests=0, arrived_prompt_tokens=0, prefill_tokens=0, decode_tokens=0,
    output_tokens=0, finished_requests=0, aborted_requests=0, preemptions=0, kv_usage=0.0, busy_s=0.0, last_step_s=0.0,
    oldest_waiting_s=0.0, active_limit=64, launch_limit=64, ttft_counts=(0,) * BUCKETS, tpot_counts=(0,) * BUCKETS,
)  # fmt: skip
FALLING = (
    "arrived_requests", "arrived_prompt_tokens", "prefill_tokens", "output_tokens", "finished_requests", "steps", "refused_requests",
)  # fmt: skip


def grown(e: EngineSample, t: Tick, now_s: float) -> EngineSample:
    g, counts = t.grows, list(e.ttft_counts)
    for bucket in g.latencies:
        counts[bucket] += 1
    e = replace(
        e, time_s=now_s, steps=e.steps + g.steps, arrived_requests=e.arrived_requests + g.arrived,
        arrived_prompt_tokens=e.arrived_prompt_tokens + g.prompt, prefill_tokens=e.prefill_tokens + g.prefilled,
        output_tokens=e.output_tokens + g.output, finished_requests=e.finished_requests + g.finished,
        refused_requests=e.refused_requests + g.refused, busy_s=e.busy_s + t.busy * max(0.0, t.window_s), running=t.running,
        waiting=t.waiting, oldest_waiting_s=t.oldest_s, kv_usage=t.kv, active_limit=t.active, ttft_counts=tuple(counts),
        tpot_counts=tuple(counts),
    )  # fmt: skip
    fallen: dict[str, Any] = {FALLING[t.falls]: 0} if t.falls >= 0 else {}
    return replace(e, **fallen)


def samples(ticks: list[Tick]) -> list[TelemetrySample]:
    now_s, engine, energy_j, told = 0.0, NOTHING, 0.0, []
    for t in ticks:
        now_s += t.window_s
        engine = grown(NOTHING if t.fresh else engine, t, now_s)
        energy_j += 200.0 * abs(t.window_s)
        board = PowerSample(
            time_s=now_s, power_w=200.0, energy_j=energy_j, enforced_limit_w=t.limit_w, sm_clock_mhz=t.mhz
        )
        told.append(
            TelemetrySample(
                time_s=now_s, window_s=t.window_s, boards=(board,) * (4 - t.absent), power_w=t.power_w,
                engine=None if t.silent else engine, absent=tuple(range(4 - t.absent, 4)),
            )
        )  # fmt: skip
    return told


def decisions(which: PalsPolicy, ticks: list[Tick], slo: Slo) -> list[Decision]:
    state, made = which.initial(), []
    for t, sample in zip(ticks, samples(ticks), strict=True):
        decision, state = which.step(state, sample, Budget(power_w=t.budget_w), slo, sample.time_s)
        which.worth(state), which.needed_w(state)
        made.append(decision)
    return made


WARM = [
    Tick(0.5, Counters(4, 4800, 4800, 900, 4, 10, 0, (20,)), False, -1, False, 0, 20 + i % 3, 0, 0.0, 0.3, 64, 900.0, 400.0, 1410, 1.0, None, 0.0)
    for i in range(6)
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=40, deadline=None)
@given(ticks=st.lists(TICKS, min_size=1, max_size=14), slo=SLOS, warm=st.booleans())
def test_no_telemetry_makes_it_raise_or_leave_its_bounds(shape: Shape, ticks: list[Tick], slo: Slo, warm: bool) -> None:
    ticks = [*WARM, *ticks] if warm else ticks
    made = decisions(policy(shape), ticks, slo)
    guard = shape.guard
    for t, d in zip(ticks, made, strict=True):
        budget = Budget(power_w=t.budget_w)
        most_w = max(guard.min_limit_w, guard.ceiling_w(budget))
        assert guard.check(d, budget).point.power_limit_w <= most_w
        assert d.point.power_limit_w <= most_w
        assert d.point.power_limit_w >= guard.min_limit_w
        assert d.point.active_sequences is not None
        assert 1 <= d.point.active_sequences <= guard.launch_sequences
        assert d.point.sm_clock_mhz is None or d.point.sm_clock_mhz in guard.sm_clocks_mhz
        assert d.most_waiting is None or (d.most_waiting >= 0 and t.budget_w is not None)
        assert d.reason
        assert d.detail
    assert decisions(policy(shape, 1), ticks, slo) == made, "another object, whose caches hold something else"
