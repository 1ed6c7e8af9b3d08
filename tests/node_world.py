"""A node for the tests: boards in memory, engines as real channels of processes that the test owns, an agent over them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pals.core.errors import DeviceLostError
from pals.core.quantities import BoardInfo, OperatingPoint
from pals.runtime.agent import AgentSetup, Board, BudgetKeeper, Watcher
from pals.runtime.channel import GAUGES, EngineChannel, find_engines
from pals.runtime.config import load_config
from pals.runtime.group import EngineGroup, group_ranks
from pals.runtime.live_budget import LiveBudget
from pals.runtime.loop import GridClock
from pals.runtime.node import control_engines
from pals.runtime.tick import TickRecord
from tests import worlds
from tests.worlds import BUCKETS, Clock, engine_info


@dataclass
class Watching:
    """Keeps what one engine's watcher saw."""

    records: list[TickRecord]

    def observe(self, record: TickRecord) -> None:
        self.records.append(record)

    def close(self) -> None:
        """Nothing is open."""


class SummingBoard(worlds.Board):
    """Notes the sum of all limits in force on its node after each write."""

    node: AgentWorld

    def apply(self, wanted: OperatingPoint) -> OperatingPoint:
        result = super().apply(wanted)
        self.node.sums_w.append((self.clock.now, sum(b.enforced_w for b in self.node.boards)))
        return result


@dataclass
class AgentWorld:
    """See the module. Each engine lives as a process that sleeps, so that it can be killed."""

    folder: Path
    clock: Clock
    may_write: bool = True
    board_count: int = 2
    said: list[str] = field(default_factory=list)
    records: dict[str, list[TickRecord]] = field(default_factory=dict)
    sums_w: list[tuple[float, float]] = field(default_factory=list)
    events: dict[float, Callable[[], object]] = field(default_factory=dict)  # by time: what happens on the node
    budgets: LiveBudget | None = None  # of the newest run, so that an event may put one
    keeper: BudgetKeeper | None = None
    writer: str = ""
    unopenable: set[int] = field(default_factory=set)  # boards that are lost when an engine that uses them comes
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.boards = [SummingBoard(self.clock, i) for i in range(self.board_count)]
        for board in self.boards:
            board.node = self

    def add(
        self, model: str, *, boards: tuple[int, ...], pid: int | None = None, rank: int = 0, **info: Any
    ) -> EngineChannel:
        """An engine appears; without `pid` it is this process."""
        made = replace(engine_info(pid or os.getpid()), model=model, boards=boards, **info)
        return EngineChannel(self.folder, made, name=f"{model.replace('/', '-')}-{rank}")

    def spawn(self) -> subprocess.Popen[bytes]:
        """A process to be an engine."""
        code = "import sys; sys.stdin.read()"
        self.processes.append(subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE))
        return self.processes[-1]

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """The engine dies."""
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()

    def close(self) -> None:
        """End every process of the world."""
        for process in self.processes:
            self.kill(process)

    def run(self, **sections: Mapping[str, Any]) -> int:
        """The agent, from start to the clock's end; `sections` override the configuration's."""
        path = self.folder / "pals.toml"
        given = {"output": {"metrics_port": 0}, **sections}
        config = load_config(path if path.exists() else None, given)
        self.budgets = LiveBudget(config.budget, now_s=self.clock.now_s, say=self.said.append)
        setup = AgentSetup(
            find=self.find,
            open_boards=self.open_boards,
            config=config,
            emulated=True,
            may_write=self.may_write,
            folder=self.folder,
            watch=self.watch,
            say=self.said.append,
            budgets=self.budgets,
            budget_keeper=self.keeper,
            writer=self.writer,
        )
        return control_engines(setup, GridClock(now_s=self.clock.now_s, wait=self.wait))

    def put(self, power_w: float, *, ttl_s: float) -> str | None:
        """Somebody puts a budget; why not, where it is refused."""
        assert self.budgets is not None
        return self.budgets.put(power_w, ttl_s=ttl_s, by="somebody")

    def find(self) -> list[EngineGroup]:
        """The engines that live now."""
        return group_ranks(find_engines(self.folder))

    def open_boards(self, group: EngineGroup) -> Sequence[Board]:
        """The boards of a group, found at the limits they have now."""
        for i in self.unopenable & set(group.info.boards):
            raise DeviceLostError(f"board {i} is lost")
        mine = [self.boards[i] for i in group.info.boards]
        for board in mine:
            board.opened()
        return mine

    def watch(self, name: str, boards: Sequence[BoardInfo]) -> Watcher:
        """Records by the engine's name."""
        return Watching(self.records.setdefault(name, []))

    def wait(self, seconds: float) -> bool:
        """Time passes, and what is due happens."""
        over = self.clock.wait(seconds)
        for at_s in [t for t in self.events if t <= self.clock.now]:
            self.events.pop(at_s)()
        return over


def busy(channel: EngineChannel, *, running: int) -> None:
    """The engine has this many running sequences from now on."""
    channel.publish([float(running) if name == "running" else 0.0 for name in GAUGES], [0] * BUCKETS, [0] * BUCKETS)
