"""Notes what a run's figures and its time line need, tick by tick; memory grows with ticks by a few numbers each."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pals.core.quantities import EngineSample, OperatingPoint
from pals.experiments.lab.figures import Ledger
from pals.plant.replica import Replica
from pals.runtime.tick import TickRecord

EVERY_S = 1.0  # between two points of a time line
DIGITS = 3


class SpanMeter:
    """Counts from `start_s` on; the energy is the plant's."""

    def __init__(self, replica: Replica, start_s: float) -> None:
        self._replica, self._start_s = replica, start_s
        self._time_s, self._energy_j, self._budget_w = list[float](), list[float](), list[float | None]()
        self._reasons = Counter[str]()
        self._judged = self._missed = self._changes = 0
        self._point: OperatingPoint | None = None
        self._first: EngineSample | None = None
        self._last: EngineSample | None = None

    def observe(self, record: TickRecord) -> None:
        """Take one record; those before the start only say which point was in force."""
        before, self._point = self._point, record.guarded.point
        if record.sample.time_s < self._start_s:
            return
        engine = self._replica.counters()
        self._first, self._last = self._first or engine, engine
        counts = bool(self._time_s)  # a tick judges the period that ends with it
        self._time_s.append(record.sample.time_s)
        self._energy_j.append(self._replica.energy_j())
        self._budget_w.append(record.budget.power_w)
        if not counts:
            return
        self._reasons[record.guarded.reason] += 1
        self._changes += before is not None and before != self._point
        if "throughput" in record.violations:
            self._judged += 1
            self._missed += record.violations["throughput"]

    def ledger(self) -> Ledger:
        """What was noted.

        Raises:
            ValueError: fewer than two ticks lie in the span.
        """
        if self._first is None or self._last is None or len(self._time_s) < 2:
            raise ValueError(f"the run ended {len(self._time_s)} ticks into its measured span; two are needed")
        return Ledger(
            time_s=self._time_s, energy_j=self._energy_j, budget_w=self._budget_w,
            output_tokens=self._last.output_tokens - self._first.output_tokens,
            refused=self._last.refused_requests - self._first.refused_requests, judged_periods=self._judged,
            missed_periods=self._missed, changes=self._changes, reasons=self._reasons,
        )  # fmt: skip


class TimeLine:
    """A run as columns for a figure, a point about every `EVERY_S` of the whole run; powers are the plant's means in between."""

    COLUMNS = (
        "time_s", "power_w", "budget_w", "limit_w", "clock_mhz", "active_limit", "running", "waiting", "tokens_per_s", "reason"
    )  # fmt: skip

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._before = (0.0, 0.0, 0)  # time, energy, tokens
        self.columns: dict[str, list[Any]] = {name: [] for name in self.COLUMNS}

    def observe(self, record: TickRecord) -> None:
        """Take one record."""
        time_s, boards = record.sample.time_s, record.sample.boards
        since_s, since_j, since_tokens = self._before
        if time_s - since_s < EVERY_S - 1e-9:
            return
        engine, energy_j = self._replica.counters(), self._replica.energy_j()
        span_s = time_s - since_s
        values = (
            time_s, (energy_j - since_j) / span_s, record.budget.power_w, sum(record.enforced_limits_w),
            sum(b.sm_clock_mhz for b in boards) / len(boards) if boards else None, engine.active_limit, engine.running,
            engine.waiting, (engine.output_tokens - since_tokens) / span_s, record.guarded.reason,
        )  # fmt: skip
        for name, value in zip(self.COLUMNS, values, strict=True):
            self.columns[name].append(round(value, DIGITS) if isinstance(value, float) else value)
        self._before = (time_s, energy_j, engine.output_tokens)
