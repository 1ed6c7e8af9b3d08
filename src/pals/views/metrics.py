"""Prometheus metrics of the agent: base units, one table (`METRICS`), filled from tick records alone.

Every metric carries the engine's name; those of one board its index too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, make_wsgi_app

from pals.control.interleaved import ARMS
from pals.core.experts import ExpertSummary
from pals.core.quantities import LOWERINGS, EngineSample
from pals.runtime.modes import MODES
from pals.runtime.tick import TickRecord
from pals.views.capd_metrics import CapdCollector, capd_rows
from pals.views.endpoint import serve
from pals.views.expert_metrics import AGE, AGE_TEXT, EXPERT_METRICS, expert_values


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table in the docs; `extra` are its labels beside the engine."""

    name: str
    kind: type[Gauge] | type[Counter]
    text: str
    extra: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels."""
        return ("engine", *self.extra)


METRICS: tuple[Metric, ...] = (
    Metric("pals_power_watts", Gauge, "Power of the engine's boards over the last period, from the energy counters"),
    Metric("pals_board_power_watts", Gauge, "Power of one board as the driver reports it", ("board",)),
    Metric("pals_energy_joules_total", Counter, "Energy of the engine's boards since the agent took it up"),
    Metric("pals_power_limit_requested_watts", Gauge, "Power limit per board that PALS asked for"),
    Metric("pals_power_limit_enforced_watts", Gauge, "Power limit the driver reports in force", ("board",)),
    Metric("pals_sm_clock_requested_hertz", Gauge, "SM clock ceiling that PALS asked for; absent while there is none"),
    Metric("pals_sm_clock_accepted_hertz", Gauge, "SM clock lock the driver accepted; absent while none", ("board",)),
    Metric("pals_sm_clock_hertz", Gauge, "SM clock of one board, as measured: a lock has no getter", ("board",)),
    Metric(
        "pals_budget_watts",
        Gauge,
        "The engine's share of the budget; the shares add up to it; absent while there is none",
    ),
    Metric(
        "pals_over_budget_seconds_total",
        Counter,
        "Time over the engine's share of the budget, judged by the mean power of up to 2 s since the share last changed",
    ),
    Metric("pals_active_sequence_limit", Gauge, "Active-sequence limit the engine now obeys"),
    Metric("pals_lowering_info", Gauge, "1 for the way the engine now gets under a lowered limit", ("lowering",)),
    Metric("pals_running_sequences", Gauge, "Running sequences"),
    Metric("pals_scheduled_sequences", Gauge, "Sequences in the newest step; fewer than run while they take turns"),
    Metric("pals_preemptions_total", Counter, "Requests sent back to the queue since the agent started"),
    Metric("pals_waiting_requests", Gauge, "Requests waiting for admission"),
    Metric(
        "pals_most_waiting_requests",
        Gauge,
        "Requests that may wait; those beyond are refused; absent while any number may",
    ),
    Metric(
        "pals_refused_requests_total",
        Counter,
        "Requests refused (503) because too many waited, since the agent started",
    ),
    Metric("pals_oldest_waiting_seconds", Gauge, "Age of the oldest waiting request"),
    Metric("pals_kv_cache_usage_ratio", Gauge, "Share of the KV cache in use"),
    Metric("pals_output_tokens_total", Counter, "Output tokens since the agent took the engine up"),
    Metric("pals_tokens_per_second", Gauge, "Output tokens per second over the last period"),
    Metric("pals_joules_per_token", Gauge, "GPU energy per output token over the last period; absent without tokens"),
    Metric("pals_violations_total", Counter, "Missed targets: periods (throughput) or requests (ttft, tpot)", ("slo",)),
    Metric("pals_decisions_total", Counter, "Decisions by reason, after the guard", ("reason",)),
    Metric("pals_mode_info", Gauge, "1 for the mode in force", ("mode",)),
    Metric(
        "pals_arm_info", Gauge, "1 for the arm that acts now, in canary mode: on (policy) or off (baseline)", ("arm",)
    ),
    Metric("pals_arm_seconds_total", Counter, "Time of each arm in canary mode: on over both is the share", ("arm",)),
    Metric(
        "pals_arm_energy_joules_total",
        Counter,
        "Energy of the engine's boards in each arm's time, where known",
        ("arm",),
    ),
    Metric("pals_arm_output_tokens_total", Counter, "Output tokens in each arm's time", ("arm",)),
    Metric(
        "pals_profile_bias",
        Gauge,
        "Measured over what the profile predicts, as the online correction has learnt it; absent before it has",
        ("quantity",),
    ),
    Metric(
        "pals_profile_drift",
        Gauge,
        "The same when a drift from the profile was found; absent while there is none",
        ("quantity",),
    ),
    *(Metric(row.name, Gauge, row.text) for row in EXPERT_METRICS),
    Metric(AGE, Gauge, AGE_TEXT),
)


PER_BOARD = tuple(m.name for m in METRICS if "board" in m.extra)


class AgentMetrics:
    """The metrics of one agent; `registry` is what is exposed."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.gauges = {
            m.name: Gauge(m.name, m.text, m.labels, registry=self.registry) for m in METRICS if m.kind is Gauge
        }
        self.counters = {
            m.name: Counter(m.name, m.text, m.labels, registry=self.registry) for m in METRICS if m.kind is Counter
        }

    def watch_capd(self, read: Callable[[], Mapping[str, Any]]) -> None:
        """Show capd's counters too; `read` asks it."""
        self.registry.register(CapdCollector(read))

    def engine(self, name: str, boards: Sequence[int]) -> EngineMetrics:
        """What observes the records of one engine; `boards` are its boards' indices."""
        return EngineMetrics(self, name, boards)


class EngineMetrics:
    """Observes one engine's tick records."""

    def __init__(self, agent: AgentMetrics, name: str, boards: Sequence[int]) -> None:
        self._agent, self._name, self._boards = agent, name, [str(b) for b in boards]
        self._set: set[tuple[str, tuple[str, ...]]] = set()
        self._before: TickRecord | None = None

    def observe(self, record: TickRecord) -> None:
        """Take one record; a sink of the agent."""
        sample = record.sample
        self._gauge("pals_power_limit_requested_watts", record.guarded.point.power_limit_w)
        self._gauge("pals_sm_clock_requested_hertz", _hertz(record.guarded.point.sm_clock_mhz))
        self._of_boards(record)
        for mode in MODES:
            self._gauge("pals_mode_info", float(record.mode == mode), mode)
        self._count("pals_decisions_total", 1, record.guarded.reason)
        for slo, missed in record.violations.items():
            self._count("pals_violations_total", missed, slo)
        for quantity in ("power", "step", "clock"):
            self._gauge("pals_profile_bias", record.correction.get(quantity), quantity)
            self._gauge("pals_profile_drift", record.drift.get(quantity), quantity)
        self._arm(record)
        self._budget(record)
        self.show_experts(record.sample.experts, now_s=sample.time_s)
        if sample.engine is not None:
            self._engine(record, sample.engine)
        self._before = record

    def show_experts(self, summary: ExpertSummary | None, *, now_s: float) -> None:
        """Show a summary of the engine's routing, or that there is none; `now_s` is on the clock of the summary."""
        for name, value in expert_values(summary, now_s).items():
            self._gauge(name, value)

    def _of_boards(self, record: TickRecord) -> None:
        """Each board under its own index; of one that could not be read, nothing is shown."""
        sample = record.sample
        indices = [self._boards[i] for i in sample.positions]
        for index, board in zip(indices, sample.boards, strict=True):
            self._gauge("pals_board_power_watts", board.power_w, index)
            self._gauge("pals_sm_clock_hertz", _hertz(board.sm_clock_mhz), index)
        for index, limit_w in zip(indices, record.enforced_limits_w, strict=True):
            self._gauge("pals_power_limit_enforced_watts", limit_w, index)
        for index, clock_mhz in zip(indices, record.accepted_clocks_mhz, strict=False):
            self._gauge("pals_sm_clock_accepted_hertz", _hertz(clock_mhz), index)
        for index in (self._boards[i] for i in sample.absent):
            for name in PER_BOARD:
                self._gauge(name, None, index)

    def _arm(self, record: TickRecord) -> None:
        """The arm that acts from here on; the period that ends here was that of the record before."""
        for arm in ARMS:
            now = record.guarded.arm
            self._gauge("pals_arm_info", None if now is None else float(now == arm), arm)
        before, sample = self._before, record.sample
        if before is None or before.guarded.arm is None:
            return
        if before.sample.engine is None or sample.engine is None or sample.power_w is None:
            return  # all three or none: their quotients mean something
        arm, tokens = before.guarded.arm, sample.engine.output_tokens - before.sample.engine.output_tokens
        self._count("pals_arm_seconds_total", sample.window_s, arm)
        self._count("pals_arm_energy_joules_total", sample.power_w * sample.window_s, arm)
        self._count("pals_arm_output_tokens_total", max(0, tokens), arm)

    def close(self) -> None:
        """The engine is no longer steered: its gauges go, its counters stay as they are."""
        self._forget(*self._agent.gauges)

    def _budget(self, record: TickRecord) -> None:
        sample, budget_w = record.sample, record.budget.power_w
        self._gauge("pals_budget_watts", budget_w)
        self._gauge("pals_power_watts", sample.power_w)
        if sample.power_w is not None:
            self._count("pals_energy_joules_total", sample.power_w * sample.window_s)
        self._count("pals_over_budget_seconds_total", record.over_budget_s)

    def _engine(self, record: TickRecord, engine: EngineSample) -> None:
        self._gauge("pals_active_sequence_limit", engine.active_limit)
        for lowering in LOWERINGS:
            self._gauge("pals_lowering_info", float(engine.lowering == lowering), lowering)
        self._gauge("pals_running_sequences", engine.running)
        self._gauge("pals_scheduled_sequences", engine.scheduled)
        self._gauge("pals_waiting_requests", engine.waiting)
        self._gauge("pals_most_waiting_requests", record.guarded.most_waiting)
        self._gauge("pals_oldest_waiting_seconds", engine.oldest_waiting_s)
        self._gauge("pals_kv_cache_usage_ratio", engine.kv_usage)
        before = self._before.sample.engine if self._before is not None else None
        window_s, power_w = record.sample.window_s, record.sample.power_w
        if before is None or window_s <= 0:
            return
        self._count("pals_preemptions_total", max(0, engine.preemptions - before.preemptions))
        self._count("pals_refused_requests_total", max(0, engine.refused_requests - before.refused_requests))
        tokens = max(0, engine.output_tokens - before.output_tokens)
        self._count("pals_output_tokens_total", tokens)
        self._gauge("pals_tokens_per_second", tokens / window_s)
        self._gauge("pals_joules_per_token", power_w * window_s / tokens if power_w is not None and tokens else None)

    def _gauge(self, name: str, value: float | None, *extra: str) -> None:
        """Show a value; what is unknown (None) is absent."""
        labels = (self._name, *extra)
        if value is not None:
            self._set.add((name, labels))
            self._agent.gauges[name].labels(*labels).set(value)
        elif (name, labels) in self._set:
            self._remove(name, labels)

    def _count(self, name: str, amount: float, *extra: str) -> None:
        self._agent.counters[name].labels(self._name, *extra).inc(amount)

    def _forget(self, *names: str) -> None:
        for name, labels in [s for s in self._set if s[0] in names]:
            self._remove(name, labels)

    def _remove(self, name: str, labels: tuple[str, ...]) -> None:
        self._agent.gauges[name].remove(*labels)
        self._set.remove((name, labels))


def _hertz(clock_mhz: int | None) -> float | None:
    return None if clock_mhz is None else clock_mhz * 1e6


def serve_metrics(metrics: AgentMetrics, port: int) -> Callable[[], None]:
    """Expose `metrics` on 127.0.0.1:`port`; return a function that stops it.

    Raises:
        ConfigError: the port is taken.
    """
    return serve(make_wsgi_app(metrics.registry), port, what="metrics port", flag="--metrics-port")


def metrics_table() -> str:
    """The Markdown table of `docs/metrics.md`."""
    rows = [f"| `{m.name}` | {m.kind.__name__.lower()} | {', '.join(m.labels)} | {m.text} |" for m in METRICS]
    return "\n".join(["| metric | type | labels | meaning |", "| --- | --- | --- | --- |", *rows, *capd_rows()])
