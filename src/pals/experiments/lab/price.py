"""What saving energy costs at nearly full throughput: answers nearly without decode, and answers nearly without prefill.

Latency targets are absolute, at p99, and were written down before the runs:

- open loop, TTFT 2 s: what MLPerf Inference asks of LLM servers (Mixtral 8x7B, Llama 2 70B; server scenario);
- closed loop, TTFT 10 s: with more requests in flight than run, every request queues, so only a collapse is excluded; ten
  seconds is what a person waits without turning away;
- decode, TPOT 0.1 s: ten tokens a second, faster than people read;
- prefill-like, TPOT 0.2 s: at most five tokens, each in a step full of others' prompts; MLPerf's target of the same servers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pals.core.load import Mix
from pals.core.quantities import Slo
from pals.experiments.lab.engines import EngineCase, model_of
from pals.experiments.lab.experiment import Row, Table, Verdict, Wish, verdict_of
from pals.experiments.lab.loads import SPAN_S, WARMUP_S, ClosedLoop, Load, OpenLoop, arrivals_of, capacity_of
from pals.experiments.lab.paper_single_node import policies_in
from pals.experiments.lab.ratios import by_seed, ratios, told
from pals.experiments.lab.rivals import BASELINE, left_out, policies_of
from pals.experiments.lab.run import RunTask, run
from pals.experiments.lab.truth import with_truth
from pals.experiments.simulated_run import Simulation

PREFILL = Mix(
    name="prefill", prompt_tokens=90, output_tokens=3, spread=2 / 3
)  # 1 to 5 tokens, as HellaSwag scripts ask
DECODE = Mix(name="decode", prompt_tokens=256, output_tokens=256, spread=0.5)
MIXES = {m.name: m for m in (PREFILL, DECODE)}
TPOT_S = {"prefill": 0.2, "decode": 0.1}
TTFT_S = {"closed": 10.0, "open": 2.0}
SHARE, OPEN_LOAD = 0.98, 0.7  # of the default's throughput; of the capacity as found
ENGINES = (
    ("mistralai/Mixtral-8x7B-v0.1", "4xa100-sxm4-80gb", 64),
    ("Qwen/Qwen3-30B-A3B", "h100-sxm5-80gb", 128),
    ("meta-llama/Llama-3.1-8B", "h100-sxm5-80gb", 128),
)
POLICIES = ("static", "static-best", "pals", "vendor-preset", "slo-clock", "oracle")
PLACES = ("engine", "mix", "loop")


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceCell:
    """One engine under one policy and one load."""

    engine: EngineCase
    policy: str
    mix: str  # of `MIXES`
    loop: str  # of `TTFT_S`
    warmup_s: float = WARMUP_S
    span_s: float = SPAN_S

    @property
    def slug(self) -> str:
        """See `Cell`."""
        return f"{self.engine.slug}--{self.mix}-{self.loop}--{self.policy}"

    @property
    def seed(self) -> int:
        """See `Cell`."""
        return self.engine.seed


class Price:
    """See the module."""

    name = "price"
    title = "The price of saving"
    question = "How much energy is saved at 98 % of the default's throughput and inside latency targets, where work is prefill, and where it is decode?"
    targets = (
        "decode: at least 1.15 times the default's tokens per joule of estimated node energy; prefill-like: at least 0.97 of the "
        "oracle; nowhere more than 1 % below the best static point; throughput at least 0.98 of the default's, p99 TTFT at most "
        "10 s in the closed and 2 s in the open loop, p99 TPOT at most 0.1 s in decode and 0.2 s in prefill-like work"
    )
    sources = ("experiments/lab/price.py",)
    takes = frozenset({"policies", "models", "boards"})

    def cells(self, wish: Wish) -> list[PriceCell]:
        """See `Experiment`."""
        policies = policies_of(wish, POLICIES)
        return [
            PriceCell(engine=e, policy=p, mix=mix, loop=loop)
            for e in engines_of(wish, ENGINES)
            for mix in MIXES
            for loop in TTFT_S
            for p in policies
        ]

    def run(self, cell: PriceCell, place: Path) -> list[Row]:
        """See `Experiment`."""
        sim, profile = cell.engine.simulation(), cell.engine.profile(place)
        load, latencies = load_of(cell, sim), Slo(ttft_p99_s=TTFT_S[cell.loop], tpot_p99_s=TPOT_S[cell.mix])
        default = run(RunTask(sim=sim, load=load, policy=BASELINE, slo=latencies, seed=cell.seed)).figures
        saturated = cell.loop == "closed"  # elsewhere arrivals, not the engine, set the throughput
        slo = Slo(
            throughput_tokens_s=SHARE * default.tokens_per_s if saturated else None,
            ttft_p99_s=latencies.ttft_p99_s, tpot_p99_s=latencies.tpot_p99_s,
        )  # fmt: skip
        task = RunTask(sim=sim, load=load, policy=cell.policy, profile=profile, slo=slo, seed=cell.seed)
        figures = run(with_truth(task)).figures
        about = {
            "engine": cell.engine.name, "mix": cell.mix, "loop": cell.loop, "seed": cell.seed, "policy": cell.policy,
            "free_tokens_s": default.tokens_per_s, "ttft_target_s": slo.ttft_p99_s, "tpot_target_s": slo.tpot_p99_s,
        }  # fmt: skip
        return [about | figures.to_row()]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """See `Experiment`."""
        policies = policies_in(rows)
        made = [
            Table(
                header=("engine, load", *policies),
                lines=[_line(here, place, figure, policies) for place, here in by_place(rows).items()],
                caption=f"**Tokens per joule of {what} energy over the default's, mean (least–most) over seeds; ! marks a run that "
                f"missed a target.** {left_out(POLICIES)}",
            )
            for figure, what in (("tokens_per_j_node", "estimated node"), ("tokens_per_j_gpu", "GPU"))
        ]
        return made if rows else []

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """See `Experiment`."""

        def ratio(mix: str, over: str, loop: str | None = None) -> dict[tuple[object, ...], float]:
            here = [r for r in rows if r["mix"] == mix and loop in (None, r["loop"])]
            return ratios(here, "tokens_per_j_node", "pals", over, PLACES)

        best = {**ratio("prefill", "static-best"), **ratio("decode", "static-best")}
        kept = {tuple(r[k] for k in (*PLACES, "seed")): float(not missed(r)) for r in rows if r["policy"] == "pals"}
        return [
            verdict_of("pals, decode, closed loop: node tokens/J over the default's, mean of engines", by_seed(ratio("decode", BASELINE, "closed")), least=1.15, unit="×"),
            verdict_of("pals, decode, open loop at 70 %: the same", by_seed(ratio("decode", BASELINE, "open")), least=1.15, unit="×"),
            verdict_of("pals, prefill-like: node tokens/J over the oracle's, mean", by_seed(ratio("prefill", "oracle")), least=0.97, unit="×"),
            verdict_of("pals: node tokens/J over the best static point's, worst engine and load", by_seed(best, "least"), least=0.99, unit="×", every_seed=True),
            verdict_of("pals: share of runs inside every target", by_seed(kept), least=1.0),
        ]  # fmt: skip

    def figures(self, rows: Sequence[Row]) -> Sequence[str]:
        """See `Experiment`."""
        return ("saving-by-load",) if rows else ()


def engines_of(wish: Wish, usual: Sequence[tuple[str, str, int]]) -> list[EngineCase]:
    """The usual engines, or every model wished for on all boards wished for, by seed; each is tried once.

    Raises:
        ConfigError: one does not exist, or does not fit its boards.
    """
    models = [model_of(m) for m in wish.models or dict.fromkeys(m for m, _, _ in usual)]
    wanted = [
        (model, sizes, boards, launch)
        for model, sizes in models
        for boards, launch in _boards_of(model, wish.boards, usual)
    ]
    cases = [
        EngineCase(model=m, sizes=sizes, boards=b, seed=s, launch=n)
        for s in wish.seeds(2, 10)
        for m, sizes, b, n in wanted
    ]
    for case in cases[: len(wanted)]:
        case.simulation()
    return cases


def _boards_of(model: str, boards: Sequence[str], usual: Sequence[tuple[str, str, int]]) -> list[tuple[str, int]]:
    """Boards and launch batch of one model; one that is not usual runs on the first usual boards."""
    own = [(b, n) for m, b, n in usual if m == model] or [(usual[0][1], usual[0][2])]
    return [(b, dict(own).get(b, own[0][1])) for b in boards] or own


def load_of(cell: PriceCell, sim: Simulation) -> Load:
    """The cell's requests: half as many again in flight as run, or arrivals at a share of the capacity as found."""
    mix = MIXES[cell.mix]
    if cell.loop == "closed":
        return ClosedLoop(mix=mix, in_flight=3 * sim.max_num_seqs // 2, warmup_s=cell.warmup_s, span_s=cell.span_s)
    rate = OPEN_LOAD * capacity_of(sim, mix, seed=cell.seed)
    end_s = cell.warmup_s + cell.span_s
    return OpenLoop(
        workload=arrivals_of(mix, rate_per_s=rate, duration_s=end_s, seed=cell.seed), warmup_s=cell.warmup_s
    )


def missed(row: Row) -> list[str]:
    """The targets that a run missed."""
    judged = (
        ("throughput", row["tokens_per_s"] < SHARE * row["free_tokens_s"]),
        ("TTFT", row["ttft_p99_s"] is None or row["ttft_p99_s"] > row["ttft_target_s"]),
        ("TPOT", row["tpot_p99_s"] is not None and row["tpot_p99_s"] > row["tpot_target_s"]),
    )
    return [name for name, lacks in judged if lacks]


def by_place(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows of each engine and load."""
    places = dict.fromkeys(tuple(r[k] for k in PLACES) for r in rows)
    return {place: [r for r in rows if tuple(r[k] for k in PLACES) == place] for place in places}


def _line(rows: Sequence[Row], place: tuple[str, ...], figure: str, policies: Sequence[str]) -> list[str]:
    cells = []
    for policy in policies:
        lacks = sorted({name for r in rows if r["policy"] == policy for name in missed(r)})
        found = ratios(rows, figure, policy, BASELINE, PLACES)
        cells.append(told(list(found.values())) + (f" ! {', '.join(lacks)}" if lacks else ""))
    return [f"{place[0]}, {place[1]}, {place[2]} loop", *cells]
