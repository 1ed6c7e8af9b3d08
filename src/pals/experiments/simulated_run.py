"""One policy on one simulated replica: the live controller's own `tick`, guard and policy, on the grid of event time.

Everything a run needs is in its `Simulation` and `PolicyTask`; so it is the same in this process and in a worker, and the
same twice. Figures that come from here are simulated.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pals.control.guard import Guard
from pals.control.interleaved import Interleaving
from pals.control.policies import PALS, build_policy
from pals.core.architecture import ModelShape
from pals.core.errors import ConfigError
from pals.core.fingerprint import check_fingerprint, only_flags_of
from pals.core.protocols import PowerMeter
from pals.core.quantities import BoardInfo, EngineInfo, fingerprint_of
from pals.experiments.outcome import Answers, Outcome, PeriodTally, outcome_of
from pals.experiments.simulated_faults import TimedFaults
from pals.experiments.simulated_files import TickFile
from pals.experiments.simulated_node import (
    SimulatedBoard,
    SimulatedCounts,
    SimulatedEngine,
    SimulatedGroup,
    engine_info,
)
from pals.models.profile import Profile
from pals.plant.faults import FaultSchedule
from pals.plant.llm_step import StepModel
from pals.plant.perturb import SPREAD, perturb
from pals.plant.replica import Replica
from pals.plant.routing_schedule import RoutingSchedule
from pals.plant.specs import BoardSpec
from pals.plant.step_constants import step_constants
from pals.plant.workload import LengthSource, Workload
from pals.runtime.agent import policy_settings
from pals.runtime.config import Config, ControlConfig
from pals.runtime.journal import Journal, JournalHeader
from pals.runtime.routing_meter import RoutingMeter
from pals.runtime.tick import Rig, TickRecord, TickState, tick

T = TypeVar("T")
TAIL_S = 1.0  # ticks after the last token, so that they cover it
LOOK_EVERY = 256  # ticks between two looks at whether to stop, and two reports
EMPTY = Workload(
    name="nothing", arrival_s=np.zeros(0), prompt_tokens=np.zeros(0, np.int32), output_tokens=np.zeros(0, np.int32),
    prefix_tokens=np.zeros(0, np.int32),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """The engine, its boards and the requests; every policy meets the same."""

    model: str
    config: Mapping[str, Any]  # the model's config.json
    spec: BoardSpec
    boards: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefix_caching: bool
    board_seed: int
    context_tokens: int  # prompt and output of the longest request
    workload: Workload
    left_out: int = 0  # requests longer than that
    faults: FaultSchedule = field(default_factory=FaultSchedule)
    routing: RoutingSchedule = field(
        default_factory=RoutingSchedule
    )  # how popularity drifts, and the seed it begins with
    counts_experts: bool = False  # as an engine started with PALS_EXPERTS=1
    perturb_seed: int | None = None  # other constants of the plant, drawn from this seed; None: the plant as it is
    spread: float = SPREAD

    @property
    def model_context(self) -> int:
        """The longest prompt and output that the model takes, tokens."""
        return int(self.config.get("max_position_embeddings") or self.config.get("n_positions") or 2**31 - 1)

    @property
    def asked_tokens_per_s(self) -> float:
        """Output tokens per second that the requests ask for, on average."""
        w = self.workload
        return float(w.output_tokens.sum()) / max(w.period_s, 1.0)

    @property
    def engine(self) -> EngineInfo:
        """The engine as a profile knows it."""
        return engine_info(
            self.model, boards=self.boards, launch_sequences=self.max_num_seqs, shape=ModelShape.from_config(self.config),
            step_tokens=self.max_num_batched_tokens, prefix_caching=self.prefix_caching,
        )  # fmt: skip

    @property
    def how_to_profile(self) -> str:
        """The command that makes a profile for it."""
        boards, plant = f"{self.boards}x{self.spec.name}", ""
        if self.perturb_seed is not None:
            plant = f" --perturb-seed {self.perturb_seed} --spread {self.spread:g}"
        return f"pals profile simulate {self.model} --boards {boards} --max-num-seqs {self.max_num_seqs}{plant} --out profile.json"

    def moved(self, thing: T) -> T:
        """Constants of the plant, moved where that is asked for; whatever a driver reports stays."""
        return thing if self.perturb_seed is None else perturb(thing, seed=self.perturb_seed, spread=self.spread)

    def step_model(self, popularity_cv: float | None = None, host_factor: float = 1.0) -> StepModel:
        """Step times; with another popularity of experts, or more or less host time, where something drifted."""
        k = self.moved(step_constants(self.spec))
        k = k.with_host_factor(host_factor)
        if popularity_cv is not None:
            k = replace(k, popularity_cv=popularity_cv)
        return StepModel(
            ModelShape.from_config(self.config), self.moved(self.spec), tensor_parallel=self.boards, constants=k,
            max_tokens=self.max_num_batched_tokens,
        )  # fmt: skip

    def replica(self) -> Replica:
        """A new one at time 0, without requests.

        Raises:
            ConfigError: the model does not fit the boards, or sizes do not fit one another.
        """
        return Replica(
            self.step_model(), self.moved(self.spec), boards=self.boards, max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens, prefix_caching=self.prefix_caching,
            board_seed=self.board_seed, routing_seed=self.routing.seed,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTask:
    """One policy to run, and where its record goes."""

    name: str
    config: Config
    profile: Profile | None
    ticks: Path
    journal: Path | None
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyResult:
    """What came of it; `outcome` is None where no request was answered."""

    task: PolicyTask
    answers: Answers  # of the requests that arrived
    extra: Mapping[str, Any]  # further columns of these
    outcome: Outcome | None
    event_s: float
    wall_s: float
    complete: bool  # False: stopped before the last token
    noted: int  # ticks that carry notes
    first_note: str | None


def run_policy(
    sim: Simulation, task: PolicyTask, *, stop: Callable[[], bool], report: Callable[[float], None]
) -> PolicyResult:
    """Serve the workload under one policy; `report` is told the event time now and then.

    Raises:
        ConfigError: settings or profile that do not fit; nothing was simulated.
    """
    began_s = time.perf_counter()
    replica, slo, w = sim.replica(), task.config.slo, sim.workload
    group = SimulatedGroup(replica, sim.spec, sim.boards)
    rig = rig_of(sim, task, replica, group)
    replica.submit(w)
    tally, energy = PeriodTally(float(w.arrival_s[0])), EnergySpan(replica, float(w.arrival_s[0]))
    with ExitStack() as exits:
        exits.enter_context(quiet_log())
        ticks = exits.enter_context(closing(TickFile(task.ticks, task.name)))
        sinks: list[Callable[[TickRecord], None]] = [ticks.take, tally.observe, energy.observe]
        if task.journal is not None:
            header = header_of(sim, task, [m.info for m in rig.meters], accepted_by(sim, task, rig.meters))
            sinks.append(exits.enter_context(closing(Journal(task.journal, header))).append)
        faults = TimedFaults(sim.faults, replica, group, sim.step_model, sim.routing)
        event_s, complete = drive(faults, replica, rig, task.config, sinks, stop=stop, report=report)
    answers, extra = answers_of(replica, w)
    mean_w = energy.mean_power_w()
    told = None
    if answers.answered.any() and mean_w is not None:
        told = outcome_of(task.name, answers, tally, slo, mean_power_w=mean_w)
    return PolicyResult(
        task=task, answers=answers, extra=extra, outcome=told, event_s=event_s, complete=complete, noted=ticks.noted,
        first_note=ticks.first_note,
        wall_s=time.perf_counter() - began_s,
    )  # fmt: skip


@contextmanager
def quiet_log() -> Iterator[None]:
    """Notes of ticks go to the file of ticks alone: hours of them would drown a terminal."""
    log = logging.getLogger("pals")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


class EnergySpan:
    """What the plant's boards really drew from the first request on, whatever their meters say."""

    def __init__(self, replica: Replica, start_s: float) -> None:
        self._replica, self._start_s = replica, start_s
        self._first: tuple[float, float] | None = None

    def observe(self, record: TickRecord) -> None:
        """Note where the span begins."""
        if self._first is None and record.sample.time_s >= self._start_s:
            self._first = (record.sample.time_s, self._replica.energy_j())

    def mean_power_w(self) -> float | None:
        """All boards, up to now; None before the span has any length."""
        if self._first is None or self._replica.now_s <= self._first[0]:
            return None
        return (self._replica.energy_j() - self._first[1]) / (self._replica.now_s - self._first[0])


def drive(
    faults: TimedFaults,
    replica: Replica,
    rig: Rig,
    config: Config,
    sinks: list[Callable[[TickRecord], None]],
    *,
    stop: Callable[[], bool],
    report: Callable[[float], None],
) -> tuple[float, bool]:
    """Tick on the grid until `TAIL_S` after the last token, or until `stop`; event time, and whether all were answered."""
    state, period_s, slot = TickState(controller=rig.controller.initial()), config.control.period_s, 0
    ends_s = float("inf")
    while True:
        now_s = slot * period_s
        faults.advance(now_s)
        record, state = tick(rig, state, config.budget.at(now_s), config.slo, now_s)
        for sink in sinks:
            sink(record)
        if replica.finished:
            ends_s = min(ends_s, now_s + TAIL_S)
            if now_s >= ends_s:
                return now_s, True
        if slot % LOOK_EVERY == 0:
            report(now_s)
            if stop():
                return now_s, False
        slot += 1


def rig_of(sim: Simulation, task: PolicyTask, replica: Replica, group: SimulatedGroup) -> Rig:
    """The parts that `tick` steers, as live ones; the mode `advise` leaves the actuators out.

    Raises:
        ConfigError: the policy or its profile does not fit.
    """
    info, control = sim.engine, task.config.control
    boards = [SimulatedBoard(group, i) for i in range(sim.boards)]
    guard = Guard.of([b.info for b in boards], sim.max_num_seqs)
    accepted = accepted_by(sim, task, boards)
    acts, engine = control.mode != "advise", SimulatedEngine(replica, info)
    policy = build_policy(
        control.policy, policy_settings(control), task.profile, guard, accepted=accepted,
        interleaving=interleaving_of(control),
    )  # fmt: skip
    return Rig(
        meters=boards,
        actuators=boards if acts else (),
        engine=engine,
        setter=engine if acts else None,
        controller=policy,
        guard=guard,
        period_s=control.period_s,
        experts=experts_of(sim, task, replica),
        lowering=control.lowering,
        acting="canary" if control.mode == "canary" else "auto",
    )


def experts_of(sim: Simulation, task: PolicyTask, replica: Replica) -> RoutingMeter | None:
    """What reads the routing, as the agent has it; None where nobody counts, or nobody would look."""
    control = task.config.control
    unused = control.experts == "off" or control.policy != PALS
    if not sim.counts_experts or unused or not ModelShape.from_config(sim.config).experts:
        return None
    return RoutingMeter(SimulatedCounts(replica), reference=task.profile.routing if task.profile is not None else None)


def interleaving_of(control: ControlConfig) -> Interleaving | None:
    """Which windows are the policy's; None: all, or none."""
    return control.interleaving if control.mode == "canary" else None


def accepted_by(sim: Simulation, task: PolicyTask, boards: Sequence[PowerMeter]) -> tuple[str, ...]:
    """What differs between the task's profile and the simulation, and is accepted.

    Raises:
        ProfileMismatchError: it is not.
    """
    if task.profile is None:
        return ()
    return check_profile(task.profile, sim, [b.info for b in boards], task.config.control)


def check_profile(
    profile: Profile, sim: Simulation, boards: list[BoardInfo], control: ControlConfig
) -> tuple[str, ...]:
    """What differs and is accepted; release, driver, activations and flags that a simulation has not do not count.

    Raises:
        ProfileMismatchError: naming every difference.
    """
    mine, here = profile.fingerprint, fingerprint_of(sim.engine, boards)
    here = replace(
        here, engine_version=mine.engine_version, engine_build=mine.engine_build, driver=mine.driver, dtype=mine.dtype,
        flags=only_flags_of(mine.flags, here.flags),
    )  # fmt: skip
    advice = f"Make one: `{sim.how_to_profile}`."
    return check_fingerprint(mine, here, accept=control.accept_mismatch, name=str(control.profile), advice=advice)


def header_of(
    sim: Simulation, task: PolicyTask, boards: list[BoardInfo], accepted: tuple[str, ...] = ()
) -> JournalHeader:
    """The journal's header; without what differs between equal runs."""
    control = task.config.control
    return JournalHeader(
        policy=control.policy,
        policy_settings=policy_settings(control),
        profile_json=task.profile.to_json() if task.profile else None,
        boards=tuple(boards),
        engine=sim.engine,
        period_s=control.period_s,
        emulated=True,
        started_at=datetime.fromtimestamp(0, UTC).isoformat(timespec="seconds"),
        command=task.command,
        lowering=control.lowering,
        clock="virtual",
        accepted_mismatch=accepted,
        interleaving=interleaving_of(control),
    )


def answers_of(replica: Replica, workload: Workload) -> tuple[Answers, dict[str, Any]]:
    """What came of the requests that came so far, the refused among them, and what only a simulator knows of them."""
    times, engine = replica.results(), replica.counters()
    n = engine.arrived_requests + engine.refused_requests
    done = ~np.isnan(times.last_token_s[:n])
    asked = workload.output_tokens[:n]
    answers = Answers(
        sent_s=workload.arrival_s[:n],
        first_token_s=times.first_token_s[:n],
        last_token_s=times.last_token_s[:n],
        output_tokens=np.where(done, asked, 0),
        asked_tokens=asked,
        refused=engine.refused_requests,
    )
    only_here = {
        "scheduled_s": times.scheduled_s[:n],
        "preemptions": times.preemptions[:n],
        "refused": times.refused[:n],
    }
    return answers, only_here


def capacity_per_s(sim: Simulation, lengths: LengthSource, rng: np.random.Generator) -> float:
    """Requests of these lengths that the engine answers per second at its launch settings when it never lacks work."""
    count = 16 * sim.max_num_seqs
    prompt, output = lengths.draw(4 * count, rng)
    fitting = np.flatnonzero(prompt.astype(np.int64) + output <= sim.context_tokens)[:count]
    if len(fitting) < 8:
        raise ConfigError(f"nearly all requests are longer than {sim.context_tokens} tokens. Nothing was started")
    count, prompt, output = len(fitting), prompt[fitting], output[fitting]
    backlog = Workload(
        name="backlog", arrival_s=np.zeros(count), prompt_tokens=prompt, output_tokens=output,
        prefix_tokens=np.zeros(count, np.int32),
    )  # fmt: skip
    replica = sim.replica()
    replica.submit(backlog)
    replica.run()
    ended_s = np.sort(replica.results().last_token_s)
    first, last = count // 4, 3 * count // 4  # neither filling nor running dry
    return float((last - first) / (ended_s[last] - ended_s[first]))
