"""Figures of surprises, and of what each part of the policy is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pals.experiments.lab.experiment import Row
from pals.experiments.lab.ratios import by_seed
from pals.experiments.lab.report.figures_budget import time_lines
from pals.experiments.lab.report.figures_node import NODE
from pals.experiments.lab.report.spread import (
    differences,
    inverse_stat,
    policies_in,
    seeds_told,
    stat_of,
    values_in,
    where,
)
from pals.views.charts import Chart, Groups, Mark, Stat

NONE, WHOLE = "none", "whole"  # the unsurprised run; the policy with all its parts
OVERRUNS = 2  # whose time lines are drawn, the worst first


def surprises(rows: Sequence[Row]) -> list[Chart]:
    """Misses beyond the unsurprised run, and seconds over the budget."""
    kinds = [s for s in values_in(rows, "surprise") if s != NONE]
    if not kinds:
        return []
    panels = [
        _more_missed(where(rows, budgeted=budgeted), kinds, "under a budget" if budgeted else "no budget")
        for budgeted in (False, True)
        if where(rows, budgeted=budgeted)
    ]
    charts = [
        Chart(
            name="surprises-misses", columns=len(panels), panels=panels,
            caption="Requests that miss TTFT or TPOT beyond those of the same policy's unsurprised run, worst engine. Where the default "
            f"gains misses too, the surprise changes what can be done. {seeds_told(rows)}",
        )
    ]  # fmt: skip
    budgeted = where(rows, budgeted=True)
    if budgeted:
        values = [
            (p, [_worst(where(budgeted, policy=p, surprise=s), "over_s") for s in (NONE, *kinds)])
            for p in policies_in(budgeted)
        ]
        panel = Groups(
            title="Budget overruns", label="seconds over the budget", groups=[NONE, *kinds], values=values,
            bars=True, lying=True,
        )  # fmt: skip
        charts.append(
            Chart(name="surprises-over", panels=[panel], caption=f"Seconds over the budget, worst engine. {seeds_told(rows)}")
        )  # fmt: skip
    worst = sorted(where(budgeted, policy="pals"), key=lambda r: -float(r.get("worst_over_w") or 0.0))[:OVERRUNS]
    return charts + time_lines(worst, "surprises", ("surprise", "engine"))


def _more_missed(rows: Sequence[Row], kinds: Sequence[str], title: str) -> Groups:
    values = list[tuple[str, list[Stat | None]]]()
    for policy in policies_in(rows):
        mine = where(rows, policy=policy)
        values.append((policy, [_more(mine, kind) for kind in kinds]))
    return Groups(
        title=title[0].upper() + title[1:], label="more requests missed, points", groups=kinds, values=values, bars=True, lying=True,
        marks=[Mark(at=2.0, label="promised")],
    )  # fmt: skip


def _more(rows: Sequence[Row], kind: str) -> Stat | None:
    usual = [{**r, "policy": "usual"} for r in where(rows, surprise=NONE)]
    changed = [{**r, "policy": "changed"} for r in where(rows, surprise=kind)]
    more = differences([*usual, *changed], "missed", "changed", "usual", ("engine",), scale=100.0)
    return stat_of(by_seed(more, "most"))


def _worst(rows: Sequence[Row], figure: str) -> Stat | None:
    values: dict[int, float] = {}
    for r in rows:
        if r.get(figure) is not None:
            values[r["seed"]] = max(values.get(r["seed"], float("-inf")), float(r[figure]))
    return stat_of(values)


def ablations(rows: Sequence[Row]) -> list[Chart]:
    """Energy per token and misses against the whole policy, for each part taken away."""
    variants, demands = [v for v in policies_in(rows) if v != WHOLE], values_in(rows, "demand")
    if not variants or not where(rows, policy=WHOLE):
        return []
    places: dict[str, Any] = {"places": ("engine", "demand")}
    energy = [(d, [inverse_stat(where(rows, demand=d), NODE, v, WHOLE, **places) for v in variants]) for d in demands]
    missed = [
        (d, [stat_of(by_seed(differences(where(rows, demand=d), "missed", v, WHOLE, scale=100.0, **places))) for v in variants])
        for d in demands
    ]  # fmt: skip
    panels = [
        Groups(
            title="Energy", label="node J/token over the whole policy's", groups=variants, values=energy, lying=True,
            marks=[Mark(at=1.0, label="as the whole policy")],
        ),
        Groups(
            title="Misses", label="more requests missed, points", groups=variants, values=missed, lying=True,
            marks=[Mark(at=0.0, label="as the whole policy")],
        ),
    ]  # fmt: skip
    caption = (
        "What becomes of energy per token (right of the line: worse) and of requests that miss TTFT or TPOT when one part is taken away, "
        f"mean of {len(values_in(rows, 'engine'))} engines. {seeds_told(rows)}"
    )
    return [Chart(name="ablations", columns=2, panels=panels, caption=caption)]
