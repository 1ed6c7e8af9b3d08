"""What PALS costs where nothing is asked of it: no budget, no throughput target, limits at default, targets that never bind.

Throughput is compared at saturation, goodput (requests answered inside generous targets) on the same arrivals below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pals.core.load import Mix
from pals.core.quantities import Slo
from pals.experiments.lab.engines import EngineCase
from pals.experiments.lab.experiment import Row, Table, Verdict, Wish, verdict_of
from pals.experiments.lab.loads import SPAN_S, WARMUP_S, ClosedLoop, Load, OpenLoop, arrivals_of, capacity_of
from pals.experiments.lab.paper_single_node import policies_in
from pals.experiments.lab.price import engines_of
from pals.experiments.lab.ratios import Place, by_seed, ratios, told
from pals.experiments.lab.rivals import BASELINE, left_out, policies_of
from pals.experiments.lab.run import RunTask, run
from pals.experiments.lab.truth import with_truth
from pals.experiments.simulated_run import Simulation

CHAT = Mix(name="chat", prompt_tokens=512, output_tokens=256, spread=0.5)
SLO = Slo(
    ttft_p99_s=10.0, tpot_p99_s=0.5
)  # generous: a person turns away after ten seconds, and reads faster than 2 tokens/s
ENGINES = (
    ("mistralai/Mixtral-8x7B-v0.1", "4xa100-sxm4-80gb", 64),
    ("allenai/OLMoE-1B-7B-0924", "4xa100-sxm4-80gb", 64),
    ("Qwen/Qwen3-30B-A3B", "h100-sxm5-80gb", 128),
    ("meta-llama/Llama-3.1-8B", "h100-sxm5-80gb", 128),
    ("meta-llama/Llama-3.1-70B", "8xh200-sxm5-141gb", 128),
)
OPEN_LOADS = {"open 60 %": 0.6, "open 90 %": 0.9, "open 130 %": 1.3}  # of the capacity as found
LOADS = ("closed", *OPEN_LOADS)
SATURATED = ("closed", "open 130 %")
POLICIES = ("static", "pals")
PLACES = ("engine", "load")
LEAST = 0.995


@dataclass(frozen=True, slots=True, kw_only=True)
class NoLossCell:
    """One engine under one policy and one load."""

    engine: EngineCase
    policy: str
    load: str  # of `LOADS`
    warmup_s: float = WARMUP_S
    span_s: float = SPAN_S

    @property
    def slug(self) -> str:
        """See `Cell`."""
        return f"{self.engine.slug}--{self.load.replace(' %', '').replace(' ', '-')}--{self.policy}"

    @property
    def seed(self) -> int:
        """See `Cell`."""
        return self.engine.seed


class NoLoss:
    """See the module."""

    name = "no-loss"
    title = "No loss where nothing is asked"
    question = "Does `pals` cost throughput or goodput where there is no budget, no throughput target, and latency targets are generous?"
    targets = (
        "output throughput at saturation and requests answered inside the targets below it at least 0.995 of the default's, in the "
        "median and in the worst case"
    )
    sources = ("experiments/lab/no_loss.py", "experiments/lab/price.py")
    takes = frozenset({"policies", "models", "boards"})

    def cells(self, wish: Wish) -> list[NoLossCell]:
        """See `Experiment`."""
        policies = policies_of(wish, POLICIES)
        return [
            NoLossCell(engine=e, policy=p, load=load)
            for e in engines_of(wish, ENGINES)
            for load in LOADS
            for p in policies
        ]

    def run(self, cell: NoLossCell, place: Path) -> list[Row]:
        """See `Experiment`."""
        sim, profile = cell.engine.simulation(), cell.engine.profile(place)
        task = RunTask(
            sim=sim, load=load_of(cell, sim), policy=cell.policy, profile=profile, slo=SLO, seed=cell.seed
        )  # fmt: skip
        about = {"engine": cell.engine.name, "load": cell.load, "seed": cell.seed, "policy": cell.policy}
        return [about | run(with_truth(task)).figures.to_row()]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """See `Experiment`."""
        policies = policies_in(rows)
        lines = []
        for place in dict.fromkeys((r["engine"], r["load"]) for r in rows):
            here = [r for r in rows if (r["engine"], r["load"]) == place]
            cells = [f"{told(list(work_ratios(here, p).values()), 3)} / {told(_saving(here, p), 2)}" for p in policies]
            lines.append([", ".join(place), *cells])
        caption = (
            "**Work done over the default's (tokens/s at saturation, requests inside the targets below it) / tokens per joule of "
            f"estimated node energy over the default's.** {left_out(POLICIES)}"
        )
        return [Table(header=("engine, load", *policies), lines=lines, caption=caption)] if rows else []

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """See `Experiment`."""
        found = []
        for what, loads in (("throughput at saturation", SATURATED), ("goodput at 60 and 90 % load", LOADS)):
            chosen = [r for r in rows if r["load"] in loads and (loads is SATURATED or r["load"] not in SATURATED)]
            done = work_ratios(chosen, "pals")
            for fold, told_as in (("median", "median"), ("least", "worst engine and load")):
                found.append(
                    verdict_of(f"pals: {what} over the default's, {told_as}", by_seed(done, fold), least=LEAST, unit="×", every_seed=fold == "least")
                )  # fmt: skip
        return found

    def figures(self, rows: Sequence[Row]) -> Sequence[str]:
        """See `Experiment`."""
        return ("work-by-load",) if rows else ()


def work_ratios(rows: Sequence[Row], policy: str) -> dict[Place, float]:
    """Tokens per second over the default's at saturation, requests inside the targets over the default's below it."""
    saturated = [r for r in rows if r["load"] in SATURATED]
    below = [r for r in rows if r["load"] not in SATURATED]
    return {
        **ratios(saturated, "tokens_per_s", policy, BASELINE, PLACES),
        **ratios(below, "good_requests", policy, BASELINE, PLACES),
    }


def _saving(rows: Sequence[Row], policy: str) -> list[float]:
    return list(ratios(rows, "tokens_per_j_node", policy, BASELINE, PLACES).values())


def load_of(cell: NoLossCell, sim: Simulation) -> Load:
    """The cell's requests."""
    end_s = cell.warmup_s + cell.span_s
    if cell.load == "closed":
        return ClosedLoop(mix=CHAT, in_flight=2 * sim.max_num_seqs, warmup_s=cell.warmup_s, span_s=cell.span_s)
    share = OPEN_LOADS[cell.load]
    rate = share * capacity_of(sim, CHAT, seed=cell.seed)
    return OpenLoop(
        workload=arrivals_of(CHAT, rate_per_s=rate, duration_s=end_s, seed=cell.seed), warmup_s=cell.warmup_s,
        end_s=end_s if share > 1 else None,
    )  # fmt: skip
