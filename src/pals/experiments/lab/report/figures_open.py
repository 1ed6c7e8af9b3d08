"""Figures of traces in an open loop: what is saved at which load, and who waits longer for it."""

from __future__ import annotations

from collections.abc import Sequence

from pals.experiments.lab.experiment import Row
from pals.experiments.lab.ratios import Place, ratios
from pals.experiments.lab.report.figures_node import NODE, names_of
from pals.experiments.lab.report.spread import differences, policies_in, seeds_told, values_in, where
from pals.experiments.lab.rivals import BASELINE
from pals.views.charts import Chart, Cloud, Mark, Series, Stat

PLACES = ("engine", "trace", "load")
LOAD_LABEL, JOULES = "load, % of capacity", "node J/token over the default's"
LEAST_SAVED = Mark(at=0.65, label="promised")
AS_DEFAULT = Mark(at=1.0, label="as the default")


def open_loop(rows: Sequence[Row]) -> list[Chart]:
    """Savings by load per trace and per model, and the frontier of savings and misses."""
    policies = [p for p in policies_in(rows) if p != BASELINE]
    if not policies:
        return []
    traces, engines = values_in(rows, "trace"), values_in(rows, "engine")
    told = "A value is the mean over places; bars span the least and the most place."
    by_trace = [saving_by_load(where(rows, trace=t), t, policies) for t in traces]
    charts = [
        Chart(
            name="open-saving", columns=min(2, len(by_trace)), panels=by_trace,
            caption=f"Joules of estimated node energy per token over the default's, by load. {told}",
        ),
        Chart(
            name="open-misses", panels=[misses(rows, policies)],
            caption="Each place (engine, trace, load): what is saved, and how many more requests miss TTFT or TPOT than under the default. "
            f"{seeds_told(rows)}",
        ),
    ]  # fmt: skip
    if "pals" in policies:
        series = [
            _by_load(where(rows, engine=e), "pals", name) for e, name in zip(engines, names_of(engines), strict=True)
        ]
        panel = Cloud(
            title="pals, by engine", x_label=LOAD_LABEL, y_label=JOULES, series=series, marks=[AS_DEFAULT], joined=True
        )
        charts.append(
            Chart(name="open-engines", panels=[panel], caption=f"The same for each engine, over traces. {told}")
        )
    return charts


def saving_by_load(rows: Sequence[Row], title: str, policies: Sequence[str]) -> Cloud:
    """A line a policy."""
    return Cloud(
        title=title, x_label=LOAD_LABEL, y_label=JOULES, series=[_by_load(rows, p, p) for p in policies], marks=[AS_DEFAULT],
        joined=True,
    )  # fmt: skip


def _by_load(rows: Sequence[Row], policy: str, name: str) -> Series:
    joules, x, y = joules_of(rows, policy), list[Stat](), list[Stat]()
    for load in sorted({float(str(p[2])) for p in joules}):
        values = [v for p, v in joules.items() if p[2] == load]
        x.append(Stat.exact(100.0 * load))
        y.append(Stat(value=sum(values) / len(values), low=min(values), high=max(values)))
    return Series(name=name, x=x, y=y)


def joules_of(rows: Sequence[Row], policy: str) -> dict[Place, float]:
    """Joules per token over the default's, by place and seed."""
    known = [r for r in rows if r.get(NODE)]
    return {place: 1.0 / v for place, v in ratios(known, NODE, policy, BASELINE, PLACES).items() if v > 0}


def misses(rows: Sequence[Row], policies: Sequence[str]) -> Cloud:
    """A point a place and seed."""
    series = []
    for policy in policies:
        more = differences(rows, "missed", policy, BASELINE, PLACES, scale=100.0)
        joules = joules_of(rows, policy)
        both = [(more[p], joules[p]) for p in joules if p in more]
        series.append(Series(name=policy, x=[Stat.exact(m) for m, _ in both], y=[Stat.exact(j) for _, j in both]))
    return Cloud(
        title="Savings and misses", x_label="more requests missed, percentage points", y_label=JOULES, series=series,
        marks=[AS_DEFAULT], x_marks=[Mark(at=1.0, label="promised")],
    )  # fmt: skip
