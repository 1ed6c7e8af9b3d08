"""Expert gauges: what a summary says under the engine's name, and nothing where it says nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from prometheus_client import generate_latest

from pals.core.experts import ExpertCounts, ExpertSummary, summarise
from pals.views.expert_metrics import AGE, EXPERT_METRICS, expert_values
from pals.views.metrics import AgentMetrics

NAMES = [row.name for row in EXPERT_METRICS] + [AGE]


def summary(**more: Any) -> ExpertSummary:
    """Two layers of four experts on two ranks, one expert in each chosen three times as often as the others."""
    given: dict[str, Any] = {
        "time_s": 50.0, "span_s": 10.0, "steps": 20, "tokens": 300, "layers": ("a", "b"), "top_k": 2, "ranks": 2,
        "routed": np.array([[300, 100, 100, 100]] * 2), "distinct": np.array([70, 60]),
    }  # fmt: skip
    window = ExpertCounts.alike(**given | more)
    return summarise(window, reference=window, least_per_expert=1)


def shown(metrics: AgentMetrics, engine: str = "model") -> dict[str, float | None]:
    return {name: metrics.registry.get_sample_value(name, {"engine": engine}) for name in NAMES}


def test_a_summary_is_shown_under_its_engines_name() -> None:
    metrics = AgentMetrics()
    metrics.engine("model", [0]).show_experts(summary(), now_s=53.0)

    values = shown(metrics)
    assert values["pals_experts_distinct_per_step"] == 3.25
    assert values["pals_experts_popularity_cv"] == np.std([3, 1, 1, 1]) / 1.5
    assert values["pals_experts_top20_share"] == 0.5
    assert values["pals_experts_hottest_rank_ratio"] == 4 / 3
    assert values["pals_experts_drift"] == 0.0
    assert (values["pals_experts_layers"], values["pals_experts_layers_known"]) == (2.0, 2.0)
    assert (values["pals_experts_tokens"], values[AGE]) == (300.0, 3.0)
    assert set(shown(metrics, "other").values()) == {None}


def test_what_is_not_known_is_absent_and_goes_when_it_becomes_so() -> None:
    metrics = AgentMetrics()
    engine = metrics.engine("model", [0])
    engine.show_experts(summary(), now_s=53.0)
    idle = summary(tokens=0, steps=0, routed=np.zeros((2, 4), np.int64))
    engine.show_experts(idle, now_s=53.0)

    known = {name: value for name, value in shown(metrics).items() if value is not None}
    assert known == {"pals_experts_layers": 2.0, "pals_experts_tokens": 0.0, AGE: 3.0}
    engine.show_experts(None, now_s=54.0)
    assert set(shown(metrics).values()) == {None}
    assert "nan" not in generate_latest(metrics.registry).decode().lower()


def test_layers_that_nobody_counts_are_missing_in_the_known_ones() -> None:
    half = summary(routed=np.array([[300, 100, 100, 100], [0, 0, 0, 0]]))
    values = expert_values(half, 50.0)
    assert (values["pals_experts_layers"], values["pals_experts_layers_known"]) == (2, 1)
    assert values["pals_experts_distinct_per_step"] == 3.5


def test_one_rank_has_no_hottest() -> None:
    assert expert_values(summary(ranks=1), 50.0)["pals_experts_hottest_rank_ratio"] is None


def test_a_window_that_ends_after_the_tick_began_is_of_age_zero() -> None:
    assert expert_values(replace(summary(), time_s=50.2), 50.0)[AGE] == 0.0
