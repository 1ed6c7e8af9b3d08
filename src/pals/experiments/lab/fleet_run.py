"""Several simulated engines under one budget: one grid of event time, one `tick` an engine, shares as the agent gives them.

Each engine is a `Session` of the agent; who may draw what is `pals.runtime.sharing`, so nothing of the sharing is modelled here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from pals.core.errors import ConfigError
from pals.core.quantities import Budget, EngineInfo
from pals.experiments.lab.figures import Figures, figures_of
from pals.experiments.lab.fleet_meter import FleetLedger, FleetMeter
from pals.experiments.lab.loads import Feed
from pals.experiments.lab.meter import SpanMeter
from pals.experiments.lab.run import RunTask, answers_between, rigged
from pals.experiments.simulated_faults import TimedFaults
from pals.experiments.simulated_run import quiet_log
from pals.plant.replica import Replica
from pals.runtime.agent import Session
from pals.runtime.budgets import BudgetSchedule
from pals.runtime.sharing import lowering_first, share_now


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetTask:
    """Everything a run of several engines needs."""

    members: tuple[RunTask, ...]  # one an engine, of one period and warm-up; their own budgets do not count
    budget: BudgetSchedule = field(default_factory=BudgetSchedule)  # boards of all engines together
    steered: bool = True  # False: the budget is only held against what is drawn, nobody is told of it


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetRan:
    """What came of it."""

    members: tuple[Figures, ...]  # in the order of the task; each with its own share as its budget
    ledger: FleetLedger  # of all together


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedProcess:
    """What a session knows of an engine that has no process."""

    info: EngineInfo
    number: int

    @property
    def pids(self) -> frozenset[int]:
        """One that no process has."""
        return frozenset({-self.number})

    def told(self) -> str:
        """Its name."""
        return f"{self.info.name} (simulated, number {self.number})"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Engine:
    """One engine under way."""

    task: RunTask
    replica: Replica
    faults: TimedFaults
    feed: Feed
    session: Session
    meter: SpanMeter


def run_fleet(task: FleetTask) -> FleetRan:
    """Run all to the first load's end.

    Raises:
        ConfigError: no engine, engines of different periods or warm-ups, or a policy that does not fit; nothing was simulated.
    """
    period_s, warmup_s = _common(task.members)
    with quiet_log():
        engines = [_engine(member, i) for i, member in enumerate(task.members, 1)]
        meter = FleetMeter([e.replica for e in engines], [m.slo for m in task.members], warmup_s)
        _drive(task, engines, meter, period_s)
    return FleetRan(members=tuple(_figures(e) for e in engines), ledger=meter.ledger())


def _common(members: Sequence[RunTask]) -> tuple[float, float]:
    """Period and warm-up of all."""
    both = {(m.period_s, m.load.warmup_s) for m in members}
    if len(both) != 1:
        raise ConfigError(
            f"engines under one budget need one period and one warm-up, got {sorted(both)}. Nothing was run"
        )
    return both.pop()


def _engine(task: RunTask, number: int) -> _Engine:
    replica, rig, faults = rigged(task)
    meter = SpanMeter(replica, task.load.warmup_s)
    return _Engine(
        task=task,
        replica=replica,
        faults=faults,
        feed=task.load.start(replica, np.random.default_rng([task.seed, 10, number])),
        session=Session(
            name=f"{number}-{task.sim.model}", group=SimulatedProcess(info=task.sim.engine, number=number), rig=rig,
            slo=task.slo, sink=meter.observe, exits=ExitStack(),
        ),
        meter=meter,
    )  # fmt: skip


def _drive(task: FleetTask, engines: Sequence[_Engine], meter: FleetMeter, period_s: float) -> None:
    """Tick on the grid until a load is over."""
    sessions, slot = [e.session for e in engines], 0
    while True:
        now_s = slot * period_s
        for engine in engines:
            engine.feed.feed()
            engine.faults.advance(now_s)
        budget = task.budget.at(now_s)
        told = budget if task.steered else Budget()
        for session, target_w in lowering_first(sessions, told, now_s):
            session.tick(share_now(session, sessions, target_w, told, now_s), now_s)
        meter.observe(now_s, budget)
        if any(e.feed.over(now_s) for e in engines):
            return
        slot += 1


def _figures(engine: _Engine) -> Figures:
    ledger = engine.meter.ledger()
    answers = answers_between(engine.replica, ledger.time_s[0], ledger.time_s[-1])
    return figures_of(answers, ledger, engine.task.slo, boards=engine.task.sim.boards)
