"""Figures of several engines under one budget, and of budgets that move: qos-budget, dynamic-budget.

A row may carry a time line, `{"time_line": {"time_s", "power_w", "budget_w", "limit_w" (may be missing)}}`; where none does, none is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pals.experiments.lab.experiment import Row
from pals.experiments.lab.report.spread import figure_stat, policies_in, seeds_told, short, values_in, where
from pals.views.charts import Chart, Groups, Mark, Traced

ALL = "all"  # the row of all engines together
LINES, CASES = 4, 9  # time lines in one figure, figures of them


def qos_budget(rows: Sequence[Row]) -> list[Chart]:
    """Misses and energy over budgets, and each model's misses."""
    every = where(rows, engine=ALL)
    charts = []
    for loop in values_in(every, "loop"):
        here, each = where(every, loop=loop), [r for r in where(rows, loop=loop) if r["engine"] != ALL]
        title = f"{loop} loop, mean of {len(values_in(each, 'engine')) or 'all'} models"
        charts += [
            Chart(
                name=f"qos-missed-{loop}", panels=[missed_by_budget(here, title)],
                caption=f"Share of control periods below the throughput target, by budget of all nodes, {loop} loop. Shares are of what "
                f"the nodes draw as found. {seeds_told(here)}",
            ),
            Chart(
                name=f"qos-energy-{loop}", panels=[_by_budget(here, "tokens_per_j_node", "output tokens/J, nodes", title)],
                caption=f"Tokens per joule of estimated energy of all nodes, {loop} loop. {seeds_told(here)}",
            ),
        ]  # fmt: skip
        if each:
            charts.append(
                Chart(
                    name=f"qos-models-{loop}", panels=[_by_model(each, e) for e in values_in(each, "engine")],
                    caption=f"The same misses for each model, {loop} loop. {seeds_told(each)}",
                )
            )  # fmt: skip
    return charts + time_lines(rows, "qos", ("loop", "budget", "engine"))


def budgets_of(rows: Sequence[Row]) -> list[str]:
    """From the least to the most watts."""
    watts = {r["budget"]: float(r["node_budget_w"]) for r in rows}
    return sorted(watts, key=lambda b: watts[b])


def missed_by_budget(rows: Sequence[Row], title: str) -> Groups:
    """Bars: a group a budget, a bar a policy."""
    return _by_budget(rows, "missed", "control periods missed, %", title, scale=100.0, bars=True)


def _by_budget(
    rows: Sequence[Row], figure: str, label: str, title: str, *, scale: float = 1.0, bars: bool = False
) -> Groups:
    budgets = budgets_of(rows)
    values = [
        (p, [figure_stat(where(rows, policy=p, budget=b), figure, scale=scale) for b in budgets])
        for p in policies_in(rows)
    ]
    return Groups(
        title=title, label=label, groups=budgets, values=values, bars=bars, group_label="budget of all nodes, % of their draw as found, or W",
    )  # fmt: skip


def _by_model(rows: Sequence[Row], engine: str) -> Groups:
    here = where(rows, engine=engine)
    share = f", target {here[0]['target_share']:.0%}" if here[0].get("target_share") else ""
    return missed_by_budget(here, f"{short(engine.partition('--')[0])}{share}")


def dynamic_budget(rows: Sequence[Row]) -> list[Chart]:
    """Tracking errors, seconds above, throughput left, and time lines."""
    charts = [
        Chart(
            name="dynamic-tracking", panels=[tracking_error(rows), _above(rows)],
            caption="How power of all boards follows the budget, in means of one second. The root mean square error (RMSE) also counts "
            f"power below the budget. {seeds_told(rows)}",
        ),
        Chart(
            name="dynamic-throughput", panels=[_throughput(rows)],
            caption=f"Throughput under the moving budget over that of the engines as found. {seeds_told(rows)}",
        ),
    ]  # fmt: skip
    told = [p for p in (_falls(rows), _far(rows)) if p.groups]
    if told:
        charts.append(
            Chart(
                name="dynamic-falls", columns=len(told), panels=told,
                caption="Time from a fall of the budget to power within it; seconds of the regulation signal whose error exceeds 0.3 of the "
                f"reserve R. {seeds_told(rows)}",
            )
        )  # fmt: skip
    return charts + time_lines(rows, "dynamic", ("fleet", "signal"))


def tracking_error(rows: Sequence[Row]) -> Groups:
    """Root mean square, in percent of the budget."""
    return tracking(rows, "rmse", "Tracking error", "RMSE, % of the budget", 100.0, 2.0)


def _above(rows: Sequence[Row]) -> Groups:
    return tracking(rows, "over_share", "Seconds above the budget", "share of seconds, %", 100.0, 1.0)


def _falls(rows: Sequence[Row]) -> Groups:
    return tracking(rows, "shed_s", "Slowest fall of power", "time, s", 1.0, None)


def _far(rows: Sequence[Row]) -> Groups:
    return tracking(rows, "far_share", "Errors beyond 0.3 R", "share of seconds, %", 100.0, 10.0)


def cases_of(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Fleets and signals."""
    return list(dict.fromkeys((r["fleet"], r["signal"]) for r in rows))


def tracking(rows: Sequence[Row], figure: str, title: str, label: str, scale: float, promised: float | None) -> Groups:
    """Bars: a group a fleet and signal that tells the figure, a bar a policy."""
    known = [r for r in rows if r.get(figure) is not None]
    cases = cases_of(known)
    values = [
        (p, [figure_stat(where(known, fleet=f, signal=s, policy=p), figure, scale=scale) for f, s in cases])
        for p in policies_in(rows)
    ]
    marks = [] if promised is None else [Mark(at=promised, label="promised")]
    return Groups(title=title, label=label, groups=_axis(cases), values=values, marks=marks, bars=True)


def _throughput(rows: Sequence[Row]) -> Groups:
    cases = cases_of(rows)
    values = [
        (p, [figure_stat(where(rows, fleet=f, signal=s, policy=p), "tokens_per_s", over="free_tokens_s") for f, s in cases])
        for p in policies_in(rows)
    ]  # fmt: skip
    return Groups(title="Throughput left", label="tokens/s over as found", groups=_axis(cases), values=values)


def _axis(cases: Sequence[tuple[str, str]]) -> list[str]:
    """Fleet and signal below each other, as nine of them stand side by side."""
    return [f"{fleet.removesuffix('-MoE').replace(' x ', ' × ')}\n{signal}" for fleet, signal in cases]


def time_lines(rows: Sequence[Row], name: str, columns: Sequence[str]) -> list[Chart]:
    """One figure for each of the first cases that have lines, of its first seed: a panel a policy."""
    kept = [r for r in rows if r.get("time_line")]
    charts = []
    for i, case in enumerate(list(dict.fromkeys(tuple(r[c] for c in columns) for r in kept))[:CASES], 1):
        of_case = [r for r in kept if tuple(r[c] for c in columns) == case]
        first = where(of_case, seed=min(r["seed"] for r in of_case))
        chosen = [r for policy in policies_in(first) for r in where(first, policy=policy)[:1]][:LINES]
        words = ", ".join(map(str, case))
        charts.append(
            Chart(
                name=f"{name}-time-line-{i}", panels=[power_line(r["time_line"], f"{r['policy']}: {words}") for r in chosen],
                caption=f"Power of all boards and the budget over time: {words}, seed {chosen[0]['seed']}.",
            )
        )  # fmt: skip
    return charts


def power_line(line: Mapping[str, Sequence[Any]], title: str) -> Traced:
    """Power against the budget, with the limits in force where they are known."""
    stepped = [("budget", _numbers(line["budget_w"]))]
    if line.get("limit_w"):
        stepped.append(("power limits", _numbers(line["limit_w"])))
    return Traced(
        title=title, label="boards, W", time_s=_numbers(line["time_s"]), drawn=[("power drawn", _numbers(line["power_w"]))],
        stepped=stepped,
    )  # fmt: skip


def _numbers(values: Sequence[Any]) -> list[float]:
    return [math.nan if v is None else float(v) for v in values]
