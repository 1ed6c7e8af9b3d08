"""Metrics: base units, right values, one table in the docs, a port in use is named."""

from __future__ import annotations

import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from pals.core.errors import ConfigError
from pals.core.quantities import Slo
from pals.runtime.budgets import parse_budget
from pals.views.metrics import AgentMetrics, metrics_table, serve_metrics
from tests.loopback import free_port
from tests.test_tick import go, rig
from tests.worlds import Board, Clock, Engine

DOCS = Path(__file__).parent.parent / "docs" / "metrics.md"


def observed() -> AgentMetrics:
    clock = Clock(until_s=110.0)
    boards = [Board(clock, i) for i in range(2)]
    metrics = AgentMetrics()
    records = go(
        rig(clock, boards, Engine(clock, per_sequence=10.0)), clock, parse_budget("600"), Slo(throughput_tokens_s=1e5)
    )
    for name, indices in (("model", [4, 5]), ("model:7", [6, 7])):
        engine = metrics.engine(name, indices)
        for record in records:
            engine.observe(record)
        if name == "model:7":
            engine.close()
    return metrics


def value(metrics: AgentMetrics, name: str, *, engine: str = "model", **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"engine": engine, **labels})


def test_values_follow_the_records() -> None:
    metrics = observed()

    assert value(metrics, "pals_power_watts") == pytest.approx(2 * 294.0)
    assert value(metrics, "pals_power_limit_enforced_watts", board="5") == 294.0
    assert value(metrics, "pals_sm_clock_hertz", board="4") == 1410e6
    assert value(metrics, "pals_tokens_per_second") == pytest.approx(640.0)
    assert value(metrics, "pals_joules_per_token") == pytest.approx(588.0 / 640.0)
    assert value(metrics, "pals_active_sequence_limit") == 64.0
    assert value(metrics, "pals_decisions_total", reason="guard-budget") == 20.0
    assert (value(metrics, "pals_violations_total", slo="throughput") or 0) > 15
    assert value(metrics, "pals_energy_joules_total") == pytest.approx(588.0 * 9.5)


def test_a_bound_on_the_queue_and_what_it_refuses_are_shown_while_there_is_one() -> None:
    clock = Clock(until_s=102.0)
    records = go(rig(clock, [Board(clock)], Engine(clock)), clock)
    metrics = AgentMetrics()
    engine = metrics.engine("model", [4])
    for record, refused, most in zip(records, (10, 10, 15), (None, 20, 20), strict=False):
        assert record.sample.engine is not None
        sample = replace(record.sample, engine=replace(record.sample.engine, refused_requests=refused))
        engine.observe(replace(record, sample=sample, guarded=replace(record.guarded, most_waiting=most)))

    assert value(metrics, "pals_most_waiting_requests") == 20.0
    assert value(metrics, "pals_refused_requests_total") == 5.0
    engine.observe(records[3])
    assert value(metrics, "pals_most_waiting_requests") is None


def test_an_engine_that_is_gone_leaves_its_counters_and_no_gauge() -> None:
    metrics = observed()

    assert value(metrics, "pals_power_limit_enforced_watts", engine="model:7", board="7") is None
    assert value(metrics, "pals_power_watts", engine="model:7") is None
    assert value(metrics, "pals_energy_joules_total", engine="model:7") == pytest.approx(588.0 * 9.5)


def test_with_a_board_lost_only_its_own_gauges_and_the_engines_power_are_absent() -> None:
    clock = Clock(until_s=102.0)
    boards = [Board(clock, 0), Board(clock, 1, natural_w=250.0)]
    metrics = AgentMetrics()
    engine = metrics.engine("model", [4, 5])
    for record in go(rig(clock, boards, Engine(clock)), clock):
        engine.observe(record)
    assert value(metrics, "pals_board_power_watts", board="5") is not None

    boards[0].lost = True
    clock.until_s = 103.0
    for record in go(rig(clock, boards, Engine(clock)), clock):
        engine.observe(record)

    for name in ("pals_board_power_watts", "pals_sm_clock_hertz", "pals_power_limit_enforced_watts"):
        assert value(metrics, name, board="4") is None
    assert value(metrics, "pals_board_power_watts", board="5") == 250.0
    assert value(metrics, "pals_power_watts") is None
    assert value(metrics, "pals_joules_per_token") is None


def test_what_is_unknown_is_absent_from_the_first_tick_on_and_never_nan() -> None:
    clock = Clock(until_s=100.4)
    metrics = AgentMetrics()
    engine = metrics.engine("model", [0])
    for record in go(rig(clock, [Board(clock)], Engine(clock)), clock):
        engine.observe(record)

    page = generate_latest(metrics.registry).decode()
    assert "nan" not in page.lower()
    for name in ("pals_budget_watts", "pals_power_watts", "pals_sm_clock_requested_hertz", "pals_joules_per_token"):
        assert value(metrics, name) is None


def test_the_endpoint_answers_and_a_taken_port_is_named() -> None:
    port = free_port()
    stop = serve_metrics(observed(), port)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            assert b"pals_power_watts" in answer.read()
        with pytest.raises(ConfigError, match=f"metrics port {port} is in use"):
            serve_metrics(AgentMetrics(), port)
    finally:
        stop()


def test_the_docs_hold_the_table_as_the_code_has_it() -> None:
    assert metrics_table() in DOCS.read_text()
