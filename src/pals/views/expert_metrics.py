"""Expert summaries as Prometheus gauges: one table (`EXPERT_METRICS`); what a summary does not know is absent, never 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pals.core.experts import ExpertSummary


class Row(NamedTuple):
    """One row of the table in the docs."""

    name: str
    text: str
    value: Callable[[ExpertSummary], float | None]  # None: not known, so absent


AGE = "pals_experts_age_seconds"
EXPERT_METRICS: tuple[Row, ...] = (
    Row(
        "pals_experts_distinct_per_step",
        "Experts touched in a layer and step, mean of the known layers",
        lambda s: s.distinct_per_step,
    ),
    Row(
        "pals_experts_popularity_cv",
        "Coefficient of variation of the experts' popularity, mean of the known layers; 0: all alike",
        lambda s: s.variation,
    ),
    Row(
        "pals_experts_top20_share",
        "Share of all choices that the most popular 20 % of the experts got",
        lambda s: s.top_fifth_share,
    ),
    Row(
        "pals_experts_hottest_rank_ratio",
        "Tokens of the busiest rank over the ranks' mean; absent where every rank holds all experts, or they move",
        lambda s: s.hottest_rank_over_mean,
    ),
    Row(
        "pals_experts_drift",
        "Jensen-Shannon distance of the popularity from the reference window's, 0 alike to 1 disjoint",
        lambda s: s.drift,
    ),
    Row("pals_experts_layers", "Layers with experts, where the engine counts them", lambda s: s.layers),
    Row(
        "pals_experts_layers_known",
        "Those of them whose choices were counted; absent for a window without tokens",
        lambda s: s.layers_known if s.tokens > 0 else None,
    ),
    Row("pals_experts_tokens", "Tokens of the window that the summary is of", lambda s: s.tokens),
)
AGE_TEXT = "Time since the end of the window that the summary is of"


def expert_values(summary: ExpertSummary | None, now_s: float) -> dict[str, float | None]:
    """Every metric's value at `now_s`, on the clock of the summary; all None without a summary."""
    if summary is None:
        return dict.fromkeys((*(row.name for row in EXPERT_METRICS), AGE))
    # A worker may publish between the tick's look at the clock and its reading.
    age_s = max(0.0, now_s - summary.time_s)
    return {**{row.name: row.value(summary) for row in EXPERT_METRICS}, AGE: age_s}
