"""One measuring window: what was read in it, whether it may count, and the row it makes; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pals.core.quantities import SAME_LIMIT_W, OperatingPoint, PowerSample, TelemetrySample
from pals.models.row import ProfileRow
from pals.profiler.load import Latencies
from pals.runtime.clock_locks import MARGIN_MHZ
from pals.runtime.staleness import STALE_AFTER_S

STILL_S = 2.0  # the counters of all boards known are refreshed at least ten times as often
FAILED_SHARE = 0.05  # of the requests that ended
TAIL_REQUESTS = 20  # fewer say nothing about a p95


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The readings of a window at one point, oldest first, and what the load saw of it."""

    point: OperatingPoint  # as accepted
    mix: int
    samples: Sequence[TelemetrySample]
    latencies: Latencies
    whole_requests: bool  # those that ended ran at this point all their life
    ranks: int = 1  # engines whose steps are added up
    at_s: float = 0.0


def fault_of(window: Window) -> str | None:
    """Why the window must not become a row; None where it may."""
    return _board_fault(window) or _engine_fault(window)


def _board_fault(window: Window) -> str | None:
    for s in window.samples:
        if s.absent:
            return f"board at position {s.absent[0]} could not be read"
        for i, b in enumerate(s.boards):
            if abs(b.enforced_limit_w - window.point.power_limit_w) > SAME_LIMIT_W:
                asked_w = window.point.power_limit_w
                return (
                    f"board at position {i}: {b.enforced_limit_w:.0f} W was in force, not the {asked_w:.0f} W accepted"
                )
            lock_mhz = window.point.sm_clock_mhz
            if lock_mhz is not None and b.sm_clock_mhz > lock_mhz + MARGIN_MHZ:
                return f"board at position {i} ran at {b.sm_clock_mhz} MHz: its lock at {lock_mhz} MHz was lost"
    for i in range(len(window.samples[0].boards)):
        if (still_s := _longest_still_s([s.boards[i] for s in window.samples])) is None:
            return f"board at position {i}: its energy counter went backwards"
        if still_s > STILL_S:
            return f"board at position {i}: its energy counter stood still for {still_s:.1f} s"
    return None


def _longest_still_s(readings: Sequence[PowerSample]) -> float | None:
    """The longest time in which the energy counter did not move, s; 0 for a board without one, None where it fell."""
    longest_s, moved = 0.0, readings[0]
    for r in readings[1:]:
        if r.energy_j is None or moved.energy_j is None:
            return 0.0
        if r.energy_j < moved.energy_j:
            return None
        longest_s = max(longest_s, r.time_s - moved.time_s) if r.energy_j == moved.energy_j else longest_s
        moved = r if r.energy_j > moved.energy_j else moved
    return longest_s


def _engine_fault(window: Window) -> str | None:
    engines = [s.engine for s in window.samples]
    first, last = engines[0], engines[-1]
    if first is None or last is None:
        return "the engine told nothing"
    for s in window.samples:
        if s.engine is not None and s.time_s - s.engine.time_s > STALE_AFTER_S:
            return f"the engine took no step for more than {STALE_AFTER_S:g} s"
    if last.steps <= first.steps or last.time_s <= first.time_s or last.output_tokens <= first.output_tokens:
        return "no token came out; does the load reach this engine?"
    failed, ended = window.latencies.failed, last.finished_requests - first.finished_requests
    if failed > FAILED_SHARE * (failed + ended):
        return f"{failed} of {failed + ended} requests failed"
    return None


def row_of(window: Window) -> ProfileRow:
    """The row of a window without a fault; power from the energy counters, rates from the engine's.

    Engine rates are per second of the engine's own time, which ends with a step: no half step is counted.
    """
    first, last = window.samples[0].engine, window.samples[-1].engine
    if first is None or last is None:
        raise ValueError("a window without engine telemetry makes no row")
    span_s = last.time_s - first.time_s
    boards = range(len(window.samples[0].boards))
    seen = [[s.boards[i] for s in window.samples] for i in boards]
    hottest = [_mean([b.temperature_c for b in board if b.temperature_c is not None]) for board in seen]
    running = [s.engine.running for s in window.samples if s.engine is not None]
    ttft, tpot = window.latencies.ttft_s, window.latencies.tpot_s if window.whole_requests else ()
    return ProfileRow(
        power_limit_w=window.point.power_limit_w,
        sm_clock_lock_mhz=window.point.sm_clock_mhz,
        active_sequences=window.point.active_sequences or 1,
        mix=window.mix,
        running=_short(max(float(np.mean(running)), 0.01)),
        power_w=_short(sum(_power_w(board) for board in seen)),
        tokens_per_s=_short((last.output_tokens - first.output_tokens) / span_s),
        prefill_tokens_per_s=_short((last.prefill_tokens - first.prefill_tokens) / span_s),
        steps_per_s=_short((last.steps - first.steps) / span_s / window.ranks),
        sm_clock_mhz=_short(min(float(np.mean([b.sm_clock_mhz for b in board])) for board in seen)),
        ttft_p50_s=_quantile(ttft, 50),
        ttft_p95_s=_quantile(ttft, 95),
        tpot_p50_s=_quantile(tpot, 50),
        tpot_p95_s=_quantile(tpot, 95),
        window_s=_short(window.samples[-1].time_s - window.samples[0].time_s),
        at_s=round(window.at_s, 1),
        temperature_c=max((t for t in hottest if t is not None), default=None),
    )


def _power_w(readings: Sequence[PowerSample]) -> float:
    """Mean power of one board, W: from its energy counter, else the mean of its readings."""
    first, last = readings[0], readings[-1]
    if first.energy_j is None or last.energy_j is None:
        return float(np.mean([b.power_w for b in readings]))
    return (last.energy_j - first.energy_j) / (last.time_s - first.time_s)


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 1) if values else None


def _quantile(values: Sequence[float], percent: float) -> float | None:
    return _short(float(np.percentile(values, percent))) if len(values) >= TAIL_REQUESTS else None


def _short(value: float) -> float:
    """Five digits: a profile is a few kilobytes."""
    return float(f"{value:.5g}")
