"""A replica under a load, steered by hand, and what it came to: what every rival that knows the truth is judged by.

No tick and no controller: the plant's own times and joules. Limits go through the guard, as those of any policy do.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from pals.control.estimator import over_budget_s
from pals.control.guard import Guard
from pals.core.errors import ConfigError
from pals.core.quantities import Budget, Decision, OperatingPoint, Slo, TelemetrySample
from pals.experiments.outcome import Answers, FloatArray
from pals.experiments.simulated_node import SimulatedBoard, SimulatedGroup
from pals.experiments.simulated_run import Simulation, answers_of
from pals.plant.fleet import NODE_OFFSET_W, NODE_SLOPE
from pals.plant.workload import Workload
from pals.runtime.budgets import BudgetSchedule

PERIOD_S = 0.5  # of looks at power where there is a budget, as a tick's
OVER_PERIODS = 4  # looks whose mean tells whether a budget holds
FEED_AHEAD_S = 60.0  # requests are submitted so far ahead: a clone copies few
SUPPLY, REFILL_BELOW, REFILL_S = 2048, 1024, 0.5  # of a closed loop: requests; fewer are used up in `REFILL_S`
BOARDS_PER_NODE = 8
KEEPS_UP = 0.95  # of the tokens that arrive per second: a finite trace ends with a tail in which little is answered
LOOK_FOR_END_S = 0.1  # how closely the last token is looked for
LONGEST_DRAIN_S = 900.0  # after the last arrival; what is not answered then is not answered

Objective = Literal["node", "gpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """So many requests in flight at all times, measured after a warm-up."""

    supply: (
        Workload  # lengths in the order in which they are sent, over again where they end; arrival times do not count
    )
    in_flight: int
    warmup_s: float = 30.0
    measured_s: float = 120.0


class Target(NamedTuple):
    """A latency that a share of requests may exceed."""

    name: str  # as in `Slo`
    ttft: bool  # else TPOT
    seconds: float
    allowed: float  # share


def targets_of(slo: Slo) -> tuple[Target, ...]:
    """The latency targets that were given."""
    known = (
        ("ttft_p95_s", True, 0.05), ("tpot_p95_s", False, 0.05), ("ttft_p99_s", True, 0.01), ("tpot_p99_s", False, 0.01),
    )  # fmt: skip
    return tuple(Target(name, ttft, getattr(slo, name), share) for name, ttft, share in known if getattr(slo, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class RivalTask:
    """Engine, load, targets and budget; every rival gets the same."""

    sim: Simulation
    slo: Slo
    budget: BudgetSchedule = field(default_factory=BudgetSchedule)
    loop: ClosedLoop | None = None  # None: the simulation's requests as they arrive
    objective: Objective = "node"  # whose energy is to be least
    lowering: str = "drain"
    node_slope: float = NODE_SLOPE
    node_offset_w: float = NODE_OFFSET_W

    def __post_init__(self) -> None:
        if self.sim.faults.events:
            raise ConfigError("rivals that know the truth know no faults: leave them out. Nothing was simulated")
        if self.loop is None and not len(self.sim.workload):
            raise ConfigError("there is no request and no closed loop: nothing to serve. Nothing was simulated")

    @property
    def guard(self) -> Guard:
        """What the boards and the engine take."""
        group = SimulatedGroup(self.sim.replica(), self.sim.spec, self.sim.boards)
        return Guard.of([SimulatedBoard(group, i).info for i in range(self.sim.boards)], self.sim.max_num_seqs)

    def node_energy_j(self, gpu_energy_j: float, span_s: float) -> float:
        """Estimated energy of the nodes that the boards sit in."""
        nodes = -(-self.sim.boards // BOARDS_PER_NODE)
        return self.node_slope * gpu_energy_j + self.node_offset_w * nodes * span_s

    def energy_j(self, gpu_energy_j: float, span_s: float) -> float:
        """What the objective counts."""
        return gpu_energy_j if self.objective == "gpu" else self.node_energy_j(gpu_energy_j, span_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class RivalOutcome:
    """What a load came to; arrays of shape (requests,), those that were answered."""

    points: tuple[OperatingPoint, ...]  # one, or one for each of `from_s`
    from_s: tuple[float, ...]  # when each was set
    requests: int
    answered: int
    tokens: int  # output
    span_s: float
    gpu_energy_j: float
    node_energy_j: float
    ttft_s: FloatArray
    tpot_s: FloatArray
    missed: Mapping[str, float]  # share of requests above each target of the `Slo`; one never answered is above all
    violation: float  # by how much the targets are missed in all, shares added up; 0: every one is kept
    energy_per_token_j: float  # of the objective
    over_budget_s: float
    runs: int = 1  # simulations of the load it took to find, clones not counted

    @property
    def point(self) -> OperatingPoint:
        """The only point, or the first."""
        return self.points[0]

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second of the span."""
        return self.tokens / self.span_s

    @property
    def meets(self) -> bool:
        """Whether every target is kept and every request answered."""
        return self.violation == 0.0

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Smaller is better: targets kept before all, then fewest misses, then energy."""
        return (not self.meets, self.violation, self.energy_per_token_j)


class Mark(NamedTuple):
    """Where a measured span begins."""

    time_s: float
    energy_j: float
    tokens: int


class Trial:
    """See the module. Time starts at 0; nothing moves but by `advance`."""

    def __init__(self, task: RivalTask, guard: Guard | None = None) -> None:
        self.task, self._guard = task, guard or task.guard
        self.replica = task.sim.replica()
        self.mark = Mark(0.0, 0.0, 0)
        self.over_budget_s = 0.0
        self._fed, self._fed_to_s = 0, 0.0
        self._watched: tuple[TelemetrySample, ...] = ()
        self._budget = task.budget.at(0.0)
        self._point: OperatingPoint | None = None

    def fork(self) -> Trial:
        """Another one in the same state."""
        twin = copy(self)
        twin.replica = self.replica.clone()
        return twin

    @property
    def now_s(self) -> float:
        """Simulated time."""
        return self.replica.now_s

    @property
    def finished(self) -> bool:
        """Whether every request there is has its last token; never of a closed loop."""
        return self.task.loop is None and self._fed == len(self.task.sim.workload) and self.replica.finished

    def set_mark(self) -> None:
        """Measure from now on."""
        self.mark = Mark(self.now_s, self.replica.energy_j(), self.replica.counters().output_tokens)
        self.over_budget_s, self._watched = 0.0, ()

    def want(self, point: OperatingPoint) -> None:
        """Set `point` as far as guard and budget let it; its limit follows the budget from then on."""
        self._point = point
        allowed = allowed_point(self._guard, point, self.task.budget.at(self.now_s))
        self.replica.set_limit_w(allowed.power_limit_w)
        self.replica.set_clock_lock(allowed.sm_clock_mhz)
        self.replica.set_active_sequences(allowed.active_sequences, self.task.lowering)

    def advance(self, until_s: float) -> None:
        """Go on to `until_s`, requests arriving and budgets changing on the way."""
        while self.now_s < until_s:
            self._feed(until_s)
            stop_s = min(until_s, self._next_look_s())
            before_j, before_s = self.replica.energy_j(), self.now_s
            self.replica.advance(stop_s)
            self._look(before_j, before_s)

    def serve(self, until_s: float) -> None:
        """Go on to `until_s`, or to just after the last token of all."""
        last_s = float(self.task.sim.workload.arrival_s[-1]) if self.task.loop is None else until_s
        self.advance(min(until_s, last_s))
        while self.now_s < until_s and not self.finished:
            self.advance(min(until_s, self.now_s + LOOK_FOR_END_S))

    def _next_look_s(self) -> float:
        """When the closed loop may want more requests, or the budget a look."""
        loop_s = self.now_s + REFILL_S if self.task.loop is not None else float("inf")
        times = self.task.budget.times_s
        if not times:
            return loop_s
        following = bisect_right(times, self.now_s)
        change_s = times[following] if following < len(times) else float("inf")
        return min(loop_s, change_s, self.now_s + PERIOD_S)

    def _look(self, before_j: float, before_s: float) -> None:
        """Judge the power since the last look, and follow the budget."""
        if not self.task.budget.times_s:
            return
        passed_s = self.now_s - before_s
        power_w = (self.replica.energy_j() - before_j) / passed_s
        sample = TelemetrySample(time_s=self.now_s, window_s=passed_s, boards=(), power_w=power_w, engine=None)
        self._watched = (*self._watched, sample)[-OVER_PERIODS:]
        self.over_budget_s += over_budget_s(self._watched, self._budget)
        budget = self.task.budget.at(self.now_s)
        if budget != self._budget:
            self._budget, self._watched = budget, ()
            if self._point is not None:
                self.want(self._point)

    def _feed(self, until_s: float) -> None:
        """Submit what arrives before `until_s`, and some more."""
        loop, work = self.task.loop, self.task.sim.workload
        if loop is not None:
            if self.replica.unsent_count < REFILL_BELOW:
                order = (self.replica.sent_count + np.arange(SUPPLY)) % len(loop.supply)
                self.replica.keep_in_flight(loop.in_flight, again(loop.supply, order))
        elif until_s > self._fed_to_s and self._fed < len(work):
            self._fed_to_s = until_s + FEED_AHEAD_S
            end = int(np.searchsorted(work.arrival_s, self._fed_to_s))
            if end > self._fed:
                self.replica.submit(work.take(np.arange(self._fed, end)))
                self._fed = end

    def answers(self) -> Answers:
        """Requests that have arrived so far; of a closed loop those that got a token after the mark."""
        if self.task.loop is None:
            return answers_of(self.replica, self.task.sim.workload)[0]
        r, since_s = self.replica.sent(), self.mark.time_s
        late = ~(r.first_token_s < since_s)
        done = ~np.isnan(r.last_token_s)
        known = (r.last_token_s >= since_s) | (late & ~np.isnan(r.first_token_s))
        return Answers(
            sent_s=np.where(late, r.arrival_s, np.nan)[known],
            first_token_s=r.first_token_s[known],
            last_token_s=r.last_token_s[known],
            output_tokens=np.where(done, r.output_tokens, 0)[known],
            asked_tokens=r.output_tokens[known],
        )

    def outcome(
        self, points: Sequence[OperatingPoint], from_s: Sequence[float], *, needed_tokens_per_s: float
    ) -> RivalOutcome:
        """What the span since the mark came to.

        Raises:
            ConfigError: nothing was answered in it.
        """
        task, answers, passed_s = self.task, self.answers(), self.now_s - self.mark.time_s
        energy_j, tokens = self.replica.energy_j() - self.mark.energy_j, self.replica.counters().output_tokens
        tokens, span_s, open_load = tokens - self.mark.tokens, passed_s, task.loop is None
        if tokens <= 0 or not answers.answered.any():
            raise ConfigError(f"no request was answered in {passed_s:.0f} s of simulated time: no figure follows")
        if open_load:  # as `outcome.outcome_of` does: mean power to just after the last token, times the span to it
            span_s = float(np.nanmax(answers.last_token_s) - answers.sent_s.min())
            energy_j *= span_s / passed_s
        requests = len(task.sim.workload) if open_load else len(answers.sent_s)
        missed = {t.name: missed_share(t, answers, requests, never=open_load) for t in targets_of(task.slo)}
        beyond = sum(max(0.0, missed[t.name] - t.allowed) for t in targets_of(task.slo))
        lacking = max(0.0, 1.0 - tokens / span_s / needed_tokens_per_s) if needed_tokens_per_s > 0 else 0.0
        answered = int(answers.answered.sum())
        unanswered = 1.0 - answered / requests if open_load else 0.0
        return RivalOutcome(
            points=tuple(points), from_s=tuple(from_s), requests=requests, answered=answered, tokens=tokens, span_s=span_s,
            gpu_energy_j=energy_j, node_energy_j=task.node_energy_j(energy_j, span_s), ttft_s=known(answers.ttft_s),
            tpot_s=known(answers.tpot_s), missed=missed, violation=beyond + lacking + unanswered,
            energy_per_token_j=task.energy_j(energy_j, span_s) / tokens, over_budget_s=self.over_budget_s,
        )  # fmt: skip


def allowed_point(guard: Guard, point: OperatingPoint, budget: Budget) -> OperatingPoint:
    """What the guard makes of `point`."""
    return guard.check(Decision(point=point, reason="fixed"), budget).point


def missed_share(target: Target, answers: Answers, requests: int, *, never: bool) -> float:
    """Share of `requests` above the target; `never`: those without a figure for want of an answer are."""
    values = answers.ttft_s if target.ttft else answers.tpot_s
    above = int((values > target.seconds).sum())
    judged = int((~np.isnan(values)).sum())
    if never:
        absent = requests - int((~np.isnan(answers.first_token_s if target.ttft else answers.last_token_s)).sum())
        above, judged = above + absent, judged + absent
    return above / judged if judged else 0.0


def known(values: FloatArray) -> FloatArray:
    """Those that are."""
    return np.asarray(values[~np.isnan(values)])


def again(supply: Workload, order: np.ndarray) -> Workload:
    """Requests of `supply` in this order; when they arrive is for the loop to say."""
    return Workload(
        name=supply.name, arrival_s=np.zeros(len(order)), prompt_tokens=supply.prompt_tokens[order],
        output_tokens=supply.output_tokens[order], prefix_tokens=supply.prefix_tokens[order],
    )  # fmt: skip


def start(task: RivalTask, point: OperatingPoint, guard: Guard | None = None) -> Trial:
    """A trial at `point` up to where its measured span begins: the first arrival, or the end of the warm-up."""
    trial = Trial(task, guard)
    trial.want(point)
    trial.advance(task.loop.warmup_s if task.loop is not None else float(task.sim.workload.arrival_s[0]))
    trial.set_mark()
    return trial


def ends_s(task: RivalTask) -> float:
    """When a trial is over at the latest."""
    if task.loop is not None:
        return task.loop.warmup_s + task.loop.measured_s
    return float(task.sim.workload.arrival_s[-1]) + LONGEST_DRAIN_S


def run_fixed(
    task: RivalTask, point: OperatingPoint, *, needed_tokens_per_s: float = 0.0, guard: Guard | None = None
) -> RivalOutcome:
    """Serve the load at one point."""
    trial = start(task, point, guard)
    trial.serve(ends_s(task))
    return trial.outcome([point], [0.0], needed_tokens_per_s=needed_tokens_per_s)


def found_point(task: RivalTask) -> OperatingPoint:
    """How the boards and the engine are found."""
    return OperatingPoint(power_limit_w=task.sim.spec.default_limit_w, active_sequences=task.sim.max_num_seqs)


def needed_tokens_per_s(task: RivalTask, guard: Guard | None = None) -> float:
    """The throughput that must be kept: the target, or the share of what the found point delivers; 0: none.

    Requests that arrive by themselves must be kept up with; more than they ask for nobody can deliver.
    """
    slo, work = task.slo, task.sim.workload
    needed = slo.throughput_tokens_s or 0.0
    if slo.throughput_share is not None:
        needed = max(needed, slo.throughput_share * run_fixed(task, found_point(task), guard=guard).tokens_per_s)
    if task.loop is None:
        needed = min(needed, KEEPS_UP * float(work.output_tokens.sum()) / max(work.period_s, PERIOD_S))
    return needed
