"""Which figures an experiment has, by its name; one that is not named here is told in tables alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pals.experiments.lab.experiment import Row
from pals.experiments.lab.report import figures_budget, figures_node, figures_open, figures_parts
from pals.experiments.lab.report.spread import policies_in, seeds_told, where
from pals.experiments.lab.rivals import BASELINE
from pals.views.charts import Chart, Panel, tells

FIGURES: Mapping[str, Callable[[Sequence[Row]], list[Chart]]] = {
    "paper-single-node": figures_node.paper_single_node,
    "price": figures_node.price,
    "no-loss": figures_node.no_loss,
    "open-loop": figures_open.open_loop,
    "qos-budget": figures_budget.qos_budget,
    "dynamic-budget": figures_budget.dynamic_budget,
    "surprises": figures_parts.surprises,
    "ablations": figures_parts.ablations,
}


def main_figure(rows: Mapping[str, Sequence[Row]]) -> Chart | None:
    """The few panels that tell most, of the experiments that have rows; None where there is none."""
    panels, told = list[Panel](), list[str]()
    for name, panel in MAIN.items():
        of_one = rows.get(name) or ()
        made = panel(of_one) if of_one else None
        if made is not None and tells(made):
            panels.append(made)
            told.append(f"{name}: {seeds_told(of_one)}")
    if not panels:
        return None
    return Chart(name="experiments", panels=panels, columns=min(2, len(panels)), caption=" ".join(told))


def _frontier(rows: Sequence[Row]) -> Panel | None:
    moe = where(rows, moe=True)
    return figures_node.frontier(
        moe or rows, "throughput targets, MoE models" if moe else "throughput targets, dense models"
    )


def _open(rows: Sequence[Row]) -> Panel | None:
    policies = [p for p in policies_in(rows) if p != BASELINE]
    return replace(figures_open.misses(rows, policies), title="Traces in an open loop") if policies else None


def _missed(rows: Sequence[Row]) -> Panel | None:
    closed = where(rows, engine=figures_budget.ALL, loop="closed")
    return figures_budget.missed_by_budget(closed, "Three models under one budget") if closed else None


def _tracking(rows: Sequence[Row]) -> Panel | None:
    lines = [r for r in where(rows, policy="pals") if r.get("time_line")]
    if lines:
        chosen = next((r for r in lines if r["signal"] == "regulation"), lines[0])
        return figures_budget.power_line(chosen["time_line"], f"pals under a moving budget: {chosen['fleet']}")
    return figures_budget.tracking_error(rows)


#: One panel an experiment, in the order of the figure.
MAIN: Mapping[str, Callable[[Sequence[Row]], Panel | None]] = {
    "paper-single-node": _frontier, "open-loop": _open, "qos-budget": _missed, "dynamic-budget": _tracking,
}  # fmt: skip
