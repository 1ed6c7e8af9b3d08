"""The policies do what the paper's algorithm says, and the guard's promises hold for any wish."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.control.estimator import over_budget_s
from pals.control.guard import Guard
from pals.control.levers import points_of, trim_of
from pals.control.pals_paper import PaperPolicy, PaperSettings, PaperState
from pals.control.policies import build_policy
from pals.core.errors import ConfigError
from pals.core.quantities import Budget, Decision, OperatingPoint, Slo, TelemetrySample
from tests.profile_world import model
from tests.worlds import board_info, telemetry

MODEL = model()
NO_TRIM = PaperSettings(trim_p_w=0.0, trim_i_w=0.0)
NO_BUDGET = Budget()


GUARD = Guard.of([board_info(i) for i in range(4)], launch_sequences=64)


def policy(settings: PaperSettings = NO_TRIM) -> PaperPolicy:
    return PaperPolicy(
        MODEL,
        points=points_of("pals-paper", MODEL, GUARD),
        trim=trim_of("pals-paper", GUARD, settings),
        settings=settings,
    )


def run(
    target: float, tokens_per_s: float, ticks: int, *, waiting: int = 1, settings: PaperSettings = NO_TRIM
) -> list[Decision]:
    p = policy(settings)
    state: PaperState = p.initial()
    out = []
    for i in range(ticks):
        sample = telemetry(0.5 * i, tokens=int(tokens_per_s * 0.5 * i), running=8, waiting=waiting)
        decision, state = p.step(state, sample, NO_BUDGET, Slo(throughput_tokens_s=target), 0.5 * i)
        out.append(decision)
    return out


def test_the_first_choice_is_the_most_efficient_point_that_meets_the_target() -> None:
    target = 500.0
    meeting = [q for q in map(MODEL.predict, MODEL.points) if q.tokens_per_s >= target]

    chosen = run(target, target, 1)[0]

    assert chosen.point == max(meeting, key=lambda q: q.tokens_per_j).point
    assert chosen.reason == "inputs-changed"


def test_an_impossible_target_gets_the_highest_throughput() -> None:
    chosen = run(1e6, 100.0, 1)[0].point

    assert chosen == max(map(MODEL.predict, MODEL.points), key=lambda q: q.tokens_per_s).point


def test_inside_the_dead_band_nothing_moves_and_outside_it_takes_several_periods() -> None:
    assert {d.reason for d in run(500.0, 490.0, 20)[5:]} == {"hold"}

    reasons = [d.reason for d in run(500.0, 300.0, 12)]
    first = reasons.index("sustained-error")
    assert first == PaperSettings().sustain_periods
    assert reasons[first + 1 : first + 4] == ["hold"] * 3


def test_a_budget_leaves_only_points_predicted_within_it() -> None:
    p = policy()
    decision, _ = p.step(p.initial(), telemetry(0.0), Budget(power_w=700.0), Slo(throughput_tokens_s=1e6), 0.0)

    assert MODEL.predict(decision.point).power_w <= 700.0


def test_the_trim_raises_the_limit_when_throughput_lacks_and_work_waits_but_not_for_want_of_work() -> None:
    wanting = run(500.0, 440.0, 30, settings=PaperSettings())
    starved = run(500.0, 440.0, 30, waiting=0, settings=PaperSettings())

    base_w = wanting[0].point.power_limit_w
    assert base_w < wanting[-1].point.power_limit_w <= base_w + PaperSettings().trim_max_w
    assert starved[-1].point.power_limit_w == base_w


@given(
    limit_w=st.floats(1, 2000),
    sequences=st.one_of(st.none(), st.integers(-5, 500)),
    budget_w=st.one_of(st.none(), st.floats(1, 5000)),
)
def test_whatever_is_wanted_leaves_the_guard_inside_range_batch_and_budget(
    limit_w: float, sequences: int | None, budget_w: float | None
) -> None:
    guard = Guard.of([board_info(i) for i in range(4)], launch_sequences=64)
    wanted = Decision(point=OperatingPoint(power_limit_w=limit_w, active_sequences=sequences), reason="r")

    point = guard.check(wanted, Budget(power_w=budget_w)).point

    assert 100.0 <= point.power_limit_w <= 400.0
    assert point.active_sequences is None or 1 <= point.active_sequences <= 64
    if budget_w is not None and budget_w > 4 * 103.0:
        assert 4 * point.power_limit_w <= budget_w


def test_the_guard_never_goes_above_the_limit_it_found() -> None:
    guard = Guard.of([board_info(0, found_w=300.0), board_info(1)], launch_sequences=64)

    checked = guard.check(Decision(point=OperatingPoint(power_limit_w=400.0), reason="r"), NO_BUDGET)

    assert checked.point.power_limit_w == 300.0
    assert checked.reason == "guard-range"


@pytest.mark.parametrize("wanted_w", [20.0, 100.0, 400.0])
def test_a_budget_below_the_minimum_is_the_reason_whatever_was_wanted(wanted_w: float) -> None:
    guard = Guard.of([board_info(i) for i in range(4)], launch_sequences=64)

    checked = guard.check(Decision(point=OperatingPoint(power_limit_w=wanted_w), reason="r"), Budget(power_w=80.0))

    assert checked.point.power_limit_w == 100.0
    assert checked.reason == "guard-budget-below-minimum"
    assert "80 W" in checked.detail


def test_a_static_limit_outside_the_range_is_refused_before_anything_is_written() -> None:
    guard = Guard.of([board_info()], launch_sequences=64)

    with pytest.raises(ConfigError, match=r"50 W lies outside 100..400 W"):
        build_policy("static", {"power_limit_w": 50.0}, None, guard)
    with pytest.raises(ConfigError, match=r"65 active sequences lie outside 1..64"):
        build_policy("static", {"active_sequences": 65}, None, guard)
    with pytest.raises(ConfigError, match="pals profile"):
        build_policy("pals-paper", {}, None, guard)


def test_over_budget_is_judged_by_a_mean_and_not_by_the_counters_jitter() -> None:
    def sample(power_w: float | None) -> TelemetrySample:
        return TelemetrySample(time_s=0.0, window_s=0.5, boards=(), power_w=power_w, engine=None)

    jitter = [sample(w) for w in (930.0, 1050.0, 930.0, 1050.0)]

    assert over_budget_s(jitter, Budget(power_w=1000.0)) == 0.0
    assert over_budget_s(jitter, Budget(power_w=980.0)) == 0.5
    assert over_budget_s([*jitter, sample(None)], Budget(power_w=500.0)) == 0.0
    assert over_budget_s(jitter, Budget()) == over_budget_s([], Budget(power_w=1.0)) == 0.0
