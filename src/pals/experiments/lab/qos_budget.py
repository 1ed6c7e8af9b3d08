"""The paper's three nodes under one power budget (arXiv:2605.21427): who still gives the throughput that each model is asked for?

Three nodes of 4×A100 serve one model each; the budget is one for all, in node power, by the paper's line from boards to
nodes (1.05 times the boards' watts and 345 W a node). The paper's 4,800 W are one point; the others are shares of what the
nodes draw as found. The paper states neither loads nor how 4,800 W are divided: loads are those of `paper_single_node`, and
`static` has the budget in equal parts as fixed limits, which is what an operator can do without an agent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from pals.core.quantities import OperatingPoint, Slo
from pals.experiments.lab.engines import EngineCase
from pals.experiments.lab.experiment import Row, Table, Verdict, Wish, verdict_of
from pals.experiments.lab.fleet import (
    SOURCES,
    AsFound,
    as_found,
    boards_w_of,
    engine_of,
    fleet_columns,
    fleet_policies,
    node_w_of,
)
from pals.experiments.lab.fleet_run import FleetTask, run_fleet
from pals.experiments.lab.fleet_truth import GUARDED, MARGIN, ORACLE, STATIC_BEST, best_allocation, served_points
from pals.experiments.lab.loads import WARMUP_S, ClosedLoop, Load, OpenLoop, arrivals_of
from pals.experiments.lab.paper_single_node import IN_FLIGHT, LENGTHS, policies_in
from pals.experiments.lab.ratios import told
from pals.experiments.lab.rivals import BASELINE
from pals.experiments.lab.run import RunTask
from pals.runtime.budgets import BudgetSchedule

ASKED = (
    ("deepseek-ai/deepseek-moe-16b-base", 0.9),
    ("mistralai/Mixtral-8x7B-v0.1", 0.6),
    ("allenai/OLMoE-1B-7B-0924", 0.75),
)  # each model's throughput target, of its own as found
#: Of what the nodes draw as found, or node watts; 62 %: equal parts do not suffice, others do, even within the guard's margin.
BUDGETS = ("60 %", "62 %", "65 %", "70 %", "80 %", "90 %", "100 %", "4800 W")
OPEN_BUDGETS = ("70 %",)
POLICIES = ("static", "pals-paper", "cap-only", "batch-only", "pals", STATIC_BEST, ORACLE, GUARDED)
STEERED = ("static", "pals-paper", "cap-only", "batch-only", "pals")  # that need no truth
SPAN_S, FULL_SPAN_S = 600.0, 3600.0
LONG_S = 10.0  # throughput is also held against its target over windows so long
FEWER, BINDS, FEW = 7.0, 0.10, 0.01
ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class QosCell:
    """All engines under one policy and one budget."""

    engines: tuple[EngineCase, ...]
    shares: tuple[float, ...]  # throughput target of each
    policy: str
    budget: str  # of `BUDGETS`
    loop: str = "closed"  # "open": Poisson arrivals that ask for the targets' tokens
    warmup_s: float = WARMUP_S
    span_s: float = SPAN_S

    @property
    def slug(self) -> str:
        """See `Cell`."""
        return f"{self.loop}-{self.budget.replace(' %', 'pc').replace(' ', '')}-{self.seed}--{self.policy}"

    @property
    def seed(self) -> int:
        """See `Cell`."""
        return self.engines[0].seed

    def load(self, target_tokens_s: float) -> Load:
        """Of one engine."""
        if self.loop == "closed":
            return ClosedLoop(mix=LENGTHS, in_flight=IN_FLIGHT, warmup_s=self.warmup_s, span_s=self.span_s)
        end_s = self.warmup_s + self.span_s
        rate_per_s = target_tokens_s / LENGTHS.output_tokens
        arrivals = arrivals_of(LENGTHS, rate_per_s=rate_per_s, duration_s=end_s, seed=self.seed)
        return OpenLoop(workload=arrivals, warmup_s=self.warmup_s, end_s=end_s)


class QosBudget:
    """See the module."""

    name = "qos-budget"
    title = "Throughput targets of three nodes under one power budget"
    question = "How often does each model fall below its throughput target where three nodes share one power budget?"
    targets = (
        "share of control periods below the throughput target, mean over the three models: where `static` has at least 10 %, "
        "`pals` has at most a seventh of it (the paper: 4 to 7 times fewer), and at most 1.2 times the oracle's everywhere (an oracle "
        "below 1 % counts as 1 %)"
    )
    sources = ("experiments/lab/qos_budget.py", *SOURCES)
    takes = frozenset({"policies"})

    def cells(self, wish: Wish) -> list[QosCell]:
        """See `Experiment`."""
        shares, policies = tuple(share for _, share in ASKED), fleet_policies(wish, POLICIES)
        span_s = FULL_SPAN_S if wish.full else SPAN_S
        made = []
        for seed in wish.seeds(1, 3):
            engines = tuple(engine_of(model, seed) for model, _ in ASKED)
            cell = QosCell(engines=engines, shares=shares, policy=BASELINE, budget=BUDGETS[0], span_s=span_s)
            made += [replace(cell, policy=p, budget=b) for b in BUDGETS for p in policies]
            made += [
                replace(cell, policy=p, budget=b, loop="open") for b in OPEN_BUDGETS for p in policies if p in STEERED
            ]
        return made

    def run(self, cell: QosCell, place: Path) -> list[Row]:
        """See `Experiment`."""
        found = [as_found(engine) for engine in cell.engines]
        task, about = _task(cell, found, place)
        ran = run_fleet(task)
        boards = task.members[0].sim.boards
        long = ran.ledger.throughput_missed(LONG_S)
        rows = [
            about | {"engine": e.name, "target_share": share, "target_tokens_s": share * f.tokens_per_s}
            | {"missed_long": missed} | figures.to_row() | {"missed": figures.throughput_missed}
            for e, share, f, figures, missed in zip(cell.engines, cell.shares, found, ran.members, long, strict=True)
        ]  # fmt: skip
        missed = fmean(f.throughput_missed for f in ran.members)
        whole = {"engine": ALL, "missed": missed, "missed_long": fmean(long)}
        return [*rows, about | whole | fleet_columns(ran.ledger, ran.members, boards)]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """See `Experiment`."""
        made = []
        for loop in dict.fromkeys(r["loop"] for r in rows):
            here = [r for r in rows if r["loop"] == loop]
            every = [r for r in here if r["engine"] == ALL]
            lead = f"{loop} loop, mean over models"
            made += [
                _by_budget(every, "missed", f"Control periods below the throughput target, {lead}", percent=True),
                _by_budget(every, "missed_long", f"The same over windows of {LONG_S:g} s, {lead}", percent=True),
                _by_budget(
                    every, "tokens_per_j_node", f"Tokens per joule of estimated node energy, {loop} loop, all nodes"
                ),
                _by_budget(every, "tokens_per_j_gpu", f"Tokens per joule of GPU energy, {loop} loop, all nodes"),
                _by_budget(every, "over_budget_share", f"Windows of 1 s above the budget, {loop} loop", percent=True),
                _by_engine(here, f"Each model, {loop} loop"),
            ]
        return made if rows else []

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """See `Experiment`."""
        every = [r for r in rows if r["engine"] == ALL and r["loop"] == "closed"]
        found = []
        for budget in _budgets(every):
            static, pals, oracle = (_missed(every, budget, p) for p in (BASELINE, "pals", ORACLE))
            name = f"at {budget}: pals misses"
            fewer = {s: m / static[s] for s, m in pals.items() if static.get(s, 0.0) >= BINDS}
            if fewer:
                rates = f"{fmean(pals[s] for s in fewer):.1%} against {fmean(static[s] for s in fewer):.1%}"
                found.append(verdict_of(f"{name}, over static's", fewer, most=1.0 / FEWER, unit="×", note=rates))
            of_oracle = {s: m / max(FEW, oracle[s]) for s, m in pals.items() if s in oracle}
            if of_oracle:
                rates = f"{fmean(pals[s] for s in of_oracle):.1%} against {fmean(oracle[s] for s in of_oracle):.1%}"
                found.append(verdict_of(f"{name}, over the oracle's", of_oracle, most=1.2, unit="×", note=rates))
        return found

    def figures(self, rows: Sequence[Row]) -> Sequence[str]:
        """See `Experiment`."""
        return ("missed-by-budget",) if rows else ()


def _task(cell: QosCell, found: Sequence[AsFound], place: Path) -> tuple[FleetTask, dict[str, Any]]:
    """The run, and what its rows say of it."""
    sims = [e.simulation() for e in cell.engines]
    count, boards = len(sims), sims[0].boards
    natural_w = node_w_of(sum(f.boards_w for f in found), count, boards)
    node_w = node_budget_w(cell.budget, natural_w)
    boards_w = boards_w_of(node_w, count, boards)
    targets = [share * f.tokens_per_s for share, f in zip(cell.shares, found, strict=True)]
    members = [
        RunTask(
            sim=sim, load=cell.load(target), policy=cell.policy if cell.policy in STEERED else BASELINE, profile=e.profile(place),
            slo=Slo(throughput_tokens_s=target), seed=cell.seed,
        )
        for sim, e, target in zip(sims, cell.engines, targets, strict=True)
    ]  # fmt: skip
    points = _held(cell, members, boards_w, place)
    about = {
        "loop": cell.loop, "budget": cell.budget, "node_budget_w": node_w, "boards_budget_w": boards_w,
        "natural_node_w": natural_w, "seed": cell.seed, "policy": cell.policy,
    }  # fmt: skip
    if points:
        members = [replace(m, point=p) for m, p in zip(members, points, strict=True)]
        about["points"] = [_told_point(p) for p in points]
    return FleetTask(members=tuple(members), budget=BudgetSchedule((0.0,), (boards_w,)), steered=not points), about


def _held(cell: QosCell, members: Sequence[RunTask], boards_w: float, place: Path) -> Sequence[OperatingPoint]:
    """Points that are held throughout without an agent; none where the policy is steered."""
    if cell.policy == BASELINE:
        spec, boards = members[0].sim.spec, sum(m.sim.boards for m in members)
        limit_w = min(spec.default_limit_w, max(spec.min_limit_w, float(int(boards_w / boards))))
        return [OperatingPoint(power_limit_w=limit_w)] * len(members)
    if cell.policy in STEERED:
        return ()
    served = [
        served_points(e, ClosedLoop(mix=LENGTHS, in_flight=IN_FLIGHT), m.slo.throughput_tokens_s or 0.0, place)
        for e, m in zip(cell.engines, members, strict=True)
    ]
    allowed_w = boards_w * (1.0 - MARGIN) if cell.policy == GUARDED else boards_w
    by_peak = cell.policy != STATIC_BEST
    return best_allocation(served, allowed_w, boards=members[0].sim.boards, by_peak=by_peak).points


def node_budget_w(budget: str, natural_w: float) -> float:
    """ "80 %" of what the nodes draw as found, or "4800 W"."""
    number, unit = budget.split()
    return float(number) * natural_w / 100.0 if unit == "%" else float(number)


def _told_point(p: OperatingPoint) -> str:
    held = f"{p.power_limit_w:.0f} W" if p.sm_clock_mhz is None else f"{p.sm_clock_mhz} MHz"
    return held if p.active_sequences is None else f"{held}, {p.active_sequences} sequences"


def _budgets(rows: Sequence[Row]) -> list[str]:
    here = {r["budget"] for r in rows}
    return [b for b in BUDGETS if b in here]


def _missed(rows: Sequence[Row], budget: str, policy: str) -> dict[int, float]:
    return {r["seed"]: r["missed"] for r in rows if (r["budget"], r["policy"]) == (budget, policy)}


def _by_budget(rows: Sequence[Row], figure: str, caption: str, *, percent: bool = False) -> Table:
    """A line a policy, a column a budget."""
    lines = []
    for policy in policies_in(rows):
        line = [policy]
        for budget in _budgets(rows):
            values = [r[figure] for r in rows if (r["policy"], r["budget"]) == (policy, budget)]
            line.append(told([100.0 * v for v in values], 1) if percent else told(values, 3))
        lines.append(line)
    unit = ", percent" if percent else ""
    return Table(header=["policy", *_budgets(rows)], lines=lines, caption=f"**{caption}{unit}**")


def _by_engine(rows: Sequence[Row], caption: str) -> Table:
    lines = []
    for budget in _budgets(rows):
        for policy in policies_in(rows):
            for r in (r for r in rows if (r["budget"], r["policy"]) == (budget, policy) and r["engine"] != ALL):
                latencies = [r[f"{q}_p95_s"] for q in ("ttft", "tpot")]
                lines.append(
                    [
                        budget, policy, r["engine"], str(r["seed"]), f"{r['missed']:.1%}", f"{r['missed_long']:.1%}",
                        f"{r['tokens_per_s'] / r['target_tokens_s']:.3f}", f"{r['mean_power_w']:.0f}",
                        *("–" if s is None else f"{s:.3f}" for s in latencies),
                    ]
                )  # fmt: skip
    header = [
        "budget",
        "policy",
        "engine",
        "seed",
        "missed",
        f"{LONG_S:g} s",
        "tokens/s over target",
        "boards W",
        "p95 TTFT s",
        "p95 TPOT s",
    ]
    return Table(header=header, lines=lines, caption=f"**{caption}**")
