"""Parallel engines as groups: one decision reaches every rank, all boards of the group move in lock-step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.core.errors import ConfigError
from pals.runtime.channel import GAUGES, AgentChannel, EngineChannel, Setpoint
from pals.runtime.group import EngineGroup, group_ranks, refuse_shared_boards, unique_name
from tests.node_world import AgentWorld
from tests.worlds import BUCKETS, Clock, engine_info


def ranks_of(folder: Path, count: int, *, parallelism: str, boards_each: int, launch: int = 64) -> list[EngineChannel]:
    """The channels of `count` data-parallel ranks of this process's child; they count a little differently."""
    channels = []
    for rank in range(count):
        info = replace(
            engine_info(os.getpid(), launch=launch),
            parallelism=parallelism,
            boards=tuple(range(rank * boards_each, (rank + 1) * boards_each)),
            data_parallel=count > 1,
        )
        channels.append(EngineChannel(folder, info, name=f"rank{rank}"))
        channels[-1].publish(
            [*(float(i + rank) for i in range(len(GAUGES) - 1)), 2.0 * min(rank, 1)], [rank] * BUCKETS, [1] * BUCKETS
        )
    return channels


@pytest.fixture
def node(tmp_path: Path) -> Iterator[AgentWorld]:
    world = AgentWorld(tmp_path, Clock(until_s=105.0), board_count=8)
    yield world
    world.close()


@pytest.mark.parametrize(
    ("told", "ranks", "boards_each", "known_as"),
    [
        ("tp8 pp1 dp1 ep0", 1, 8, "tp8 pp1 dp1 ep0"),
        ("tp4 pp2 dp1 ep0", 1, 8, "tp4 pp2 dp1 ep0"),
        ("tp2 pp1 dp1 ep0", 2, 2, "tp2 pp1 dp2 ep0"),  # dense: vLLM tells each rank that it is alone
        ("tp2 pp1 dp2 ep1", 2, 2, "tp2 pp1 dp2 ep1"),
        ("tp1 pp2 dp3 ep1", 3, 2, "tp1 pp2 dp3 ep1"),
    ],
)
def test_one_decision_reaches_all_ranks_and_boards_move_in_lock_step(
    node: AgentWorld, told: str, ranks: int, boards_each: int, known_as: str
) -> None:
    channels = ranks_of(node.folder, ranks, parallelism=told, boards_each=boards_each)
    used = ranks * boards_each
    parts: list[list[int | None]] = []
    node.events = {104.0: lambda: parts.append([s and s.active_sequences for s in [c.setpoint(0.0) for c in channels]])}

    assert node.run(control={"active_sequences": 23}, budget={"power_w": f"0:{300 * used},2:{200 * used}"}) == 0

    records = node.records["test/model"]
    assert {len(set(r.enforced_limits_w)) for r in records} == {1}
    assert {len(r.enforced_limits_w) for r in records} == {used}
    assert [b.written_w for b in node.boards[:used]] == [node.boards[0].written_w] * used
    assert records[0].enforced_limits_w[0] == 294.0
    assert records[-1].enforced_limits_w[0] == 196.0
    assert sum(p or 0 for p in parts[0]) == 23
    assert max(p or 0 for p in parts[0]) - min(p or 0 for p in parts[0]) <= 1
    assert node.find()[0].info.parallelism == known_as
    assert all(b.written_w == [] for b in node.boards[used:])


def test_counters_of_ranks_add_up(tmp_path: Path) -> None:
    channels = ranks_of(tmp_path, 2, parallelism="tp1 pp1 dp2 ep1", boards_each=1)
    agents = [AgentChannel(c.path) for c in channels]

    group = group_ranks(agents)[0]
    now = group.read()

    assert len(group.ranks) == 2
    assert group.complete
    assert not EngineGroup(agents[:1]).complete
    assert (group.info.boards, group.info.launch_sequences) == ((0, 1), 128)
    assert now.output_tokens == sum(a.read().output_tokens for a in agents)
    assert now.ttft_counts == (1,) * BUCKETS
    assert now.lowering == "drain"  # as slow as its slowest rank
    group.apply(16, lease_s=60.0, lowering="preempt")
    assert [c.setpoint(0.0) for c in channels] == [Setpoint(8, "preempt")] * 2
    group.release()
    assert [c.setpoint(0.0) for c in channels] == [None, None]
    with pytest.raises(ValueError, match=r"outside 1\.\.128"):
        group.apply(129, lease_s=1.0)


def test_a_rank_that_stands_still_is_not_hidden_by_the_others(tmp_path: Path) -> None:
    channels = ranks_of(tmp_path, 3, parallelism="tp1 pp1 dp3 ep1", boards_each=1)
    group = group_ranks([AgentChannel(c.path) for c in channels])[0]
    for channel, time_s, running in zip(channels, (50.0, 60.0, 10.0), (4.0, 4.0, 0.0), strict=True):
        told = {"time_s": time_s, "running": running}
        channel.publish([told.get(name, 0.0) for name in GAUGES])

    assert group.read().time_s == 50.0  # the third is idle
    channels[0].publish([0.0] * len(GAUGES))
    channels[1].publish([0.0] * len(GAUGES))
    assert group.read().time_s == 10.0


class Rank:
    """A rank in memory that remembers its part."""

    def __init__(self, launch: int) -> None:
        self.info = engine_info(launch=launch)
        self.part = 0
        self.waiting: int | None = None

    def apply(
        self, active_sequences: int, *, lease_s: float, lowering: str = "drain", most_waiting: int | None = None
    ) -> None:
        assert 1 <= active_sequences <= self.info.launch_sequences
        self.part, self.waiting = active_sequences, most_waiting


@given(st.lists(st.integers(1, 300), min_size=1, max_size=16), st.data())
def test_parts_of_active_sequences_add_up(launches: list[int], data: st.DataObject) -> None:
    ranks = [Rank(n) for n in launches]
    wanted = data.draw(st.integers(1, sum(launches)))

    may_wait = data.draw(st.none() | st.integers(0, 1000))

    EngineGroup(ranks).apply(wanted, lease_s=1.0, most_waiting=may_wait)  # type: ignore[arg-type]

    assert sum(r.part for r in ranks) == max(wanted, len(ranks))
    if may_wait is None:
        assert {r.waiting for r in ranks} == {None}
    else:
        parts = [r.waiting or 0 for r in ranks]
        assert sum(parts) == may_wait
        assert max(parts) - min(parts) <= 1


def test_engines_that_are_no_ranks_stay_apart_whatever_their_parent(tmp_path: Path) -> None:
    pids = os.getpid(), os.getppid()
    made = [
        EngineChannel(tmp_path, replace(engine_info(pid), boards=(n,)), name=f"offline{n}")
        for n, pid in enumerate(pids)
    ]

    groups = group_ranks([AgentChannel(m.path) for m in made])

    assert len(groups) == 2
    assert {unique_name(g, groups) for g in groups} == {f"test/model:{pid}" for pid in pids}
    refuse_shared_boards(groups)
    with pytest.raises(ConfigError, match="both use boards 0;"):
        refuse_shared_boards([groups[0], groups[0]])


def test_a_rank_whose_boards_are_unknown_makes_the_groups_unknown(tmp_path: Path) -> None:
    (known,) = ranks_of(tmp_path, 1, parallelism="tp1 pp1 dp2 ep0", boards_each=1)
    unknown = EngineChannel(tmp_path, replace(engine_info(os.getpid()), boards=()), name="unknown")

    assert EngineGroup([AgentChannel(c.path) for c in (known, unknown)]).info.boards == ()
