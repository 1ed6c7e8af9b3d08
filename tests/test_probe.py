"""Looking at boards without writing: meters told from watching them, faults reported per board, over the real nvidia-ml-py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pals.core.diagnosis import NvmlFacts
from pals.hardware.metering import judge_meters
from pals.hardware.probe import probe_nvml, probe_privilege
from pals.plant.boards import BoardBank
from pals.plant.silicon import Load
from pals.plant.specs import board_specs

pytest.importorskip("pynvml")
Reading = tuple[float, float, float]


def readings(
    power: Callable[[float], float], *, window_s: float, refresh_s: float, every_s: float = 0.005
) -> list[Reading]:
    """Four seconds of a board whose instantaneous power is `power(t)`: counter and windowed mean as boards show them."""
    fine_s = np.arange(-1.5, 4.0, 0.001)
    energy_j = np.cumsum([power(float(t)) for t in fine_s]) * 0.001
    made = []
    for t in np.arange(0.0, 4.0, every_s):
        shown = float(np.interp(np.floor(t / refresh_s) * refresh_s, fine_s, energy_j))
        start, end = np.interp([t - window_s, t], fine_s, energy_j)
        made.append((float(t), shown, float(end - start) / window_s))
    return made


def square(t: float) -> float:
    """Power of a load that comes and goes."""
    return 350.0 if t % 1.4 < 0.6 else 100.0


@pytest.mark.parametrize("window", [0.1, 0.5, 1.0])
def test_the_averaging_window_is_told_from_energy_differences(window: float) -> None:
    meter = judge_meters(readings(square, window_s=window, refresh_s=0.05))

    assert meter.power_window_s == window
    assert meter.energy_refresh_s == pytest.approx(0.05, abs=0.006)
    assert meter.power_w == pytest.approx(207.0, rel=0.1)


def test_how_often_the_power_reading_changes_is_told_apart_from_the_counter() -> None:
    seen = readings(square, window_s=0.5, refresh_s=0.02)
    held = [(t, e, seen[i - i % 20][2]) for i, (t, e, _) in enumerate(seen)]  # shown anew every 20 * 5 ms

    meter = judge_meters(held)

    assert meter.power_refresh_s == pytest.approx(0.1, abs=0.006)
    assert meter.energy_refresh_s == pytest.approx(0.02, abs=0.006)


def test_a_steady_power_leaves_the_window_unknown() -> None:
    meter = judge_meters(readings(lambda t: 300.0, window_s=1.0, refresh_s=0.05))

    assert meter.power_window_s is None
    assert meter.swing_w == pytest.approx(0.0, abs=0.1)


def test_a_reading_that_fits_no_window_leaves_it_unknown() -> None:
    unrelated = [(t, e, 200.0 + 50.0 * np.sin(7.0 * t)) for t, e, _ in readings(square, window_s=1.0, refresh_s=0.05)]

    assert judge_meters(unrelated).power_window_s is None


def test_a_counter_that_stands_still_gives_no_power() -> None:
    meter = judge_meters([(0.005 * i, 1234.0, 300.0) for i in range(400)])

    assert (meter.energy_refresh_s, meter.power_w, meter.power_window_s) == (None, None, None)


@dataclass
class World:
    """Emulated boards with a time of their own, that passes only when the probe sleeps."""

    path: Path
    board: str = "h100-sxm5-80gb"
    writable: bool = True
    now: float = 10.0

    def __post_init__(self) -> None:
        self.bank = BoardBank.create(self.path, board_specs()[self.board], 2, writable=self.writable, now_s=self.now)

    def probe(self, watch_s: float = 0.5) -> NvmlFacts:
        return probe_nvml(
            emulated=self.path, emulator_alive=True, watch_s=watch_s, clock=lambda: self.now, sleep=self.sleep
        )

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "bank")
    yield made
    made.bank.close()


def test_it_says_what_the_boards_are_and_writes_nothing(world: World) -> None:
    before = [world.bank.reading(i, world.now) for i in range(2)]

    facts = world.probe()

    assert facts.error is None
    assert facts.may_write
    assert [b.index for b in facts.boards] == [0, 1]
    board = facts.boards[1]
    assert board.info is not None
    assert board.now is not None
    assert board.settings is not None
    assert board.meter is not None
    assert (board.info.max_limit_w, board.now.enforced_limit_w) == (700.0, 700.0)
    assert (board.settings.persistence_mode, board.settings.clock_lock_api) == (True, True)
    assert board.settings.mig_mode is False
    assert board.settings.clock_reasons == ("idle",)
    assert 0.045 < (board.meter.energy_refresh_s or 0.0) < 0.07
    assert board.meter.power_window_s is None
    after = [world.bank.reading(i, world.now) for i in range(2)]
    assert [(r.requested_limit_w, r.enforced_limit_w) for r in after] == [
        (r.requested_limit_w, r.enforced_limit_w) for r in before
    ]


def test_the_emulated_h100_averages_over_a_second_as_the_real_one(world: World) -> None:
    for k in range(6):
        world.bank.book([0], 10.0 + 0.9 * k, 10.4 + 0.9 * k, Load(compute=0.3, memory=0.8), world.now)

    busy, idle = world.probe(watch_s=4.0).boards

    assert busy.meter is not None
    assert idle.meter is not None
    assert busy.meter.power_window_s == 1.0
    assert idle.meter.power_window_s is None


def test_without_watching_nothing_is_said_of_the_meters(world: World) -> None:
    assert [b.meter for b in world.probe(watch_s=0.0).boards] == [None, None]


def test_a_lost_board_is_reported_and_the_others_are_still_looked_at(world: World) -> None:
    world.bank.inject(0, "lost", 1, world.now)

    lost, sound = world.probe().boards

    assert "board is lost" in (lost.error or "")
    assert lost.info is None
    assert sound.error is None
    assert sound.meter is not None


def test_boards_that_refuse_writes_say_so_without_being_asked_to_write(tmp_path: Path) -> None:
    world = World(tmp_path / "bank", writable=False)

    assert not world.probe().may_write
    world.bank.close()


def test_no_driver_is_a_fact_and_not_a_traceback(tmp_path: Path) -> None:
    facts = probe_nvml(emulated=None, watch_s=0.0, proc=tmp_path)

    assert "no NVIDIA driver" in (facts.error or "")
    assert facts.kernel_driver is None
    assert facts.boards == ()


def test_a_loaded_kernel_driver_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "driver/nvidia").mkdir(parents=True)
    (tmp_path / "driver/nvidia/version").write_text("NVRM version: NVIDIA UNIX 580.95.05\nGCC version: 12\n")

    assert probe_nvml(emulated=None, watch_s=0.0, proc=tmp_path).kernel_driver == "NVRM version: NVIDIA UNIX 580.95.05"


@pytest.mark.parametrize(("mask", "has"), [("000001ffffffffff", True), ("00000000a80425fb", False)])
def test_the_capability_to_set_limits_is_read_from_the_process(tmp_path: Path, mask: str, has: bool) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text(f"Name:\tpals\nCapEff:\t{mask}\n")

    assert probe_privilege(tmp_path).sys_admin is has
    assert probe_privilege(tmp_path / "nowhere").sys_admin is None
