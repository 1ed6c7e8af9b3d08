"""A power budget that moves, as in the paper's demand response (arXiv:2605.21427): does power follow, and what does it cost?

Engines serve a saturated closed loop without a throughput target, so the most throughput under the ceiling is asked for. The
paper's rules, which take the most efficient point where no throughput is asked for, are asked for that of the engine as found.
Budgets and powers are the boards'; the nodes' would look better by their constant part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pals.control.levers import LEVERS
from pals.core.quantities import Slo
from pals.experiments.lab.engines import EngineCase
from pals.experiments.lab.experiment import Row, Table, Verdict, Wish, verdict_of
from pals.experiments.lab.fleet import SOURCES, as_found, engine_of, fleet_columns, fleet_policies
from pals.experiments.lab.fleet_run import FleetTask, run_fleet
from pals.experiments.lab.loads import WARMUP_S, ClosedLoop
from pals.experiments.lab.paper_single_node import IN_FLIGHT, LENGTHS, policies_in
from pals.experiments.lab.power_signals import PowerSignal, low, read_signal, regulation, shed, steps
from pals.experiments.lab.ratios import Place, by_seed, ratios, told
from pals.experiments.lab.run import RunTask
from pals.experiments.lab.tracking import FAR, tracking_of

DEEPSEEK, MIXTRAL = "deepseek-ai/deepseek-moe-16b-base", "mistralai/Mixtral-8x7B-v0.1"
FLEETS = {"DeepSeek-MoE": (DEEPSEEK,), "Mixtral": (MIXTRAL,), "3 x DeepSeek-MoE": (DEEPSEEK,) * 3}
CAP_ONLY = "cap-only"
POLICIES = ("static", CAP_ONLY, "pals-paper", "pals")
REGULATION_S, FULL_REGULATION_S = 600.0, 3600.0
MOST_RMSE, MOST_OVER, MOST_SHED_S, MOST_FAR = 0.02, 0.01, 5.0, 0.10
PLACES = ("fleet", "signal")


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicCell:
    """A fleet under one policy and one signal."""

    fleet: str  # of `FLEETS`
    engines: tuple[EngineCase, ...]
    policy: str
    signal: PowerSignal
    warmup_s: float = WARMUP_S

    @property
    def slug(self) -> str:
        """See `Cell`."""
        return f"{self.fleet.lower().replace(' ', '')}-{self.signal.name}-{self.seed}--{self.policy}"

    @property
    def seed(self) -> int:
        """See `Cell`."""
        return self.engines[0].seed


class DynamicBudget:
    """See the module."""

    name = "dynamic-budget"
    title = "A power budget that moves"
    question = "How well does power follow a budget that moves, and how much throughput is left?"
    targets = (
        f"`pals`, each fleet and signal: root mean square error of 1 s means at most {MOST_RMSE:.0%} of the budget; at most "
        f"{MOST_OVER:.0%} of them above it; a fall by 30 % is reached within {MOST_SHED_S:g} s; on the regulation signal, errors above "
        f"{FAR:g} of the reserve in less than {MOST_FAR:.0%} of samples (the criterion of the paper's group). Throughput is told "
        "against `cap-only` (the paper: up to 1.22 times at low power)"
    )
    sources = (
        "experiments/lab/dynamic_budget.py",
        "experiments/lab/power_signals.py",
        "experiments/lab/tracking.py",
        *SOURCES,
    )
    takes = frozenset({"policies", "trace"})

    def cells(self, wish: Wish) -> list[DynamicCell]:
        """See `Experiment`."""
        given = read_signal(Path(wish.trace)) if wish.trace else None
        span_s = FULL_REGULATION_S if wish.full else REGULATION_S
        return [
            DynamicCell(fleet=name, engines=tuple(engine_of(m, seed) for m in models), policy=policy, signal=signal)
            for seed in wish.seeds(1, 3)
            for name, models in FLEETS.items()
            for signal in ((given,) if given is not None else (steps(), low(), shed(), regulation(span_s, seed)))
            for policy in fleet_policies(wish, POLICIES)
        ]

    def run(self, cell: DynamicCell, place: Path) -> list[Row]:
        """See `Experiment`."""
        found = [as_found(e) for e in dict.fromkeys(cell.engines)]
        by_engine = dict(zip(dict.fromkeys(cell.engines), found, strict=True))
        natural_w = sum(by_engine[e].boards_w for e in cell.engines)
        load = ClosedLoop(mix=LENGTHS, in_flight=IN_FLIGHT, warmup_s=cell.warmup_s, span_s=cell.signal.span_s)
        members = []
        for i, e in enumerate(cell.engines):
            asked = Slo(throughput_tokens_s=by_engine[e].tokens_per_s) if cell.policy in LEVERS else Slo()
            sim = replace(e.simulation(), board_seed=e.seed + 1000 * i)  # no two nodes have the same boards
            members.append(
                RunTask(sim=sim, load=load, policy=cell.policy, profile=e.profile(place), slo=asked, seed=cell.seed)
            )
        budget = cell.signal.schedule(natural_w, cell.warmup_s)
        ran = run_fleet(FleetTask(members=tuple(members), budget=budget))
        about = {
            "fleet": cell.fleet, "signal": cell.signal.name, "seed": cell.seed, "policy": cell.policy, "natural_w": natural_w,
            "free_tokens_s": sum(by_engine[e].tokens_per_s for e in cell.engines),
        }  # fmt: skip
        followed = tracking_of(ran.ledger, cell.signal.reserve_w(natural_w))
        line = {
            k: a.round(1).tolist() for k, a in zip(("time_s", "power_w", "budget_w"), ran.ledger.windows(), strict=True)
        }
        columns = fleet_columns(ran.ledger, ran.members, members[0].sim.boards)
        return [about | columns | followed | {"time_line": line}]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """See `Experiment`."""
        header = [
            "fleet", "signal", "policy", "RMSE %", "above only %", "beside the margin %", "mean %", "seconds over %", "slowest fall s",
            f"beyond {FAR:g} R %", "tokens/s over as found", f"over {CAP_ONLY}", "tokens/J node",
        ]  # fmt: skip
        lines = []
        for fleet, signal in dict.fromkeys((r["fleet"], r["signal"]) for r in rows):
            here = [r for r in rows if (r["fleet"], r["signal"]) == (fleet, signal)]
            for policy in policies_in(here):
                relative = ratios(here, "tokens_per_s", policy, CAP_ONLY, PLACES)
                lines.append([fleet, signal, policy, *_line([r for r in here if r["policy"] == policy], relative)])
        caption = (
            "**Power of all boards against the budget in means of one second, all as shares of the budget; beside the margin: against the "
            "budget less the guard's 2 %**"
        )
        return [Table(header=header, lines=lines, caption=caption)] if rows else []

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """See `Experiment`."""
        found = []
        for fleet, signal in dict.fromkeys((r["fleet"], r["signal"]) for r in rows if r["policy"] == "pals"):
            mine = [r for r in rows if (r["fleet"], r["signal"], r["policy"]) == (fleet, signal, "pals")]
            name = f"pals, {fleet}, {signal}"
            left = sum(r["rmse_left"] for r in mine) / len(mine)
            note = f"{left:.3f} beside the guard's margin"
            found += [
                verdict_of(f"{name}: RMSE over the budget", _of(mine, "rmse"), most=MOST_RMSE, note=note),
                verdict_of(f"{name}: share of seconds above the budget", _of(mine, "over_share"), most=MOST_OVER),
            ]
            if signal == "shed":
                found.append(verdict_of(f"{name}: time to shed 30 %", _of(mine, "shed_s"), most=MOST_SHED_S, unit=" s"))
            if far := _of(mine, "far_share"):
                found.append(verdict_of(f"{name}: share of seconds beyond {FAR:g} R", far, most=MOST_FAR))
        return found

    def figures(self, rows: Sequence[Row]) -> Sequence[str]:
        """See `Experiment`."""
        return ("tracking",) if rows else ()


def _of(rows: Sequence[Row], figure: str) -> dict[int, float]:
    return {r["seed"]: r[figure] for r in rows if r[figure] is not None}


def _line(rows: Sequence[Row], relative: dict[Place, float]) -> list[str]:
    """The figures of one policy, over seeds."""
    shares = ("rmse", "rmse_over", "rmse_left", "bias", "over_share")
    return [
        *(told([100.0 * r[f] for r in rows]) for f in shares),
        told(list(_of(rows, "shed_s").values()), 1),
        told([100.0 * v for v in _of(rows, "far_share").values()], 1),
        told([r["tokens_per_s"] / r["free_tokens_s"] for r in rows], 3),
        told(list(by_seed(relative).values()), 3),
        told([r["tokens_per_j_node"] for r in rows], 3),
    ]
