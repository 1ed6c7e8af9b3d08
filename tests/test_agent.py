"""The agent with one engine: refuses foreign profiles, advises without permission, leaves boards and files in order."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pals.core.errors import ConfigError, ProfileMismatchError
from pals.core.quantities import fingerprint_of
from pals.runtime.agent import indices_text
from pals.runtime.channel import Setpoint
from pals.runtime.journal import read_journal
from pals.runtime.tick import TickRecord
from tests.node_world import AgentWorld
from tests.profile_world import profile
from tests.routing_world import CountingWorker, gamma_weights
from tests.worlds import Clock, board_info, engine_info


@dataclass
class World:
    """Two boards, an engine's channel, and an agent that stops after three ticks."""

    folder: Path
    may_write: bool = True
    records: list[TickRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clock = Clock(until_s=101.4)
        self.node = AgentWorld(self.folder, self.clock, may_write=self.may_write)
        self.engine = self.node.add("test/model", boards=(0, 1))
        self.boards, self.said = self.node.boards, self.node.said

    def run(self, **control: Any) -> int:
        code = self.node.run(
            control=control,
            slo={"throughput_tokens_s": 500.0},
            output={"journal": str(self.folder / "j.jsonl")},
        )
        self.records = self.node.records.get("test/model", [])
        return code


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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["j.jsonl", "p.json", "test-model-0.channel"]


@pytest.mark.parametrize(("experts", "known"), [("auto", True), ("off", False)])
def test_routing_that_a_worker_counts_is_in_the_records_unless_it_is_switched_off(
    tmp_path: Path, experts: str, known: bool
) -> None:
    world = World(tmp_path)
    worker = CountingWorker(tmp_path, gamma_weights(2, 16), engine_pid=os.getpid(), now_s=100.0)
    world.clock.until_s = 112.4
    world.node.events = {100.5 + 0.5 * i: worker.work for i in range(25)}
    assert world.run(policy="static", experts=experts) == 0
    seen = [r.sample.experts for r in world.records]
    assert seen[0] is None  # no window is full yet
    assert (seen[-1] is not None) == known
    assert sum("first full window" in note for r in world.records for note in r.notes) == known
    assert list(read_journal(tmp_path / "j.jsonl")[1]) == world.records


def test_a_profile_of_another_engine_is_refused_with_the_difference(tmp_path: Path) -> None:
    world = World(tmp_path)
    name = write_profile(tmp_path / "p.json", "another/model")

    with pytest.raises(ProfileMismatchError, match="model: 'another/model' in the profile, 'test/model' here"):
        world.run(policy="pals-paper", profile=name)

    assert world.boards[0].written_w == []
    assert not (tmp_path / "j.jsonl").exists()


def test_an_accepted_mismatch_is_said_in_one_line_and_recorded(tmp_path: Path) -> None:
    world = World(tmp_path)
    fits = fingerprint_of(replace(engine_info(), version="0.31.0"), [board_info(0)] * 2)
    (tmp_path / "p.json").write_text(replace(profile(), fingerprint=fits).to_json())

    assert world.run(policy="pals-paper", profile=str(tmp_path / "p.json"), accept_mismatch=True) == 0

    told = "engine_version: '0.31.0' in the profile, '0.32.0' here"
    assert [s for s in world.said if "accepted by --accept-mismatch" in s and told in s] == [world.said[0]]
    assert read_journal(tmp_path / "j.jsonl")[0].accepted_mismatch == (told,)


def test_without_permission_it_advises_in_one_line_and_writes_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, may_write=False)

    assert world.run(policy="static", power_limit_w=200.0, active_sequences=8) == 0

    assert [s for s in world.said if s.startswith("advise only")] == [world.said[0]]
    assert world.boards[0].written_w == []
    assert world.engine.setpoint(0.0) is None
    assert world.records[-1].mode == "advise"
    assert world.records[-1].guarded.point.power_limit_w == 200.0


def test_a_board_that_must_not_be_written_makes_its_engine_advise_with_the_reason(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.boards[1].refusal = "board 1: MIG mode is enabled"

    assert world.run(policy="static", power_limit_w=200.0, active_sequences=8) == 0

    assert [s for s in world.said if "MIG mode is enabled. Decisions are recorded" in s] == [world.said[0]]
    assert [b.written_w for b in world.boards] == [[], []]
    assert {r.mode for r in world.records} == {"advise"}


def test_the_way_of_lowering_reaches_the_engine_and_the_journal_and_a_missing_one_is_told(tmp_path: Path) -> None:
    world = World(tmp_path)
    asked: list[Setpoint | None] = []
    world.node.events = {101.2: lambda: asked.append(world.engine.setpoint(0.0))}

    assert world.run(policy="static", active_sequences=8, sm_clock_mhz=1200, lowering="preempt") == 0

    assert asked == [Setpoint(8, "preempt")]
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


@pytest.mark.parametrize(
    ("boards", "text"), [((3,), "board 3"), ((0, 1, 2, 3), "boards 0-3"), ((7, 0, 2, 5, 6), "boards 0, 2, 5-7")]
)
def test_boards_are_told_in_runs(boards: tuple[int, ...], text: str) -> None:
    assert indices_text(boards) == text
