"""What measured routing of experts is worth to `pals`: the same policy, its correction in place, with and without the counts.

Its arms meet the same arrivals on the same plant: one that knows no counts, one whose profile stores the routing it was measured
under, and one that has counts but a profile without, and so uses only what changed since the start; this also without being told of a
drift of routing, which would widen its margins. Routing stands, or changes at `AT_S`.
Everything is told as a paired difference over seeds from the arm that knows none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import log, sqrt
from pathlib import Path
from statistics import fmean, stdev

from scipy.special import stdtrit

from pals.control.controller import PalsPolicy
from pals.control.correction import Correction
from pals.control.guard import Guard
from pals.control.pals_state import PalsSettings, State
from pals.control.policies import watched
from pals.control.routing import UNKNOWN
from pals.core.errors import ConfigError
from pals.core.quantities import Budget, Decision, EngineSample, Slo, TelemetrySample
from pals.experiments.lab.engines import EngineCase
from pals.experiments.lab.experiment import Row, Table, Verdict, Wish, verdict_of
from pals.experiments.lab.loads import OpenLoop, arrivals_of, capacity_of
from pals.experiments.lab.price import engines_of
from pals.experiments.lab.ratios import Place, by_seed, ratios
from pals.experiments.lab.rivals import BASELINE
from pals.experiments.lab.run import RunTask, run
from pals.experiments.lab.surprises import CHAT
from pals.experiments.simulated_node import SimulatedBoard, SimulatedGroup
from pals.experiments.simulated_run import Simulation
from pals.models.profile import Profile
from pals.plant.routing_schedule import RoutingEvent, RoutingSchedule

ENGINES = (
    ("Qwen/Qwen3-30B-A3B", "h100-sxm5-80gb", 128),
    ("mistralai/Mixtral-8x7B-v0.1", "4xa100-sxm4-80gb", 64),
    ("allenai/OLMoE-1B-7B-0924", "h100-sxm5-80gb", 128),
)
LOAD = 0.5  # of the capacity as found, chats
WARMUP_S, SPAN_S = 60.0, 120.0
AT_S = 90.0
TTFT_S, SLOWER = 2.0, 1.4  # TPOT p95 may be so many times that of `static` under standing routing: tight enough to bind
STANDS, ALL = "stands", "all"
ROUTINGS: dict[str, RoutingSchedule] = {
    STANDS: RoutingSchedule(),
    "half swapped": RoutingSchedule(events=(RoutingEvent(time_s=AT_S, swap=0.5),)),
    "cv 0.3": RoutingSchedule(events=(RoutingEvent(time_s=AT_S, cv=0.3),)),
    "cv 2": RoutingSchedule(events=(RoutingEvent(time_s=AT_S, cv=2.0),)),
}
BLIND, STORED, SINCE = "knows none", "stored and counted", "counted since the start"
STEADY = "since the start, drift not told"  # a diagnosis, added after the first runs: no promise is made for it
ARMS = (BLIND, STORED, SINCE, STEADY)
PROMISED = (STORED, SINCE)
PLACES = ("engine", "routing")
NO_WORSE, MORE_MISSED, OFF = 0.995, 0.005, 0.05
SEEN_S = 15.0  # after the change, before predictions are held against it: the window of the counts is 10 s
LESSON_S = 8.0  # over which one prediction is compared, as the policy's own lessons


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsCell:
    """One engine under one routing, with every arm in turn."""

    engine: EngineCase
    routing: str  # of `ROUTINGS`
    warmup_s: float = WARMUP_S
    span_s: float = SPAN_S

    @property
    def slug(self) -> str:
        """See `Cell`."""
        return f"{self.engine.slug}--{self.routing.replace(' ', '-')}"

    @property
    def seed(self) -> int:
        """See `Cell`."""
        return self.engine.seed


class Experts:
    """See the module."""

    name = "experts"
    title = "What measured routing is worth"
    question = "What becomes of energy, misses and predictions when `pals` knows which experts tokens choose, and routing stands or drifts?"
    targets = (
        f"against the same policy that knows no counts, in the mean over engines and routings: node tokens/J no worse than {NO_WORSE:g} of "
        f"it, and at most {100 * MORE_MISSED:g} points more requests late; with the routing stored in the profile, step times after a change "
        f"of the popularity's variation are predicted within {OFF:.0%} before any correction, and better than without counts"
    )
    sources = ("experiments/lab/experts.py", "experiments/lab/surprises.py", "experiments/lab/price.py")
    takes = frozenset({"models", "boards"})

    def cells(self, wish: Wish) -> list[ExpertsCell]:
        """See `Experiment`."""
        first = [e for e in engines_of(replace(wish, full=False), ENGINES) if e.seed == wish.seed]
        if dense := [e.model for e in first if not has_experts(e.simulation())]:
            raise ConfigError(f"{', '.join(dense)} has no experts: choose mixture models. Nothing was run")
        return [
            ExpertsCell(engine=replace(e, seed=s, counted=True), routing=routing)
            for s in wish.seeds(5, 10)
            for e in first
            for routing in ROUTINGS
        ]

    def run(self, cell: ExpertsCell, place: Path) -> list[Row]:
        """See `Experiment`."""
        sim, stored = cell.engine.simulation(), cell.engine.profile(place)
        bare = without_routing(cell.engine, place)
        rate = LOAD * capacity_of(sim, CHAT, seed=cell.seed)
        arrivals = arrivals_of(CHAT, rate_per_s=rate, duration_s=cell.warmup_s + cell.span_s, seed=cell.seed)
        load = OpenLoop(workload=arrivals, warmup_s=cell.warmup_s)
        found = run(RunTask(sim=sim, load=load, policy=BASELINE, slo=Slo(ttft_p95_s=TTFT_S), seed=cell.seed)).figures
        slo = Slo(ttft_p95_s=TTFT_S, tpot_p95_s=SLOWER * found.tpot_s[1] if found.tpot_s else None)
        rows, turn = list[Row](), cell.seed % len(ARMS)
        for arm in (*ARMS[turn:], *ARMS[:turn]):
            profile, counts = stored if arm == STORED else bare, arm != BLIND
            here = replace(sim, routing=ROUTINGS[cell.routing], counts_experts=counts)
            steps = StepErrors(
                PalsPolicy(profile.model(), guard_of(sim), PalsSettings(use_experts=counts)),
                told_of_drift=arm != STEADY,
            )
            f = run(RunTask(
                sim=here, load=load, policy="pals", profile=profile, slo=slo, seed=cell.seed,
                controller=watched(steps, profile, guard_of(sim)),
            )).figures  # fmt: skip
            about = {
                "engine": cell.engine.name, "routing": cell.routing, "seed": cell.seed, "policy": arm, "tpot_target_s": slo.tpot_p95_s,
                "missed": 1.0 - f.good_requests / max(1, f.requests), "step_error": steps.error(AT_S + SEEN_S),
            }  # fmt: skip
            rows.append(about | f.to_row())
        return rows

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """See `Experiment`."""
        if not rows:
            return []
        places = list(dict.fromkeys((x["engine"], x["routing"]) for x in rows))
        groups = [*places, *((ALL, r) for r in dict.fromkeys(r for _, r in places)), (ALL, ALL)]
        lines = [line_of(rows, engine, routing) for engine, routing in groups]
        header = (
            "engine", "routing", "misses, knows none", *(f"{arm}: {what}" for arm in ARMS[1:] for what in ("tokens/J", "misses")),
            *(f"step off, {arm}" for arm in ARMS),
        )  # fmt: skip
        caption = (
            "**Against the same policy that knows no counts, by seed in pairs, with 95 % intervals: node tokens per joule in percent (above 0: "
            'better), requests late in points (above 0: more), "all" by the mean of places in a seed; and by how much a step\'s time is off its prediction before correction, in the mean**'
        )
        return [Table(header=header, lines=lines, caption=caption)]

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """See `Experiment`."""
        told = list[Verdict]()
        for arm in PROMISED:
            gains, more = (
                by_seed(ratios(rows, "tokens_per_j_node", arm, BLIND, PLACES)),
                by_seed(more_misses(rows, arm)),
            )
            told += [
                verdict_of(f"{arm}: node tokens/J over that of the arm that knows none", gains, least=NO_WORSE, unit="×"),
                verdict_of(f"{arm}: more requests late", {s: 100 * m for s, m in more.items()}, most=100 * MORE_MISSED, unit=" points"),
            ]  # fmt: skip
        changed = [r for r in rows if str(r["routing"]).startswith("cv") and r["step_error"] is not None]
        off = by_seed(
            {(r["engine"], r["routing"], r["seed"]): r["step_error"] for r in changed if r["policy"] == STORED}
        )
        better = by_seed(ratios(changed, "step_error", STORED, BLIND, PLACES))
        return [
            *told,
            verdict_of(f"{STORED}: step time off its prediction after a change of cv", off, most=OFF),
            verdict_of(f"{STORED}: the same over that of the arm that knows none", better, most=1.0, unit="×"),
        ]

    def figures(self, rows: Sequence[Row]) -> Sequence[str]:
        """See `Experiment`."""
        return ()


@dataclass(slots=True)
class StepErrors:
    """The policy, unchanged where it is told everything; notes what its tables say of each period's steps, before correction, beside what they took."""

    policy: PalsPolicy
    told_of_drift: bool = True  # of routing
    _noted: list[tuple[float, float, float]] = field(default_factory=list)  # time, seconds predicted, seconds in steps
    _before: EngineSample | None = None

    def initial(self) -> State:
        """The policy's."""
        return self.policy.initial()

    def step(
        self, state: State, sample: TelemetrySample, budget: Budget, slo: Slo, now_s: float
    ) -> tuple[Decision, State]:
        """The policy's; the profile's drift is not told."""
        return self.step_corrected(state, sample, budget, slo, now_s, Correction())

    def step_corrected(
        self, state: State, sample: TelemetrySample, budget: Budget, slo: Slo, now_s: float, correction: Correction
    ) -> tuple[Decision, State]:
        """The policy's."""
        if not self.told_of_drift:
            correction = correction.routed(UNKNOWN)
        decision, after = self.policy.step_corrected(state, sample, budget, slo, now_s, correction)
        if sample.engine is not None:
            self._note(after, state, sample.engine, now_s)
            self._before = sample.engine
        return decision, after

    def _note(self, after: State, state: State, engine: EngineSample, now_s: float) -> None:
        """The period that ends now, by the point that was in force in it and the routing known now."""
        steps = engine.steps - self._before.steps if self._before is not None else 0
        if self._before is None or steps <= 0 or after.key is None or state.key is None:
            return
        told_s = self.policy.step_time_s(
            state._replace(routing=after.routing), (self._before.running + engine.running) / 2
        )
        if told_s is not None:
            self._noted.append((now_s, told_s * steps, engine.busy_s - self._before.busy_s))

    def error(self, since_s: float) -> float | None:
        """Mean over windows of `LESSON_S` from `since_s` on of how far measured lies from predicted, as a logarithm; None: nothing noted."""
        windows: dict[int, tuple[float, float]] = {}
        for time_s, told_s, took_s in self._noted:
            if time_s >= since_s and took_s > 0.0:
                told, took = windows.get(int(time_s / LESSON_S), (0.0, 0.0))
                windows[int(time_s / LESSON_S)] = (told + told_s, took + took_s)
        return fmean(abs(log(took / told)) for told, took in windows.values()) if windows else None


def has_experts(sim: Simulation) -> bool:
    """Whether the model is a mixture."""
    return sim.replica().expert_counts() is not None


def guard_of(sim: Simulation) -> Guard:
    """Of the simulation's boards."""
    group = SimulatedGroup(sim.replica(), sim.spec, sim.boards)
    return Guard.of([SimulatedBoard(group, i).info for i in range(sim.boards)], sim.max_num_seqs)


@cache
def without_routing(engine: EngineCase, place: Path) -> Profile:
    """The rows of the same sweep, fitted as those of an engine that counts nothing."""
    p = engine.profile(place)
    return Profile.of(
        p.rows, p.mixes, replace(p.facts, popularity=None), p.fingerprint, source=p.source, made_at=p.made_at, command=p.command, notes=p.notes
    )  # fmt: skip


def more_misses(rows: Sequence[Row], arm: str) -> dict[Place, float]:
    """Share of requests late, beyond that of the arm that knows none."""
    keys = (*PLACES, "seed")
    blind = {tuple(r[k] for k in keys): float(r["missed"]) for r in rows if r["policy"] == BLIND}
    mine = {tuple(r[k] for k in keys): float(r["missed"]) for r in rows if r["policy"] == arm}
    return {place: missed - blind[place] for place, missed in mine.items() if place in blind}


def line_of(rows: Sequence[Row], engine: str, routing: str) -> list[str]:
    """A line of the table; a seed's value is the mean over places."""
    here = [r for r in rows if engine in (r["engine"], ALL) and routing in (r["routing"], ALL)]
    line = [engine, routing, f"{100 * fmean([r['missed'] for r in here if r['policy'] == BLIND] or [0.0]):.1f} %"]
    for arm in ARMS[1:]:
        gains = by_seed(ratios(here, "tokens_per_j_node", arm, BLIND, PLACES)).values()
        more = by_seed(more_misses(here, arm)).values()
        line += [with_interval([100.0 * (g - 1.0) for g in gains]), with_interval([100.0 * m for m in more])]
    for arm in ARMS:
        off = [100.0 * r["step_error"] for r in here if r["policy"] == arm and r["step_error"] is not None]
        line.append(f"{fmean(off):.1f} %" if off else "–")
    return line


def with_interval(values: Sequence[float]) -> str:
    """Mean of paired differences, and its 95 % interval by Student's law; a dash where there is none."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:+.1f}"
    half = float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / sqrt(len(values))
    return f"{fmean(values):+.1f} ({fmean(values) - half:+.1f}..{fmean(values) + half:+.1f})"
