"""The node tells its keeper the budget before any board of the slot is written, and takes it away last, after an orderly stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pals.cli.inspect import steered_now
from pals.core.errors import NotPutBackError
from pals.views.status import print_status
from tests.node_world import AgentWorld
from tests.worlds import Clock


@dataclass
class Keeper:
    """Notes what it was told, when, and how the boards stood then."""

    node: AgentWorld
    told: list[tuple[float, float | None, tuple[str, ...]]] = field(default_factory=list)
    limits_w: list[float] = field(default_factory=list)
    ended_at: list[list[float]] = field(default_factory=list)

    def keep(self, watts: float | None, uuids: Sequence[str]) -> None:
        self.told.append((self.node.clock.now, watts, tuple(uuids)))
        self.limits_w.append(sum(b.enforced_w for b in self.node.boards))

    def end(self) -> None:
        self.ended_at.append([b.limit_w for b in self.node.boards])


@pytest.fixture
def node(tmp_path: Path) -> Iterator[AgentWorld]:
    world = AgentWorld(tmp_path, Clock(until_s=106.0), board_count=4)
    world.keeper = Keeper(world)
    yield world
    world.close()


def keeper_of(node: AgentWorld) -> Keeper:
    assert isinstance(node.keeper, Keeper)
    return node.keeper


def test_falls_and_rises_are_told_before_the_boards_are_written_and_the_end_comes_last(node: AgentWorld) -> None:
    node.add("a/first", boards=(0, 1), pid=node.spawn().pid)
    node.add("b/second", boards=(2, 3), pid=node.spawn().pid)

    assert node.run(budget={"power_w": "0:1200,2:800,4:1400"}) == 0

    keeper = keeper_of(node)
    changes = [i for i, told in enumerate(keeper.told) if i == 0 or told[1] != keeper.told[i - 1][1]]
    assert [keeper.told[i][1] for i in changes] == [1200.0, 800.0, 1400.0]
    assert [round(keeper.limits_w[i]) for i in changes] == [1600, 1176, 784]  # as the slots before had left the boards
    assert len(keeper.told[0][2]) == len(set(keeper.told[0][2])) == 4
    assert keeper.ended_at == [[400.0] * 4]


def test_an_engine_that_leaves_takes_its_boards_out_of_what_is_kept(node: AgentWorld) -> None:
    node.add("a/first", boards=(0, 1), pid=node.spawn().pid)
    leaving = node.spawn()
    node.add("b/second", boards=(2, 3), pid=leaving.pid)
    node.events = {103.0: lambda: node.kill(leaving)}

    node.run(budget={"power_w": "1000"})

    told = [len(uuids) for _, _, uuids in keeper_of(node).told]
    assert (told[0], told[-1]) == (4, 2)


def test_what_an_engine_that_only_gets_advice_may_draw_is_not_promised_to_the_others(node: AgentWorld) -> None:
    node.add("a/first", boards=(0, 1), pid=node.spawn().pid)
    node.add("b/second", boards=(2, 3), pid=node.spawn().pid)
    node.boards[3].refusal = "board 3: MIG mode is enabled"

    node.run(budget={"power_w": "1300"})

    keeper = keeper_of(node)
    assert {told[1] for told in keeper.told} == {1300.0 - 800.0}
    assert {told[2] for told in keeper.told} == {tuple(b.info.uuid for b in node.boards[:2])}


def test_without_a_budget_the_keeper_is_told_so(node: AgentWorld) -> None:
    node.add("a/first", boards=(0, 1), pid=node.spawn().pid)
    node.run()

    assert {told[1] for told in keeper_of(node).told} == {None}


def test_where_boards_are_left_behind_or_the_agent_fails_the_budget_stays(node: AgentWorld) -> None:
    node.add("a/first", boards=(0, 1), pid=node.spawn().pid)

    def break_down() -> None:
        node.boards[0].lost = True

    node.events = {103.0: break_down}
    with pytest.raises(NotPutBackError):
        node.run(budget={"power_w": "600"})
    assert keeper_of(node).ended_at == []

    def fail() -> None:
        raise ZeroDivisionError

    node.boards[0].lost = False
    node.clock.now, node.events = 100.0, {103.0: fail}
    with pytest.raises(ZeroDivisionError):
        node.run(budget={"power_w": "600"})
    assert keeper_of(node).ended_at == []


def test_status_says_who_writes(node: AgentWorld, capsys: pytest.CaptureFixture[str]) -> None:
    node.writer = "capd (dead-man: capd, 3 s)"
    node.add("a/first", boards=(0, 1), pid=node.spawn().pid)

    def show() -> None:
        print_status(node.folder, (), (), steered_now(node.folder), emulated=True, limited=0)

    node.events = {103.0: show}
    node.run()
    assert "boards are written by capd (dead-man: capd, 3 s)" in " ".join(capsys.readouterr().out.split())

    node.may_write, node.clock.now, node.events = False, 100.0, {103.0: show}
    node.run()
    assert "writes no board" in " ".join(capsys.readouterr().out.split())
