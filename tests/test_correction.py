"""The online correction: follows what is true, yields little to a bad minute, tells drift from noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import exp, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.control.correction import (
    MINUTE_WINDOWS,
    WINDOW_S,
    Correction,
    Observation,
    corrected,
    update,
)
from pals.control.drift_cause import Shifts, guess_cause
from pals.models.forecast import Estimates, Forecast

SD = 0.03  # of the profile's own predictions
HALF = 1.645 * SD
PER_HOUR = round(3600 / WINDOW_S)
Said = list[tuple[float, str]]


def window(step: float | None = None, power: float | None = None, sd: float = SD) -> dict[str, Observation]:
    half = 1.645 * sd
    told = {"step": step, "power": power}
    return {q: Observation(1.0, exp(-half), exp(half), m) for q, m in told.items() if m is not None}


def fed(
    correction: Correction,
    windows: Iterator[dict[str, Observation]] | list[dict[str, Observation]],
    start_s: float = 0.0,
) -> tuple[Correction, Said]:
    said: Said = []
    for i, each in enumerate(windows):
        now_s = start_s + (i + 1) * WINDOW_S
        correction, sentences = update(correction, each, now_s)
        said += [(now_s, s) for s in sentences]
    return correction, said


def noise(seed: int, hours: float, *, correlation_s: float = 0.0, sd: float = SD) -> Iterator[float]:
    """Measured over predicted, stationary, with the profile's own error; correlated over `correlation_s`."""
    rng, keep = np.random.default_rng(seed), exp(-WINDOW_S / correlation_s) if correlation_s else 0.0
    x = rng.standard_normal()
    for _ in range(round(hours * PER_HOUR)):
        x = keep * x + np.sqrt(1 - keep * keep) * rng.standard_normal()
        yield exp(sd * float(x))


def settled(bias: float = 1.0) -> Correction:
    return fed(Correction(), [window(step=bias, power=bias)] * (PER_HOUR // 2))[0]


def test_the_factor_becomes_what_is_measured_within_ten_minutes_or_so() -> None:
    correction, said = fed(Correction(), [window(step=1.03)] * (15 * MINUTE_WINDOWS))

    assert correction.bias("step") == pytest.approx(1.03, abs=0.003)
    assert correction.bias("power") == 1.0
    assert not said


garbage = st.lists(
    st.one_of(st.floats(1e-9, 1e9), st.sampled_from([0.0, -1.0, float("nan"), float("inf"), 1e300])),
    min_size=15,
    max_size=15,
)


@settings(max_examples=60, deadline=None)
@given(garbage, st.integers(0, MINUTE_WINDOWS - 1), st.floats(0.96, 1.04))
def test_a_minute_of_garbage_moves_a_settled_factor_by_at_most_one_per_cent_and_is_forgotten(
    values: list[float], begins: int, truth: float
) -> None:
    before = fed(settled(truth), [window(step=truth, power=truth)] * begins)[0]

    after, said = fed(before, [window(step=v, power=v) for v in values] + [window(step=truth)] * MINUTE_WINDOWS, 4000.0)
    assert abs(log(after.bias("step") / before.bias("step"))) <= 0.01
    assert not [s for _, s in said if "against" in s]

    later, said = fed(after, [window(step=truth, power=truth)] * (20 * MINUTE_WINDOWS), 5000.0)
    assert abs(log(later.bias("step") / before.bias("step"))) <= 0.002
    assert not said


def test_half_a_minute_of_garbage_moves_nothing() -> None:
    before = settled()

    after, _ = fed(before, [window(step=50.0)] * 7 + [window(step=1.0)] * 8, 4000.0)
    assert after.bias("step") == pytest.approx(before.bias("step"), abs=1e-6)


@pytest.mark.parametrize("correlation_s", [0.0, 60.0])
def test_ten_hours_of_the_profiles_own_error_are_no_drift(correlation_s: float) -> None:
    for seed in range(5):
        _, said = fed(Correction(), [window(step=m) for m in noise(seed, 10.0, correlation_s=correlation_s)])
        assert not said, (seed, said)


@pytest.mark.parametrize(("factor", "sign"), [(1.08, "+"), (1 / 1.08, "-")])
def test_eight_per_cent_are_found_within_five_minutes_with_their_size(factor: float, sign: str) -> None:
    for seed in range(5):
        before, _ = fed(Correction(), [window(step=m) for m in noise(seed, 2.0)])

        after, said = fed(before, [window(step=factor * m) for m in noise(seed + 99, 0.5)], 7200.0)
        found_s, sentence = said[0]
        assert found_s - 7200.0 <= 300.0
        assert f"step time is {sign}" in sentence
        drift = after.tracks["step"].drift
        assert drift is not None
        assert drift.ratio == pytest.approx(factor, abs=0.025)
        assert after.told.drift == {"step": round(drift.ratio, 5)}
        assert after.bias("step") == pytest.approx(factor, abs=0.02)


def test_a_drift_that_was_there_from_the_start_is_found_too() -> None:
    _, said = fed(Correction(), [window(power=m / 1.08) for m in noise(3, 0.5)])

    assert "power is -" in said[0][1]
    assert said[0][0] <= 900.0


def test_the_end_of_a_drift_is_said_once() -> None:
    drifted, _ = fed(settled(), [window(step=1.1)] * PER_HOUR)

    back, said = fed(drifted, [window(step=1.0)] * PER_HOUR, 9000.0)
    assert ["ended" in s for _, s in said] == [True]
    assert back.told.drift == {}
    assert back.bias("step") == pytest.approx(1.0, abs=0.005)


def test_a_summer_too_slow_for_a_step_is_found_when_it_leaves_the_interval() -> None:
    rising = [window(power=exp(0.10 * i / (100 * PER_HOUR))) for i in range(100 * PER_HOUR)]

    _, said = fed(Correction(), rising)
    assert "power is +" in said[0][1]


def test_the_same_windows_give_the_same_correction() -> None:
    windows = [window(step=m, power=1 / m) for m in noise(5, 1.0)]

    assert fed(Correction(), windows) == fed(Correction(), windows)


@pytest.mark.parametrize(
    ("shifts", "experts", "told"),
    [
        (Shifts(step=2.5, power=-2.0), True, "more time on the host"),
        (Shifts(step=-2.5, power=1.6), False, "less time on the host"),
        (Shifts(step=2.5, power=0.3), True, "more distinct experts"),
        (Shifts(step=2.5, power=0.3), False, "the engine was updated"),
        (Shifts(step=2.0, clock=-3.0), True, "lower clock (heat, the hottest at 91 °C"),
        (Shifts(power=2.5), True, "another board, warmer or colder air (boards, the hottest at 91 °C)"),
        (Shifts(power=2.5, clock=-1.5), False, "another clock for their power"),
    ],
)
def test_what_moved_together_hints_at_the_cause(shifts: Shifts, experts: bool, told: str) -> None:
    quantity = "step" if abs(shifts.step) > 1 else "power"
    assert told in guess_cause(quantity, shifts, experts=experts, temperature_c=91.0)


def test_a_corrected_forecast_keeps_its_width_and_what_firmware_holds() -> None:
    one = Estimates(np.array([100.0, 500.0]), np.array([90.0, 450.0]), np.array([110.0, 550.0]))
    forecast = Forecast(*([one] * len(Forecast._fields)))
    correction = settled(1.05)

    moved = corrected(forecast, correction, np.array([400.0, 510.0]))
    assert moved.step_s.value == pytest.approx(1.05 * one.value, rel=1e-3)
    assert moved.tokens_per_s.value == pytest.approx(one.value / 1.05, rel=1e-3)
    assert moved.step_s.high / moved.step_s.low == pytest.approx(one.high / one.low)
    assert moved.power_w.value == pytest.approx([105.0, 510.0], rel=1e-3)
    assert (moved.power_w.high <= [400.0, 510.0]).all()


def maker(truth: Callable[[float], float]) -> list[dict[str, Observation]]:
    return [window(step=truth(i * WINDOW_S)) for i in range(PER_HOUR)]


def test_a_stuck_reading_for_minutes_is_told_but_the_factor_stays_bounded() -> None:
    stuck, said = fed(settled(), maker(lambda t: 1e6 if t < 600 else 1.0), 4000.0)

    assert said
    assert stuck.bias("step") == pytest.approx(1.0, abs=0.02)  # an hour later
