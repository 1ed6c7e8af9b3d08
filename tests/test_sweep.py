"""The sweep measures what stands there, keeps every row, goes on where it was stopped and refuses foreign rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pals.control.guard import Guard
from pals.control.static import StaticPolicy
from pals.core.errors import ConfigError, ProfileMismatchError
from pals.core.quantities import OperatingPoint, fingerprint_of
from pals.models.profile import ProfileRow
from pals.profiler.sweep import (
    Interrupted,
    PartialRows,
    SweepPlan,
    default_limits_w,
    default_sequences,
    sweep,
)
from pals.runtime.loop import GridClock
from pals.runtime.tick import Rig
from tests.worlds import Board, Clock, Engine, board_info, engine_info

PLAN = SweepPlan(limits_w=(200.0, 400.0), sequences=(8, 64), settle_s=1.0, window_s=4.0)
FINGERPRINT = fingerprint_of(engine_info(), [board_info()])


class Load:
    """Remembers the concurrency asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def set_concurrency(self, n: int) -> None:
        self.asked.append(n)


def world(until_s: float = 1e9) -> tuple[Clock, Rig, Load]:
    clock = Clock(until_s=until_s)
    boards, engine = [Board(clock)], Engine(clock)
    rig = Rig(
        meters=boards, actuators=boards, engine=engine, setter=engine,
        controller=StaticPolicy(OperatingPoint(power_limit_w=400.0)), guard=Guard.of([board_info()], 64), period_s=0.5,
    )  # fmt: skip
    return clock, rig, Load()


def measure(tmp_path: Path, until_s: float = 1e9) -> tuple[list[ProfileRow], list[bool]]:
    clock, rig, load = world(until_s)
    partial = PartialRows(tmp_path / "p.partial.jsonl", FINGERPRINT, "load")
    measured: list[bool] = []
    rows = sweep(
        rig, PLAN, load=load, partial=partial, clock=GridClock(now_s=clock.now_s, wait=clock.wait),
        progress=lambda point, row: measured.append(row is not None),
    )  # fmt: skip
    return rows, measured


def test_rows_hold_what_the_world_does(tmp_path: Path) -> None:
    rows, measured = measure(tmp_path)

    assert measured == [True] * 4
    assert {(r.power_limit_w, r.active_sequences): (r.power_w, r.tokens_per_s) for r in rows} == {
        (400.0, 8): (320.0, 160.0),
        (200.0, 8): (200.0, 160.0),
        (400.0, 64): (320.0, 1280.0),
        (200.0, 64): (200.0, 1280.0),
    }


def test_clocks_are_swept_at_the_found_limit_announced_and_released(tmp_path: Path) -> None:
    clock, rig, load = world()
    partial = PartialRows(tmp_path / "p.partial.jsonl", FINGERPRINT, "load")
    plan = replace(PLAN, sequences=(8,), clocks_mhz=(1005, 1410), found_limit_w=350.0)
    board = rig.actuators[0]
    announced: list[bool] = []
    board.announce_to(lambda write: announced.append(write.clock_locked))

    rows = sweep(
        rig, plan, load=load, partial=partial, clock=GridClock(now_s=clock.now_s, wait=clock.wait),
        progress=lambda point, row: None,
    )  # fmt: skip

    assert [(r.power_limit_w, r.requested_clock_mhz, r.sm_clock_mhz) for r in rows] == [
        (400.0, None, 1410), (200.0, None, 1410), (350.0, 1410, 1410), (350.0, 1005, 1005),
    ]  # fmt: skip
    assert announced == [False, False, True, True]
    again = PartialRows(tmp_path / "p.partial.jsonl", FINGERPRINT, "load")
    assert again.rows == rows
    assert all(again.has(point) for point in plan.points)
    assert not again.has(replace(plan.points[-1], sm_clock_mhz=1200))


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        measure(tmp_path, until_s=112.0)

    rows, measured = measure(tmp_path)

    assert measured == [False, False, True, True]
    assert len(rows) == 4


def test_rows_of_another_engine_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "p.partial.jsonl"
    PartialRows(path, FINGERPRINT, "load")

    with pytest.raises(ProfileMismatchError, match="model: "):
        PartialRows(path, replace(FINGERPRINT, model="another"), "load")
    with pytest.raises(ProfileMismatchError, match="load: "):
        PartialRows(path, FINGERPRINT, "another load")
    path.write_text("rubbish\n")
    with pytest.raises(ConfigError, match="damaged"):
        PartialRows(path, FINGERPRINT, "load")


def test_the_default_grid_stays_inside_board_and_batch() -> None:
    assert default_limits_w(100.0, 400.0) == (150.0, 200.0, 250.0, 300.0, 350.0, 400.0)
    assert default_limits_w(200.0, 700.0)[0] >= 200.0
    assert default_sequences(64) == (4, 8, 16, 32, 64)
    assert default_sequences(3) == (3,)
