"""A run directory after bad days: the engines' word on their boards, and what killed processes left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pals.cli.inspect import died_now, steered_now
from pals.cli.run_folder import BANK_FILE, OWNERS_FILE, agent_lives, bank_of, emulated_bank, put_back, sweep
from pals.core.errors import ConfigError
from pals.plant.boards import BoardBank
from pals.plant.specs import board_specs
from pals.runtime.processes import process_started
from tests.found_records import write_record
from tests.node_world import AgentWorld
from tests.worlds import Clock

A100 = board_specs()["a100-sxm4-80gb"]
FOUND = "limits-found.json"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[AgentWorld]:
    world = AgentWorld(tmp_path, Clock())
    yield world
    world.close()


@pytest.fixture
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "pass"])
    process.wait()
    return process.pid


def stale_bank(folder: Path, owner: int) -> Path:
    BoardBank.create(folder / BANK_FILE, A100, 2).close()
    (folder / OWNERS_FILE).write_text(f"{owner} 0 1\n")
    return folder / BANK_FILE


def test_a_bank_that_a_killed_server_left_makes_no_real_engine_emulated(node: AgentWorld, dead: int) -> None:
    stale_bank(node.folder, dead)
    node.add("a/real", boards=(0, 1))

    assert bank_of(node.find()) is None
    assert emulated_bank(node.folder) is None
    assert emulated_bank(node.folder, left_too=True) is None, "the engine's word counts more than the file"


def test_an_emulated_engine_says_where_its_boards_are(node: AgentWorld, dead: int) -> None:
    bank = stale_bank(node.folder, dead)
    node.add("a/emulated", boards=(0, 1), bank=str(bank))

    assert bank_of(node.find()) == bank
    assert emulated_bank(node.folder) == bank
    sweep(node.folder)
    assert bank.exists(), "an engine still uses it"


def test_emulated_and_real_engines_are_not_steered_together(node: AgentWorld) -> None:
    node.add("a/emulated", boards=(0,), bank="/x/emulated-boards.bank")
    node.add("b/real", boards=(1,))
    node.add("c/alone", boards=(2,), bank="")

    with pytest.raises(ConfigError, match=r"emulated boards \(/x/emulated-boards.bank\), b/real .* on real boards"):
        bank_of(node.find()[:2])
    with pytest.raises(ConfigError, match="nobody else can open"):
        bank_of(node.find()[2:])
    with pytest.raises(ConfigError, match="no running engine"):
        bank_of([])


def test_without_an_engine_only_a_living_servers_bank_counts(node: AgentWorld, dead: int) -> None:
    bank = stale_bank(node.folder, dead)
    assert emulated_bank(node.folder) is None
    assert emulated_bank(node.folder, left_too=True) == bank

    (node.folder / OWNERS_FILE).write_text(f"{os.getpid()} 0 1\n")
    assert emulated_bank(node.folder) == bank


def test_the_next_start_removes_what_killed_processes_left_and_nothing_else(node: AgentWorld, dead: int) -> None:
    folder = node.folder
    stale_bank(folder, dead)
    node.add("a/dead", boards=(0,), pid=dead)
    living = node.add("b/living", boards=(1,))
    (folder / "agent-status-a.json").write_text(json.dumps({"agent_pid": dead, "name": "a", "header": {}}))
    (folder / "agent-status-b.json").write_text("[]")
    write_record(folder / FOUND, {"GPU-00000000-1": (400.0, [300.0])}, pid=dead)
    for pid in (dead, os.getpid()):
        (folder / f"ipc-{pid}").mkdir()
        (folder / f"ipc-{pid}" / "socket").write_text("")
        (folder / f".x.json.{pid}.new").write_text("")

    sweep(folder)

    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [living.path.name, f"ipc-{os.getpid()}", f".x.json.{os.getpid()}.new"]
    )


def test_a_real_boards_record_is_never_mended_on_emulated_boards(node: AgentWorld, dead: int) -> None:
    bank = stale_bank(node.folder, dead)
    record = node.folder / FOUND
    asked: list[Path | None] = []

    def mend(folder: Path, bank: Path | None) -> int:
        asked.append(bank)
        return 1

    write_record(record, {"GPU-8f3c": (700.0, [400.0])}, pid=dead)
    assert put_back(node.folder, mend) == 1
    sweep(node.folder)
    assert record.exists()
    stale_bank(node.folder, dead)
    write_record(record, {"GPU-00000000-1": (400.0, [300.0])}, pid=dead)
    assert put_back(node.folder, mend) == 1
    assert asked == [None, bank]
    bank.unlink()
    assert put_back(node.folder, mend) == 0
    assert not record.exists(), "its boards are gone"


def test_an_agents_successor_in_the_process_table_is_not_the_agent(node: AgentWorld, dead: int) -> None:
    me = os.getpid()
    started = process_started(me)
    assert started is not None
    assert agent_lives({"agent_pid": me, "agent_started": started})
    assert not agent_lives({"agent_pid": me, "agent_started": started - 1})
    assert not agent_lives({"agent_pid": dead, "agent_started": process_started(dead)})

    path = node.folder / "agent-status-a.json"
    told = {"agent_pid": me, "agent_started": started - 1, "name": "a", "header": {"boards": []}, "record": {}}
    path.write_text(json.dumps(told))
    assert steered_now(node.folder) == []
    assert died_now(node.folder) == {me: path.stat().st_mtime}
    path.write_text(json.dumps({**told, "agent_started": started}))
    assert len(steered_now(node.folder)) == 1
    assert died_now(node.folder) == {}
    for content in ("{}", "[]", "", '{"agent_pid": "x"}'):
        path.write_text(content)
        assert steered_now(node.folder) == []
        assert died_now(node.folder) == {}
