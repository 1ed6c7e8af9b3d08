"""An agent over the real capd: budgets fall and rise, raises that wait are no trouble, and at the end all is as found."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pals.hardware.capd_board import CapdBoard
from pals.hardware.capd_budget import CapdBudget
from pals.hardware.capd_client import CapdClient
from pals.runtime.agent import Board
from pals.runtime.group import EngineGroup
from pals_capd.audit import check_order, read_audit
from tests.capd_loopback import Boards, Capd, capd_over
from tests.node_world import AgentWorld
from tests.worlds import Clock

pytest.importorskip("pynvml")


@dataclass
class CapdNode(AgentWorld):
    """A node whose boards are emulated H100 that capd writes; their time is the agent's."""

    hardware: Boards = field(kw_only=True)
    client: CapdClient = field(kw_only=True)

    def open_boards(self, group: EngineGroup) -> Sequence[Board]:
        boards = [self.hardware.board(i, may_write=False) for i in group.info.boards]
        return [CapdBoard(b, self.client, ttl_s=3.0, reason="a test") for b in boards]

    def wait(self, seconds: float) -> bool:
        over = super().wait(seconds)
        self.hardware.now = max(self.hardware.now, self.clock.now)
        return over


def run(tmp_path: Path, exits: ExitStack, **sections: dict[str, object]) -> tuple[CapdNode, Capd]:
    hardware = Boards(tmp_path, now=100.0)
    exits.enter_context(hardware.opened())
    capd = exits.enter_context(capd_over(hardware))
    client = exits.enter_context(closing(CapdClient(capd.socket, now_s=hardware.clock)))
    node = CapdNode(tmp_path / "run", Clock(until_s=108.0), hardware=hardware, client=client)
    node.folder.mkdir()
    exits.callback(node.close)
    node.keeper = CapdBudget(client, node.said.append)
    node.add("a/first", boards=(0, 1), pid=node.spawn().pid)
    assert node.run(**sections) == 0
    return node, capd


def test_an_agent_follows_its_budget_through_capd_and_leaves_the_boards_as_found(tmp_path: Path) -> None:
    with ExitStack() as exits:
        node, capd = run(tmp_path, exits, budget={"power_w": "0:1200,2:800,5:1300"})
        (records,) = node.records.values()
        settled = {r.budget.power_w: r.enforced_limits_w for r in records}

        assert settled == {1200.0: (588.0, 588.0), 800.0: (392.0, 392.0), 1300.0: (637.0, 637.0)}
        assert not [n for r in records for n in r.notes if "something else" in n or "capd" in n]
        assert [node.hardware.limit_w(i) for i in range(2)] == [700.0, 700.0]
        assert capd.budget is None
        assert check_order(list(read_audit(capd.socket.parent / "audit.jsonl"))) == []


def test_small_raises_that_capd_holds_back_for_a_while_are_not_taken_for_another_hand(tmp_path: Path) -> None:
    with ExitStack() as exits:
        node, _ = run(tmp_path, exits, budget={"power_w": "0:800,2:804,2.5:808,3:812,3.5:816"})
        (records,) = node.records.values()

        assert any(min(r.enforced_limits_w) < r.guarded.point.power_limit_w - 0.5 for r in records)  # some waited
        assert records[-1].enforced_limits_w == (399.0, 399.0)  # half of 98 % of 816 W
        assert not [n for r in records for n in r.notes if "something else" in n]
