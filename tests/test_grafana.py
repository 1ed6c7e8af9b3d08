"""The Grafana dashboard: made from the table of metrics, importable, and the committed file is what the generator gives."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Counter, Gauge

from pals.views.grafana import COLUMNS, dashboard, dashboard_json, other
from pals.views.metrics import METRICS, Metric

COMMITTED = Path(__file__).parent.parent / "docs" / "grafana" / "pals-dashboard.json"
LABELS = {m.name: {*m.labels, "engine"} for m in METRICS}
PANELS: list[dict[str, Any]] = dashboard()["panels"]
DRAWN = [p for p in PANELS if p["type"] != "row"]
TARGETS = [t for p in DRAWN for t in p["targets"]]


def metrics_in(expression: str) -> list[str]:
    return re.findall(r"\bpals_\w+", expression)


def labels_in(expression: str) -> set[str]:
    """Labels an expression groups by or selects with."""
    grouped = [name.strip() for part in re.findall(r"by \(([^)]*)\)", expression) for name in part.split(",")]
    return {*grouped, *re.findall(r"[{,]\s*(\w+)\s*=~?", expression)}


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t["expr"][:40])
def test_every_expression_and_legend_uses_metrics_and_labels_that_exist(target: dict[str, Any]) -> None:
    names = metrics_in(target["expr"])

    assert names
    for name in names:
        assert name in LABELS
        assert labels_in(target["expr"]) <= LABELS[name]
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= LABELS[name]
        assert f'{name}{{engine=~"$engine"}}' in target["expr"]


def test_counters_are_never_drawn_raw_and_gauges_never_as_rates() -> None:
    for target in TARGETS:
        for name in metrics_in(target["expr"]):
            counts = next(m for m in METRICS if m.name == name).kind is Counter
            assert counts == bool(re.search(rf"(rate|increase)\({name}\b", target["expr"])), target["expr"]


def test_every_metric_has_a_panel() -> None:
    shown = {name for t in TARGETS for name in metrics_in(t["expr"])}

    assert shown == set(LABELS)


def test_a_metric_that_nobody_placed_gets_a_panel_with_its_labels() -> None:
    made = other(
        [Metric("pals_new_total", Counter, "New", ("engine", "why")), Metric("pals_old_watts", Gauge, "Old")],
        "pals_old_watts{}",
    )

    assert [p.title for p in made] == ["pals_new_total"]
    assert made[0].queries[0].legend == "{{engine}} {{why}}"
    assert "sum by (engine, why) (rate(pals_new_total" in made[0].queries[0].expression


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    assert len({p["id"] for p in PANELS}) == len(PANELS)
    boxes = [p["gridPos"] for p in PANELS]
    assert all(b["x"] >= 0 and b["w"] > 0 and b["h"] > 0 and b["x"] + b["w"] <= COLUMNS for b in boxes)
    for a, b in combinations(boxes, 2):
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, (a, b)


def test_it_imports_against_any_prometheus() -> None:
    made = dashboard()

    assert [i["name"] for i in made["__inputs"] if i["pluginId"] == "prometheus"] == ["DS_PROMETHEUS"]
    assert made["id"] is None
    sources = [p["datasource"] for p in DRAWN] + [t["datasource"] for t in TARGETS]
    sources += [v["datasource"] for v in made["templating"]["list"]]
    assert all(s == {"type": "prometheus", "uid": "${DS_PROMETHEUS}"} for s in sources)
    assert {p["type"] for p in DRAWN} <= {r["id"] for r in made["__requires"] if r["type"] == "panel"}


def test_units_follow_the_names() -> None:
    units = {t["expr"].split("{")[0]: p["fieldConfig"]["defaults"]["unit"] for p in DRAWN for t in p["targets"]}

    assert units["pals_power_watts"] == "watt"
    assert units["pals_sm_clock_hertz"] == "hertz"
    assert units["pals_oldest_waiting_seconds"] == "s"
    assert units["pals_kv_cache_usage_ratio"] == "percentunit"


def test_the_committed_file_is_what_the_command_prints() -> None:
    done = subprocess.run([sys.executable, "-m", "pals.cli", "dashboard"], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert done.stdout == dashboard_json()
    json.loads(done.stdout)
    assert COMMITTED.read_text(encoding="utf-8") == done.stdout, (
        "run: pals dashboard > docs/grafana/pals-dashboard.json"
    )
