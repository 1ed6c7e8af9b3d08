"""From a short window of samples to an estimate of load and output; differences of counters, nothing else."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from pals.control.routing import fresh
from pals.core.quantities import LATENCY_BOUNDS_S, Budget, Slo, StateEstimate, TelemetrySample


def remember(window: tuple[TelemetrySample, ...], sample: TelemetrySample, length: int) -> tuple[TelemetrySample, ...]:
    """The last `length` + 1 samples, the newest last: `length` periods of differences."""
    return (*window, sample)[-(length + 1) :]


def estimate(window: Sequence[TelemetrySample]) -> StateEstimate:
    """Rates over the window, gauges of its last sample; rates are 0 where the engine has told nothing yet."""
    last = window[-1]
    told = [s for s in window if s.engine is not None]
    powers = [(s.power_w, s.window_s) for s in window[1:] if s.power_w is not None] or [
        (s.power_w, s.window_s) for s in window[-1:] if s.power_w is not None
    ]
    known = routing_of(last)
    watched_s = sum(w for _, w in powers)
    power_w = sum(p * w for p, w in powers) / watched_s if watched_s > 0 else None
    a, b = (told[0], told[-1]) if told else (last, last)
    first, now = a.engine, b.engine
    span_s = b.time_s - a.time_s
    if first is None or now is None or span_s <= 0:
        running, waiting = (now.running, now.waiting) if now else (0, 0)
        return StateEstimate(
            tokens_per_s=0.0, arrivals_per_s=0.0, prompt_tokens_per_s=0.0, power_w=power_w, running=running,
            waiting=waiting, idle=now is not None and running + waiting == 0, ttft_p95_s=None, tpot_p95_s=None, **known,
        )  # fmt: skip
    return StateEstimate(
        tokens_per_s=tokens_per_s(window),
        arrivals_per_s=(now.arrived_requests - first.arrived_requests) / span_s,
        prompt_tokens_per_s=(now.arrived_prompt_tokens - first.arrived_prompt_tokens) / span_s,
        power_w=power_w,
        running=now.running,
        waiting=now.waiting,
        idle=now.running + now.waiting == 0,
        ttft_p95_s=percentile_s(first.ttft_counts, now.ttft_counts, 0.95),
        tpot_p95_s=percentile_s(first.tpot_counts, now.tpot_counts, 0.95),
        **known,
    )


def routing_of(sample: TelemetrySample) -> dict[str, float | None]:
    """The measured routing as an estimate holds it; empty where it is unknown or old."""
    told = fresh(sample)
    if told is None:
        return {}
    return {
        "popularity_cv": told.variation, "distinct_experts": told.distinct_per_step, "routing_drift": told.drift,
        "experts_age_s": max(0.0, sample.time_s - told.time_s),
    }  # fmt: skip


def tokens_per_s(window: Sequence[TelemetrySample]) -> float:
    """Output tokens per second over the window; 0 where the engine has told nothing yet."""
    told = [s for s in window if s.engine is not None]
    if not told or told[-1].time_s <= told[0].time_s:
        return 0.0
    first, now = told[0].engine, told[-1].engine
    return (now.output_tokens - first.output_tokens) / (told[-1].time_s - told[0].time_s)  # type: ignore[union-attr]


def percentile_s(before: Sequence[int], after: Sequence[int], share: float) -> float | None:
    """Upper bound of the bucket that holds the `share` quantile of what came between two histograms, seconds.

    None where nothing came; above the last bound, the last bound.
    """
    total = sum(after) - sum(before)
    if total <= 0:
        return None
    counts = [b - a for a, b in zip(before, after, strict=True)]
    seen = 0
    for i, count in enumerate(counts):
        seen += count
        if seen >= share * total:
            return LATENCY_BOUNDS_S[min(i, len(LATENCY_BOUNDS_S) - 1)]
    return LATENCY_BOUNDS_S[-1]


def count_above(before: Sequence[int], after: Sequence[int], target_s: float) -> int:
    """How many of the new entries lie in buckets wholly above `target_s`."""
    first = 0 if target_s <= 0 else bisect_left(LATENCY_BOUNDS_S, target_s) + 1
    return sum(after[first:]) - sum(before[first:])


def violations(window: Sequence[TelemetrySample], slo: Slo) -> dict[str, int]:
    """What missed its target in the newest period: 0 or 1 period for throughput, requests for TTFT and TPOT.

    Throughput counts only while requests wait: without work there is nothing to miss.
    """
    if len(window) < 2:
        return {}
    before, now = window[-2].engine, window[-1].engine
    if before is None or now is None:
        return {}
    found: dict[str, int] = {}
    if slo.throughput_tokens_s is not None:
        found["throughput"] = int(now.waiting > 0 and tokens_per_s(window) < slo.throughput_tokens_s)
    if slo.ttft_p95_s is not None:
        found["ttft"] = count_above(before.ttft_counts, now.ttft_counts, slo.ttft_p95_s)
    if slo.tpot_p95_s is not None:
        found["tpot"] = count_above(before.tpot_counts, now.tpot_counts, slo.tpot_p95_s)
    return found


def over_budget_s(since_change: Sequence[TelemetrySample], budget: Budget) -> float:
    """The newest period's length, if the mean power of these samples exceeds the budget; else 0.

    A mean over several periods, because an energy counter that refreshes each 50..100 ms moves the power of a single
    half-second by up to 10..20 %. Just after a change the window is short and errs towards counting too much.
    """
    known = [(s.power_w * s.window_s, s.window_s) for s in since_change if s.power_w is not None]
    if budget.power_w is None or not known or since_change[-1].power_w is None:
        return 0.0
    mean_w = sum(e for e, _ in known) / sum(t for _, t in known)
    return since_change[-1].window_s if mean_w > budget.power_w else 0.0
