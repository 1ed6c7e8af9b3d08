"""Records on bad days: an outlet that the operating system refuses is given up once, and control goes on."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from pals.core.errors import ConfigError
from pals.core.quantities import BoardInfo
from pals.runtime.agent import Watcher
from pals.runtime.journal import Journal, read_journal
from pals.runtime.outlets import Outlet, journal_outlet
from pals.runtime.tick import TickRecord
from tests.node_world import AgentWorld
from tests.worlds import Clock


class FullDisk(Journal):
    """The disk is full in the middle of a line."""

    def append(self, record: TickRecord) -> None:
        with self.path.open("a") as f:
            f.write('{"index": ')
        raise OSError(errno.ENOSPC, "No space left on device")


@dataclass
class Refusing:
    """A watcher that the operating system refuses from the second record on."""

    kept: list[TickRecord]
    tried: int = 0

    def observe(self, record: TickRecord) -> None:
        self.tried += 1
        if self.tried > 1:
            raise OSError(errno.EPIPE, "Broken pipe")
        self.kept.append(record)

    def close(self) -> None:
        """Nothing is open."""


class WorldWithRefusingMetrics(AgentWorld):
    """Its watchers refuse."""

    watchers: list[Refusing]

    def watch(self, name: str, boards: Sequence[BoardInfo]) -> Watcher:
        self.watchers = [Refusing([])]
        return self.watchers[0]


def ran(folder: Path, make: Callable[..., AgentWorld] = AgentWorld) -> AgentWorld:
    world = make(folder, Clock(until_s=101.9))
    world.add("test/model", boards=(0, 1))
    assert world.run(output={"journal": str(folder / "j.jsonl")}) == 0
    return world


def test_metrics_that_cannot_be_shown_stop_neither_control_nor_the_journal(tmp_path: Path) -> None:
    world = ran(tmp_path, WorldWithRefusingMetrics)

    assert len(list(read_journal(tmp_path / "j.jsonl")[1])) == 4
    assert isinstance(world, WorldWithRefusingMetrics)
    assert world.watchers[0].tried == 2
    assert [s for s in world.said if "Broken pipe" in s] == [
        "the metrics cannot be shown: Broken pipe; it is given up, control goes on without it"
    ]
    assert [b.limit_w for b in world.boards] == [400.0, 400.0]


def test_a_journal_on_a_full_disk_keeps_its_whole_lines(tmp_path: Path) -> None:
    ran(tmp_path)
    header, records = read_journal(tmp_path / "j.jsonl")
    said: list[str] = []
    journal = FullDisk(tmp_path / "full.jsonl", header)
    outlet, record = journal_outlet(journal, said.append), next(records)

    outlet.take(record)
    outlet.take(record)

    assert (tmp_path / "full.jsonl").read_text().count("\n") == 1
    assert read_journal(tmp_path / "full.jsonl")[0] == header
    assert len(said) == 1
    assert "No space left on device; it is given up" in said[0]


def test_what_is_no_refusal_of_the_system_is_not_hidden(tmp_path: Path) -> None:
    ran(tmp_path)

    def broken(record: TickRecord) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        Outlet("x", broken, lambda: None, lambda text: None).take(next(read_journal(tmp_path / "j.jsonl")[1]))


def test_a_journal_is_never_written_over(tmp_path: Path) -> None:
    ran(tmp_path)
    before = (tmp_path / "j.jsonl").read_bytes()

    with pytest.raises(ConfigError, match=r"j\.jsonl exists; choose another"):
        ran(tmp_path)

    assert (tmp_path / "j.jsonl").read_bytes() == before


def test_a_journal_that_cannot_be_written_is_refused_before_a_board_is_changed(tmp_path: Path) -> None:
    world = AgentWorld(tmp_path, Clock(until_s=101.0))
    world.add("test/model", boards=(0, 1))

    with pytest.raises(ConfigError, match=r"/dev/full cannot be written \(No space left on device\)"):
        world.run(output={"journal": "/dev/full"}, control={"power_limit_w": 200.0})

    assert world.boards[0].written_w == []
