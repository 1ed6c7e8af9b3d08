"""`pals status` on a node with two engines: whose boards, whose share, and why."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pals.cli.inspect import died_now, engines_now, limited, steered_now
from pals.cli.run_folder import remove_stale_status
from pals.views.status import print_status
from tests.found_records import write_record
from tests.node_world import AgentWorld
from tests.worlds import Clock


@pytest.fixture
def node(tmp_path: Path) -> Iterator[AgentWorld]:
    world = AgentWorld(tmp_path, Clock(until_s=103.0), board_count=4)
    yield world
    world.close()


def seen(node: AgentWorld, capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed in the middle of a run."""
    boards = [(b.info, b.read()) for b in node.boards]
    print_status(
        node.folder,
        engines_now(node.folder),
        boards,
        steered_now(node.folder),
        emulated=True,
        limited=limited(node.folder),
    )
    return capsys.readouterr().out


def test_two_engines_their_boards_and_their_shares(node: AgentWorld, capsys: pytest.CaptureFixture[str]) -> None:
    node.add("b/second", boards=(2, 3), pid=node.spawn().pid, parallelism="tp2 pp1 dp1 ep1")
    node.add("a/first", boards=(0, 1), pid=node.spawn().pid)
    told: list[str] = []
    node.events = {102.0: lambda: told.append(seen(node, capsys))}

    node.run(budget={"power_w": "1000"})

    lines = told[0].splitlines()
    assert "budget 1000 W shared by 2 engines" in told[0]
    assert lines.index(next(x for x in lines if x.startswith("a/first: policy static"))) < lines.index(
        next(x for x in lines if x.startswith("b/second: policy static"))
    )
    assert "asked: 245 W per board" in told[0]
    assert "why: guard-budget (400 W wanted, 245 W allowed)" in told[0]
    assert told[0].count("of 500 W granted") == 2
    assert "2-3 (tp2 ep)" in told[0]


def test_a_bound_on_the_queue_is_shown(node: AgentWorld, capsys: pytest.CaptureFixture[str]) -> None:
    node.add("a/first", boards=(0, 1), pid=node.spawn().pid)
    told: list[str] = []

    def bounded() -> None:
        steered = json.loads(json.dumps(steered_now(node.folder)))
        assert "waiting" not in seen(node, capsys).split("asked:")[1].splitlines()[0]
        steered[0]["record"]["guarded"]["most_waiting"] = 12
        steered[0]["record"]["sample"]["engine"]["refused_requests"] = 7
        print_status(node.folder, engines_now(node.folder), [], steered, emulated=True, limited=0)
        told.append(capsys.readouterr().out)

    node.events = {102.0: bounded}
    node.run(budget={"power_w": "1000"})

    assert "at most 12 waiting (7 refused so far)" in " ".join(told[0].split())


def test_without_an_agent_and_after_a_killed_one(node: AgentWorld, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no engine with PALS runs" in seen(node, capsys)
    dead = node.spawn()
    node.kill(dead)
    stale: dict[str, Any] = {"agent_pid": dead.pid, "name": "a/first", "header": {"boards": []}}
    (node.folder / "agent-status-a-first.json").write_text(json.dumps(stale))
    write_record(node.folder / "limits-found.json", {"GPU-0": (400.0, [200.0])}, pid=dead.pid)

    told = seen(node, capsys)
    assert "an agent was killed: 1 boards may stay limited" in told
    assert "no agent" in told
    boards = [(b.info, b.read()) for b in node.boards]
    print_status(node.folder, [], boards, [], emulated=True, limited=1, died=died_now(node.folder))
    assert f"agent (process {dead.pid}): dead since 2" in (told := capsys.readouterr().out)
    assert "; run `pals restore`" in told

    remove_stale_status(node.folder)
    assert not list(node.folder.glob("agent-status-*"))
    (node.folder / "agent-status-mine.json").write_text(json.dumps({**stale, "agent_pid": os.getpid()}))
    remove_stale_status(node.folder)
    assert list(node.folder.glob("agent-status-*"))


def test_a_canary_tells_whose_window_it_is(node: AgentWorld, capsys: pytest.CaptureFixture[str]) -> None:
    node.add("a/first", boards=(0, 1))
    told: list[str] = []
    node.events = {102.0: lambda: told.append(seen(node, capsys))}

    node.run(control={"mode": "canary:10%", "canary_window_s": 3.0, "power_limit_w": 250.0})

    assert "mode canary" in told[0]
    assert "arm: off (static acts; the policy's are 10 % of 3 s windows)" in told[0]
    assert "the policy would ask for 250 W" in " ".join(told[0].split())
