"""The plant keeps its physics: energy is the integral of power, limits bind as measured, sensors lag as real ones do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.core.errors import ConfigError
from pals.plant.boards import BoardBank
from pals.plant.silicon import Load, load_power_w
from pals.plant.specs import board_specs, parse_boards

A100 = board_specs()["a100-sxm4-80gb"]
H100 = board_specs()["h100-sxm5-80gb"]
FULL = Load(compute=1.0, memory=0.3)


@pytest.fixture
def bank(tmp_path: Path) -> Iterator[BoardBank]:
    made = BoardBank.create(tmp_path / "bank", A100, 4, seed=3, now_s=0.0)
    yield made
    made.close()


def keep_busy(bank: BoardBank, until_s: float, load: Load = FULL, start_s: float = 0.0) -> None:
    bank.book(range(bank.count), start_s, until_s, load, start_s)


def power_trace_w(bank: BoardBank, start_s: float, end_s: float) -> np.ndarray:
    times = np.arange(start_s, end_s, 0.01)
    return np.array([[bank.reading(i, float(t)).power_instant_w for i in range(bank.count)] for t in times])


def test_memory_bound_draw_matches_the_measured_a100_at_two_clocks() -> None:
    stream = Load(compute=0.0, memory=1.0)
    silicon = board_specs()["a100-pcie-80gb"].silicon

    assert load_power_w(silicon, stream, 1005) == pytest.approx(144, abs=3)
    assert load_power_w(silicon, stream, 1410) == pytest.approx(228, abs=3)


@given(
    compute=st.floats(0, 1), memory=st.floats(0, 1), low=st.floats(210, 1410), high=st.floats(210, 1410),
    name=st.sampled_from(sorted(board_specs())),
)  # fmt: skip
def test_a_lower_clock_never_draws_more(compute: float, memory: float, low: float, high: float, name: str) -> None:
    load = Load(compute=compute, memory=memory)
    low, high = sorted((low, high))

    assert (
        load_power_w(board_specs()[name].silicon, load, low)
        <= load_power_w(board_specs()[name].silicon, load, high) + 1e-9
    )


def test_boards_of_an_idle_engine_sleep_while_another_engine_works(bank: BoardBank) -> None:
    bank.book((0, 1), 0.0, 8.0, FULL, 0.0)

    busy, idle = bank.reading(0, 6.0), bank.reading(3, 6.0)

    assert busy.sm_clock_mhz > 1000
    assert (idle.sm_clock_mhz, idle.throttle & 1) == (A100.min_sm_clock_mhz, 1)
    assert idle.power_instant_w < 1.2 * A100.silicon.idle_w
    assert bank.pace_mhz((2, 3), 6.0) == A100.max_sm_clock_mhz  # they rise to it within a few ticks of a first step


def test_energy_is_the_integral_of_power(bank: BoardBank) -> None:
    keep_busy(bank, 2.0)
    start_j = [bank.energy_integral_j(i, 0.5) for i in range(4)]

    trace_w = power_trace_w(bank, 0.51, 1.5 + 1e-6)

    grown_j = [bank.energy_integral_j(i, 1.5) - start_j[i] for i in range(4)]
    assert trace_w.sum(axis=0) * 0.01 == pytest.approx(grown_j, rel=0.01)


@pytest.mark.parametrize("limit_w", [150.0, 200.0, 300.0, 350.0])
def test_a_binding_limit_holds_the_mean_within_a_few_watts(bank: BoardBank, limit_w: float) -> None:
    keep_busy(bank, 20.0)
    for i in range(4):
        bank.set_limit(i, limit_w, 0.0)
    before_j = [bank.energy_integral_j(i, 2.0) for i in range(4)]

    mean_w = [(bank.energy_integral_j(i, 12.0) - before_j[i]) / 10.0 for i in range(4)]

    assert min(mean_w) > limit_w - 4.0
    assert max(mean_w) < limit_w + 1.0
    assert bank.reading(0, 12.0).throttle & 0x4


def test_a_limit_above_natural_draw_does_nothing(bank: BoardBank, tmp_path: Path) -> None:
    free = BoardBank.create(tmp_path / "free", A100, 4, seed=3, now_s=0.0)
    for each in (bank, free):
        keep_busy(each, 20.0, Load(compute=0.1, memory=0.5))
        each.refresh(3.0)
    for i in range(4):
        bank.set_limit(i, 300.0, 3.0)

    assert (power_trace_w(bank, 3.0, 5.0) == power_trace_w(free, 3.0, 5.0)).all()
    assert bank.reading(0, 5.0).sm_clock_mhz == 1410
    free.close()


def test_the_clock_lock_is_an_upper_bound_and_is_released(bank: BoardBank) -> None:
    keep_busy(bank, 10.0, Load(compute=0.0, memory=0.8))
    bank.set_clock_lock(0, 210, 1007, 1.0)
    assert bank.reading(0, 2.0).sm_clock_mhz == 1005
    assert bank.reading(1, 2.0).sm_clock_mhz == 1410
    assert bank.pace_mhz([0, 1], 2.0) == 1005

    bank.reset_clock_lock(0, 2.0)
    assert bank.reading(0, 3.0).sm_clock_mhz == 1410


def test_an_idle_bank_falls_to_idle_power_and_a_long_sleep_costs_nothing(bank: BoardBank) -> None:
    keep_busy(bank, 1.0)
    assert bank.reading(0, 2.0).power_instant_w > 60

    idle = bank.reading(0, 10.0)
    before_j = bank.energy_integral_j(0, 20.0)
    slept_j = bank.energy_integral_j(0, 1e6) - before_j

    assert idle.power_instant_w == pytest.approx(55, rel=0.15)
    assert slept_j == pytest.approx((1e6 - 20) * idle.power_instant_w, rel=0.001)


def test_the_power_reading_lags_a_second_on_h100_and_not_on_a100(tmp_path: Path) -> None:
    lag = {}
    for spec in (A100, H100):
        bank = BoardBank.create(tmp_path / spec.name, spec, 1, now_s=0.0)
        keep_busy(bank, 20.0, start_s=5.0)
        reading = bank.reading(0, 5.3)
        lag[spec.name] = reading.power_avg_w / reading.power_instant_w
        bank.close()

    assert lag[A100.name] > 0.95
    assert lag[H100.name] < 0.6


def test_two_processes_see_the_same_boards(bank: BoardBank) -> None:
    other = BoardBank.open(bank.path)
    keep_busy(bank, 5.0)
    other.set_limit(2, 200.0, 1.0)

    assert bank.reading(2, 4.0) == other.reading(2, 4.0)
    assert bank.reading(2, 4.0).enforced_limit_w == 200.0
    other.close()


def test_a_limit_lowered_from_outside_wins_over_ours(bank: BoardBank) -> None:
    bank.inject(1, "external_limit", 220.0, 0.0)
    bank.set_limit(1, 300.0, 0.0)

    reading = bank.reading(1, 0.1)
    assert (reading.requested_limit_w, reading.enforced_limit_w) == (300.0, 220.0)
    with pytest.raises(ValueError, match="unknown fault"):
        bank.inject(1, "gremlins", 1, 0.0)


def test_boards_are_named_with_a_count_and_the_nearest_is_suggested() -> None:
    assert parse_boards("4xa100-sxm4-80gb") == (A100, 4)
    assert parse_boards("H100-SXM5-80GB") == (H100, 1)
    with pytest.raises(ConfigError, match="did you mean 'a100-sxm4-80gb'"):
        parse_boards("4xa100-sxm-80gb")
    with pytest.raises(ConfigError, match="0 boards"):
        parse_boards("0xa100-sxm4-80gb")


@pytest.mark.parametrize(
    ("name", "limit_w", "low_mhz", "high_mhz"),
    [("h100-sxm5-80gb", 700, 1300, 1430), ("h200-sxm5-141gb", 700, 1410, 1500), ("b200-sxm-180gb", 1000, 1060, 1235)],
)
def test_a_saturated_matrix_product_settles_at_the_measured_clock(
    name: str, limit_w: float, low_mhz: int, high_mhz: int, tmp_path: Path
) -> None:
    bank = BoardBank.create(tmp_path / "bank", board_specs()[name], 1, seed=0, now_s=0.0)
    keep_busy(bank, 20.0, Load(compute=1.0, memory=0.2))

    assert low_mhz <= bank.reading(0, 10.0).sm_clock_mhz <= high_mhz
    assert bank.reading(0, 10.0).enforced_limit_w == limit_w
    bank.close()
