"""capd's counters as Prometheus metrics: asked for when somebody scrapes, at most every two seconds; absent without a capd."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pals.core.errors import PalsError

POLL_S = 2.0


class Row(NamedTuple):
    """One row of the table in the docs."""

    name: str
    counts: bool
    text: str
    value: Callable[[Mapping[str, Any]], float | None]  # of capd's answer; None: not known, so absent


def _count(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda told: float(told["counters"].get(name, 0))


def _seconds(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda told: told["counters"].get(name)


UP = "pals_capd_up"
UP_TEXT = "1 while capd answers, 0 where it does not; absent where it does not write this agent's boards"
CAPD_METRICS: tuple[Row, ...] = (
    Row("pals_capd_writes_total", True, "Writes to boards since capd started", _count("writes")),
    Row("pals_capd_refused_total", True, "Requests that capd refused", _count("refused")),
    Row("pals_capd_expired_leases_total", True, "Leases that nobody renewed in time", _count("expired")),
    Row("pals_capd_other_hand_total", True, "Times another hand changed a limit of ours", _count("other_hand")),
    Row("pals_capd_suspected_locks_total", True, "Clocks seen above their lock", _count("suspected_lock")),
    Row("pals_capd_malformed_total", True, "Requests that were not understood", _count("malformed")),
    Row("pals_capd_audit_lost_total", True, "Lines that the audit log could not take", _count("audit_lost")),
    Row("pals_capd_clients", False, "Open connections", _count("clients")),
    Row("pals_capd_write_p50_seconds", False, "Half of the last writes took at most this", _seconds("write_s_p50")),
    Row("pals_capd_write_p99_seconds", False, "99 % of the last writes took at most this", _seconds("write_s_p99")),
    Row(
        "pals_capd_leased_boards",
        False,
        "Boards that somebody leases",
        lambda told: float(sum(b["lease"] is not None for b in told["boards"])),
    ),
    Row(
        "pals_capd_budget_watts",
        False,
        "The budget a client set; absent while there is none",
        lambda told: told["budget"]["watts"],
    ),
    Row("pals_capd_off", False, "1 while the kill switch is there", lambda told: float(told["off"])),
    Row("pals_capd_alarm", False, "1 while capd raises an alarm", lambda told: float(told["alarm"] is not None)),
)


class CapdCollector(Collector):
    """Asks capd when it is scraped; one that does not answer leaves `pals_capd_up` at 0 and nothing else."""

    def __init__(self, read: Callable[[], Mapping[str, Any]], *, now_s: Callable[[], float] = time.monotonic) -> None:
        self._read, self._now_s, self._lock = read, now_s, threading.Lock()
        self._told: Mapping[str, Any] | None = None
        self._asked_s = float("-inf")

    def describe(self) -> list[Metric]:
        """Nothing is asked to register."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics now."""
        told = self._newest()
        yield GaugeMetricFamily(UP, UP_TEXT, value=float(told is not None))
        if told is None:
            return
        for row in CAPD_METRICS:
            value = row.value(told)
            if value is not None:
                kind = CounterMetricFamily if row.counts else GaugeMetricFamily
                yield kind(row.name, row.text, value=value)

    def _newest(self) -> Mapping[str, Any] | None:
        with self._lock:  # scrapes come in threads of their own
            if self._now_s() - self._asked_s >= POLL_S:
                self._asked_s = self._now_s()
                try:
                    self._told = self._read()
                except (PalsError, ValueError):
                    self._told = None
            return self._told


def capd_rows() -> list[str]:
    """Rows for the Markdown table of `docs/metrics.md`."""
    rows = [(UP, False, UP_TEXT), *((r.name, r.counts, r.text) for r in CAPD_METRICS)]
    return [f"| `{name}` | {'counter' if counts else 'gauge'} | | {text} |" for name, counts, text in rows]
