"""cap-only, batch-only and clock-only: the paper's rule with one lever each, and the profile's clock dimension."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.control.guard import Guard
from pals.control.levers import LEVERS
from pals.control.pals_paper import PaperSettings
from pals.control.policies import build_policy
from pals.core.errors import ConfigError
from pals.core.protocols import AnyController
from pals.core.quantities import Budget, Decision, OperatingPoint, Slo
from pals.experiments.scenarios import SCENARIOS
from pals.models.clock_model import fit_clocks
from pals.models.profile import Profile, ProfileRow, fit
from pals.runtime.config import POLICIES
from tests.test_profile import profile, rows
from tests.worlds import board_info, telemetry

CLOCKS = (1410, 1200, 1005, 810)
GUARD = Guard.of([board_info(i) for i in range(4)], launch_sequences=64)
FOUND_W, LAUNCH = 400.0, 64
NO_BUDGET = Budget()


def world(mhz: float, n: int) -> tuple[float, float]:
    """Tokens/s and W of four boards under a lock: a power law, flat enough in the clock to be worth lowering."""
    return 30.0 * n**0.8 * (mhz / 1410) ** 0.3, 4 * 90.0 * n**0.3 * (mhz / 1410) ** 1.2


def clock_rows(
    clocks: tuple[int, ...] = CLOCKS, levels: tuple[int, ...] = (4, 8, 16, 32, 64)
) -> tuple[ProfileRow, ...]:
    out = []
    for n in levels:
        for mhz in clocks:
            tokens, watts = world(mhz, n)
            out.append(
                ProfileRow(
                    power_limit_w=FOUND_W, active_sequences=n, power_w=watts, tokens_per_s=tokens, sm_clock_mhz=mhz,
                    window_s=8.0, requested_clock_mhz=mhz,
                )
            )  # fmt: skip
    return tuple(out)


@cache
def with_clocks() -> Profile:
    return replace(profile(), rows=rows() + clock_rows())


@cache
def made(name: str) -> AnyController:
    return build_policy(name, {}, with_clocks(), GUARD)


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
    poor, rich = (decide(name, 1e6, [100.0], budget_w)[0] for budget_w in (900.0, None))
    model = with_clocks().model()

    assert poor != rich
    assert model.predict(poor).power_w <= 900.0
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
    with pytest.raises(ConfigError, match="known: static, pals-paper, cap-only, batch-only, clock-only"):
        build_policy("cap-onl", {}, profile(), GUARD)
    assert set(POLICIES) == {"static", *LEVERS}


def test_pals_paper_with_clock_rows_decides_as_without() -> None:
    plain = build_policy("pals-paper", asdict(PaperSettings()), profile(), GUARD)
    sample, slo = telemetry(0.0, tokens=100, waiting=1), Slo(throughput_tokens_s=400.0)

    with_rows = made("pals-paper").step(made("pals-paper").initial(), sample, NO_BUDGET, slo, 0.0)[0]

    assert plain.step(plain.initial(), sample, NO_BUDGET, slo, 0.0)[0] == with_rows


def test_the_clock_model_recovers_a_power_law_world_and_stays_inside_what_was_measured() -> None:
    model = with_clocks().model()

    assert model.residuals.clock_power_mape is not None
    assert model.residuals.clock_power_mape < 0.01
    for mhz, n in ((1110, 12), (900, 50)):
        predicted = model.predict(OperatingPoint(power_limit_w=FOUND_W, sm_clock_mhz=mhz, active_sequences=n))
        tokens, watts = world(mhz, n)
        assert predicted.tokens_per_s == pytest.approx(tokens, rel=0.02)
        assert predicted.power_w == pytest.approx(watts, rel=0.02)
    at_floor, below = (
        model.predict(OperatingPoint(power_limit_w=FOUND_W, sm_clock_mhz=mhz, active_sequences=64))
        for mhz in (810, 300)
    )
    assert below.tokens_per_s == at_floor.tokens_per_s


def test_a_limit_that_binds_too_is_felt_under_a_lock() -> None:
    model = with_clocks().model()
    free, limited = (
        model.predict(OperatingPoint(power_limit_w=w, sm_clock_mhz=1200, active_sequences=64)) for w in (400.0, 150.0)
    )

    assert limited.power_w == 4 * 150.0
    assert free.power_w > limited.power_w
    assert limited.tokens_per_s < free.tokens_per_s


@pytest.mark.parametrize(("clocks", "levels"), [((1200,), (64,)), ((1410, 1005), (64,)), ((1410, 1005), (8, 64))])
def test_few_clock_rows_lower_the_degree_and_still_predict_what_they_hold(
    clocks: tuple[int, ...], levels: tuple[int, ...]
) -> None:
    model = fit(rows() + clock_rows(clocks, levels), boards=4)

    for mhz in clocks:
        predicted = model.predict(OperatingPoint(power_limit_w=FOUND_W, sm_clock_mhz=mhz, active_sequences=64))
        assert predicted.power_w == pytest.approx(world(mhz, 64)[1], rel=0.02)


def test_a_profile_with_clocks_round_trips_and_one_without_reads_and_writes_as_before() -> None:
    assert Profile.from_json(with_clocks().to_json()) == with_clocks()
    assert "requested_clock_mhz" not in profile().to_json()
    committed = Profile.from_json(SCENARIOS[0].profile.read_text())
    written, kept = (text.split('"rows"')[1] for text in (committed.to_json(), SCENARIOS[0].profile.read_text()))
    assert written == kept
    assert committed.model().clock is None
    with pytest.raises(ValueError, match="1200 MHz is unknown"):
        committed.model().predict(OperatingPoint(power_limit_w=400.0, sm_clock_mhz=1200))


def test_rows_under_a_lock_alone_are_no_profile() -> None:
    with pytest.raises(ConfigError, match="0 rows without a clock lock"):
        fit(clock_rows(), boards=4)


def test_the_fit_takes_arrays() -> None:
    mhz, n = np.array([1000.0, 1200.0, 1400.0]), np.array([16.0, 16.0, 16.0])
    model = fit_clocks(sm_clock_mhz=mhz, active_sequences=n, tokens_per_s=mhz / 2, power_w=mhz / 4)

    tokens, watts = model.predict(mhz, n)
    assert tokens == pytest.approx(mhz / 2)
    assert watts == pytest.approx(mhz / 4)
