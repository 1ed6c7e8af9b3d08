"""Traces as people sent them, on large models at 20 to 90 % of what each engine can do: what is saved, and who waits longer for it.

Every engine is launched with a batch of 256 and prefix caching, vLLM's defaults on such boards, on as many boards of a node as its
weights and `ROOM` tokens of KV cache need (4 or 8; DeepSeek-V3 does not fit eight H100). Latency targets at p95 are absolute.
They were chosen from `static` alone, before any other policy ran: what people want where that can be kept up to a load of 65 %,
and otherwise a round number above what `static` then gives.

- chat (answers of hundreds of tokens): TTFT 2 s; TPOT 0.1 s, ten tokens a second, faster than people read; 0.15 s for models
  of more than 200 billion parameters, whose `static` gives 0.10 s at 65 %;
- short (prompts of hundreds of tokens, answers of tens): TTFT 2 s, TPOT 0.3 s: most answers are so short that they end within
  one or two steps full of others' prompts;
- bursts (gaps of CV above 4, as the code trace, whose requests come in crowds): TTFT 60 s, dense models 80 s; TPOT 1 s: `static`
  needs 37 to 65 s at a load of 65 %, and its steps full of prompts last 0.35 to 0.75 s;
- long (prompts of thousands of tokens): TTFT 30 s, TPOT 1 s for the same reason.

At 90 % `static` misses some of them, too: what counts is whether a policy misses more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median

from pals.core.architecture import ModelShape
from pals.core.errors import ConfigError
from pals.core.quantities import Slo
from pals.experiments.lab.engines import EngineCase, model_of
from pals.experiments.lab.experiment import Row, Table, Verdict, Wish, verdict_of
from pals.experiments.lab.loads import OpenLoop
from pals.experiments.lab.paper_single_node import policies_in
from pals.experiments.lab.ratios import by_seed, ratios
from pals.experiments.lab.replayed import TRACES, TraceCase, fitting, offered, own_mix
from pals.experiments.lab.rivals import BASELINE, left_out, policies_of
from pals.experiments.lab.run import RunTask, run
from pals.experiments.lab.truth import with_truth
from pals.plant.workload import Workload

LAUNCH = 256
LOADS = (0.2, 0.4, 0.65, 0.9)
MODELS = (
    "mistralai/Mixtral-8x22B-v0.1", "Qwen/Qwen3-235B-A22B", "deepseek-ai/DeepSeek-V3", "meta-llama/Llama-3.1-70B",
)  # fmt: skip
BOARDS = ("h100-sxm5-80gb", "h200-sxm5-141gb", "b200-sxm-180gb")
COUNTS, ANY_COUNTS = (4, 8), (1, 2, 4, 8)  # boards of one engine: of the models above, and of a user's
ROOM = LAUNCH * 1024  # tokens of KV cache, about what a full batch of chats holds
POLICIES = ("static", "pals", "slo-clock", "bandit", "vendor-preset")
BOUNDS = ("static-best", "oracle")  # know the truth, and cost many runs: on every `BOUND_EVERY`th place alone
BOUND_EVERY = 4
PLACES_BY_DEFAULT = 22
PLACES = ("engine", "trace", "load")
WARMUP_S, SPAN_S = 120.0, 900.0
LARGE = 200e9  # parameters
SAVED, MORE_MISSES = 0.35, 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenCell:
    """One engine under one policy, one trace and one load."""

    engine: EngineCase
    trace: TraceCase
    load: float  # of `most_per_s`
    policy: str
    slo: Slo
    warmup_s: float = WARMUP_S
    span_s: float = SPAN_S

    @property
    def slug(self) -> str:
        """See `Cell`."""
        return f"{self.engine.slug}--{self.trace.name}-{self.load:.0%}--{self.policy}".replace("%", "")

    @property
    def seed(self) -> int:
        """See `Cell`."""
        return self.engine.seed


class OpenLoopTraces:
    """See the module."""

    name = "open-loop"
    title = "Traces in an open loop"
    question = "How much energy is saved where requests arrive as people sent them, at 20 to 90 % load, and do more of them come late?"
    targets = (
        f"median over places: {SAVED:.0%} fewer joules of estimated node energy per token than the default, and at most one point more "
        "requests that miss TTFT or TPOT; no place worse than the default: neither more joules per token nor more than one point more misses"
    )
    sources = ("experiments/lab/open_loop.py", "experiments/lab/replayed.py", "experiments/simulated_load.py")
    takes = frozenset({"policies", "models", "boards", "trace"})

    def cells(self, wish: Wish) -> list[OpenCell]:
        """See `Experiment`."""
        usual, found = policies_of(wish, POLICIES), list[OpenCell]()
        bounds = tuple(p for p in policies_of(wish, BOUNDS) if p in BOUNDS and p not in usual)
        for seed in wish.seeds(1, 2):
            for i, (engine, trace, load) in enumerate(places_of(wish, seed)):
                requests = fitting(trace, engine.simulation().context_tokens)
                prompt, output = own_mix(requests)
                told = replace(engine, prompt_tokens=prompt, output_tokens=output)
                cell = OpenCell(
                    engine=told, trace=trace, load=load, policy=BASELINE, slo=slo_of(engine, requests)
                )  # fmt: skip
                policies = (*usual, *bounds) if i % BOUND_EVERY == 0 else usual
                found += [replace(cell, policy=p) for p in policies]
        return found

    def run(self, cell: OpenCell, place: Path) -> list[Row]:
        """See `Experiment`."""
        sim = cell.engine.simulation()
        profile = None if cell.policy == BASELINE else cell.engine.profile(place)
        arriving, most = offered(
            sim, fitting(cell.trace, sim.context_tokens), load=cell.load, duration_s=cell.warmup_s + cell.span_s, seed=cell.seed
        )  # fmt: skip
        load = OpenLoop(workload=arriving, warmup_s=cell.warmup_s)
        task = RunTask(sim=sim, load=load, policy=cell.policy, profile=profile, slo=cell.slo, seed=cell.seed)
        figures = run(with_truth(task)).figures
        about = {
            "engine": cell.engine.name, "trace": cell.trace.name, "load": cell.load, "seed": cell.seed, "policy": cell.policy,
            "most_per_s": most, "ttft_target_s": cell.slo.ttft_p95_s, "tpot_target_s": cell.slo.tpot_p95_s,
            "missed": 1.0 - figures.good_requests / max(1, figures.requests),
        }  # fmt: skip
        return [about | figures.to_row()]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """See `Experiment`."""
        if not rows:
            return []
        policies = policies_in(rows)
        note = left_out((*POLICIES, *BOUNDS))
        lines = [
            [f"{p[0]}, {p[1]}, {float(str(p[2])):.0%}", *(_cell(here, q) for q in policies)]
            for p, here in by_place(rows)
        ]
        each = Table(
            header=("engine, trace, load", *policies),
            lines=lines,
            caption="**Node joules per token (GPU), over the default's where it is another policy; share of requests that missed TTFT or "
            f"TPOT. Launch batch {LAUNCH}. {note}**",
        )
        loads = sorted({r["load"] for r in rows})
        medians = Table(
            header=("policy", *(f"{x:.0%}" for x in loads), "all"),
            lines=[[p, *(_medians([r for r in rows if r["load"] == x], p) for x in loads), _medians(rows, p)] for p in policies[1:]],
            caption="**Median over places: node joules per token over the default's, points more misses**",
        )  # fmt: skip
        return [each, medians]

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """See `Experiment`."""
        joules, more = joule_ratios(rows, "pals"), more_misses(rows, "pals")
        saved = {place: 1.0 - ratio for place, ratio in joules.items()}
        return [
            verdict_of("pals: share of node joules per token saved, median of places", by_seed(saved, "median"), least=SAVED),
            verdict_of("pals: more misses than the default, median of places", by_seed(more, "median"), most=MORE_MISSES),
            verdict_of("pals: node joules per token over the default's, worst place", by_seed(joules, "most"), most=1.0, unit="×"),
            verdict_of("pals: more misses than the default, worst place", by_seed(more, "most"), most=MORE_MISSES),
        ]  # fmt: skip

    def figures(self, rows: Sequence[Row]) -> Sequence[str]:
        """See `Experiment`."""
        return ("saving-by-load",) if rows else ()


def places_of(wish: Wish, seed: int) -> list[tuple[EngineCase, TraceCase, float]]:
    """Where to look: a balanced choice, or everything where a user names something or wants all.

    Raises:
        ConfigError: a trace, model or board that does not exist or fit.
    """
    engines = engines_of(wish, seed)
    traces = TRACES if wish.trace is None else (TraceCase.of_file(wish.trace),)
    if wish.full or wish.models or wish.boards or wish.trace:
        return list(product(engines, traces, LOADS))
    return list(balanced(engines, traces, PLACES_BY_DEFAULT))


def balanced(
    engines: Sequence[EngineCase], traces: Sequence[TraceCase], count: int
) -> Iterator[tuple[EngineCase, TraceCase, float]]:
    """So many places in which engines, traces, loads, and pairs of the last two come equally often, as far as they can."""
    for k in range(count):
        yield engines[k % len(engines)], traces[k % len(traces)], LOADS[(k + k // len(traces)) % len(LOADS)]


def engines_of(wish: Wish, seed: int) -> list[EngineCase]:
    """Every model on every kind of boards that takes it.

    Raises:
        ConfigError: a model takes none of the boards, or not those that were named.
    """
    found = list[EngineCase]()
    counts = ANY_COUNTS if wish.models else COUNTS
    for model in [model_of(m)[0] for m in wish.models] or MODELS:
        fit = (
            [e for e in (_fitting_engine(model, b, seed, counts) for b in BOARDS) if e is not None]
            if not wish.boards
            else []
        )
        fit += [_engine(model, b, seed) for b in wish.boards]
        if not fit:
            raise ConfigError(f"{model} fits none of {', '.join(BOARDS)}; name boards with --boards. Nothing was run")
        found += fit
    for engine in found:
        engine.simulation()
    return found


def _engine(model: str, boards: str, seed: int) -> EngineCase:
    return EngineCase(model=model, boards=boards, seed=seed, launch=LAUNCH, prefix_caching=True)


def _fitting_engine(model: str, board: str, seed: int, counts: Sequence[int]) -> EngineCase | None:
    """On the fewest boards that leave `ROOM`; None: it does not fit."""
    for count in counts:
        engine = _engine(model, f"{count}x{board}", seed)
        try:
            if engine.simulation().replica().kv_tokens >= ROOM:
                return engine
        except ConfigError:
            continue
    return None


def slo_of(engine: EngineCase, requests: Workload) -> Slo:
    """Targets of a class of model and a kind of trace; see the module."""
    shape = ModelShape.from_config(engine.simulation().config)
    kind = kind_of(requests)
    ttft_s = {"chat": 2.0, "short": 2.0, "bursts": 60.0 if shape.experts else 80.0, "long": 30.0}[kind]
    tpot_s = {"chat": 0.15 if shape.total_params > LARGE else 0.1, "short": 0.3, "bursts": 1.0, "long": 1.0}[kind]
    return Slo(ttft_p95_s=ttft_s, tpot_p95_s=tpot_s)


def kind_of(requests: Workload) -> str:
    """Of a trace, by its gaps and lengths."""
    if requests.gap_cv > 4.0:
        return "bursts"
    if own_mix(requests)[0] > 4000.0:
        return "long"
    return "short" if requests.output_tokens.mean() < 64.0 else "chat"


def by_place(rows: Sequence[Row]) -> list[tuple[tuple[object, ...], list[Row]]]:
    """Rows of each place, in their order."""
    places = dict.fromkeys(tuple(r[k] for k in PLACES) for r in rows)
    return [(place, [r for r in rows if tuple(r[k] for k in PLACES) == place]) for place in places]


def joule_ratios(
    rows: Sequence[Row], policy: str, figure: str = "tokens_per_j_node"
) -> dict[tuple[object, ...], float]:
    """Joules per token over the default's, by place and seed."""
    return {place: 1.0 / ratio for place, ratio in ratios(rows, figure, policy, BASELINE, PLACES).items() if ratio > 0}


def more_misses(rows: Sequence[Row], policy: str) -> dict[tuple[object, ...], float]:
    """Share of requests that missed a latency target, beyond the default's, by place and seed."""
    keys = (*PLACES, "seed")
    default = {tuple(r[k] for k in keys): float(r["missed"]) for r in rows if r["policy"] == BASELINE}
    mine = {tuple(r[k] for k in keys): float(r["missed"]) for r in rows if r["policy"] == policy}
    return {place: missed - default[place] for place, missed in mine.items() if place in default}


def _cell(rows: Sequence[Row], policy: str) -> str:
    mine = [r for r in rows if r["policy"] == policy]
    if not mine:
        return "–"
    missed = sum(r["missed"] for r in mine) / len(mine)
    if policy == BASELINE:
        node, gpu = (sum(1.0 / r[f"tokens_per_j_{of}"] for r in mine) / len(mine) for of in ("node", "gpu"))
        return f"{node:.2f} J ({gpu:.2f}), {missed:.1%}"
    node, gpu = (_mean(joule_ratios(rows, policy, f"tokens_per_j_{of}")) for of in ("node", "gpu"))
    return f"{node:.3f} ({gpu:.3f}), {missed:.1%}"


def _mean(found: dict[tuple[object, ...], float]) -> float:
    return sum(found.values()) / len(found) if found else float("nan")


def _medians(rows: Sequence[Row], policy: str) -> str:
    joules, more = joule_ratios(rows, policy), more_misses(rows, policy)
    if not joules:
        return "–"
    return f"{median(joules.values()):.3f}, {100 * median(more.values()):+.2f}"
