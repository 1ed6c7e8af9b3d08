"""Several engines under one agent: one budget, disjoint boards, engines that come, grow and go."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from pals.core.errors import ConfigError, NotPutBackError
from pals.runtime.found import left_by_dead_agent
from pals.runtime.journal import read_journal
from tests.node_world import AgentWorld, busy
from tests.worlds import Clock


@pytest.fixture
def node(tmp_path: Path) -> Iterator[AgentWorld]:
    """Eight boards that may stand at 100..400 W, for ten seconds."""
    world = AgentWorld(tmp_path, Clock(until_s=110.0), board_count=8)
    yield world
    world.close()


def limits_w(node: AgentWorld) -> list[float]:
    return [b.limit_w for b in node.boards]


def test_two_engines_share_the_budget_by_their_boards_and_each_has_its_own_journal(node: AgentWorld) -> None:
    node.add("a/large", boards=(0, 1, 2, 3, 4, 5), pid=node.spawn().pid)
    node.add("b/small", boards=(6, 7), pid=node.spawn().pid)

    assert node.run(budget={"power_w": "1600"}) == 0

    large, small = node.records["a/large"], node.records["b/small"]
    assert [r.budget.power_w for r in large[1:]] == [1200.0] * (len(large) - 1)
    assert [r.budget.power_w for r in small[1:]] == [400.0] * (len(small) - 1)
    assert large[-1].enforced_limits_w == (196.0,) * 6
    assert small[-1].enforced_limits_w == (196.0,) * 2
    assert limits_w(node) == [400.0] * 8, "put back as found"
    journals = {read_journal(p)[0].engine.model for p in node.folder.glob("journal-*.jsonl")}
    assert journals == {"a/large", "b/small"}
    assert not list(node.folder.glob("agent-status-*"))
    assert not (node.folder / "limits-found.json").exists()


def test_the_sum_of_the_limits_never_rises_above_a_budget_that_jumps(node: AgentWorld) -> None:
    one = node.add("a/one", boards=(0, 1, 2, 3), pid=node.spawn().pid)
    node.add("b/two", boards=(4, 5, 6, 7), pid=node.spawn().pid)
    node.clock.until_s = 130.0
    busy(one, running=3)
    node.events = {112.0: lambda: busy(one, running=0), 122.0: lambda: busy(one, running=5)}

    node.run(budget={"power_w": "0:2400,3:1200,16:2000"})

    budget_w = {0.0: 2400.0, 3.0: 1200.0, 16.0: 2000.0}
    for (_, before_w), (at_s, after_w) in pairwise(node.sums_w):
        allowed_w = budget_w[max(t for t in budget_w if t <= at_s - 100.0)]
        assert after_w <= max(0.98 * allowed_w, before_w)
    two = [(r.sample.time_s - 100.0, r.budget.power_w) for r in node.records["b/two"]]
    assert {w for t, w in two if 6 < t < 12} == {409.0}  # idle: its boards' minimum, the rest is lent to the busy one
    assert {w for t, w in two if 18 < t < 21} == {1000.0}  # both idle
    assert two[-1][1] == 409.0
    assert node.records["a/one"][-1].budget.power_w == 1591.0


def test_an_engine_whose_plugin_switched_itself_off_has_its_boards_put_back(node: AgentWorld) -> None:
    lost = node.add("a/lost", boards=(0, 1), pid=node.spawn().pid)
    node.add("b/last", boards=(2, 3), pid=node.spawn().pid)
    seen: list[list[float]] = []
    node.events = {102.0: lost.close, 104.0: lambda: seen.append(limits_w(node))}

    assert node.run(control={"power_limit_w": 250.0}) == 0

    assert seen == [[400.0, 400.0, 250.0, 250.0, *[400.0] * 4]]
    assert any("plugin switched itself off" in s and "1 more are steered on" in s for s in node.said)


def test_an_engine_that_ends_is_dropped_and_the_last_one_ends_the_agent(node: AgentWorld) -> None:
    first, last = node.spawn(), node.spawn()
    node.add("a/first", boards=(0, 1), pid=first.pid)
    node.add("b/last", boards=(2, 3), pid=last.pid)
    seen: list[list[float]] = []
    node.events = {
        102.0: lambda: node.kill(first),
        104.0: lambda: seen.append(limits_w(node)),
        106.0: lambda: node.kill(last),
    }

    assert node.run(control={"power_limit_w": 250.0}, budget={"power_w": "900"}) == 3

    assert node.records["b/last"][0].enforced_limits_w == (220.0, 220.0)
    assert seen == [[400.0, 400.0, 250.0, 250.0, 400.0, 400.0, 400.0, 400.0]]
    assert node.records["b/last"][-1].budget.power_w == 900.0, "the share of the dead engine goes to the living"
    assert limits_w(node) == [400.0] * 8
    told = [s for s in node.said if "has ended" in s]
    assert "1 more" in told[0]
    assert "the agent stops" in told[1]
    assert len(node.records["a/first"]) < len(node.records["b/last"])


def test_an_engine_that_comes_later_is_taken_up_within_seconds(node: AgentWorld) -> None:
    node.add("a/first", boards=(0, 1), pid=node.spawn().pid)
    node.events = {101.0: lambda: node.add("b/later", boards=(2, 3), pid=node.spawn().pid)}

    assert node.run(budget={"power_w": "800"}) == 0

    came_s = node.records["b/later"][0].sample.time_s
    assert 101.0 <= came_s <= 104.0
    assert node.records["a/first"][-1].budget.power_w == 400.0
    assert node.records["b/later"][-1].enforced_limits_w == (196.0, 196.0)


def test_a_group_that_grows_by_a_rank_becomes_one_engine_again(node: AgentWorld) -> None:
    node.add("a/other", boards=(7,), pid=node.spawn().pid)
    rank = {"parallelism": "tp2 pp1 dp1 ep0", "data_parallel": True}
    node.add("m/dense", boards=(0, 1), pid=node.spawn().pid, rank=0, **rank)
    node.events = {103.0: lambda: node.add("m/dense", boards=(2, 3), pid=node.spawn().pid, rank=1, **rank)}

    assert node.run(control={"power_limit_w": 300.0}) == 0

    records = node.records["m/dense"]
    assert records[0].enforced_limits_w == (300.0, 300.0)
    assert records[-1].enforced_limits_w == (300.0,) * 4
    assert len(list(node.folder.glob("journal-m-dense-*.jsonl"))) == 2
    assert limits_w(node) == [400.0] * 8


def test_boards_of_two_engines_at_once_are_refused_and_both_are_named(node: AgentWorld) -> None:
    one, two = node.spawn(), node.spawn()
    node.add("a/one", boards=(0, 1, 2), pid=one.pid)
    node.add("b/two", boards=(2, 3), pid=two.pid)

    with pytest.raises(ConfigError) as refused:
        node.run(control={"power_limit_w": 200.0})

    for word in ("a/one", str(one.pid), "b/two", str(two.pid), "boards 2", "Nothing was written"):
        assert word in str(refused.value)
    assert all(b.written_w == [] for b in node.boards)


def test_a_latecomer_on_taken_boards_is_told_once_and_waits_until_they_are_free(node: AgentWorld) -> None:
    first = node.spawn()
    node.add("a/one", boards=(0, 1), pid=first.pid)
    node.add("c/three", boards=(7,), pid=node.spawn().pid)
    node.events = {
        101.0: lambda: node.add("b/two", boards=(1, 2), pid=node.spawn().pid),
        106.0: lambda: node.kill(first),
    }

    assert node.run() == 0

    assert len([s for s in node.said if "b/two" in s and "is not steered" in s]) == 1
    assert len(node.records["c/three"]) >= 19
    assert 106.0 < node.records["b/two"][0].sample.time_s <= 108.5


def test_sections_of_an_engine_override_the_general_ones(node: AgentWorld) -> None:
    (node.folder / "pals.toml").write_text(
        "[control]\npower_limit_w = 300\nactive_sequences = 32\n[slo]\nttft_p95_s = 2\n"
        '[engine."b/two"]\npower_limit_w = 200\ntpot_p95_s = 0.1\n'
    )
    node.add("a/one", boards=(0, 1), pid=node.spawn().pid)
    node.add("b/two", boards=(2, 3), pid=node.spawn().pid)

    assert node.run(control={"active_sequences": 8}) == 0

    one, two = node.records["a/one"][-1], node.records["b/two"][-1]
    assert (one.guarded.point.power_limit_w, two.guarded.point.power_limit_w) == (300.0, 200.0)
    assert (one.guarded.point.active_sequences, two.guarded.point.active_sequences) == (8, 8)
    assert (one.slo.tpot_p95_s, two.slo.tpot_p95_s, two.slo.ttft_p95_s) == (None, 0.1, 2.0)


def test_two_engines_of_one_name_are_told_apart_by_their_process(node: AgentWorld) -> None:
    pids = [node.spawn().pid, node.spawn().pid]
    for rank, pid in enumerate(pids):
        node.add("same/model", boards=(rank,), pid=pid, rank=rank, served_as="chat")

    node.run(output={"journal": str(node.folder / "j.jsonl"), "metrics_port": 0})

    assert set(node.records) == {f"chat:{pid}" for pid in pids}
    assert {p.name for p in node.folder.glob("j-*.jsonl")} == {f"j-chat-{pid}.jsonl" for pid in pids}


def test_what_was_found_of_every_engine_is_written_down_until_it_is_put_back(node: AgentWorld) -> None:
    first = node.spawn()
    node.add("a/first", boards=(0, 1), pid=first.pid)
    node.add("b/last", boards=(2,), pid=node.spawn().pid)
    found: list[set[str]] = []

    def look() -> None:
        found.append(set(json.loads((node.folder / "limits-found.json").read_text())["boards"]))

    node.events = {101.0: look, 102.0: lambda: node.kill(first), 104.0: look}

    node.run(control={"power_limit_w": 200.0})

    assert found == [{"GPU-0", "GPU-1", "GPU-2"}, {"GPU-2"}]


def test_without_any_engine_there_is_nothing_to_do(node: AgentWorld) -> None:
    with pytest.raises(ConfigError, match="no running engine"):
        node.run()


def test_an_engine_whose_board_is_lost_is_not_steered_and_the_others_are(node: AgentWorld) -> None:
    node.add("a/first", boards=(0,), pid=node.spawn().pid)
    node.add("b/last", boards=(1,), pid=node.spawn().pid)
    node.unopenable = {0}

    assert node.run() == 0

    assert set(node.records) == {"b/last"}
    assert [s for s in node.said if "is not steered: board 0 is lost" in s]


def test_a_late_engine_whose_board_is_lost_does_not_end_the_agent(node: AgentWorld) -> None:
    node.add("a/first", boards=(0,), pid=node.spawn().pid)
    node.unopenable = {1}
    late = node.spawn().pid
    node.events = {101.0: lambda: node.add("b/last", boards=(1,), pid=late)}

    assert node.run() == 0

    assert set(node.records) == {"a/first"}
    assert [s for s in node.said if "is not steered: board 1 is lost" in s]


def test_boards_that_could_not_be_put_back_are_told_at_the_end_and_the_other_engine_is_steered_on(
    node: AgentWorld,
) -> None:
    first = node.spawn()
    node.add("a/first", boards=(0, 1), pid=first.pid)
    node.add("b/last", boards=(2,), pid=node.spawn().pid)

    def lose_and_kill() -> None:
        node.boards[0].lost = True
        node.kill(first)

    node.events = {101.0: lose_and_kill}

    with pytest.raises(NotPutBackError, match=r"1 of 2 boards could not be put back: GPU-0: lost.*pals restore"):
        node.run(control={"power_limit_w": 200.0})

    assert [s for s in node.said if "its boards are not all put back" in s]
    assert node.records["b/last"][-1].sample.time_s > 103.0
    assert limits_w(node)[:3] == [200.0, 400.0, 400.0]
    assert set(left_by_dead_agent(node.folder / "limits-found.json")) == {"GPU-0"}


def test_a_lost_board_keeps_its_watts_and_the_budget_holds(node: AgentWorld) -> None:
    node.add("a/first", boards=(0, 1), pid=node.spawn().pid)
    node.add("b/last", boards=(2,), pid=node.spawn().pid)
    node.events = {101.0: lambda: setattr(node.boards[1], "lost", True)}

    with pytest.raises(NotPutBackError):  # the lost board
        node.run(budget={"power_w": "0:900,2:700"})

    late = [w - 5 * 400.0 for at_s, w in node.sums_w if at_s > 103.0]  # five boards belong to no engine
    assert late
    assert max(late) <= 700.0 * 0.98 + 1e-6


def test_a_budget_put_while_the_agent_runs_is_shared_obeyed_and_expires(node: AgentWorld) -> None:
    node.add("a/one", boards=(0, 1), pid=node.spawn().pid)
    node.add("b/two", boards=(2, 3), pid=node.spawn().pid)
    refused: list[str | None] = []
    node.events = {
        102.0: lambda: node.put(1000.0, ttl_s=4.0),
        104.0: lambda: refused.append(node.put(400.0, ttl_s=4.0)),
    }

    assert node.run(budget={"power_w": "1600"}) == 0

    shares_w = {r.sample.time_s - 100.0: r.budget.power_w for r in node.records["a/one"]}
    assert {w for t, w in shares_w.items() if 3 <= t < 6} == {500.0}
    assert {w for t, w in shares_w.items() if t >= 7} == {800.0}
    after_w = [w - 4 * 400.0 for at_s, w in node.sums_w if 103.0 <= at_s < 106.0]  # four boards belong to no engine
    assert after_w
    assert max(after_w) <= 0.98 * 1000.0
    assert "410 W is the lowest budget that can be promised" in str(refused[0])
    assert [s for s in node.said if "budget of" in s] == [
        s for s in node.said if "put by somebody for 4 s" in s or "has expired; now in force: 1600 W (schedule)" in s
    ]
    assert len([s for s in node.said if "has expired" in s]) == 1


def test_nothing_is_promised_before_the_engines_are_there_nor_after(node: AgentWorld) -> None:
    node.add("a/one", boards=(0, 1), pid=node.spawn().pid)

    node.run()

    assert "no engine is steered" in str(node.put(1000.0, ttl_s=4.0))


def test_the_default_holds_before_the_first_step(node: AgentWorld) -> None:
    node.add("a/one", boards=(0, 1), pid=node.spawn().pid)

    node.run(budget={"power_w": "5:600", "default": "500W"})

    assert {r.budget.power_w for r in node.records["a/one"] if r.sample.time_s < 105.0} == {500.0}
    assert node.records["a/one"][-1].budget.power_w == 600.0
