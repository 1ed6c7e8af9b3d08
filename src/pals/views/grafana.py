"""The Grafana dashboard, generated from the table of metrics: names and descriptions have one source, `METRICS`.

A metric that no panel below names gets a panel of its own in the last row, so nothing exposed is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prometheus_client import Counter

from pals.views.metrics import METRICS, Metric

UID = "pals-agent"
SCHEMA_VERSION = 39  # Grafana 10.4 and later; newer ones migrate it
SOURCE = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
COLUMNS, HEIGHT = 24, 8
_UNITS = (
    ("_joules_per_token", "suffix:J/token"),
    ("_tokens_per_second", "suffix:tokens/s"),
    ("_watts", "watt"),
    ("_joules_total", "joule"),
    ("_hertz", "hertz"),
    ("_seconds", "s"),
    ("_seconds_total", "s"),
    ("_ratio", "percentunit"),
)


@dataclass(frozen=True, slots=True)
class Query:
    """One curve: a PromQL expression and its legend."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel; `width` in Grafana's 24 columns."""

    title: str
    queries: tuple[Query, ...]
    unit: str
    text: str
    kind: str = "timeseries"
    width: int = 12
    height: int = HEIGHT


def of(name: str) -> str:
    """The series of the engines chosen at the top of the dashboard."""
    return f'{name}{{engine=~"$engine"}}'


def rate(name: str, *by: str) -> str:
    """Change per second of a counter, summed by labels."""
    return f"sum by ({', '.join(('engine', *by))}) (rate({of(name)}[$__rate_interval]))"


def joules_per_token(window: str) -> str:
    """Energy over output tokens of a whole window; the ratio of sums, not the mean of ratios."""
    energy, tokens = (
        f"sum by (engine) (increase({of(n)}[{window}]))"
        for n in ("pals_energy_joules_total", "pals_output_tokens_total")
    )
    return f"{energy} / ({tokens} > 0)"


def plain(title: str, name: str, legend: str = "{{engine}}", **changes: Any) -> Panel:
    """A panel of one gauge, described as the table describes it."""
    return Panel(title=title, queries=(Query(of(name), legend),), unit=unit_of(name), text=text_of(name), **changes)


def number(title: str, expression: str, unit: str, text: str) -> Panel:
    """A single number per engine."""
    return Panel(
        title=title, queries=(Query(expression, "{{engine}}"),), unit=unit, text=text, kind="stat", width=6, height=4
    )


def unit_of(name: str) -> str:
    """Grafana's unit for a metric, from the unit in its name."""
    return next((unit for suffix, unit in _UNITS if name.endswith(suffix)), "short")


def text_of(name: str) -> str:
    """The table's description of a metric."""
    return next(m.text for m in METRICS if m.name == name)


def rows() -> list[tuple[str, list[Panel]]]:
    """Rows of panels, in the order of the questions an operator asks; one table, hence its length."""
    watts, board = "watt", "{{engine}} board {{board}}"
    return [
        (
            "Now",
            [
                number("Power", of("pals_power_watts"), watts, text_of("pals_power_watts")),
                number("Output", of("pals_tokens_per_second"), "suffix:tokens/s", text_of("pals_tokens_per_second")),
                number(
                    "Energy per output token",
                    joules_per_token("$__range"),
                    "suffix:J/token",
                    "GPU energy of the time shown over its output tokens",
                ),
                number(
                    "Time over budget",
                    f"sum by (engine) (increase({of('pals_over_budget_seconds_total')}[$__range]))",
                    "s",
                    f"In the time shown. {text_of('pals_over_budget_seconds_total')}",
                ),
            ],
        ),
        (
            "Power",
            [
                Panel(
                    title="Power and budget",
                    queries=(
                        Query(of("pals_power_watts"), "{{engine}} power"),
                        Query(of("pals_budget_watts"), "{{engine}} budget"),
                    ),
                    unit=watts,
                    text=f"{text_of('pals_power_watts')}. {text_of('pals_budget_watts')}",
                ),
                Panel(
                    title="Power limit per board",
                    queries=(
                        Query(of("pals_power_limit_requested_watts"), "{{engine}} asked"),
                        Query(of("pals_power_limit_enforced_watts"), f"{board} in force"),
                    ),
                    unit=watts,
                    text="What PALS asked for and what the driver reports; in force below asked: something else limits",
                ),
                plain("Power per board", "pals_board_power_watts", board),
                plain("SM clock per board", "pals_sm_clock_hertz", board),
            ],
        ),
        (
            "Output",
            [
                plain("Output tokens per second", "pals_tokens_per_second"),
                Panel(
                    title="Energy per output token",
                    queries=(
                        Query(of("pals_joules_per_token"), "{{engine}} last period"),
                        Query(joules_per_token("5m"), "{{engine}} last 5 min"),
                    ),
                    unit="suffix:J/token",
                    text=text_of("pals_joules_per_token"),
                ),
            ],
        ),
        (
            "Engine",
            [
                Panel(
                    title="Sequences",
                    queries=(
                        Query(of("pals_running_sequences"), "{{engine}} running"),
                        Query(of("pals_waiting_requests"), "{{engine}} waiting"),
                        Query(of("pals_active_sequence_limit"), "{{engine}} limit"),
                        Query(of("pals_most_waiting_requests"), "{{engine}} may wait"),
                    ),
                    unit="short",
                    text="Running and waiting requests, the active-sequence limit the engine obeys, and how many may wait",
                ),
                plain("Oldest waiting request", "pals_oldest_waiting_seconds", width=6),
                plain("KV cache in use", "pals_kv_cache_usage_ratio", width=6),
            ],
        ),
        (
            "Control",
            [
                Panel(
                    title="Decisions by reason",
                    queries=(Query(rate("pals_decisions_total", "reason"), "{{engine}} {{reason}}"),),
                    unit="suffix:1/s",
                    text=text_of("pals_decisions_total"),
                    width=8,
                ),
                Panel(
                    title="Missed targets",
                    queries=(Query(rate("pals_violations_total", "slo"), "{{engine}} {{slo}}"),),
                    unit="suffix:1/s",
                    text=text_of("pals_violations_total"),
                    width=8,
                ),
                plain("Mode", "pals_mode_info", "{{engine}} {{mode}}", width=8),
            ],
        ),
        ("Experts", expert_panels()),
    ]  # fmt: skip


def pair(title: str, *named: tuple[str, str]) -> Panel:
    """A panel of two metrics of each engine, each with its name in the legend."""
    return Panel(
        title=title,
        queries=tuple(Query(of(metric), f"{{{{engine}}}} {name}") for metric, name in named),
        unit="short",
        text=". ".join(text_of(metric) for metric, _ in named),
        width=8,
    )


def expert_panels() -> list[Panel]:
    """Of engines that count their experts (PALS_EXPERTS=1); empty for all others."""
    return [
        plain("Experts touched in a layer and step", "pals_experts_distinct_per_step", width=8),
        pair(
            "Experts' popularity",
            ("pals_experts_popularity_cv", "variation"),
            ("pals_experts_top20_share", "share of the top 20 %"),
        ),
        plain("Drift of the routing", "pals_experts_drift", width=8),
        # A ratio above one: the unit that its name suggests would end the axis at 100 %.
        replace(plain("Hottest rank over mean", "pals_experts_hottest_rank_ratio", width=8), unit="short"),
        pair("Layers with experts", ("pals_experts_layers", "all"), ("pals_experts_layers_known", "counted")),
        plain("Tokens of the window", "pals_experts_tokens", width=4),
        plain("Age of the window", "pals_experts_age_seconds", width=4),
    ]


def other(metrics: Sequence[Metric], shown: str) -> list[Panel]:
    """A panel for each metric whose name does not occur in `shown`."""
    panels = []
    for m in metrics:
        if re.search(rf"\b{m.name}\b", shown):
            continue
        counts = m.kind is Counter
        legend = " ".join(f"{{{{{label}}}}}" for label in dict.fromkeys(("engine", *m.labels)))
        labels = [label for label in m.labels if label != "engine"]
        expression = rate(m.name, *labels) if counts else of(m.name)
        unit = "suffix:1/s" if counts else unit_of(m.name)
        panels.append(Panel(title=m.name, queries=(Query(expression, legend),), unit=unit, text=m.text, width=8))
    return panels


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana's import dialog takes it."""
    layout = rows()
    shown = " ".join(q.expression for _, panels in layout for p in panels for q in p.queries)
    if rest := other(METRICS, shown):
        layout.append(("Everything else", rest))
    return {
        "__inputs": [
            {
                "name": "DS_PROMETHEUS",
                "label": "Prometheus",
                "description": "Prometheus that scrapes the PALS agent",
                "type": "datasource",
                "pluginId": "prometheus",
                "pluginName": "Prometheus",
            }
        ],
        "__requires": [
            {"type": "grafana", "id": "grafana", "name": "Grafana", "version": "10.4.0"},
            {"type": "datasource", "id": "prometheus", "name": "Prometheus", "version": "1.0.0"},
            {"type": "panel", "id": "stat", "name": "Stat", "version": ""},
            {"type": "panel", "id": "timeseries", "name": "Time series", "version": ""},
        ],
        "annotations": {"list": []},
        "description": "Power, limits, output and decisions of the engines that PALS steers on a node",
        "editable": True,
        "graphTooltip": 1,
        "id": None,
        "links": [],
        "panels": list(placed(layout)),
        "refresh": "5s",
        "schemaVersion": SCHEMA_VERSION,
        "tags": ["pals", "power", "llm"],
        "templating": {"list": [engine_variable()]},
        "time": {"from": "now-30m", "to": "now"},
        "timepicker": {},
        "timezone": "browser",
        "title": "PALS: power of LLM serving",
        "uid": UID,
        "version": 1,
        "weekStart": "",
    }


def engine_variable() -> dict[str, Any]:
    """The choice of engines at the top; "All" also matches an agent whose metrics carry no `engine` label."""
    query = "label_values(pals_power_watts, engine)"
    return {
        "name": "engine",
        "label": "Engine",
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"qryType": 1, "query": query, "refId": "engines"},
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
        "options": [],
        "refresh": 2,
        "regex": "",
        "skipUrlSync": False,
        "sort": 1,
    }


def placed(layout: Sequence[tuple[str, Sequence[Panel]]]) -> Iterator[dict[str, Any]]:
    """Panels with ids and positions: rows from left to right, top to bottom."""
    number_of, y = 0, 0
    for title, panels in layout:
        number_of += 1
        yield {
            "id": number_of,
            "type": "row",
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y},
        }
        x, y, tallest = 0, y + 1, 0
        for panel in panels:
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            number_of += 1
            yield drawn(panel, number_of, x, y)
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest


def drawn(panel: Panel, number_of: int, x: int, y: int) -> dict[str, Any]:
    """One panel's JSON."""
    options: dict[str, Any] = (
        {
            "colorMode": "value",
            "graphMode": "area",
            "justifyMode": "auto",
            "orientation": "auto",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "textMode": "auto",
        }
        if panel.kind == "stat"
        else {
            "legend": {
                "calcs": ["mean", "lastNotNull"],
                "displayMode": "table",
                "placement": "bottom",
                "showLegend": True,
            },
            "tooltip": {"mode": "multi", "sort": "none"},
        }
    )
    return {
        "id": number_of,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": {"h": panel.height, "w": panel.width, "x": x, "y": y},
        "fieldConfig": {"defaults": {"unit": panel.unit, **_axis(panel)}, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": SOURCE,
                "editorMode": "code",
                "expr": q.expression,
                "legendFormat": q.legend,
                "range": True,
            }
            for i, q in enumerate(panel.queries)
        ],
    }


def _axis(panel: Panel) -> dict[str, Any]:
    """Power starts at zero, so that what a limit saves is seen in its true size; a ratio ends at one."""
    low = {"min": 0} if panel.kind == "timeseries" else {}
    return low | ({"max": 1} if panel.unit == "percentunit" else {})


def dashboard_json() -> str:
    """The file `docs/grafana/pals-dashboard.json`."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"
