"""Figures of the experiments on one node: paper-single-node, price, no-loss."""

from __future__ import annotations

from collections.abc import Sequence

from pals.experiments.lab.experiment import Row
from pals.experiments.lab.report.spread import (
    figure_stat,
    policies_in,
    ratio_stat,
    seeds_told,
    short,
    stat_of,
    values_in,
    where,
)
from pals.experiments.lab.rivals import BASELINE
from pals.views.charts import Chart, Cloud, Groups, Mark, Series, Stat

AS_DEFAULT = Mark(at=1.0, label="as the default")
GPU, NODE = "tokens_per_j_gpu", "tokens_per_j_node"
AT = ("engine", "target_share")


def paper_single_node(rows: Sequence[Row]) -> list[Chart]:
    """Frontiers, each model at the lowest target, and how often targets were missed."""
    kinds = (("MoE models", where(rows, moe=True)), ("dense models", where(rows, moe=False)))
    panels = [frontier(of_kind, kind) for kind, of_kind in kinds if of_kind]
    lowest = min(r["target_share"] for r in rows)
    return [
        Chart(
            name="paper-frontier", columns=len(panels), panels=panels,
            caption="Tokens per joule of GPU energy against throughput, both over the default's on the same plant, mean over models; a "
            f"point is a throughput target, the upright lines. {seeds_told(rows)}",
        ),
        Chart(
            name="paper-models", panels=[_by_model(where(rows, target_share=lowest), lowest)],
            caption=f"Each model at the {lowest:.0%} target. {seeds_told(rows)}",
        ),
        Chart(
            name="paper-missed", panels=[_missed(rows)],
            caption=f"Share of control periods below the throughput target while requests waited, mean over models. {seeds_told(rows)}",
        ),
    ]  # fmt: skip


def frontier(rows: Sequence[Row], kind: str) -> Cloud:
    """Of the models in `rows`: a line a policy, a point a target."""
    shares, lines = sorted({r["target_share"] for r in rows}), list[Series]()
    for policy in policies_in(rows):
        points = list[tuple[Stat, Stat]]()
        for share in shares:
            here = where(rows, target_share=share)
            speed = figure_stat(where(here, policy=policy), "tokens_per_s", over="free_tokens_s")
            gain = ratio_stat(here, GPU, policy, BASELINE, AT)
            if speed is not None and gain is not None:
                points.append((speed, gain))
        lines.append(Series(name=policy, x=[x for x, _ in points], y=[y for _, y in points]))
    marks = [Mark(at=s, label="targets") for s in shares]
    return Cloud(
        title=f"{kind[:1].upper()}{kind[1:]} ({len(values_in(rows, 'engine'))})", x_label="throughput over the default's",
        y_label="GPU tokens/J over the default's", series=lines, x_marks=marks, joined=True,
    )  # fmt: skip


def _by_model(rows: Sequence[Row], share: float) -> Groups:
    engines = values_in(rows, "engine")
    values = [
        (p, [ratio_stat(where(rows, engine=e), GPU, p, BASELINE, AT) for e in engines])
        for p in policies_in(rows)
        if p != BASELINE
    ]
    return Groups(
        title=f"Each model at {share:.0%} of its throughput", label="GPU tokens/J over the default's", groups=[n.replace(", ", "\n") for n in names_of(engines)],
        values=values, marks=[AS_DEFAULT],
    )  # fmt: skip


def names_of(engines: Sequence[str]) -> list[str]:
    """Engines for an axis: with their boards where boards differ."""
    boards = {e.partition("--")[2] for e in engines}
    return [short(e if len(boards) > 1 else e.partition("--")[0]) for e in engines]


def _missed(rows: Sequence[Row]) -> Groups:
    shares = sorted({r["target_share"] for r in rows})
    values = [
        (p, [figure_stat(where(rows, policy=p, target_share=s), "throughput_missed", scale=100.0) for s in shares])
        for p in policies_in(rows)
    ]
    return Groups(
        title="Throughput targets missed", label="control periods, %", groups=[f"target {s:.0%}" for s in shares],
        values=values, bars=True,
    )  # fmt: skip


def price(rows: Sequence[Row]) -> list[Chart]:
    """Savings by engine and load, and what the tail pays."""
    policies = [p for p in policies_in(rows) if p != BASELINE]
    panels = []
    for mix, loop in dict.fromkeys((r["mix"], r["loop"]) for r in rows):
        here = where(rows, mix=mix, loop=loop)
        engines = values_in(here, "engine")
        values = [
            (p, [ratio_stat(where(here, engine=e), NODE, p, BASELINE, ("engine",)) for e in engines]) for p in policies
        ]
        panels.append(
            Groups(
                title=f"{mix}, {loop} loop", label="node tokens/J over the default's", groups=[n.replace(", ", "\n") for n in names_of(engines)], values=values,
                marks=[AS_DEFAULT],
            )
        )  # fmt: skip
    tails = [t for t in (_tail(rows, "tpot", "TPOT"), _tail(rows, "ttft", "TTFT")) if any(s.x for s in t.series)]
    charts = [
        Chart(
            name="price-savings", columns=2, panels=panels,
            caption=f"Tokens per joule of estimated node energy over the default's. {seeds_told(rows)}",
        )
    ]  # fmt: skip
    if tails:
        charts.append(
            Chart(
                name="price-tails", columns=len(tails), panels=tails,
                caption="Savings against p99 latency over its target: right of the line the target is missed. A point is an engine, a "
                f"load and a policy. {seeds_told(rows)}",
            )
        )  # fmt: skip
    return charts


def _tail(rows: Sequence[Row], name: str, words: str) -> Cloud:
    lines = []
    for policy in policies_in(rows):
        points = list[tuple[Stat, Stat]]()
        for engine, mix, loop in dict.fromkeys((r["engine"], r["mix"], r["loop"]) for r in rows):
            here = where(rows, engine=engine, mix=mix, loop=loop)
            late = figure_stat(where(here, policy=policy), f"{name}_p99_s", over=f"{name}_target_s")
            gain = ratio_stat(here, NODE, policy, BASELINE, ("engine",))
            if late is not None and gain is not None:
                points.append((late, gain))
        lines.append(Series(name=policy, x=[x for x, _ in points], y=[y for _, y in points]))
    return Cloud(
        title=f"Savings and {words}", x_label=f"p99 {words} over its target", y_label="node tokens/J over the default's", series=lines,
        x_marks=[Mark(at=1.0, label="target")],
    )  # fmt: skip


def no_loss(rows: Sequence[Row]) -> list[Chart]:
    """Work done, and energy, over the default's."""
    loads, policies = values_in(rows, "load"), [p for p in policies_in(rows) if p != BASELINE]
    if not policies:
        return []
    engines = values_in(rows, "engine")
    panels = []
    for title, label, node in (
        ("Work done", "work over the default's", False),
        ("Energy", "node tokens/J over the default's", True),
    ):
        values = [
            (name, [_stat(where(rows, load=load, engine=e), policies[-1], node) for load in loads])
            for e, name in zip(engines, names_of(engines), strict=True)
        ]
        marks = [AS_DEFAULT] if node else [AS_DEFAULT, Mark(at=0.995, label="promised")]
        panels.append(Groups(title=f"{title}, {policies[-1]}", label=label, groups=loads, values=values, marks=marks))
    caption = (
        "Where nothing is asked: work is tokens per second at saturation (closed loop, 130 % of capacity) and requests answered inside "
        f"the targets below it. {seeds_told(rows)}"
    )
    return [Chart(name="no-loss", columns=2, panels=panels, caption=caption)]


def _stat(rows: Sequence[Row], policy: str, node: bool) -> Stat | None:
    from pals.experiments.lab.no_loss import work_ratios
    from pals.experiments.lab.ratios import by_seed

    if node:
        return ratio_stat(rows, NODE, policy, BASELINE, ("engine", "load"))
    return stat_of(by_seed(work_ratios(rows, policy)))
