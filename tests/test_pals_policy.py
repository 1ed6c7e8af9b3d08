"""The pals policy: savings inside the targets, at once where something is in danger, within the budget, and a reason for each."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from pals.control.controller import PalsPolicy
from pals.control.guard import Guard
from pals.control.pals_state import PalsSettings, State
from pals.core.errors import ConfigError
from pals.core.quantities import Budget, Decision, EngineSample, PowerSample, Slo, TelemetrySample
from tests.profile_world import whole_profile
from tests.worlds import BUCKETS, engine_sample

GUARD = Guard(
    min_limit_w=100.0, max_limit_w=400.0, boards=4, launch_sequences=64, sm_clocks_mhz=tuple(range(210, 1411, 15))
)
NO_BUDGET, PERIOD_S = Budget(), 0.5
EASY = Slo(ttft_p95_s=10.0, tpot_p95_s=1.0)


@cache
def policy(**settings: object) -> PalsPolicy:
    return PalsPolicy(whole_profile().model(), GUARD, replace(PalsSettings(), **settings))  # type: ignore[arg-type]


class World:
    """An engine that answers all that comes, told by its counters alone; what the policy decides has no effect on it."""

    def __init__(self, *, per_tick: int = 1, inside: int = 20, prompt: int = 1200, output: int = 225) -> None:
        self.per_tick, self.inside, self.waiting, self.oldest_s = per_tick, inside, 0, 0.0
        self.prompt, self.output = prompt, output
        self.now_s, self.engine, self.energy_j, self.power_w = 0.0, engine_sample(), 0.0, 1000.0
        self.meters, self.lost, self.jitter = True, 0, 0

    def tick(self) -> TelemetrySample:
        self.now_s += PERIOD_S
        n, e = self.per_tick, self.engine
        self.jitter = (self.jitter + 7) % 11  # requests inside vary: clients do not wait for one another
        self.engine = replace(
            e, time_s=self.now_s, steps=e.steps + 10, running=self.inside + self.jitter // 3, waiting=self.waiting,
            arrived_requests=e.arrived_requests + n, arrived_prompt_tokens=e.arrived_prompt_tokens + n * self.prompt,
            prefill_tokens=e.prefill_tokens + n * self.prompt, output_tokens=e.output_tokens + n * self.output,
            finished_requests=e.finished_requests + n, busy_s=e.busy_s + PERIOD_S, oldest_waiting_s=self.oldest_s,
        )  # fmt: skip
        if self.meters:
            self.energy_j += self.power_w / 4 * PERIOD_S
        boards = tuple(
            PowerSample(time_s=self.now_s, power_w=self.power_w / 4, energy_j=self.energy_j, enforced_limit_w=400.0, sm_clock_mhz=1410)
            for _ in range(4 - self.lost)
        )  # fmt: skip
        return TelemetrySample(
            time_s=self.now_s, window_s=PERIOD_S, boards=boards, engine=self.engine,
            power_w=self.power_w if self.meters and not self.lost else None, absent=tuple(range(4 - self.lost, 4)),
        )  # fmt: skip


def run(
    world: World,
    seconds: float,
    *,
    slo: Slo = EASY,
    budget: Budget = NO_BUDGET,
    state: State | None = None,
    p: PalsPolicy | None = None,
) -> tuple[list[Decision], State]:
    p = p or policy()
    state, said = state or p.initial(), []
    for _ in range(round(seconds / PERIOD_S)):
        decision, state = p.step(state, world.tick(), budget, slo, world.now_s)
        said.append(decision)
    return said, state


def moves(said: list[Decision]) -> int:
    return sum(a.point != b.point for a, b in itertools.pairwise(said))


def test_nothing_is_moved_before_the_lengths_are_known() -> None:
    said, _ = run(World(), 3.0)
    assert {d.reason for d in said} == {"learning"}
    assert said[-1].point.power_limit_w == 400.0
    assert said[-1].point.sm_clock_mhz is None


def test_with_easy_targets_the_clock_comes_down_slowly_and_then_rests() -> None:
    said, _ = run(World(), 600.0)
    savings = [i for i, d in enumerate(said) if d.reason == "efficiency"]
    assert savings
    assert all(b - a >= PalsSettings().dwell_s / PERIOD_S for a, b in itertools.pairwise(savings))
    assert "saves" in said[savings[0]].detail
    assert moves(said[-600:]) == 0  # the last five minutes


def test_a_limit_is_only_set_where_it_binds() -> None:
    for per_tick in (1, 2, 3, 4):
        said, _ = run(World(per_tick=per_tick, inside=10 * per_tick), 200.0)
        for d in said:
            if d.point.power_limit_w < 400.0:
                assert d.point.sm_clock_mhz is None  # one lever holds the clock
        assert all(d.point.active_sequences == 64 for d in said)  # more sequences are nearly always more efficient


def test_a_falling_budget_bites_in_the_same_tick() -> None:
    world = World(per_tick=3, inside=30)
    _, state = run(world, 100.0)
    said, _ = run(world, 0.5, budget=Budget(power_w=600.0), state=state)
    assert said[0].point.power_limit_w <= GUARD.ceiling_w(Budget(power_w=600.0))


def test_no_decision_stands_above_the_budget_whatever_it_is() -> None:
    rng, world, state = np.random.default_rng(3), World(per_tick=2), None
    for watts in rng.uniform(350.0, 1800.0, 40):
        budget = Budget(power_w=float(watts))
        said, state = run(world, 2.0, budget=budget, state=state)
        assert all(d.point.power_limit_w <= max(GUARD.ceiling_w(budget), 100.0) for d in said)


def test_a_queue_is_answered_at_once_and_only_for_as_long_as_it_lasts() -> None:
    slo = Slo(ttft_p95_s=2.0, tpot_p95_s=1.0)
    world = World()
    calm, state = run(world, 300.0, slo=slo)
    world.waiting, world.oldest_s, world.inside = 20, 0.3, 64
    said, state = run(world, 0.5, slo=slo, state=state)
    assert said[0].reason in ("queue", "targets")
    assert _speed(said[0]) > _speed(calm[-1])
    world.waiting, world.oldest_s, world.inside = 0, 0.0, 20
    after, _ = run(world, 200.0, slo=slo, state=state)
    assert _speed(after[-1]) <= _speed(said[0])


def _speed(d: Decision) -> float:
    """Rises with the clock: of limits and locks alike."""
    return (d.point.sm_clock_mhz or 1410) * min(1.0, d.point.power_limit_w / 400.0)


def test_requests_that_come_late_make_the_engine_faster() -> None:
    slo = Slo(ttft_p95_s=0.5)
    world = World(prompt=2500)
    before, state = run(world, 300.0, slo=slo)
    assert _speed(before[-1]) < 1410.0
    late, speeds = [0] * BUCKETS, []
    for _ in range(40):  # half of them above the target
        late[30] += 3
        late[10] += 3
        world.engine = replace(world.engine, ttft_counts=tuple(late))
        said, state = run(world, 0.5, slo=slo, state=state)
        speeds.append(_speed(said[-1]))
    assert max(speeds) > _speed(before[-1])


@pytest.mark.parametrize("fault", ["engine", "meters", "boards"])
def test_telemetry_that_cannot_be_believed_leads_to_the_safe_point_and_is_said(fault: str) -> None:
    world = World()
    _, state = run(world, 300.0)
    world.meters, world.lost = fault != "meters", 1 if fault == "boards" else 0
    p, said = policy(), []
    for _ in range(12):
        sample = world.tick()
        if fault == "engine":
            sample = replace(sample, engine=None)
        decision, state = p.step(state, sample, Budget(power_w=1200.0), EASY, world.now_s)
        said.append(decision)
    assert said[-1].reason == "telemetry"
    assert said[-1].point.sm_clock_mhz is None
    assert said[-1].point.active_sequences == 64
    assert said[-1].point.power_limit_w == GUARD.ceiling_w(Budget(power_w=1200.0))
    world.meters, world.lost = True, 0
    back, _ = run(world, 100.0, state=state)
    assert back[0].reason == "telemetry"  # not believed at once
    assert back[-1].reason != "telemetry"


def test_impossible_power_is_not_believed() -> None:
    world = World()
    _, state = run(world, 60.0)
    world.power_w = 9000.0
    said, _ = run(world, 6.0, state=state)
    assert said[-1].reason == "telemetry"
    assert "9000 W" in said[-1].detail


def test_what_nobody_watched_teaches_nothing() -> None:
    still = policy(use_clock=False, use_limit=False, use_batch=False)  # nothing moves: a lesson could span the gap
    world = World()
    _, state = run(world, 303.0, p=still)
    before = state
    for _ in range(40):
        sample = replace(world.tick(), absent=(3,), power_w=None)
        decision, state = still.step(state, sample, NO_BUDGET, EASY, world.now_s)
    assert decision.reason == "telemetry"
    late = list(world.engine.ttft_counts)
    late[BUCKETS - 2] += 500
    world.engine = replace(world.engine, ttft_counts=tuple(late))
    said, state = run(world, 12.0, state=state, p=still)
    assert said[-1].reason != "telemetry"
    assert state.margins.ttft <= before.margins.ttft
    assert state.bias.power == pytest.approx(before.bias.power, rel=0.01)


@pytest.mark.parametrize(("budget_w", "bounded"), [(600.0, True), (1600.0, False)])
def test_a_budget_that_does_not_bind_turns_nobody_away(budget_w: float, bounded: bool) -> None:
    world, state, slo = World(per_tick=8, inside=64), None, Slo(ttft_p95_s=1.0)
    for _ in range(60):  # the queue grows under either budget
        world.waiting, world.oldest_s = world.waiting + 4, 4.0
        said, state = run(world, 1.0, slo=slo, budget=Budget(power_w=budget_w), state=state)
    assert said[-1].reason == "sacrifice"
    assert (said[-1].most_waiting is not None) is bounded


def test_a_move_for_throughput_says_so() -> None:
    world = World()
    _, state = run(world, 300.0)
    said, _ = run(world, 10.0, slo=replace(EASY, throughput_tokens_s=1500.0), state=state)
    moved = next(d for d in said if d.reason == "targets")
    assert "tokens/s of 1500" in moved.detail


def test_boards_that_rest_may_say_the_same_for_long() -> None:
    world = World()
    _, state = run(world, 60.0)
    first = _idle(world)  # the last step ends in this period
    resting = replace(first.boards[0], energy_j=None, power_w=55.0)
    for i in range(40):
        at_s = world.now_s + i * PERIOD_S
        sample = replace(first, time_s=at_s, boards=(resting,) * 4, power_w=220.0)
        decision, state = policy().step(state, sample, NO_BUDGET, EASY, at_s)
        first = replace(first, engine=replace(first.engine, steps=first.engine.steps + (i == 0)))  # type: ignore[type-var,union-attr]
    assert decision.reason == "idle"


def test_a_budget_below_the_boards_minimum_asks_for_the_minimum() -> None:
    decision, _ = policy().step(policy().initial(), World().tick(), Budget(power_w=80.0), EASY, 0.5)
    assert decision.point.power_limit_w == GUARD.min_limit_w


def test_lengths_outside_the_profile_lead_to_the_safe_point() -> None:
    said, _ = run(World(prompt=90_000, output=4), 60.0)
    assert said[-1].reason == "outside-profile"
    assert said[-1].point.sm_clock_mhz is None


def test_an_idle_engine_keeps_its_point_and_says_so() -> None:
    world = World()
    _, state = run(world, 200.0)
    world.per_tick, world.inside = 0, 0
    world.jitter = 0
    decision, _ = policy().step(state, _idle(world), NO_BUDGET, EASY, world.now_s)
    assert decision.reason == "idle"


def _idle(world: World) -> TelemetrySample:
    sample = world.tick()
    assert sample.engine is not None
    idle: EngineSample = replace(sample.engine, running=0, waiting=0)
    return replace(sample, engine=idle)


def test_what_cannot_be_kept_is_given_up_in_the_declared_order() -> None:
    said, _ = run(World(per_tick=1), 100.0, slo=Slo(ttft_p95_s=5.0, tpot_p95_s=0.001))
    assert said[-1].reason == "sacrifice"
    assert said[-1].detail.startswith("TPOT cannot surely be kept")
    said, _ = run(World(per_tick=60, inside=64), 100.0, slo=Slo(ttft_p95_s=1.0, tpot_p95_s=5.0))
    assert "TTFT" in said[-1].detail
    assert said[-1].most_waiting is None  # nobody is turned away without a budget


def test_admission_is_bounded_only_where_a_budget_leaves_no_other_way() -> None:
    world = World(per_tick=8, inside=64)
    state = None
    for _ in range(60):  # the queue grows: more comes than is answered
        world.waiting, world.oldest_s = world.waiting + 4, 4.0
        said, state = run(world, 1.0, slo=Slo(ttft_p95_s=1.0), budget=Budget(power_w=500.0), state=state)
    assert said[-1].most_waiting is not None
    assert said[-1].most_waiting >= 1
    world.waiting, world.oldest_s, world.per_tick, world.inside = 0, 0.0, 1, 10
    after, _ = run(world, 200.0, slo=Slo(ttft_p95_s=1.0), budget=Budget(power_w=1600.0), state=state)
    assert after[-1].most_waiting is None


def test_the_same_samples_give_the_same_decisions() -> None:
    a, _ = run(World(per_tick=2), 120.0)
    b, _ = run(World(per_tick=2), 120.0, p=PalsPolicy(whole_profile().model(), GUARD))
    assert a == b


def test_a_lever_that_may_not_be_used_is_not() -> None:
    said, _ = run(World(), 200.0, p=policy(use_clock=False))
    assert all(d.point.sm_clock_mhz is None for d in said)
    said, _ = run(World(), 200.0, p=policy(use_limit=False))
    assert all(d.point.power_limit_w == 400.0 for d in said)


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(ConfigError, match="objective"):
        policy(objective="rack")


def test_the_share_that_targets_need_keeps_them_and_less_does_not() -> None:
    slo = Slo(ttft_p95_s=0.9)
    world = World(per_tick=2, inside=30, prompt=2000)
    p = policy()
    _, state = run(world, 60.0, slo=slo, budget=Budget(power_w=1600.0))
    needed_w, points = p.needed_w(state), p.worth(state)
    assert needed_w is not None
    assert [w for w, _ in points] == sorted(w for w, _ in points)
    assert [t for _, t in points] == sorted(t for _, t in points)
    kept, _ = run(world, 20.0, slo=slo, budget=Budget(power_w=1.1 * needed_w), state=state)
    assert kept[-1].reason != "sacrifice"
    lost, _ = run(world, 20.0, slo=slo, budget=Budget(power_w=max(420.0, 0.6 * needed_w)), state=state)
    assert lost[-1].reason == "sacrifice"


def test_a_bound_on_the_queue_does_not_come_and_go_with_each_request() -> None:
    world, state = World(per_tick=8, inside=64), None
    slo, budget, bounded = Slo(ttft_p95_s=1.0), Budget(power_w=500.0), list[bool]()
    for i in range(120):  # the queue comes and goes every other second
        world.waiting, world.oldest_s = (40 + i, 4.0) if i % 2 else (0, 0.0)
        said, state = run(world, 1.0, slo=slo, budget=budget, state=state)
        bounded.append(said[-1].most_waiting is not None)
    assert any(bounded)
    assert sum(a != b for a, b in itertools.pairwise(bounded)) <= 1
