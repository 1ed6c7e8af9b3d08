"""cap-only, batch-only and clock-only: the paper's rule with one lever each, and the profile's clock dimension."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.control.guard import Guard
from pals.control.levers import LEVERS, points_of
from pals.control.pals_paper import PaperSettings
from pals.control.policies import build_policy
from pals.core.errors import ConfigError
from pals.core.protocols import AnyController
from pals.core.quantities import Budget, Decision, OperatingPoint, Slo
from pals.runtime.config import POLICIES
from tests.profile_world import clock_profile, profile
from tests.worlds import board_info, telemetry

GUARD = Guard.of([board_info(i) for i in range(4)], launch_sequences=64)
FOUND_W, LAUNCH = 400.0, 64
NO_BUDGET = Budget()


@cache
def made(name: str) -> AnyController:
    return build_policy(name, {}, clock_profile(), GUARD)


def decide(name: str, target: float, delivered: list[float], budget_w: float | None = None) -> list[OperatingPoint]:
    """What the policy wants at each of these measured throughputs, one a period."""
    policy = made(name)
    state, tokens, points = policy.initial(), 0.0, []
    for i, rate in enumerate(delivered):
        tokens += 0.5 * rate
        sample = telemetry(0.5 * i, tokens=int(tokens), running=8, waiting=i % 3)
        decision, state = policy.step(state, sample, Budget(power_w=budget_w), Slo(throughput_tokens_s=target), 0.5 * i)
        points.append(decision.point)
    return points


@pytest.mark.parametrize("name", list(LEVERS))
@given(
    target=st.floats(1, 2000),
    delivered=st.lists(st.floats(0, 3000), min_size=1, max_size=15),
    budget_w=st.one_of(st.none(), st.floats(100, 2000)),
)
@settings(deadline=None)  # the first one fits a profile
def test_only_the_owned_lever_moves_and_the_wish_lies_in_range(
    name: str, target: float, delivered: list[float], budget_w: float | None
) -> None:
    for point in decide(name, target, delivered, budget_w):
        assert 100.0 <= point.power_limit_w <= FOUND_W
        assert point.active_sequences is not None
        assert 1 <= point.active_sequences <= LAUNCH
        assert point.sm_clock_mhz is None or point.sm_clock_mhz in GUARD.sm_clocks_mhz
        owned = LEVERS[name]
        assert "limit" in owned or point.power_limit_w == FOUND_W
        assert "batch" in owned or point.active_sequences == LAUNCH
        assert "clock" in owned or point.sm_clock_mhz is None
        checked = GUARD.check(Decision(point=point, reason="r"), NO_BUDGET)
        assert checked.point == point  # without a budget the guard has nothing to add


@pytest.mark.parametrize("name", list(LEVERS))
def test_each_policy_uses_its_lever_in_both_directions(name: str) -> None:
    model = clock_profile().model()
    drawn_w = [model.predict(p).power_w for p in points_of(name, model, GUARD)]
    budget_w = 0.5 * (min(drawn_w) + max(drawn_w))
    poor, rich = (decide(name, 1e6, [100.0], w)[0] for w in (budget_w, None))

    assert poor != rich
    assert model.predict(poor).power_w <= budget_w
    assert model.predict(poor).tokens_per_s < model.predict(rich).tokens_per_s


@pytest.mark.parametrize(
    ("name", "lever"),
    [("cap-only", "power_limit_w"), ("batch-only", "active_sequences"), ("clock-only", "sm_clock_mhz")],
)
def test_the_trim_moves_the_owned_lever_up_when_throughput_lacks(name: str, lever: str) -> None:
    points = decide(name, 400.0, [340.0] * 30, 900.0)

    first, last = getattr(points[0], lever), getattr(points[-1], lever)
    assert first is not None
    assert first < last


def test_clock_only_needs_clock_rows_and_says_how_to_get_them() -> None:
    with pytest.raises(ConfigError, match=r"no rows of these boards' SM clocks.*pals profile --clocks"):
        build_policy("clock-only", {}, profile(), GUARD)
    with pytest.raises(ConfigError, match=r"no row at the launch batch of 128.*--sequences"):
        build_policy("cap-only", {}, profile(), replace(GUARD, launch_sequences=128))
    with pytest.raises(ConfigError, match=r"no profiled power limit lies within 100\.\.120 W"):
        build_policy("pals-paper", {}, profile(), replace(GUARD, max_limit_w=120.0))
    with pytest.raises(ConfigError, match="policy batch-only needs a profile"):
        build_policy("batch-only", {}, None, GUARD)
    with pytest.raises(
        ConfigError, match="known: static, pals, pals-paper, cap-only, batch-only, clock-only, vendor-preset"
    ):
        build_policy("cap-onl", {}, profile(), GUARD)
    assert {"static", *LEVERS} <= set(POLICIES)


def test_pals_paper_with_clock_rows_decides_as_without() -> None:
    plain = build_policy("pals-paper", asdict(PaperSettings()), profile(), GUARD)
    sample, slo = telemetry(0.0, tokens=100, waiting=1), Slo(throughput_tokens_s=400.0)

    with_rows = made("pals-paper").step(made("pals-paper").initial(), sample, NO_BUDGET, slo, 0.0)[0]

    assert plain.step(plain.initial(), sample, NO_BUDGET, slo, 0.0)[0] == with_rows
