"""Does the simulated replica say what real vLLM says? The same runs on both, on one plant with its own constants, with the committed profiles.

Real vLLM serves on emulated boards in virtual time: its scheduler, KV cache, plugin and shared memory, and NVML's adapter,
are the live ones, while step times and watts come from the plant of the simulation. So this checks what the simulation adds
(its scheduler, its boards' events, its shortcuts), never the plant's constants, which are held against silicon elsewhere
(`pals plant validate`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pals.core.errors import ConfigError
from pals.core.quantities import Slo
from pals.engines.model_zoo import read_config
from pals.experiments.lab.experiment import Basis, Row, Table, Verdict, Wish, verdict_of
from pals.experiments.lab.live_run import emulate
from pals.experiments.lab.loads import ClosedLoop
from pals.experiments.lab.paper_single_node import IN_FLIGHT, LENGTHS
from pals.experiments.lab.rivals import BASELINE, policies_of
from pals.experiments.lab.run import RunTask, run
from pals.experiments.lab.truth import TRUTHFUL
from pals.experiments.scenarios import scenario_of
from pals.experiments.simulated_run import EMPTY, Simulation
from pals.models.profile import Profile
from pals.plant.specs import parse_boards
from pals.runtime.budgets import BudgetSchedule

MODELS = ("mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen3-30B-A3B")
POLICIES = (BASELINE, "pals")
AT_MOST = 3.0  # percent
EMULATED, SIMULATED = "emulated", "simulated"
SHORT_S, LONG_S = (
    (5.0, 30.0),
    (5.0, 175.0),
)  # warm-up and span; where a policy is still deciding counts, as both must decide alike


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked of a policy, as shares of what the default does and draws in the simulation."""

    throughput: float
    budgets: tuple[float | None, ...] = (None,)  # one after the other, each for an equal part of the span


ASKED = {
    "target": Asked(throughput=0.75),  # as in paper-single-node
    "budget": Asked(throughput=0.9, budgets=(0.65,)),  # as in qos-budget, with one engine
    "steps": Asked(throughput=0.9, budgets=(0.8, 0.55, 0.7)),
}
JUDGED = (("tokens_per_j_gpu", "GPU tokens/J"), ("tokens_per_s", "tokens/s"))
SHOWN: tuple[tuple[str, str, float, int], ...] = (
    ("tokens_per_j_gpu", "GPU tokens/J", 1.0, 3),
    ("tokens_per_s", "tokens/s", 1.0, 0),
    ("mean_power_w", "boards, W", 1.0, 0),
)
LATENCIES: tuple[tuple[str, str, float, int], ...] = tuple(
    (f"{name}_{q}_s", f"{name.upper()} {q}, ms", 1e3, 1) for name in ("ttft", "tpot") for q in ("p50", "p95")
)
CONTROL: tuple[tuple[str, str, float, int], ...] = (
    ("throughput_missed", "periods below the target, %", 100.0, 1),
    ("over_budget_share", "seconds over budget, %", 100.0, 1),
    ("changes_per_min", "changes a minute", 1.0, 1),
)
Place = tuple[str, str, str]  # engine, task, policy


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveCell:
    """One engine under every task and policy, emulated and simulated."""

    model: str
    policies: tuple[str, ...]
    seed: int  # of lengths and boards
    tasks: tuple[str, ...] = tuple(ASKED)
    warmup_s: float = SHORT_S[0]
    span_s: float = SHORT_S[1]

    @property
    def slug(self) -> str:
        """See `Cell`."""
        return f"{scenario_of(self.model).slug}--{self.span_s:g}s--{'+'.join(self.policies)}--{self.seed}"


class LiveCheck:
    """See the module."""

    name = "live-check"
    title = "The simulation against real vLLM"
    question = "Do the simulated replica and real vLLM on emulated boards come to the same figures under the same policy and load?"
    targets = (
        f"for each engine, task and policy, tokens per joule of GPU energy and tokens per second as simulated within {AT_MOST:g} % of "
        "those emulated"
    )
    basis = Basis(
        word="emulated and simulated",
        told="Emulated: real vLLM on emulated boards in virtual time; simulated: the replica of all other experiments. Both have the plant's "
        "own constants, the same requests and boards ({seeds}) and the committed profiles. No watt or second here was measured on silicon.",
    )
    sources = (
        "engines/*.py", "hardware/*.py", "experiments/virtual_run.py", "experiments/scenarios.py", "experiments/lab/live_*.py",
    )  # fmt: skip
    takes = frozenset({"policies", "models"})

    def cells(self, wish: Wish) -> list[LiveCell]:
        """See `Experiment`."""
        if truth := [p for p in wish.policies if p in TRUTHFUL]:
            raise ConfigError(
                f"{truth[0]} asks the simulated plant itself, which real vLLM does not have. Nothing was run"
            )
        models = dict.fromkeys(scenario_of(m).model for m in wish.models or MODELS)
        policies, (warmup_s, span_s) = policies_of(wish, POLICIES), LONG_S if wish.full else SHORT_S
        return [
            LiveCell(model=m, policies=policies, seed=s, warmup_s=warmup_s, span_s=span_s)
            for s in wish.seeds(1, 3)
            for m in models
        ]

    def run(self, cell: LiveCell, place: Path) -> list[Row]:
        """See `Experiment`."""
        runs = runs_of(cell)
        tasks = [task for _, task in runs]
        found = {EMULATED: emulate(tasks, place), SIMULATED: [run(t).figures for t in tasks]}
        return [
            about | {"kind": kind} | figures.to_row()
            for kind, of_kind in found.items()
            for (about, _), figures in zip(runs, of_kind, strict=True)
        ]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """See `Experiment`."""
        if not rows:
            return []
        what = "emulated → simulated (difference), mean over seeds"
        return [
            _table(rows, (*SHOWN, LATENCIES[-1]), f"**{what}**"),
            _table(rows, LATENCIES[:-1], f"**Other latencies: {what}**"),
            _table(rows, CONTROL, "**What the controller did: emulated → simulated, mean over seeds**", differ=False),
        ]

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """See `Experiment`."""
        return [
            verdict_of(
                f"{_told(place)}: {words}, simulated apart from emulated", {s: abs(d) for s, d in apart(here, figure).items()},
                most=AT_MOST, unit=" %", every_seed=True,
            )
            for place, here in by_place(rows).items()
            for figure, words in JUDGED
        ]  # fmt: skip

    def figures(self, rows: Sequence[Row]) -> Sequence[str]:
        """See `Experiment`."""
        return ()


def runs_of(cell: LiveCell) -> list[tuple[dict[str, Any], RunTask]]:
    """What the rows of each run say of it, and the run."""
    scenario = scenario_of(cell.model)
    profile = Profile.from_json(scenario.profile.read_text(encoding="utf-8"), name=str(scenario.profile))
    sim = simulation_of(scenario.model, scenario.boards, profile, cell.seed)
    load = ClosedLoop(mix=LENGTHS, in_flight=IN_FLIGHT, warmup_s=cell.warmup_s, span_s=cell.span_s)
    found = run(RunTask(sim=sim, load=load, policy=BASELINE, seed=cell.seed)).figures
    runs = []
    for name in cell.tasks:
        slo = Slo(throughput_tokens_s=ASKED[name].throughput * found.tokens_per_s)
        budget = schedule_of(ASKED[name].budgets, found.mean_power_w, cell.warmup_s, cell.span_s)
        for policy in cell.policies:
            about = {
                "engine": scenario.slug.replace(f"-{scenario.boards}", f"--{scenario.boards}"), "task": name, "policy": policy,
                "seed": cell.seed, "target_tokens_s": slo.throughput_tokens_s, "budgets_w": list(budget.watts),
            }  # fmt: skip
            task = RunTask(
                sim=sim,
                load=load,
                policy=policy,
                profile=profile,
                slo=slo,
                budget=budget,
                objective="gpu",
                seed=cell.seed,
            )
            runs.append((about, task))
    return runs


def schedule_of(shares: Sequence[float | None], found_w: float, warmup_s: float, span_s: float) -> BudgetSchedule:
    """Each share of `found_w` for an equal part of the span, the first from the start of the run."""
    starts_s = [0.0, *(warmup_s + i * span_s / len(shares) for i in range(1, len(shares)))]
    return BudgetSchedule(tuple(starts_s), tuple(None if s is None else s * found_w for s in shares))


def simulation_of(model: str, boards: str, profile: Profile, seed: int) -> Simulation:
    """The engine of the profile, on the plant as it is."""
    spec, count = parse_boards(boards)
    name, config = read_config(model)
    return Simulation(
        model=name, config=config, spec=spec, boards=count, max_num_seqs=profile.facts.launch_sequences,
        max_num_batched_tokens=profile.facts.step_tokens, prefix_caching=False, board_seed=seed, context_tokens=1, workload=EMPTY,
    )  # fmt: skip


def by_place(rows: Sequence[Row]) -> dict[Place, list[Row]]:
    """Rows of each engine, task and policy."""
    found: dict[Place, list[Row]] = {}
    for r in rows:
        found.setdefault((r["engine"], r["task"], r["policy"]), []).append(r)
    return found


def apart(rows: Sequence[Row], figure: str) -> Mapping[int, float]:
    """By how many percent the simulated figure is above the emulated one, by seed; seeds that lack either do not appear."""
    pairs = _pairs(rows, figure)
    return {seed: 100.0 * (simulated / emulated - 1.0) for seed, (emulated, simulated) in pairs.items() if emulated}


def _pairs(rows: Sequence[Row], figure: str) -> dict[int, tuple[float, float]]:
    """Emulated and simulated value of each seed that has both."""
    emulated, simulated = (
        {int(r["seed"]): float(r[figure]) for r in rows if r["kind"] == kind and r[figure] is not None}
        for kind in (EMULATED, SIMULATED)
    )
    return {seed: (value, simulated[seed]) for seed, value in emulated.items() if seed in simulated}


def _table(
    rows: Sequence[Row], columns: Sequence[tuple[str, str, float, int]], caption: str, *, differ: bool = True
) -> Table:
    """A line a place; each value times the column's factor, with so many digits."""
    lines = [
        [_told(place), *(_cell(here, figure, factor, digits, differ) for figure, _, factor, digits in columns)]
        for place, here in by_place(rows).items()
    ]
    return Table(header=["engine, task, policy", *(words for _, words, _, _ in columns)], lines=lines, caption=caption)


def _cell(rows: Sequence[Row], figure: str, factor: float, digits: int, differ: bool) -> str:
    pairs = list(_pairs(rows, figure).values())
    if not pairs:
        return "–"
    a, b = (factor * sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    told = f"{a:.{digits}f} → {b:.{digits}f}"
    return f"{told} ({100.0 * (b / a - 1.0):+.1f} %)" if differ and a else told


def _told(place: Place) -> str:
    return f"{place[0].partition('--')[0]}, {place[1]}, {place[2]}"
