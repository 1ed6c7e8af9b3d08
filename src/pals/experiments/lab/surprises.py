"""What goes wrong in the middle of a run, or was wrong with the profile from the start: is the budget kept, and who waits longer for it?

An open loop of chats at `LOAD` of the engine's capacity; at `BUDGET_S` a budget comes into force, at `AT_S` the surprise. A run is
compared with the unsurprised run of the same policy. Where the surprise itself changes what can be done (longer answers, a crowd,
another hand's limit, an engine that became slower, hot boards), the misses that `static` gains by it are taken off: no policy can avoid these.

The budget is `BUDGET_SHARE` of what the engine draws at its launch settings with every slot taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pals.core.load import Mix
from pals.core.quantities import Slo
from pals.experiments.lab.engines import EngineCase
from pals.experiments.lab.experiment import Row, Table, Verdict, Wish, verdict_of
from pals.experiments.lab.loads import ClosedLoop, OpenLoop, arrivals_of, capacity_of
from pals.experiments.lab.paper_single_node import policies_in
from pals.experiments.lab.perturbed_load import crowded, shifted
from pals.experiments.lab.price import engines_of
from pals.experiments.lab.ratios import Place, by_seed
from pals.experiments.lab.rivals import BASELINE, left_out, policies_of
from pals.experiments.lab.run import RunTask, run
from pals.experiments.lab.wrong_profiles import of_another_plant, off_by
from pals.experiments.simulated_run import Simulation
from pals.models.profile import Profile
from pals.plant.faults import FaultEvent, FaultSchedule
from pals.plant.workload import Workload
from pals.runtime.budgets import BudgetSchedule

CHAT = Mix(name="chat", prompt_tokens=512, output_tokens=256, spread=0.5)
SLO = Slo(ttft_p95_s=2.0, tpot_p95_s=0.1)  # as in the open loop
LOAD = 0.4  # of the capacity: twice the lengths, or a crowd of three, bring it near, or above, what the engine can do
WARMUP_S, SPAN_S = 60.0, 240.0
BUDGET_S, AT_S, SETTER_S = 90.0, 120.0, 80.0  # the slow setter is there before the budget, which is what it makes late
BUDGET_SHARE = 0.8
CROWD, CROWD_S = 3.0, 60.0
OFF = 0.15
CORRECTION_S = 2.0  # after the budget, or whatever holds limits, changed
ENGINES = (
    ("mistralai/Mixtral-8x7B-v0.1", "4xa100-sxm4-80gb", 64),
    ("Qwen/Qwen3-30B-A3B", "h100-sxm5-80gb", 128),
)
POLICIES = ("static", "pals")
NONE = "none"
MORE_MISSES = 0.02
PLACES = ("engine", "surprise", "budgeted")

#: Faults of the plant by the surprise they make; values as in `pals.plant.faults`.
FAULTS: Mapping[str, FaultEvent] = {
    "engine rebuilt": FaultEvent(time_s=AT_S, kind="engine_build", value=1.5),  # half as much host time again
    "routing drift": FaultEvent(time_s=AT_S, kind="routing_drift", value=1.5),  # few experts are popular
    "heat": FaultEvent(time_s=AT_S, kind="hot_air", value=45.0),
    "meter stuck": FaultEvent(time_s=AT_S, kind="stuck_meter", board=0),
    "slow setter": FaultEvent(time_s=SETTER_S, kind="slow_setter", value=1.0),
}
#: Profiles that are wrong from the start, each accepted as if it were right.
PROFILES = ("profile of another plant", "profile +15 %", "profile -15 %")
LENGTHS: Mapping[str, float] = {"lengths x2": 2.0, "lengths x0.5": 0.5}
FLASH, OTHER_HAND = "flash crowd x3", "other hand's limit"
SURPRISES = (NONE, *PROFILES, *FAULTS, *LENGTHS, FLASH, OTHER_HAND)
#: Those that nobody can make up for by steering: `static` suffers them too.
CHANGES_WHAT_CAN_BE_DONE = frozenset({"engine rebuilt", "routing drift", "heat", "lengths x2", FLASH, OTHER_HAND})
OTHER_HAND_SHARE = 0.6  # of the default limit


@dataclass(frozen=True, slots=True, kw_only=True)
class SurpriseCell:
    """One engine under one policy and one surprise."""

    engine: EngineCase
    policy: str
    surprise: str  # of `SURPRISES`
    budgeted: bool
    warmup_s: float = WARMUP_S
    span_s: float = SPAN_S

    @property
    def slug(self) -> str:
        """See `Cell`."""
        words = "".join(c if c.isalnum() or c in "+-." else "-" for c in self.surprise)
        return f"{self.engine.slug}--{words}--{'budget' if self.budgeted else 'free'}--{self.policy}"

    @property
    def seed(self) -> int:
        """See `Cell`."""
        return self.engine.seed

    @property
    def end_s(self) -> float:
        """Of the arrivals."""
        return self.warmup_s + self.span_s


class Surprises:
    """See the module."""

    name = "surprises"
    title = "Surprises"
    question = "Is the budget kept, and do not many more requests come late, when the profile, the engine, the boards or the load turn out other than known?"
    targets = (
        f"no second over the budget beyond {CORRECTION_S:g} s after the budget came, or limits were meddled with; at most two points more "
        "requests that miss TTFT or TPOT than in the unsurprised run of the same policy (beyond what `static` gains where the surprise "
        "changes what can be done)"
    )
    sources = (
        "experiments/lab/surprises.py", "experiments/lab/perturbed_load.py", "experiments/lab/wrong_profiles.py",
        "experiments/lab/price.py",
    )  # fmt: skip
    takes = frozenset({"policies", "models", "boards"})

    def cells(self, wish: Wish) -> list[SurpriseCell]:
        """See `Experiment`."""
        policies = policies_of(wish, POLICIES)
        return [
            SurpriseCell(engine=e, policy=p, surprise=s, budgeted=budgeted)
            for e in engines_of(wish, ENGINES)
            for s in SURPRISES
            for budgeted in (False, True)
            for p in policies
            if not (p == BASELINE and s in PROFILES)  # it reads no profile
        ]

    def run(self, cell: SurpriseCell, place: Path) -> list[Row]:
        """See `Experiment`."""
        sim = cell.engine.simulation()
        budget_w = BUDGET_SHARE * natural_draw_w(sim, seed=cell.seed) if cell.budgeted else None
        task = RunTask(
            sim=replace(sim, faults=faults_of(cell, sim)), load=OpenLoop(workload=load_of(cell, sim), warmup_s=cell.warmup_s),
            policy=cell.policy, profile=None if cell.policy == BASELINE else profile_of(cell, place), slo=SLO, seed=cell.seed, time_line=True,
            budget=BudgetSchedule((BUDGET_S,), (budget_w,)) if budget_w is not None else BudgetSchedule(),
        )  # fmt: skip
        ran = run(task)
        assert ran.time_line is not None  # for the type checker: it was asked for
        over_w = over_budget_w(ran.time_line, excused_from_s=changes_of(cell))
        f = ran.figures
        about = {
            "engine": cell.engine.name, "surprise": cell.surprise, "budgeted": cell.budgeted, "seed": cell.seed,
            "policy": cell.policy, "budget_w": budget_w, "missed": 1.0 - f.good_requests / max(1, f.requests),
            "over_s": sum(w > 0 for w in over_w), "worst_over_w": max([0.0, *over_w]),
        }  # fmt: skip
        return [about | f.to_row()]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """See `Experiment`."""
        policies = policies_in(rows)
        made = []
        for budgeted in (False, True):
            here = [r for r in rows if r["budgeted"] == budgeted]
            lines = [
                [f"{engine}, {surprise}", *(_told([r for r in here if (r["engine"], r["surprise"], r["policy"]) == (engine, surprise, p)]) for p in policies)]
                for engine, surprise in dict.fromkeys((r["engine"], r["surprise"]) for r in here)
            ]  # fmt: skip
            words = f"a budget of {BUDGET_SHARE:.0%} of the natural draw" if budgeted else "no budget"
            caption = (
                f"**With {words}: share of requests that missed TTFT or TPOT, node joules per token"
                f"{', seconds over the budget beyond the correction time' if budgeted else ''}; means over seeds. {left_out(POLICIES)}**"
            )
            made.append(Table(header=("engine, surprise", *policies), lines=lines, caption=caption))
        return made if rows else []

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """See `Experiment`."""
        over: dict[Place, float] = {
            (r["engine"], r["surprise"], r["seed"]): float(r["over_s"])
            for r in rows
            if r["policy"] == "pals" and r["budgeted"]
        }
        found = [
            verdict_of(
                "pals: seconds over the budget beyond the correction time, worst case", by_seed(over, "most"), most=0.0
            )
        ]
        for surprise in SURPRISES[1:]:
            more = extra_misses(rows, "pals", surprise)
            beyond = " beyond those of static" if surprise in CHANGES_WHAT_CAN_BE_DONE else ""
            found.append(
                verdict_of(f"pals, {surprise}: more misses than unsurprised{beyond}, worst case", by_seed(more, "most"), most=MORE_MISSES)
            )  # fmt: skip
        return found

    def figures(self, rows: Sequence[Row]) -> Sequence[str]:
        """See `Experiment`."""
        return ("misses-by-surprise",) if rows else ()


def natural_draw_w(sim: Simulation, *, seed: int, mix: Mix = CHAT) -> float:
    """Watts of all boards at launch settings with every slot taken."""
    full = ClosedLoop(mix=mix, in_flight=2 * sim.max_num_seqs, warmup_s=20.0, span_s=30.0)
    return run(RunTask(sim=sim, load=full, policy=BASELINE, seed=seed)).figures.mean_power_w


def faults_of(cell: SurpriseCell, sim: Simulation) -> FaultSchedule:
    """What happens to engine and boards."""
    if cell.surprise == OTHER_HAND:
        limit_w = round(OTHER_HAND_SHARE * sim.spec.default_limit_w)
        return FaultSchedule(events=(FaultEvent(time_s=AT_S, kind="external_limit", value=limit_w),))
    event = FAULTS.get(cell.surprise)
    return FaultSchedule(events=(event,) if event is not None else ())


def load_of(cell: SurpriseCell, sim: Simulation) -> Workload:
    """The requests."""
    rate, end_s = LOAD * capacity_of(sim, CHAT, seed=cell.seed), cell.end_s
    if cell.surprise in LENGTHS:
        factor = LENGTHS[cell.surprise]
        return shifted(CHAT, factor, at_s=AT_S, rate_per_s=rate, duration_s=end_s, seed=cell.seed)
    if cell.surprise == FLASH:
        return crowded(CHAT, CROWD, at_s=AT_S, for_s=CROWD_S, rate_per_s=rate, duration_s=end_s, seed=cell.seed)
    return arrivals_of(CHAT, rate_per_s=rate, duration_s=end_s, seed=cell.seed)


def profile_of(cell: SurpriseCell, place: Path) -> Profile:
    """What the policy believes of the engine."""
    if cell.surprise == PROFILES[0]:
        return of_another_plant(cell.engine, place)
    profile = cell.engine.profile(place)
    if cell.surprise in PROFILES:
        factor = 1.0 + OFF if "+" in cell.surprise else 1.0 - OFF
        return off_by(profile, time=factor, power=factor)
    return profile


def changes_of(cell: SurpriseCell) -> tuple[float, ...]:
    """When the budget, or what holds limits, changed."""
    return (BUDGET_S, AT_S) if cell.surprise == OTHER_HAND else (BUDGET_S,)


def over_budget_w(line: Mapping[str, Sequence[Any]], *, excused_from_s: Sequence[float]) -> list[float]:
    """Watts above the budget in each second of a time line, those within `CORRECTION_S` after a change left out."""
    over = list[float]()
    for i in range(1, len(line["time_s"])):
        begun_s, ended_s, budget_w = line["time_s"][i - 1], line["time_s"][i], line["budget_w"][i - 1]
        if budget_w is None or any(s < ended_s and begun_s < s + CORRECTION_S for s in excused_from_s):
            continue
        over.append(line["power_w"][i] - budget_w)
    return over


def extra_misses(rows: Sequence[Row], policy: str, surprise: str) -> dict[Place, float]:
    """Misses beyond the unsurprised run of the same policy, and beyond what static gains where it must; by place and seed."""
    found = dict[Place, float]()
    mine, static = _misses(rows, policy), _misses(rows, BASELINE)
    for engine, budgeted, seed in dict.fromkeys((r["engine"], r["budgeted"], r["seed"]) for r in rows):
        here, usual = (engine, surprise, budgeted, seed), (engine, NONE, budgeted, seed)
        if here not in mine or usual not in mine:
            continue
        unavoidable = 0.0
        if surprise in CHANGES_WHAT_CAN_BE_DONE:
            if here not in static or usual not in static:
                continue
            unavoidable = max(0.0, static[here] - static[usual])
        found[engine, budgeted, seed] = mine[here] - mine[usual] - unavoidable
    return found


def _misses(rows: Sequence[Row], policy: str) -> dict[Place, float]:
    return {tuple(r[k] for k in (*PLACES, "seed")): float(r["missed"]) for r in rows if r["policy"] == policy}


def _told(rows: Sequence[Row]) -> str:
    if not rows:
        return "–"
    missed, joules, over_s = (
        sum(values) / len(rows) for values in (
            [r["missed"] for r in rows], [1.0 / r["tokens_per_j_node"] for r in rows], [r["over_s"] for r in rows],
        )
    )  # fmt: skip
    over = f", {over_s:.1f} s" if rows[0]["budgeted"] else ""
    return f"{missed:.1%}, {joules:.2f} J{over}"
