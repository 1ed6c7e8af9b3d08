"""Prometheus metrics of the agent: base units, one table (`METRICS`), filled from tick records alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, make_wsgi_app

from pals.core.quantities import EngineSample
from pals.runtime.tick import TickRecord
from pals.views.endpoint import serve


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table in the docs."""

    name: str
    kind: type[Gauge] | type[Counter]
    text: str
    labels: tuple[str, ...] = ()


METRICS: tuple[Metric, ...] = (
    Metric("pals_power_watts", Gauge, "Power of all boards over the last period, from the energy counters"),
    Metric("pals_board_power_watts", Gauge, "Power of one board as the driver reports it", ("board",)),
    Metric("pals_energy_joules_total", Counter, "Energy of all boards since the agent started"),
    Metric("pals_power_limit_requested_watts", Gauge, "Power limit per board that PALS asked for"),
    Metric("pals_power_limit_enforced_watts", Gauge, "Power limit the driver reports in force", ("board",)),
    Metric("pals_sm_clock_hertz", Gauge, "SM clock of one board", ("board",)),
    Metric("pals_budget_watts", Gauge, "Power budget of all boards; absent while there is none"),
    Metric(
        "pals_over_budget_seconds_total",
        Counter,
        "Time over budget, judged by the mean power of up to 2 s since the budget last changed",
    ),
    Metric("pals_active_sequence_limit", Gauge, "Active-sequence limit the engine now obeys"),
    Metric("pals_running_sequences", Gauge, "Running sequences"),
    Metric("pals_waiting_requests", Gauge, "Requests waiting for admission"),
    Metric("pals_oldest_waiting_seconds", Gauge, "Age of the oldest waiting request"),
    Metric("pals_kv_cache_usage_ratio", Gauge, "Share of the KV cache in use"),
    Metric("pals_output_tokens_total", Counter, "Output tokens since the agent started"),
    Metric("pals_tokens_per_second", Gauge, "Output tokens per second over the last period"),
    Metric("pals_joules_per_token", Gauge, "GPU energy per output token over the last period; absent without tokens"),
    Metric("pals_violations_total", Counter, "Missed targets: periods (throughput) or requests (ttft, tpot)", ("slo",)),
    Metric("pals_decisions_total", Counter, "Decisions by reason, after the guard", ("reason",)),
    Metric("pals_mode_info", Gauge, "1 for the mode in force", ("mode",)),
)


class AgentMetrics:
    """Observes tick records; `registry` is what is exposed."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._gauges = {
            m.name: Gauge(m.name, m.text, m.labels, registry=self.registry) for m in METRICS if m.kind is Gauge
        }
        self._counters = {
            m.name: Counter(m.name, m.text, m.labels, registry=self.registry) for m in METRICS if m.kind is Counter
        }
        self._before: TickRecord | None = None

    def observe(self, record: TickRecord) -> None:
        """Take one record; a sink of the agent."""
        sample = record.sample
        self._gauge("pals_power_limit_requested_watts", record.guarded.point.power_limit_w)
        for i, board in enumerate(sample.boards):
            self._gauge("pals_board_power_watts", board.power_w, str(i))
            self._gauge("pals_sm_clock_hertz", board.sm_clock_mhz * 1e6, str(i))
        for i, limit_w in enumerate(record.enforced_limits_w):
            self._gauge("pals_power_limit_enforced_watts", limit_w, str(i))
        for mode in ("auto", "advise"):
            self._gauge("pals_mode_info", float(record.mode == mode), mode)
        self._count("pals_decisions_total", 1, record.guarded.reason)
        for slo, missed in record.violations.items():
            self._count("pals_violations_total", missed, slo)
        self._budget(record)
        if sample.engine is not None:
            self._engine(record, sample.engine)
        self._before = record

    def _budget(self, record: TickRecord) -> None:
        sample, budget_w = record.sample, record.budget.power_w
        self._gauge("pals_budget_watts", float("nan") if budget_w is None else budget_w)
        if sample.power_w is not None:
            self._gauge("pals_power_watts", sample.power_w)
            self._count("pals_energy_joules_total", sample.power_w * sample.window_s)
        self._count("pals_over_budget_seconds_total", record.over_budget_s)

    def _engine(self, record: TickRecord, engine: EngineSample) -> None:
        self._gauge("pals_active_sequence_limit", engine.active_limit)
        self._gauge("pals_running_sequences", engine.running)
        self._gauge("pals_waiting_requests", engine.waiting)
        self._gauge("pals_oldest_waiting_seconds", engine.oldest_waiting_s)
        self._gauge("pals_kv_cache_usage_ratio", engine.kv_usage)
        before = self._before.sample.engine if self._before is not None else None
        window_s, power_w = record.sample.window_s, record.sample.power_w
        if before is None or window_s <= 0:
            return
        tokens = max(0, engine.output_tokens - before.output_tokens)
        self._count("pals_output_tokens_total", tokens)
        self._gauge("pals_tokens_per_second", tokens / window_s)
        known = power_w is not None and tokens > 0
        self._gauge("pals_joules_per_token", power_w * window_s / tokens if known and power_w else float("nan"))

    def _gauge(self, name: str, value: float, *labels: str) -> None:
        (self._gauges[name].labels(*labels) if labels else self._gauges[name]).set(value)

    def _count(self, name: str, amount: float, *labels: str) -> None:
        (self._counters[name].labels(*labels) if labels else self._counters[name]).inc(amount)


def serve_metrics(metrics: AgentMetrics, port: int) -> Callable[[], None]:
    """Expose `metrics` on 127.0.0.1:`port`; return a function that stops it.

    Raises:
        ConfigError: the port is taken.
    """
    return serve(make_wsgi_app(metrics.registry), port, what="metrics port", flag="--metrics-port")


def metrics_table() -> str:
    """The Markdown table of `docs/metrics.md`."""
    rows = [f"| `{m.name}` | {m.kind.__name__.lower()} | {', '.join(m.labels) or '–'} | {m.text} |" for m in METRICS]
    return "\n".join(["| metric | type | labels | meaning |", "| --- | --- | --- | --- |", *rows])
