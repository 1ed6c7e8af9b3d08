"""What a limit, a lock and heat make of the clock; what meters and setters make of it for those who look and write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.core.errors import ConfigError
from pals.experiments.plant_checks import governor as governor_check
from pals.experiments.plant_checks import silicon as silicon_check
from pals.experiments.plant_checks.measured import data_folder
from pals.plant.boards import BoardBank
from pals.plant.governor import TICK_S, govern, tick
from pals.plant.silicon import Load, load_power_w
from pals.plant.specs import BoardSpec, Variation, board_specs

SPECS = board_specs()
SPECS_FILE = Path(governor_check.__file__).parents[2] / "plant" / "board_specs.json"
A100, H100, B200 = SPECS["a100-sxm4-80gb"], SPECS["h100-sxm5-80gb"], SPECS["b200-sxm-180gb"]
FULL, STREAM = Load(compute=1.0, memory=0.3), Load(compute=0.0, memory=1.0)
DECODE = Load(compute=0.0, memory=0.6)


@contextmanager
def boards(
    folder: Path, spec: BoardSpec, count: int = 1, *, latency_s: float = 0.0, seed: int = 1
) -> Iterator[BoardBank]:
    folder.mkdir(exist_ok=True)
    bank = BoardBank.create(folder / "bank", spec, count, seed=seed, setter_latency_s=latency_s, now_s=0.0)
    try:
        yield bank
    finally:
        bank.close()


def mean_w(bank: BoardBank, start_s: float, end_s: float) -> float:
    start_j = bank.energy_integral_j(0, start_s)
    return (bank.energy_integral_j(0, end_s) - start_j) / (end_s - start_s)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_every_board_keeps_a_binding_limit_to_a_few_watts(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    limit_w = max(spec.min_limit_w, 0.6 * spec.default_limit_w)
    with boards(tmp_path, spec) as bank:
        bank.set_limit(0, limit_w, 0.0)
        bank.book([0], 0.0, 20.0, FULL, 0.0)

        assert limit_w - 4.0 < mean_w(bank, 4.0, 14.0) < limit_w + 1.0
        assert bank.reading(0, 14.0).throttle == 0x4


def test_measured_clocks_limits_and_bursts_are_met() -> None:
    rows = governor_check.check(data_folder())

    assert len(rows) == 6
    assert [(r.check, r.value) for r in rows if not r.reached] == []
    assert all(len(r.residuals) == r.cases for r in rows if r.unit == "%")


def test_the_checks_take_other_rows_and_see_a_board_that_differs(tmp_path: Path) -> None:
    source, folder = data_folder() / "gpu-physics-constants", tmp_path / "gpu-physics-constants"
    shutil.copytree(source, folder)
    (tmp_path / "aiconfigurator-silicon").symlink_to(data_folder() / "aiconfigurator-silicon")
    rows = (folder / "h100_rails.csv").read_text().splitlines()
    (folder / "h100_rails.csv").write_text("\n".join([rows[0], rows[2], "450,1200,400,105", rows[6]]) + "\n")

    first = governor_check.check(tmp_path)[0]

    assert (first.cases, first.reached) == (3, False)
    (folder / "h100_rails.csv").unlink()
    with pytest.raises(ConfigError, match=r"h100_rails\.csv"):
        governor_check.check(tmp_path)


def test_the_fit_gives_the_constants_in_force() -> None:
    in_force, fitted = json.loads(SPECS_FILE.read_text()), silicon_check.fit(data_folder())
    owned = [
        (board, group) for board, spec in in_force.items() if not board.startswith("_")
        for group, constants in spec["silicon"].items() if silicon_check.OWNED in constants["source"]
    ]  # fmt: skip

    assert len(owned) > 15
    for board, group in owned:
        given, found = (numbers(each[board]["silicon"][group]) for each in (in_force, fitted))
        assert found == pytest.approx(given, rel=0.01), (board, group)
    rest = {board: spec for board, spec in fitted.items() if board.startswith(("_", "rtx", "l4"))}
    assert rest == {board: in_force[board] for board in rest}


def numbers(group: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in group.items() if isinstance(value, int | float)}


def test_below_the_lowest_clock_cycles_are_skipped_and_then_the_limit_is_missed(tmp_path: Path) -> None:
    with boards(tmp_path, A100) as bank:
        bank.book([0], 0.0, 30.0, STREAM, 0.0)
        bank.inject(0, "external_limit", 60.0, 0.0)  # less than the static part and HBM take

        reading = bank.reading(0, 5.0)
        assert (reading.sm_clock_mhz, reading.enforced_limit_w) == (210, 60.0)
        assert bank.pace_mhz([0], 5.0) == 105.0
        assert 100.0 < reading.power_instant_w < 125.0

        bank.inject(0, "external_limit", 0.0, 5.0)
        assert bank.reading(0, 8.0).sm_clock_mhz == 1410


def test_a_limit_wins_over_a_lock_that_asks_for_more(tmp_path: Path) -> None:
    with boards(tmp_path, A100) as bank:
        bank.set_limit(0, 200.0, 0.0)
        bank.set_clock_lock(0, 1350, 1410, 0.0)
        bank.book([0], 0.0, 20.0, FULL, 0.0)

        assert bank.reading(0, 5.0).sm_clock_mhz < 1300
        assert 196.0 < mean_w(bank, 5.0, 10.0) < 201.0
        assert bank.reading(0, 60.0).sm_clock_mhz == 1350  # where the lock lets it rest


def test_clocks_rise_more_slowly_than_they_fall(tmp_path: Path) -> None:
    with boards(tmp_path, H100) as bank:
        bank.book([0], 0.0, 20.0, FULL, 0.0)
        high_mhz = bank.pace_mhz([0], 3.0)
        bank.set_limit(0, 200.0, 3.0)
        falling = [bank.pace_mhz([0], 3.0 + n * TICK_S) for n in range(1, 60)]
        bank.set_limit(0, 700.0, 3.6)
        rising = [bank.pace_mhz([0], 3.6 + n * TICK_S) for n in range(1, 60)]

    g = H100.firmware
    assert 0.0 < np.diff(rising).max() <= g.steps_up * 15 + 1e-6
    assert 0.0 < -np.diff(falling).min() <= g.steps_down * 15 + 1e-6
    assert g.steps_up < g.steps_down
    assert rising[-1] == pytest.approx(high_mhz, abs=30)


@pytest.mark.parametrize("period_s", [1.0, 0.2, 0.06])
@pytest.mark.parametrize("limit_w", [200.0, 250.0])
def test_a_load_that_comes_and_goes_has_its_mean_at_the_limit(period_s: float, limit_w: float, tmp_path: Path) -> None:
    with boards(tmp_path, A100) as bank:
        bank.set_limit(0, limit_w, 0.0)
        joules = []
        for n in range(round(8.0 / period_s)):  # prefill for a third of the time, decode for the rest
            start_s = n * period_s
            bank.book([0], start_s, start_s + 0.3 * period_s, Load(compute=0.9, memory=0.3), start_s)
            bank.book([0], start_s + 0.3 * period_s, start_s + period_s, Load(compute=0.1, memory=0.8), start_s)
            joules.append(bank.energy_integral_j(0, start_s))

    settled = np.array(joules[len(joules) // 2 :])
    assert limit_w - 4.0 < (settled[-1] - settled[0]) / ((len(settled) - 1) * period_s) < limit_w + 1.0


def test_near_natural_draw_a_limit_clips_the_peaks_of_a_fluctuating_load_alone(tmp_path: Path) -> None:
    means = {}
    for limit_w in (280.0, 310.0, 330.0, 345.0, 400.0):
        with boards(tmp_path / f"{limit_w}", A100) as bank:
            bank.set_limit(0, limit_w, 0.0)
            for n in range(100):  # peaks and troughs of 60 ms
                load = Load(compute=0.25, memory=0.6) if n % 2 else Load(compute=0.55, memory=0.6)
                bank.book([0], 0.06 * n, 0.06 * (n + 1), load, 0.0)
            means[limit_w] = mean_w(bank, 2.0, 6.0)
    natural_w = means[400.0]

    assert 325.0 < natural_w < 350.0
    assert list(means.values()) == sorted(means.values())
    assert all(mean < min(limit_w, natural_w) * 1.03 for limit_w, mean in means.items())
    assert means[345.0] < natural_w - 2.0  # it bites although the mean would be within it


def test_what_a_burst_draws_beyond_the_limit_is_paid_back(tmp_path: Path) -> None:
    with boards(tmp_path, H100) as bank:
        bank.set_limit(0, 400.0, 0.0)
        bank.book([0], 0.0, 3.0, STREAM, 0.0)
        bank.book([0], 3.0, 20.0, FULL, 0.0)
        trace_w = np.array([bank.reading(0, 3.0 + n * TICK_S).power_instant_w for n in range(1, 11)])

        assert trace_w.max() > 500.0
        assert mean_w(bank, 3.1, 4.1) < 399.0
        assert mean_w(bank, 10.0, 15.0) == pytest.approx(399.5, abs=1.0)


@given(
    shares=st.tuples(*[st.floats(0, 1)] * 3), awake=st.sampled_from([0.0, 1.0]), limit_w=st.floats(50, 700),
    clock=st.floats(100, 1980), filtered_w=st.floats(50, 900), debt_j=st.floats(0, 20), temperature_c=st.floats(20, 95),
)  # fmt: skip
def test_a_tick_of_one_board_is_that_of_an_array_and_keeps_its_bounds(
    shares: tuple[float, float, float], awake: float, limit_w: float, clock: float, filtered_w: float, debt_j: float,
    temperature_c: float,
) -> None:  # fmt: skip
    k, g = H100.silicon, H100.firmware
    common = (limit_w, 345.0, 1980.0 if awake else 345.0, 1.02, 0.97, 30.0)

    one = tick(k, g, *shares, awake, *common, clock, filtered_w, debt_j, temperature_c)
    both = tick(k, g, *(np.full(2, x) for x in (*shares, awake, *common, clock, filtered_w, debt_j, temperature_c)))

    assert [float(x) for x in one] == pytest.approx([float(x[1]) for x in both])
    power_w, clock_after, _, debt_after, _, _ = one
    assert 60.0 < power_w < 2500.0
    assert 0.5 * 345.0 <= clock_after <= 1980.0
    assert 0.0 <= debt_after <= limit_w * g.debt_limit_s


def test_the_tick_compiles_and_gives_the_same(tmp_path: Path) -> None:
    numba = pytest.importorskip("numba")
    from pals.plant.governor import thermal_ceiling_mhz
    from pals.plant.silicon import core_power_w, static_power_w, voltage

    for function in (voltage, core_power_w, static_power_w, govern, thermal_ceiling_mhz):
        numba.extending.register_jitable(function)
    compiled = numba.njit(tick)
    k = type(H100.silicon)(*map(float, H100.silicon))
    g = type(H100.firmware)(*map(float, H100.firmware))
    args = (0.8, 0.3, 1.0, 1.0, 400.0, 345.0, 1980.0, 1.0, 1.0, 30.0, 1900.0, 500.0, 1.0, 60.0)

    assert [float(x) for x in compiled(k, g, *args)] == pytest.approx([float(x) for x in tick(k, g, *args)])


def test_clocks_stay_up_for_a_while_after_the_last_kernel(tmp_path: Path) -> None:
    with boards(tmp_path, A100) as bank:
        bank.book([0], 0.0, 1.0, STREAM, 0.0)
        waiting, asleep = bank.reading(0, 3.5), bank.reading(0, 5.0)

    assert (waiting.sm_clock_mhz, waiting.throttle) == (1410, 0)
    assert waiting.power_instant_w == pytest.approx(70.0, rel=0.1)  # measured 67-73 W with a model loaded
    assert (asleep.sm_clock_mhz, asleep.throttle) == (210, 0x1)
    assert asleep.power_instant_w < waiting.power_instant_w - 5.0


def test_hot_air_slows_a_board_down_before_it_boils(tmp_path: Path) -> None:
    with boards(tmp_path, H100) as bank:
        bank.inject(0, "ambient", 60.0, 0.0)
        bank.book([0], 0.0, 400.0, FULL, 0.0)
        cool, hot = bank.reading(0, 5.0), bank.reading(0, 150.0)
        bank.inject(0, "ambient", 0.0, 150.0)
        mended = bank.reading(0, 270.0)

    assert cool.throttle == 0x4
    assert hot.throttle & 0x20
    assert 87.0 < hot.temperature_c < 92.0
    assert hot.sm_clock_mhz < cool.sm_clock_mhz
    assert mended.temperature_c < 75.0
    assert not mended.throttle & 0x20


def test_a_forced_hardware_slowdown_halves_the_clock_and_says_so(tmp_path: Path) -> None:
    with boards(tmp_path, A100) as bank:
        bank.book([0], 0.0, 20.0, STREAM, 0.0)
        bank.inject(0, "thermal", 1, 1.0)
        reading = bank.reading(0, 2.0)
        bank.inject(0, "thermal", 0, 2.0)

        assert (reading.sm_clock_mhz, reading.throttle) == (705, 0x48)
        assert (bank.reading(0, 3.0).sm_clock_mhz, bank.reading(0, 3.0).throttle) == (1410, 0)


def test_a_current_dip_takes_a_third_of_the_clock_for_half_a_second(tmp_path: Path) -> None:
    with boards(tmp_path, B200) as bank:
        bank.book([0], 0.0, 20.0, DECODE, 0.0)
        free_mhz = bank.reading(0, 2.0).sm_clock_mhz
        bank.inject(0, "dip", 0.5, 2.0)
        dipped, after = bank.reading(0, 2.3), bank.reading(0, 3.5)

    assert dipped.sm_clock_mhz == pytest.approx(0.7 * free_mhz, abs=15)
    assert dipped.throttle == 0x4
    assert dipped.power_instant_w < B200.default_limit_w * 0.8
    assert (after.sm_clock_mhz, after.throttle) == (free_mhz, 0)


def test_dips_come_by_themselves_on_loaded_boards_the_same_for_one_seed(tmp_path: Path) -> None:
    often = replace(B200, firmware=B200.firmware._replace(dip_interval_s=5.0))

    def dips(seed: int, load: Load) -> list[bool]:
        with boards(tmp_path, often, seed=seed) as bank:
            bank.book([0], 0.0, 40.0, load, 0.0)
            return [bank.reading(0, t).throttle == 0x4 for t in np.arange(1.0, 39.0, 0.2).tolist()]

    first = dips(4, DECODE)
    assert 3 < sum(first) < 80
    assert first == dips(4, DECODE) != dips(5, DECODE)
    assert not any(dips(4, Load(compute=0.0, memory=0.0, busy=0.05)))


@settings(max_examples=20, deadline=None)
@given(looks=st.lists(st.floats(0.0, 3.0), max_size=12))
def test_what_meters_show_does_not_depend_on_who_looked_before(tmp_path_factory: Any, looks: list[float]) -> None:
    folder = tmp_path_factory.mktemp("looks")
    readings = []
    for times in (sorted(looks), []):
        with boards(folder, A100, latency_s=0.004) as bank:
            for n in range(3):
                bank.book([0], n, n + 0.6, FULL, 0.0)
            for t in times:
                bank.reading(0, t)
            readings.append(bank.reading(0, 3.005))
    assert readings[0].energy_j == pytest.approx(readings[1].energy_j, rel=1e-9)
    assert readings[0].sm_clock_mhz == readings[1].sm_clock_mhz
    assert readings[0].power_avg_w == pytest.approx(readings[1].power_avg_w, rel=1e-9)


@pytest.mark.parametrize("name", ["a100-sxm4-80gb", "h100-sxm5-80gb", "b200-sxm-180gb"])
def test_the_energy_counter_is_within_two_percent_and_refreshes_on_its_grid(name: str, tmp_path: Path) -> None:
    with boards(tmp_path, SPECS[name]) as bank:
        bank.book([0], 0.0, 20.0, STREAM, 0.0)
        shown = [bank.reading(0, 5.0 + n * TICK_S).energy_j for n in range(21)]
        before, integral = bank.reading(0, 6.0).energy_j, bank.energy_integral_j(0, 6.0)
        counted_j, drawn_j = bank.reading(0, 8.0).energy_j - before, bank.energy_integral_j(0, 8.0) - integral

    assert len(set(shown)) == round(0.2 / SPECS[name].energy_refresh_s) + 1
    assert counted_j == pytest.approx(drawn_j, rel=0.02)


@pytest.mark.parametrize(("name", "aliases"), [("h100-sxm5-80gb", True), ("b200-sxm-180gb", False)])
def test_a_sensor_that_sees_a_quarter_of_the_time_mistakes_a_load_in_step_with_it(
    name: str, aliases: bool, tmp_path: Path
) -> None:
    with boards(tmp_path, SPECS[name]) as bank:
        for n in range(60):  # busy in the first 30 ms of each 100 ms
            bank.book([0], 0.1 * n - 0.005, 0.1 * n + 0.025, STREAM, 0.0)
        shown_w, true_w = bank.reading(0, 5.0).power_avg_w, mean_w(bank, 5.0, 6.0)

    assert (shown_w > 1.3 * true_w) == aliases
    if not aliases:
        assert shown_w == pytest.approx(true_w, rel=0.02)


def test_instantaneous_power_is_a_short_window(tmp_path: Path) -> None:
    with boards(tmp_path, H100) as bank:
        bank.book([0], 0.0, 1.0, Load(compute=0.0, memory=0.0, busy=0.0), 0.0)
        bank.book([0], 1.0, 3.0, STREAM, 0.0)
        shown_w = [bank.reading(0, 1.0 + n * TICK_S + 1e-6).power_instant_w for n in range(6)]

    rise = (np.array(shown_w) - shown_w[0]) / (shown_w[-1] - shown_w[0])
    assert rise[:4] == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0], abs=0.02)


def test_a_limit_is_read_back_at_once_and_acts_a_while_later(tmp_path: Path) -> None:
    with boards(tmp_path, A100, latency_s=0.004) as bank:
        bank.book([0], 0.0, 20.0, STREAM, 0.0)
        free_mhz = bank.pace_mhz([0], 2.0)
        bank.set_limit(0, 150.1234, 2.0)
        assert bank.reading(0, 2.0).enforced_limit_w == 150.123  # to the milliwatt
        clocks = [bank.pace_mhz([0], 2.0 + n * TICK_S) for n in range(8)]

    acted = next(n for n, mhz in enumerate(clocks) if mhz < free_mhz)
    assert 0.01 <= acted * TICK_S <= 0.05 + 2 * TICK_S


def test_setters_take_at_least_their_shortest_time_and_sometimes_much_longer(tmp_path: Path) -> None:
    with boards(tmp_path, A100, latency_s=0.004) as bank:
        times = []
        for n in range(300):
            times.append(bank.setter_time_s(0))
            bank.set_limit(0, 300.0 + n % 2, 0.0)
        bank.inject(0, "slow_setter", 0.3, 0.0)
        assert bank.setter_time_s(0) >= 0.304

    assert min(times) >= 0.004
    assert 0.005 < np.median(times) < 0.008
    assert 0.015 < max(times) <= 0.05


def test_specimens_differ_as_boards_of_one_type_do(tmp_path: Path) -> None:
    with boards(tmp_path, H100, 64) as bank:
        bank.book(range(64), 0.0, 10.0, STREAM, 0.0)
        readings = [bank.reading(i, 5.0) for i in range(64)]
    same = replace(H100, variation=Variation(0.0, 0.0, 0.0, 0.0))
    with boards(tmp_path, same, 4) as bank:
        bank.book(range(4), 0.0, 10.0, STREAM, 0.0)
        equal = [bank.reading(i, 5.0).power_instant_w for i in range(4)]

    watts = np.array([r.power_instant_w for r in readings])
    assert 0.01 < watts.std() / watts.mean() < 0.05
    assert {r.sm_clock_mhz for r in readings} == {1935, 1950, 1965, 1980}
    assert len(set(equal)) == 1
    assert equal[0] == pytest.approx(load_power_w(H100.silicon, STREAM, 1980), rel=0.02)


def test_a_bank_holds_the_physics_it_was_made_with(tmp_path: Path) -> None:
    hungry = replace(A100, silicon=A100.silicon._replace(hbm_w=90.0))
    with boards(tmp_path, hungry) as bank:
        other = BoardBank.open(bank.path)
        assert other.spec.silicon.hbm_w == 90.0
        assert other.spec.firmware == A100.firmware
        other.close()


def test_every_group_of_constants_says_where_it_is_from() -> None:
    groups = [
        g for board in json.loads(SPECS_FILE.read_text()).values() if isinstance(board, dict) for g in numbers_in(board)
    ]

    assert len(groups) > 100
    assert all(g["source"] and g["confidence"] in ("A", "B", "C") for g in groups)


def numbers_in(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for group in board.values():
        if isinstance(group, dict):
            yield from [group] if any(isinstance(v, int | float) for v in group.values()) else numbers_in(group)
