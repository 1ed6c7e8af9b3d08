"""The SM clock as a lever: asked, accepted, measured; refused locks degrade to the limit alone; no lock outlives PALS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.cli.mending import mend
from pals.control.guard import Guard
from pals.control.policies import build_policy
from pals.control.static import StaticPolicy
from pals.core.errors import ConfigError, NotPutBackError, PalsError
from pals.core.quantities import Budget, Decision, OperatingPoint, Slo
from pals.hardware.nvml import Nvml, open_boards
from pals.plant.boards import BoardBank
from pals.plant.silicon import Load
from pals.plant.specs import board_specs
from pals.runtime.budgets import BudgetSchedule
from pals.runtime.found import left_by_dead_agent
from pals.runtime.journal import encode
from pals.runtime.loop import GridClock, boards_as_found, run
from pals.runtime.tick import Rig, TickRecord
from pals.views.metrics import AgentMetrics
from pals.views.status import clock_text
from tests.found_records import write_record
from tests.test_tick import go, rig
from tests.worlds import Board, Clock, Engine, board_info

A100 = board_specs()["a100-sxm4-80gb"]


def locked(clock: Clock, boards: Sequence[Board], mhz: int | None, record: Path | None = None) -> list[TickRecord]:
    """Run a static policy with this ceiling until the clock says stop."""
    made = rig(clock, boards, Engine(clock))
    made.controller = StaticPolicy(OperatingPoint(power_limit_w=300.0, sm_clock_mhz=mhz, active_sequences=64))
    if record is None:
        return go(made, clock)
    with boards_as_found(boards, boards, record):
        return go(made, clock)


def test_a_record_holds_the_clock_as_requested_accepted_and_measured() -> None:
    clock = Clock(until_s=103.0)
    records = locked(clock, [Board(clock, i) for i in range(2)], 1203)
    metrics = AgentMetrics()
    watcher = metrics.engine("e", [0, 1])
    for record in records:
        watcher.observe(record)
    last = records[-1]

    assert (last.decision.point.sm_clock_mhz, last.guarded.point.sm_clock_mhz) == (1203, 1200)
    assert last.guarded.reason == "guard-clock"
    assert last.accepted_clocks_mhz == (1200, 1200)
    assert [b.sm_clock_mhz for b in last.sample.boards] == [1200, 1200]
    value = metrics.registry.get_sample_value
    assert value("pals_sm_clock_requested_hertz", {"engine": "e"}) == 1200e6
    assert value("pals_sm_clock_accepted_hertz", {"engine": "e", "board": "1"}) == 1200e6
    assert value("pals_sm_clock_hertz", {"engine": "e", "board": "1"}) == 1200e6
    assert clock_text(encode(last)) == "SM clock ≤ 1200 MHz (accepted 1200/1200, measured 1200/1200)"


def test_boards_without_clock_locks_are_held_by_their_limit_and_that_is_said_once() -> None:
    clock = Clock(until_s=105.0)
    boards = [Board(clock, 0), Board(clock, 1, no_clock_lock=True)]

    records = locked(clock, boards, 1200)

    assert [len(r.notes) for r in records] == [1] + [0] * (len(records) - 1)
    assert "held by its power limit alone" in records[0].notes[0]
    assert records[-1].accepted_clocks_mhz == (1200, None)
    assert [b.limit_w for b in boards] == [300.0, 300.0]
    assert boards[1].locks_asked == [1200]


class Emulated:
    """Two busy emulated A100 behind the real adapter, in the time of `clock`."""

    def __init__(self, path: Path) -> None:
        self.path, self.clock = path, Clock()
        self.bank = BoardBank.create(path, A100, 2, now_s=self.clock.now)
        self.bank.book((0, 1), self.clock.now, self.clock.now + 500.0, Load(compute=0.1, memory=0.5), self.clock.now)

    def open(self) -> Nvml:
        return open_boards(emulated=self.path, clock=self.clock.now_s, sleep=lambda seconds: None)

    def clocks_mhz(self, after_s: float = 1.0) -> list[int]:
        self.clock.now += after_s
        return [self.bank.reading(i, self.clock.now).sm_clock_mhz for i in range(2)]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Emulated]:
    made = Emulated(tmp_path / "bank")
    yield made
    made.bank.close()


@pytest.mark.parametrize("always", [False, True])
def test_a_lock_that_something_else_released_is_written_again_once(world: Emulated, always: bool) -> None:
    world.clock.until_s = 110.0
    records: list[TickRecord] = []

    def somebody_resets(record: TickRecord) -> None:
        records.append(record)
        if always or record.index == 5:
            world.bank.reset_clock_lock(0, world.clock.now)

    with world.open() as nvml:
        made = Rig(
            meters=nvml.boards, actuators=nvml.boards, engine=Engine(world.clock), setter=None,
            controller=StaticPolicy(OperatingPoint(power_limit_w=400.0, sm_clock_mhz=1005)),
            guard=Guard.of([b.info for b in nvml.boards], 64), period_s=0.5,
        )  # fmt: skip
        run(
            made, budget=BudgetSchedule(), slo=Slo(), sink=somebody_resets,
            clock=GridClock(now_s=world.clock.now_s, wait=world.clock.wait),
        )  # fmt: skip

    told = [note for r in records for note in r.notes]
    assert ["locked again" in note for note in told] == ([True, False] if always else [True])
    assert records[-1].accepted_clocks_mhz == ((None, 1005) if always else (1005, 1005))
    assert records[-1].sample.boards[1].sm_clock_mhz == 1005
    assert (records[-1].sample.boards[0].sm_clock_mhz > 1005) == always


def test_the_record_says_before_each_write_what_is_written_and_whether_a_lock_may_be_left(tmp_path: Path) -> None:
    record = tmp_path / "found.json"
    seen: list[tuple[bool, bool]] = []

    class Watched(Board):
        def write(self, limit_w: float) -> None:
            (left,) = left_by_dead_agent(record).values()
            seen.append((left.clock_locked, limit_w in left.written_w))
            super().write(limit_w)

    for mhz in (None, 1200):
        clock = Clock(until_s=101.0)
        boards = [Watched(clock)]
        locked(clock, boards, mhz, record)
        assert boards[0].lock_mhz is None
        assert not record.exists()

    assert seen == [(False, True)] * 2 + [(True, True)] * 2


@pytest.mark.parametrize("wrote_locks", [True, False])
def test_what_a_killed_agent_locked_is_released_and_what_somebody_else_locked_is_not(
    world: Emulated, tmp_path: Path, wrote_locks: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with world.open() as nvml:
        left = {b.info.uuid: b.info.found_limit_w for b in nvml.boards}
        for board in nvml.boards:
            board.apply(OperatingPoint(power_limit_w=200.0, sm_clock_mhz=1005))
    write_record(tmp_path / "limits-found.json", {u: (w, [300.0, 200.0]) for u, w in left.items()}, locked=wrote_locks)

    assert mend(tmp_path, world.path, clock=world.clock.now_s) == 2

    assert [world.bank.reading(i, world.clock.now).enforced_limit_w for i in range(2)] == [400.0, 400.0]
    assert world.clocks_mhz() == ([1410, 1410] if wrote_locks else [1005, 1005])
    assert ("clock locks are released" in capsys.readouterr().err) == wrote_locks
    assert not (tmp_path / "limits-found.json").exists()


def lock_and_deny(world: Emulated, nvml: Nvml, record: Path) -> None:
    """Steer both boards; before they are put back, board 0 begins to refuse limits."""
    with boards_as_found(nvml.boards, nvml.boards, record):
        for board in nvml.boards:
            board.apply(OperatingPoint(power_limit_w=200.0, sm_clock_mhz=1005))
        world.bank.inject(0, "limit_denied", 1, world.clock.now)


def test_a_board_that_refuses_its_limit_still_loses_its_lock_and_keeps_no_other_board_limited(
    world: Emulated, tmp_path: Path
) -> None:
    record = tmp_path / "limits-found.json"
    with world.open() as nvml:
        left = {b.info.uuid: b.info.found_limit_w for b in nvml.boards}
        with pytest.raises(NotPutBackError, match=r"1 of 2 boards.*200 W is still in force.*pals restore"):
            lock_and_deny(world, nvml, record)
        held, free = (
            world.clocks_mhz()
        )  # board 0 would not take its limit back, its lock at 1005 MHz is gone all the same
        assert 1005 < held < free == 1410
    assert set(left_by_dead_agent(record)) == {next(iter(left))}
    write_record(record, {u: (w, [200.0, 300.0]) for u, w in left.items()}, locked=True)
    with world.open() as nvml:
        nvml.boards[1].apply(OperatingPoint(power_limit_w=300.0, sm_clock_mhz=1200))

    with pytest.raises(PalsError, match=r"200 W is still in force.*pals restore"):
        mend(tmp_path, world.path, clock=world.clock.now_s)

    assert world.bank.reading(1, world.clock.now).enforced_limit_w == 400.0
    held, free = world.clocks_mhz()
    assert 1200 < held < free == 1410  # 200 W hold the first board's clock below the top, no lock does
    assert record.exists()


@given(
    wanted_mhz=st.one_of(st.none(), st.integers(-100, 5000)),
    limit_w=st.floats(1, 2000),
    budget_w=st.one_of(st.none(), st.floats(1, 5000)),
    clocks=st.lists(st.integers(210, 2100), unique=True, max_size=90),
)
def test_whatever_clock_is_wanted_leaves_the_guard_supported_and_not_above_the_wish(
    wanted_mhz: int | None, limit_w: float, budget_w: float | None, clocks: list[int]
) -> None:
    info = board_info(0, clocks_mhz=tuple(sorted(clocks)))
    guard = Guard.of([info, info], launch_sequences=64)
    wanted = Decision(point=OperatingPoint(power_limit_w=limit_w, sm_clock_mhz=wanted_mhz), reason="r")

    checked = guard.check(wanted, Budget(power_w=budget_w))

    got = checked.point.sm_clock_mhz
    possible = sorted(clocks) or list(range(210, 1411, 15))
    if wanted_mhz is None:
        assert got is None
        return
    assert got in possible
    assert got == max((c for c in possible if c <= wanted_mhz), default=possible[0])
    assert got == wanted_mhz or checked.reason.startswith("guard")


def test_boards_of_one_group_are_locked_at_clocks_they_share() -> None:
    infos = [board_info(0, clocks_mhz=(210, 1200, 1410)), board_info(1, clocks_mhz=(210, 1200, 1395))]

    assert Guard.of(infos, 64).sm_clocks_mhz == (210, 1200)
    assert Guard.of(infos, 64).supported_clock_mhz(1400) == 1200


def test_a_static_clock_outside_the_range_is_refused_before_anything_is_written() -> None:
    guard = Guard.of([board_info()], launch_sequences=64)

    with pytest.raises(ConfigError, match=r"5000 MHz lies outside 210..1410 MHz"):
        build_policy("static", {"sm_clock_mhz": 5000}, None, guard)
