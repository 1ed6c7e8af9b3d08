"""The agent as a whole: refuses foreign profiles, advises without permission, and leaves boards and files in order."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pals.core.errors import ConfigError, ProfileMismatchError
from pals.core.quantities import fingerprint_of
from pals.runtime.agent import AgentSetup, control_engine
from pals.runtime.channel import GAUGES, AgentChannel, EngineChannel, Setpoint
from pals.runtime.config import load_config
from pals.runtime.group import EngineGroup, group_ranks
from pals.runtime.journal import read_journal
from pals.runtime.tick import TickRecord
from tests.test_profile import profile
from tests.worlds import BUCKETS, Board, Clock, board_info, engine_info


@dataclass
class World:
    """Two boards, an engine's channel, and an agent that stops after three ticks."""

    folder: Path
    may_write: bool = True
    said: list[str] = field(default_factory=list)
    records: list[TickRecord] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.clock = Clock()
        self.boards = [Board(self.clock, i) for i in range(2)]
        self.engine = EngineChannel(self.folder, engine_info(os.getpid()), name="engine")

    def run(self, **control: Any) -> int:
        config = load_config(
            None,
            {
                "control": {"period_s": 0.05, **control},
                "slo": {"throughput_tokens_s": 500.0},
                "output": {"journal": str(self.folder / "j.jsonl"), "metrics_port": 0},
            },
        )
        setup = AgentSetup(
            boards=self.boards, channel=EngineGroup([AgentChannel(self.engine.path)]), config=config, emulated=True,
            may_write=self.may_write, folder=self.folder, sinks=(self.sink,), say=self.said.append,
        )  # fmt: skip
        return control_engine(setup, self.stop)

    def sink(self, record: TickRecord) -> None:
        self.clock.now += 0.05
        self.records.append(record)
        if len(self.records) == 3:
            self.stop.set()


def write_profile(path: Path, model: str) -> str:
    made = replace(profile(), fingerprint=fingerprint_of(replace(engine_info(), model=model), [board_info(0)] * 2))
    path.write_text(made.to_json())
    return str(path)


def test_it_steers_records_and_puts_everything_back(tmp_path: Path) -> None:
    world = World(tmp_path)
    name = write_profile(tmp_path / "p.json", "test/model")

    assert world.run(policy="pals-paper", profile=name) == 0

    assert world.boards[0].written_w
    assert world.records[-1].mode == "auto"
    assert [b.limit_w for b in world.boards] == [400.0, 400.0]
    assert len(list(read_journal(tmp_path / "j.jsonl")[1])) == 3
    assert world.engine.setpoint(0.0) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["engine.channel", "j.jsonl", "p.json"]


def test_a_profile_of_another_engine_is_refused_with_the_difference(tmp_path: Path) -> None:
    world = World(tmp_path)
    name = write_profile(tmp_path / "p.json", "another/model")

    with pytest.raises(ProfileMismatchError, match="model: 'another/model' in the profile, 'test/model' here"):
        world.run(policy="pals-paper", profile=name)

    assert world.boards[0].written_w == []
    assert not (tmp_path / "j.jsonl").exists()


def test_without_permission_it_advises_in_one_line_and_writes_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, may_write=False)

    assert world.run(policy="static", power_limit_w=200.0, active_sequences=8) == 0

    assert [s for s in world.said if s.startswith("advise only")] == [world.said[0]]
    assert world.boards[0].written_w == []
    assert world.engine.setpoint(0.0) is None
    assert world.records[-1].mode == "advise"
    assert world.records[-1].guarded.point.power_limit_w == 200.0


def test_the_way_of_lowering_reaches_the_engine_and_the_journal_and_a_missing_one_is_told(tmp_path: Path) -> None:
    world = World(tmp_path)
    asked: list[Setpoint | None] = []
    sink = world.sink

    def watching(record: TickRecord) -> None:
        asked.append(world.engine.setpoint(0.0))
        sink(record)

    world.sink = watching  # type: ignore[method-assign]

    assert world.run(policy="static", active_sequences=8, sm_clock_mhz=1200, lowering="preempt") == 0

    assert asked == [Setpoint(8, "preempt")] * 3
    assert read_journal(tmp_path / "j.jsonl")[0].lowering == "preempt"
    assert "drains instead" in world.said[0]  # this engine says nothing of preempting
    assert world.boards[0].locks_asked == [1200] * 3
    assert world.boards[0].lock_mhz is None
    assert not (tmp_path / "limits-found.json").exists()


def test_a_limit_outside_the_range_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    world = World(tmp_path)

    with pytest.raises(ConfigError, match=r"outside 100\.\.400 W"):
        world.run(policy="static", power_limit_w=50.0)

    assert world.boards[0].written_w == []


def test_data_parallel_ranks_are_one_engine_with_one_decision(tmp_path: Path) -> None:
    channels = []
    for rank in range(2):
        info = replace(engine_info(os.getpid()), parallelism="tp1 pp1 dp2 ep1", boards=(rank,))
        engine = EngineChannel(tmp_path, info, name=f"rank{rank}")
        engine.publish(
            [*(float(i + rank) for i in range(len(GAUGES) - 1)), 2.0 * rank], [rank] * BUCKETS, [1] * BUCKETS
        )
        channels.append(engine)
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
