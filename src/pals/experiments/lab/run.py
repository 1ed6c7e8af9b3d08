"""One policy under one load on one simulated engine, through the real `tick`; the same arguments give the same figures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pals.core.protocols import AnyController
from pals.core.quantities import OperatingPoint, Slo
from pals.experiments.lab.figures import Figures, figures_of
from pals.experiments.lab.loads import Feed, Load
from pals.experiments.lab.meter import SpanMeter, TimeLine
from pals.experiments.outcome import Answers
from pals.experiments.simulated_faults import TimedFaults
from pals.experiments.simulated_node import SimulatedGroup
from pals.experiments.simulated_run import PolicyTask, Simulation, quiet_log, rig_of
from pals.models.profile import Profile
from pals.plant.replica import Replica
from pals.runtime.budgets import BudgetSchedule
from pals.runtime.config import Config, ControlConfig
from pals.runtime.tick import Rig, TickState, tick

Objective = Literal["gpu", "node"]

#: What decides a run's figures, as patterns of `src/pals`; an experiment adds its own module.
RUNNING = (
    "core", "engines/model_configs/*.json", "plant", "models", "control", "profiler", "runtime", "experiments/simulated_*.py", "experiments/static_best.py",
    "experiments/oracle.py", "experiments/fixed_run.py", *(f"experiments/lab/{n}.py" for n in ("engines", "figures", "loads", "meter", "run", "truth")),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTask:
    """Everything a run needs."""

    sim: Simulation  # its workload is not used; its faults are
    load: Load
    policy: str
    profile: Profile | None = None  # None: for policies that need none
    point: OperatingPoint | None = None  # policy "static": held throughout; None: as found
    slo: Slo = field(default_factory=Slo)
    budget: BudgetSchedule = field(default_factory=BudgetSchedule)
    period_s: float = 0.5
    lowering: str = "drain"
    objective: Objective = "node"  # whose energy is to be least, where a policy or rival can be told
    seed: int = 1  # of the lengths in a closed loop
    time_line: bool = False
    controller: AnyController | None = None  # in place of the one that `policy` names: for rivals that know the truth

    def rng(self) -> np.random.Generator:
        """What lengths are drawn from; the same each time."""
        return np.random.default_rng([self.seed, 10])

    @property
    def config(self) -> Config:
        """As a user would write it."""
        held = self.point
        control = ControlConfig(
            policy=self.policy, period_s=self.period_s, lowering=self.lowering, objective=self.objective,
            power_limit_w=held.power_limit_w if held is not None else None,
            sm_clock_mhz=held.sm_clock_mhz if held is not None else None,
            active_sequences=held.active_sequences if held is not None else None,
        )  # fmt: skip
        return Config(control=control, slo=self.slo, budget=self.budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What came of it."""

    figures: Figures
    time_line: Mapping[str, list[Any]] | None  # columns of `TimeLine`


def run(task: RunTask) -> Ran:
    """Run it to the load's end.

    Raises:
        ConfigError: the policy, its profile or the load does not fit; nothing was simulated.
    """
    replica, rig, faults = rigged(task)
    meter, line = SpanMeter(replica, task.load.warmup_s), TimeLine(replica) if task.time_line else None
    feed = task.load.start(replica, task.rng())
    with quiet_log():
        _drive(task, rig, faults, feed, meter, line)
    ledger = meter.ledger()
    answers = answers_between(replica, ledger.time_s[0], ledger.time_s[-1])
    figures = figures_of(answers, ledger, task.slo, boards=task.sim.boards)
    return Ran(figures=figures, time_line=line.columns if line is not None else None)


def rigged(task: RunTask) -> tuple[Replica, Rig, TimedFaults]:
    """A new replica, what `tick` steers of it, and its faults to come.

    Raises:
        ConfigError: the policy or its profile does not fit.
    """
    replica = task.sim.replica()
    group = SimulatedGroup(replica, task.sim.spec, task.sim.boards)
    named = PolicyTask(
        name=task.policy, config=task.config, profile=task.profile, ticks=Path(os.devnull), journal=None, command=""
    )
    rig = rig_of(task.sim, named, replica, group)
    if task.controller is not None:
        rig = replace(rig, controller=task.controller)
    return replica, rig, TimedFaults(task.sim.faults, replica, group, task.sim.step_model, task.sim.routing)


def _drive(
    task: RunTask, rig: Rig, faults: TimedFaults, feed: Feed, meter: SpanMeter, line: TimeLine | None
) -> None:  # fmt: skip
    """Tick on the grid until the load is over."""
    state, slot = TickState(controller=rig.controller.initial()), 0
    while True:
        now_s = slot * task.period_s
        feed.feed()
        faults.advance(now_s)
        record, state = tick(rig, state, task.budget.at(now_s), task.slo, now_s)
        meter.observe(record)
        if line is not None:
            line.observe(record)
        if feed.over(now_s):
            return
        slot += 1


def answers_between(replica: Replica, start_s: float, end_s: float) -> Answers:
    """Of the requests that arrived in [start_s, end_s)."""
    sent = replica.sent()
    chosen = (sent.arrival_s >= start_s) & (sent.arrival_s < end_s)
    answered = ~np.isnan(sent.last_token_s[chosen])
    asked = sent.output_tokens[chosen]
    return Answers(
        sent_s=sent.arrival_s[chosen],
        first_token_s=sent.first_token_s[chosen],
        last_token_s=sent.last_token_s[chosen],
        output_tokens=np.where(answered, asked, 0),
        asked_tokens=asked,
    )
