"""Runs in virtual time: one process holds vLLM, the plugin, the boards beneath NVML and the agent, all on one clock.

A run made twice from one seed is the same run: its journal is equal byte for byte. Each run gets an engine and boards
of its own, so that the order of several runs does not matter.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pals.core.errors import ConfigError
from pals.engines.openai_client import RequestSpec
from pals.engines.virtual_engine import VirtualEngine, VirtualTrace
from pals.experiments.outcome import Outcome, outcome
from pals.hardware.nvml import Nvml, open_boards
from pals.plant.boards import BoardBank
from pals.plant.faults import FaultEvent, FaultSchedule, apply_to
from pals.plant.specs import BoardSpec
from pals.runtime.agent import AgentSetup, Session, open_session
from pals.runtime.clock import VirtualClock
from pals.runtime.config import Config
from pals.runtime.group import EngineGroup
from pals.runtime.journal import read_journal
from pals.runtime.loop import GridClock
from pals.runtime.tick import TickRecord

BANK_FILE = "emulated-boards.bank"
LEAD_S, TAIL_S = 0.5, 1.0  # ticks before the load and after the last token, so that the journal covers it


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualNode:
    """What runs are made of; `folder` is the run directory that the plugin was told."""

    model: Path
    options: Sequence[str]  # vLLM's
    spec: BoardSpec
    count: int
    board_seed: int
    folder: Path
    faults: FaultSchedule = field(default_factory=FaultSchedule)  # times from the run's start


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveNode:
    """A node that runs, in virtual time."""

    engine: VirtualEngine
    channel: EngineGroup
    nvml: Nvml
    bank: BoardBank
    clock: VirtualClock
    folder: Path

    def grid_clock(self, stop: threading.Event) -> GridClock:
        """A clock whose waits let the engine work; a wait ends with the step it falls into."""

        def wait(seconds: float) -> bool:
            self.engine.serve(until_s=self.clock.now_s() + max(0.0, seconds), done=stop.is_set)
            return stop.is_set()

        return GridClock(now_s=self.clock.now_s, wait=wait)


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualResult:
    """What a run came to, and how long it took in either time."""

    outcome: Outcome
    virtual_s: float
    wall_s: float

    @property
    def speed(self) -> float:
        """Virtual seconds per second."""
        return self.virtual_s / self.wall_s


@contextmanager
def running(node: VirtualNode) -> Iterator[LiveNode]:
    """Boards, engine, channel and NVML adapter, new and at virtual time 0."""
    clock = VirtualClock()
    node.folder.mkdir(parents=True, exist_ok=True)
    path = node.folder / BANK_FILE
    bank = BoardBank.create(  # a setter takes no virtual time: an agent beside the engine would not hold it up either
        path, node.spec, node.count, seed=node.board_seed, setter_latency_s=0.0, now_s=clock.now_s()
    )
    try:
        with VirtualEngine(node.model, node.options, clock=clock, bank=bank) as engine:
            channel = engine.channel(node.folder)
            with open_boards(emulated=path, indices=channel.info.boards, clock=clock.now_s) as nvml:
                yield LiveNode(engine=engine, channel=channel, nvml=nvml, bank=bank, clock=clock, folder=node.folder)
    finally:
        bank.close()
        path.unlink(missing_ok=True)


def run_policy(
    node: VirtualNode,
    specs: Sequence[RequestSpec],
    config: Config,
    *,
    name: str,
    seed: int,
    command: str,
    stop: threading.Event,
    say: Callable[[str], None],
) -> VirtualResult | None:
    """Serve `specs` under one policy on a node of its own; None where `stop` was set before the end.

    Raises:
        ConfigError: as `serve_trace`.
    """
    with running(node) as live:
        await_faults(live, node.faults)
        return serve_trace(live, specs, config, name=name, seed=seed, command=command, stop=stop, say=say)


def await_faults(live: LiveNode, faults: FaultSchedule) -> None:
    """Have each fault strike the boards when it is due."""
    start_s = live.clock.now_s()
    for event in faults.events:

        def strike(event: FaultEvent = event) -> None:
            apply_to(live.bank, [event], live.clock.now_s())

        live.clock.call_at(start_s + event.time_s, strike)


def serve_trace(
    live: LiveNode,
    specs: Sequence[RequestSpec],
    config: Config,
    *,
    name: str,
    seed: int,
    command: str,
    stop: threading.Event,
    say: Callable[[str], None],
) -> VirtualResult | None:
    """Serve `specs` under the policy of `config`, which names the journal; None where `stop` was set before the end.

    Raises:
        ConfigError: settings or profile that do not fit this engine, or no request was answered.
    """
    began_s = time.perf_counter()
    trace = VirtualTrace(live.engine, specs, seed=seed, start_s=live.clock.now_s() + LEAD_S)
    journal = Path(str(config.output.journal))
    setup = AgentSetup(
        find=lambda: (live.channel,), open_boards=lambda group: live.nvml.boards, config=config, emulated=True,
        may_write=all(b.can_write() for b in live.nvml.boards), folder=live.folder, watch=lambda name, boards: Unwatched(),
        say=say, virtual_command=command,
    )  # fmt: skip
    with closing(open_session(setup, live.channel, live.channel.info.name, journal)) as session:
        drive(live, session, config, trace, stop)
    if stop.is_set():
        return None
    wall_s = time.perf_counter() - began_s
    now_s = live.clock.now_s()
    try:
        achieved = outcome(name, trace.results, list(read_journal(journal)[1]), config.slo)
    except ValueError as e:
        raise ConfigError(f"{e}; the journal {journal} holds what the agent saw") from e
    return VirtualResult(outcome=achieved, virtual_s=now_s, wall_s=wall_s)


class Unwatched:
    """Nobody looks: the journal holds everything."""

    def observe(self, record: TickRecord) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Ending(Protocol):
    """A load that knows when it is over."""

    @property
    def answered(self) -> bool:
        """Asked between steps."""
        ...


def drive(live: LiveNode, session: Session, config: Config, load: Ending, stop: threading.Event) -> None:
    """Serve the load, with ticks exactly on the grid: between steps, or in the middle of one as an agent beside would."""
    clock, engine, period_s = live.clock, live.engine, config.control.period_s
    start_s, slot = clock.now_s(), 0

    def tick() -> None:
        nonlocal slot
        now_s = clock.now_s()
        session.tick(config.budget.at(now_s - start_s), now_s)
        slot += 1
        clock.call_at(start_s + slot * period_s, tick)

    clock.call_at(start_s, tick)
    try:
        engine.serve(until_s=float("inf"), done=lambda: stop.is_set() or load.answered)
        engine.serve(until_s=clock.now_s() + TAIL_S, done=stop.is_set)
    finally:
        clock.drop_all()
