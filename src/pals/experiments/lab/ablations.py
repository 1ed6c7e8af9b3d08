"""What each part of `pals` is worth: the whole policy, and the same with one part taken away, under five demands.

The parts are its three levers, the correction of the profile in place, the margins below targets, the look at who waits, and the
profile's term for experts of unequal popularity. A demand is met by one engine; energy and misses are told against the whole policy's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pals.control.controller import PalsPolicy
from pals.control.guard import Guard
from pals.control.pals_state import PalsSettings
from pals.control.policies import watched
from pals.core.architecture import ModelShape
from pals.core.protocols import AnyController
from pals.core.quantities import Slo
from pals.experiments.lab.engines import EngineCase
from pals.experiments.lab.experiment import Row, Table, Verdict, Wish, verdict_of
from pals.experiments.lab.figures import Figures
from pals.experiments.lab.loads import ClosedLoop, Load, OpenLoop, arrivals_of, capacity_of
from pals.experiments.lab.price import engines_of
from pals.experiments.lab.ratios import Place, by_seed, ratios, told
from pals.experiments.lab.rivals import BASELINE
from pals.experiments.lab.run import RunTask, run
from pals.experiments.lab.surprises import CHAT, SLO, natural_draw_w
from pals.experiments.lab.wrong_profiles import of_another_plant, without_experts
from pals.experiments.simulated_node import SimulatedBoard, SimulatedGroup
from pals.experiments.simulated_run import Simulation
from pals.models.profile import Profile
from pals.runtime.budgets import BudgetSchedule

ENGINES = (
    ("mistralai/Mixtral-8x7B-v0.1", "4xa100-sxm4-80gb", 64),
    ("Qwen/Qwen3-30B-A3B", "h100-sxm5-80gb", 128),
)
WHOLE, EXPERTS = "whole", "without experts"
#: The policy's constants for each part that is taken away.
SETTINGS: Mapping[str, PalsSettings] = {
    "without clock": PalsSettings(use_clock=False),
    "without batch": PalsSettings(use_batch=False),
    "without limit": PalsSettings(use_limit=False),
    "without correction": PalsSettings(use_bias=False),
    "without margins": PalsSettings(use_margins=False),
    "without queue": PalsSettings(use_queue=False),
}
VARIANTS = (WHOLE, *SETTINGS, EXPERTS)
CLOSED, HALF, HIGH, BUDGET, WRONG = (
    "closed, 80 % throughput", "open 50 %", "open 85 %", "closed, 70 % budget", "open 65 %, other plant's profile",
)  # fmt: skip
OPEN_LOADS = {HALF: 0.5, HIGH: 0.85, WRONG: 0.65}
DEMANDS = (CLOSED, HALF, HIGH, BUDGET, WRONG)
SHARE, BUDGET_SHARE = 0.8, 0.7  # of the default's throughput, of the natural draw
LATE = Slo(tpot_p95_s=SLO.tpot_p95_s)  # of a closed loop, whose requests queue
WARMUP_S, SPAN_S = 60.0, 180.0
PLACES = ("engine", "demand")
BETTER = 1.01


@dataclass(frozen=True, slots=True, kw_only=True)
class AblationCell:
    """One engine under one demand, with every variant."""

    engine: EngineCase
    demand: str  # of `DEMANDS`
    variant: str  # of `VARIANTS`
    warmup_s: float = WARMUP_S
    span_s: float = SPAN_S

    @property
    def slug(self) -> str:
        """See `Cell`."""
        words = "".join(c if c.isalnum() else "-" for c in f"{self.demand}--{self.variant}")
        return f"{self.engine.slug}--{words}"

    @property
    def seed(self) -> int:
        """See `Cell`."""
        return self.engine.seed


class Ablations:
    """See the module."""

    name = "ablations"
    title = "What each part is worth"
    question = "What becomes of energy and misses when one part of `pals` is taken away?"
    targets = (
        f"nothing that is taken away makes energy per token better by more than {BETTER - 1:.0%} in the mean over places, unless more "
        "requests come late or throughput is lost by it"
    )
    sources = (
        "experiments/lab/ablations.py", "experiments/lab/surprises.py", "experiments/lab/wrong_profiles.py", "experiments/lab/price.py",
    )  # fmt: skip
    takes = frozenset({"models", "boards"})

    def cells(self, wish: Wish) -> list[AblationCell]:
        """See `Experiment`."""
        return [
            AblationCell(engine=e, demand=d, variant=v)
            for e in engines_of(wish, ENGINES)
            for d in DEMANDS
            for v in VARIANTS
            if v != EXPERTS or ModelShape.from_config(e.simulation().config).experts
        ]

    def run(self, cell: AblationCell, place: Path) -> list[Row]:
        """See `Experiment`."""
        sim = cell.engine.simulation()
        profile = profile_of(cell, place)
        slo = SLO if cell.demand in OPEN_LOADS else LATE
        if cell.demand == CLOSED:
            slo = replace(slo, throughput_tokens_s=SHARE * default_tokens_s(cell, sim))
        budget_w = BUDGET_SHARE * natural_draw_w(sim, seed=cell.seed) if cell.demand == BUDGET else None
        task = RunTask(
            sim=sim, load=load_of(cell, sim), policy="pals", profile=profile, slo=slo, seed=cell.seed,
            budget=BudgetSchedule((0.0,), (budget_w,)) if budget_w is not None else BudgetSchedule(),
            controller=controller_of(cell.variant, sim, profile),
        )  # fmt: skip
        f = run(task).figures
        about = {
            "engine": cell.engine.name, "demand": cell.demand, "seed": cell.seed, "policy": cell.variant, "budget_w": budget_w,
            "target_tokens_s": slo.throughput_tokens_s, "missed": missed_in(f, whole_run=cell.demand in OPEN_LOADS),
        }  # fmt: skip
        return [about | f.to_row()]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """See `Experiment`."""
        if not rows:
            return []
        places = list(dict.fromkeys((r["engine"], r["demand"]) for r in rows))
        variants = [v for v in VARIANTS if any(r["policy"] == v for r in rows)]
        lines = []
        for engine, demand in places:
            here = [r for r in rows if (r["engine"], r["demand"]) == (engine, demand)]
            lines.append([f"{engine}, {demand}", *(_told(here, v) for v in variants)])
        caption = (
            "**Node joules per token, and points more requests that missed a latency target, against the whole policy (whose own "
            "figures stand first; tokens/s over the whole's where it is below 0.995); means, least–most over seeds**"
        )
        return [Table(header=("engine, demand", *variants), lines=lines, caption=caption)]

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """See `Experiment`."""
        return [
            verdict_of(f"pals {variant}: node tokens/J over the whole policy's, mean of places where no more is missed", by_seed(fair_gains(rows, variant)), most=BETTER, unit="×")
            for variant in VARIANTS[1:]
        ]  # fmt: skip

    def figures(self, rows: Sequence[Row]) -> Sequence[str]:
        """See `Experiment`."""
        return ("ablations",) if rows else ()


def missed_in(figures: Figures, *, whole_run: bool) -> float:
    """Share of requests that missed a latency target; where the run ends with requests inside, of those whose TPOT is known."""
    if whole_run:
        return 1.0 - figures.good_requests / max(1, figures.requests)
    return figures.tpot_missed or 0.0


def default_tokens_s(cell: AblationCell, sim: Simulation) -> float:
    """What the engine answers as found."""
    return run(RunTask(sim=sim, load=load_of(cell, sim), policy=BASELINE, seed=cell.seed)).figures.tokens_per_s


def load_of(cell: AblationCell, sim: Simulation) -> Load:
    """The requests of a demand."""
    if cell.demand not in OPEN_LOADS:
        return ClosedLoop(
            mix=CHAT, in_flight=3 * sim.max_num_seqs // 2, warmup_s=cell.warmup_s, span_s=cell.span_s
        )  # fmt: skip
    rate = OPEN_LOADS[cell.demand] * capacity_of(sim, CHAT, seed=cell.seed)
    end_s = cell.warmup_s + cell.span_s
    return OpenLoop(
        workload=arrivals_of(CHAT, rate_per_s=rate, duration_s=end_s, seed=cell.seed), warmup_s=cell.warmup_s
    )


def profile_of(cell: AblationCell, place: Path) -> Profile:
    """What the variant believes of the engine."""
    profile = of_another_plant(cell.engine, place) if cell.demand == WRONG else cell.engine.profile(place)
    return without_experts(profile) if cell.variant == EXPERTS else profile


def controller_of(variant: str, sim: Simulation, profile: Profile) -> AnyController:
    """The policy with its part taken away, watched as any policy with a profile is."""
    group = SimulatedGroup(sim.replica(), sim.spec, sim.boards)
    guard = Guard.of([SimulatedBoard(group, i).info for i in range(sim.boards)], sim.max_num_seqs)
    policy = PalsPolicy(profile.model(), guard, SETTINGS.get(variant, PalsSettings()))
    return watched(policy, profile, guard)


def fair_gains(rows: Sequence[Row], variant: str) -> dict[Place, float]:
    """Tokens per joule over the whole policy's, where the variant misses no more than half a point more and loses no throughput."""
    gains = ratios(rows, "tokens_per_j_node", variant, WHOLE, PLACES)
    speed = ratios(rows, "tokens_per_s", variant, WHOLE, PLACES)
    more = more_misses(rows, variant)
    return {place: gain for place, gain in gains.items() if more[place] <= 0.005 and speed[place] >= 0.995}


def more_misses(rows: Sequence[Row], variant: str) -> dict[Place, float]:
    """Share of requests that missed, beyond the whole policy's."""
    keys = (*PLACES, "seed")
    whole = {tuple(r[k] for k in keys): float(r["missed"]) for r in rows if r["policy"] == WHOLE}
    mine = {tuple(r[k] for k in keys): float(r["missed"]) for r in rows if r["policy"] == variant}
    return {place: missed - whole[place] for place, missed in mine.items() if place in whole}


def _told(rows: Sequence[Row], variant: str) -> str:
    mine = [r for r in rows if r["policy"] == variant]
    if not mine:
        return "–"
    if variant == WHOLE:
        return f"{told([1.0 / r['tokens_per_j_node'] for r in mine])} J, {100 * sum(r['missed'] for r in mine) / len(mine):.1f} %"
    joules = [1.0 / g for g in ratios(rows, "tokens_per_j_node", variant, WHOLE, PLACES).values()]
    more = [100.0 * m for m in more_misses(rows, variant).values()]
    speed = list(ratios(rows, "tokens_per_s", variant, WHOLE, PLACES).values())
    slower = f", {told(speed, 3)} tokens/s" if speed and sum(speed) / len(speed) < 0.995 else ""
    return f"{told(joules, 3)}×, {sum(more) / len(more):+.1f}{slower}" if joules else "–"
