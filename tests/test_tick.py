"""The tick and the loop: energy-counter power, order of writing, drift-free grid, boards put back whatever happens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.control.guard import Guard
from pals.control.static import StaticPolicy
from pals.core.errors import (
    ConfigError,
    DeviceLostError,
    EngineGoneError,
    NotPutBackError,
    NotSupportedError,
    PalsError,
)
from pals.core.quantities import BoardWrite, Budget, EngineSample, OperatingPoint, Slo
from pals.runtime.budgets import BudgetSchedule, parse_budget
from pals.runtime.found import left_by_dead_agent
from pals.runtime.loop import GridClock, boards_as_found, run
from pals.runtime.processes import process_started
from pals.runtime.staleness import stale_notes
from pals.runtime.tick import Rig, TickRecord
from tests.found_records import write_record
from tests.worlds import Board, Clock, Engine, engine_sample


def rig(clock: Clock, boards: Sequence[Board], engine: Engine, *, limit_w: float = 400.0, n: int = 64) -> Rig:
    return Rig(
        meters=boards,
        actuators=boards,
        engine=engine,
        setter=engine,
        controller=StaticPolicy(OperatingPoint(power_limit_w=limit_w, active_sequences=n)),
        guard=Guard.of([b.info for b in boards], launch_sequences=64),
        period_s=0.5,
    )


def go(r: Rig, clock: Clock, budget: BudgetSchedule = BudgetSchedule(), slo: Slo = Slo()) -> list[TickRecord]:  # noqa: B008
    records: list[TickRecord] = []
    run(r, budget=budget, slo=slo, clock=GridClock(now_s=clock.now_s, wait=clock.wait), sink=records.append)
    return records


def test_power_comes_from_the_energy_counters() -> None:
    clock = Clock(until_s=105.0)
    boards = [Board(clock, i) for i in range(4)]

    records = go(rig(clock, boards, Engine(clock)), clock)

    assert records[0].sample.power_w is None
    assert [r.sample.power_w for r in records[1:]] == pytest.approx([4 * 320.0] * (len(records) - 1))


def test_a_budget_step_bites_at_the_next_tick_and_is_kept() -> None:
    clock = Clock(until_s=110.0)
    boards = [Board(clock, i) for i in range(4)]

    records = go(rig(clock, boards, Engine(clock)), clock, parse_budget("0:1600,5:800,8:1600"))

    low = [r for r in records if r.budget.power_w == 800.0]
    assert low[0].guarded.reason == "guard-budget"
    assert all(r.sample.power_w is not None and r.sample.power_w <= 800.0 for r in low[1:])
    assert records[-1].guarded.point.power_limit_w > 300.0


def test_the_grid_does_not_drift_and_a_late_tick_skips_grid_points() -> None:
    clock = Clock(until_s=110.0)
    board, engine = Board(clock), Engine(clock)
    late: list[float] = []
    times: list[float] = []

    def slow_sink(record: TickRecord) -> None:
        times.append(record.sample.time_s)
        clock.now += 0.013 if len(times) != 5 else 1.3
        late.append(clock.now)

    run(
        rig(clock, [board], engine), budget=BudgetSchedule(), slo=Slo(),
        clock=GridClock(now_s=clock.now_s, wait=clock.wait), sink=slow_sink,
    )  # fmt: skip

    offsets = [(t - 100.0) / 0.5 for t in times]
    assert offsets == pytest.approx([round(o) for o in offsets], abs=1e-6)
    assert 4.0 in [round(o) for o in offsets]
    assert 5.0 not in [round(o) for o in offsets]
    assert 7.0 in [round(o) for o in offsets]


def test_a_refused_write_turns_to_advice_with_one_clear_line() -> None:
    clock = Clock(until_s=103.0)
    board = Board(clock, denied=True)

    records = go(rig(clock, [board], Engine(clock), limit_w=200.0), clock)

    assert [r.notes != () for r in records] == [True] + [False] * (len(records) - 1)
    assert "only advises" in records[0].notes[0]
    assert {r.mode for r in records} == {"advise"}
    assert board.written_w == []
    assert records[-1].enforced_limits_w == (400.0,)
    assert records[-1].guarded.point.power_limit_w == 200.0


def test_a_limit_lowered_by_another_is_read_back_and_told() -> None:
    clock = Clock(until_s=101.0)
    board = Board(clock, external_w=250.0)

    record = go(rig(clock, [board], Engine(clock), limit_w=400.0), clock)[0]

    assert record.enforced_limits_w == (250.0,)
    assert "something else holds the limit lower" in record.notes[0]


@pytest.mark.parametrize("fails", [DeviceLostError("lost"), PalsError("unknown error"), ValueError("invalid argument")])
def test_a_board_that_cannot_be_read_is_absent_and_keeps_its_part_of_the_budget(fails: Exception) -> None:
    clock = Clock(until_s=106.0)
    boards = [Board(clock, i) for i in range(3)]
    events = {102.0: fails, 104.0: None}

    def sink_at(record: TickRecord) -> None:
        records.append(record)
        for at_s in [t for t in events if t <= clock.now]:
            boards[1].fails = events.pop(at_s)

    records: list[TickRecord] = []
    run(
        rig(clock, boards, Engine(clock)), budget=parse_budget("0:1000,3:700"), slo=Slo(), sink=sink_at,
        clock=GridClock(now_s=clock.now_s, wait=clock.wait),
    )  # fmt: skip

    away = [r for r in records if r.sample.absent]
    assert {r.sample.absent for r in away} == {(1,)}
    assert {r.sample.positions for r in away} == {(0, 2)}
    assert all(r.sample.power_w is None for r in away)
    held = [r for r in away if r.budget.power_w == 700.0]
    assert {r.enforced_limits_w for r in held} == {(180.0, 180.0)}  # 700 less 2 %, less the 326 W board 1 stood at
    assert "board 1 may draw 326 W unseen: the engine's other boards go to 180 W" in held[0].notes[1]
    back = records[records.index(away[-1]) + 1]
    assert (back.sample.power_w, back.enforced_limits_w) == (None, (228.0,) * 3)
    assert "board 1 can be read again" in back.notes
    assert records[-1].sample.power_w is not None


def test_a_note_that_stays_the_same_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock(until_s=103.0)

    records = go(rig(clock, [Board(clock, 0), Board(clock, 1, lost=True)], Engine(clock)), clock)

    assert all("lost" in r.notes[0] for r in records)
    assert sum("lost" in m for m in caplog.messages) == 1


def test_a_board_lost_from_the_start_may_draw_the_most_the_guard_allows() -> None:
    clock = Clock(until_s=101.0)
    boards = [Board(clock, 0), Board(clock, 1, lost=True)]

    records = go(rig(clock, boards, Engine(clock)), clock, parse_budget("700"))

    assert {r.enforced_limits_w for r in records} == {(286.0,)}


def test_a_board_without_an_energy_counter_is_measured_by_the_drivers_readings() -> None:
    clock = Clock(until_s=102.0)
    boards = [Board(clock, 0), Board(clock, 1, natural_w=200.0, energy_counter=False)]

    records = go(rig(clock, boards, Engine(clock)), clock)

    assert [r.sample.power_w for r in records[1:]] == pytest.approx([520.0] * (len(records) - 1))
    assert ["no energy counter" in "".join(r.notes) for r in records] == [True] + [False] * (len(records) - 1)


@pytest.mark.parametrize("theirs_w", [200.0, 350.0])
def test_what_another_hand_sets_is_never_exceeded_and_is_left_on_exit(tmp_path: Path, theirs_w: float) -> None:
    clock = Clock(until_s=105.0)
    boards = [Board(clock, i) for i in range(3)]
    found: list[dict[str, BoardWrite]] = []

    def somebody_sets(record: TickRecord) -> None:
        records.append(record)
        if record.index == 3:
            boards[2].limit_w = theirs_w
        found.append(left_by_dead_agent(tmp_path / "found.json"))

    records: list[TickRecord] = []
    with boards_as_found(boards, boards, tmp_path / "found.json"):
        run(
            rig(clock, boards, Engine(clock), limit_w=300.0), budget=BudgetSchedule(), slo=Slo(), sink=somebody_sets,
            clock=GridClock(now_s=clock.now_s, wait=clock.wait),
        )  # fmt: skip

    told = [n for r in records for n in r.notes if "somebody else" in n]
    assert told == [f"board 2: somebody else set {theirs_w:.0f} W; PALS stays at or below it and leaves it so on exit"]
    assert {r.enforced_limits_w for r in records[4:]} == {(min(theirs_w, 300.0),) * 3}
    assert found[3]["GPU-2"].found_limit_w == 400.0
    assert found[-1]["GPU-2"].found_limit_w == theirs_w
    assert [b.limit_w for b in boards] == [400.0, 400.0, theirs_w]


def test_a_limit_that_another_hand_set_last_is_left_on_exit(tmp_path: Path) -> None:
    board = Board(Clock())

    with boards_as_found([board], [board], tmp_path / "found.json"):
        board.apply(OperatingPoint(power_limit_w=300.0))
        board.limit_w = 250.0

    assert board.limit_w == 250.0
    assert not (tmp_path / "found.json").exists()


class Hanging(Engine):
    """Takes no step between two times, and says so in its counters."""

    hangs_s = (102.0, 110.0)

    def read(self) -> EngineSample:
        told = super().read()
        first, last = self.hangs_s
        return replace(told, time_s=first, steps=7) if first < self.clock.now < last else told


def test_an_engine_that_hangs_is_told_while_it_does_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock(until_s=113.0)

    records = go(rig(clock, [Board(clock)], Hanging(clock), limit_w=200.0), clock)

    noted = [r.sample.time_s for r in records if r.notes]
    assert (noted[0], noted[-1]) == (107.5, 109.5)
    assert "no step has ended for more than 5 s (after step 7)" in next(r.notes[0] for r in records if r.notes)
    assert sum("stands still" in m for m in caplog.messages) == 1


def test_an_idle_engine_is_not_stale() -> None:
    assert stale_notes(engine_sample(0.0), 1000.0) == []
    assert len(stale_notes(engine_sample(0.0, running=1), 1000.0)) == 1


class Refusing(Board):
    """A board whose driver refuses every write."""

    def apply(self, wanted: OperatingPoint) -> OperatingPoint:
        raise NotSupportedError(f"board {self.index}: not supported here")


def group_of(clock: Clock, odd: Board) -> list[Board]:
    return [Board(clock, 0, limit_w=300.0), Board(clock, 1, limit_w=300.0), odd, Board(clock, 3, limit_w=300.0)]


def test_where_one_board_cannot_rise_its_group_does_not_rise_either() -> None:
    clock = Clock(until_s=103.0)
    boards = group_of(clock, Refusing(clock, 2, limit_w=300.0))
    for b in boards:
        b.found_w = 400.0

    records = go(rig(clock, boards, Engine(clock), limit_w=400.0), clock)

    assert [r.enforced_limits_w for r in records] == [(300.0,) * 4] * len(records)
    assert "not supported here" in records[0].notes[0]
    assert "the engine's other boards go to 300 W" in records[0].notes[1]
    assert all(set(b.written_w[2:]) <= {300.0} for b in boards), "after the first tick nothing goes up and down again"


def test_where_one_board_cannot_fall_the_others_keep_the_budget_for_it() -> None:
    clock = Clock(until_s=106.0)
    boards = group_of(clock, Refusing(clock, 2, limit_w=300.0))

    records = go(rig(clock, boards, Engine(clock), limit_w=300.0), clock, parse_budget("0:1300,3:1000,4.5:500"))

    assert records[0].enforced_limits_w == (300.0,) * 4
    middle = [r for r in records if r.budget.power_w == 1000.0]
    assert {r.enforced_limits_w for r in middle} == {(226.0, 226.0, 300.0, 226.0)}
    assert sum(middle[0].enforced_limits_w) <= 980.0
    low = records[-1]
    assert low.enforced_limits_w == (100.0, 100.0, 300.0, 100.0)  # the boards' minimum; the note says what stands


def test_boards_written_before_a_denied_one_are_put_back() -> None:
    clock = Clock(until_s=102.0)
    boards = [Board(clock, 0), Board(clock, 1, denied=True)]

    engine = Engine(clock)
    engine.apply(8, lease_s=100.0)
    records = go(rig(clock, boards, engine, limit_w=200.0, n=8), clock)

    assert boards[0].written_w == [200.0]
    assert {r.enforced_limits_w for r in records} == {(400.0, 400.0)}
    assert {r.mode for r in records} == {"advise"}
    assert (engine.in_force, engine.lease_until_s) == (64, 0.0)  # no batch is limited either


@given(st.lists(st.floats(100, 400), min_size=1, max_size=7), st.floats(100, 400), st.floats(500, 4000))
def test_the_limit_beside_stuck_boards_keeps_the_budget_or_stands_at_the_minimum(
    stuck_w: list[float], wanted_w: float, budget_w: float
) -> None:
    guard = Guard(min_limit_w=100.0, max_limit_w=400.0, boards=8, launch_sequences=64)

    limit_w = guard.limit_beside(stuck_w, wanted_w, Budget(power_w=budget_w))

    assert 100.0 <= limit_w <= min(wanted_w, *stuck_w)
    total_w = sum(stuck_w) + limit_w * (8 - len(stuck_w))
    assert total_w <= budget_w * 0.98 + 1e-6 or limit_w == 100.0


@pytest.mark.parametrize("gone_at_s", [1e9, 104.2])
def test_boards_are_put_back_as_found_on_stop_and_when_the_engine_goes(tmp_path: Path, gone_at_s: float) -> None:
    clock = Clock(until_s=108.0)
    boards = [Board(clock, i, limit_w=350.0) for i in range(2)]
    engine = Engine(clock, gone_at_s=gone_at_s)
    record = tmp_path / "found.json"

    def steer() -> None:
        with boards_as_found(boards, boards, record):
            go(rig(clock, boards, engine, limit_w=200.0), clock)

    if gone_at_s < 200:
        with pytest.raises(EngineGoneError):
            steer()
    else:
        steer()

    assert boards[0].written_w
    assert [b.limit_w for b in boards] == [350.0, 350.0]
    assert not record.exists()


def test_what_a_killed_agent_left_is_known_and_a_living_one_is_respected(tmp_path: Path) -> None:
    record = tmp_path / "found.json"
    assert left_by_dead_agent(record) == {}

    write_record(record, {"GPU-0": (400.0, [300.0]), "GPU-1": (400.0, [])})
    assert {u: w.found_limit_w for u, w in left_by_dead_agent(record).items()} == {"GPU-0": 400.0}  # 1 was not written

    init = process_started(1)
    assert init is not None
    write_record(record, {"GPU-0": (400.0, [300.0])}, pid=1, started=init)
    with pytest.raises(ConfigError, match="another PALS agent"):
        left_by_dead_agent(record)

    write_record(record, {"GPU-0": (400.0, [300.0])}, pid=1, started=init + 1)  # its id went to another process
    assert set(left_by_dead_agent(record)) == {"GPU-0"}


def test_the_engines_lease_outlives_a_few_missed_ticks_and_then_ends() -> None:
    clock = Clock(until_s=102.0)
    engine = Engine(clock)

    go(rig(clock, [Board(clock)], engine, n=8), clock)

    assert engine.in_force == 8
    clock.now += 3.1
    assert engine.in_force == 64


def test_one_board_that_refuses_does_not_keep_the_others_limited(tmp_path: Path) -> None:
    class Stubborn(Board):
        def restore(self) -> None:
            raise ValueError("invalid argument")

    clock = Clock()
    boards = [Stubborn(clock, 0), Board(clock, 1)]
    record = tmp_path / "found.json"

    def limit() -> None:
        with boards_as_found(boards, boards, record):
            for board in boards:
                board.apply(OperatingPoint(power_limit_w=200.0))

    with pytest.raises(NotPutBackError, match="1 of 2 boards could not be put back: invalid argument"):
        limit()

    assert boards[1].limit_w == 400.0
    assert set(left_by_dead_agent(record)) == {"GPU-0"}  # what was found stays known for `pals restore`
