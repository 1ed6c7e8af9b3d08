"""What an engine is asked to do, learnt from its counters: how much arrives, how long it is, how many are inside, who comes late.

All sums fade by time or by requests, so that a mix or a rate that changes is followed; nothing here rests on a profile.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import exp, inf, log, sqrt
from operator import attrgetter
from typing import NamedTuple

from pals.core.quantities import LATENCY_BOUNDS_S, EngineSample, Slo

SLOW_S, FAST_S = 80.0, 6.0  # memory of the arrival rate
SURPRISE = 2.5  # standard deviations of a Poisson count by which the fast rate must exceed the slow one to replace it
REQUESTS, FEW_REQUESTS = 200.0, 30.0  # memories of the lengths
CHANGED = 0.35  # share by which the short one must differ to be believed
FEWEST = 8.0  # requests before lengths mean anything
STEADY_S = 20.0  # in flight so long the same: clients that send when they are answered
STEADY = 0.04  # share that may differ then, or one request
STEADY_ARRIVALS = 8  # at least so many in that time
PERIODS = 4  # over which throughput is held against its target
SMOOTH_S = 5.0  # memory of the running sequences


class Counted(NamedTuple):
    """Requests and tokens, fading by requests."""

    arrived: float = 0.0
    prompts: float = 0.0
    prefilled: float = 0.0
    output: float = 0.0
    finished: float = 0.0

    @property
    def prompt_tokens(self) -> float:
        """Mean of those computed."""
        return max(1.0, min(self.prompts, self.prefilled) / self.arrived) if self.arrived > 1e-9 else 1.0

    @property
    def cached_tokens(self) -> float:
        """Mean of those that a prefix cache had."""
        return max(0.0, self.prompts / self.arrived - self.prompt_tokens) if self.arrived > 1e-9 else 0.0

    @property
    def output_tokens(self) -> float:
        """Mean."""
        return max(1.0, self.output / self.finished) if self.finished > 1e-9 else 1.0


class Late(NamedTuple):
    """Of the requests that told a latency in this period, how many there were and how many came late; parts of a bucket count."""

    counted: float = 0.0
    late: float = 0.0


class Demand(NamedTuple):
    """The state of these sums, and what they say."""

    at_s: float = -inf
    slow: tuple[float, float] = (0.0, 0.0)  # arrivals, seconds
    fast: tuple[float, float] = (0.0, 0.0)
    counted: Counted = Counted()
    lately: Counted = Counted()  # by the short memory
    running: float = 0.0  # mean of the last seconds
    places: float = inf  # sequences that the KV cache has room for
    inside: tuple[int, ...] = ()  # requests in flight at the last ticks
    arrivals: tuple[int, ...] = ()  # cumulative, at the same
    outputs: tuple[tuple[float, int], ...] = ()  # time and output tokens, cumulative, at the last few ticks
    waiting: int = 0
    oldest_s: float = 0.0
    before: EngineSample | None = None

    @property
    def known(self) -> bool:
        """Whether lengths mean anything yet."""
        return min(self.counted.arrived, self.counted.finished) >= FEWEST

    @property
    def arrivals_per_s(self) -> float:
        """Requests that arrive per second; a surge is believed at once, chance is not."""
        (a, t), (b, u) = self.slow, self.fast
        if t <= 0:
            return 0.0
        slow = a / t
        fast = b / u if u > 0 else slow
        surge = fast - slow > SURPRISE * sqrt(max(slow, 0.5 / FAST_S) / max(u, 1.0))
        return fast if surge else slow

    @property
    def prompt_tokens(self) -> float:
        """Mean prompt tokens that are computed."""
        return _newer(self.counted.prompt_tokens, self.lately.prompt_tokens)

    @property
    def cached_tokens(self) -> float:
        """Mean prompt tokens that a prefix cache had."""
        return self.counted.cached_tokens

    @property
    def output_tokens(self) -> float:
        """Mean output tokens; of requests that grow longer the tokens show before their ends do."""
        return _newer(self.counted.output_tokens, self.lately.output_tokens)

    @property
    def in_flight(self) -> int:
        """Requests inside now."""
        return self.inside[-1] if self.inside else 0

    @property
    def tokens_per_s(self) -> float | None:
        """Output of the last periods; None: not known yet."""
        if len(self.outputs) <= PERIODS:
            return None
        (a_s, a), (b_s, b) = self.outputs[0], self.outputs[-1]
        return (b - a) / max(1e-6, b_s - a_s)

    def closed(self, period_s: float) -> bool:
        """Whether as many requests are inside all the time although they come and go: clients wait for their answers."""
        ticks = max(4, round(STEADY_S / period_s))
        if len(self.inside) < ticks or self.arrivals[-1] - self.arrivals[0] < STEADY_ARRIVALS:
            return False
        most, mean = max(self.inside), sum(self.inside) / len(self.inside)
        return most - min(self.inside) <= max(1.0, STEADY * mean)


def observe(d: Demand, now: EngineSample, now_s: float, period_s: float) -> Demand:
    """With one more sample; where any counter fell (another engine) all begin anew."""
    a = d.before
    if a is None or any(after < before for before, after in zip(_counters(a), _counters(now), strict=True)):
        return Demand(at_s=now_s, before=now, inside=(now.running + now.waiting,), arrivals=(now.arrived_requests,))
    dt = max(1e-6, now_s - d.at_s)
    came = now.arrived_requests + now.refused_requests - a.arrived_requests - a.refused_requests
    ticks = max(4, round(STEADY_S / period_s))
    keep = exp(-dt / SMOOTH_S)
    return Demand(
        at_s=now_s,
        slow=_faded(d.slow, came, dt, SLOW_S),
        fast=_faded(d.fast, came, dt, FAST_S),
        counted=_counted(d.counted, a, now, REQUESTS),
        lately=_counted(d.lately, a, now, FEW_REQUESTS),
        places=_places(d.places, now, keep),
        running=now.running + keep * (d.running - now.running),
        inside=(*d.inside, now.running + now.waiting)[-ticks:],
        arrivals=(*d.arrivals, now.arrived_requests)[-ticks:],
        outputs=(*d.outputs, (now_s, now.output_tokens))[-PERIODS - 1 :],
        waiting=now.waiting,
        oldest_s=now.oldest_waiting_s,
        before=now,
    )


_counters = attrgetter(
    "arrived_requests",
    "arrived_prompt_tokens",
    "prefill_tokens",
    "output_tokens",
    "finished_requests",
    "refused_requests",
)


def _faded(pair: tuple[float, float], came: float, dt: float, memory_s: float) -> tuple[float, float]:
    keep = exp(-dt / memory_s)
    return pair[0] * keep + came, pair[1] * keep + dt


def _newer(slow: float, fast: float) -> float:
    return fast if abs(fast - slow) > CHANGED * slow else slow


def _places(before: float, now: EngineSample, keep: float) -> float:
    """Sequences that the KV cache has room for, as long as those that run; infinite where it is nearly empty."""
    if now.kv_usage < 0.1 or now.running == 0:
        return before
    seen = now.running / now.kv_usage
    return seen if before == inf else seen + keep * (before - seen)


def _counted(c: Counted, a: EngineSample, b: EngineSample, memory: float) -> Counted:
    came, ended = b.arrived_requests - a.arrived_requests, b.finished_requests - a.finished_requests
    if came == ended == 0 and b.output_tokens == a.output_tokens:
        return c
    keep_in, keep_out = exp(-came / memory), exp(-ended / memory)
    return Counted(
        c.arrived * keep_in + came,
        c.prompts * keep_in + b.arrived_prompt_tokens - a.arrived_prompt_tokens,
        c.prefilled * keep_in + b.prefill_tokens - a.prefill_tokens,
        c.output * keep_out + b.output_tokens - a.output_tokens,
        c.finished * keep_out + ended,
    )


def late(before: Sequence[int], after: Sequence[int], target_s: float | None) -> Late:
    """How many of the new entries of a histogram exceed a target; of the bucket around it the logarithmic part above."""
    if target_s is None or before == after:
        return Late()
    counted = sum(after) - sum(before)
    if counted <= 0:
        return Late()
    i = bisect_left(LATENCY_BOUNDS_S, target_s)
    above = float(sum(after[i + 1 :]) - sum(before[i + 1 :]))
    if 0 < i < len(LATENCY_BOUNDS_S):
        high, low = LATENCY_BOUNDS_S[i], LATENCY_BOUNDS_S[i - 1]
        above += (after[i] - before[i]) * log(high / target_s) / log(high / low)
    return Late(float(counted), above)


class Targets(NamedTuple):
    """A latency's target and the share that may miss it; None: no target."""

    target_s: float | None
    share: float = 0.05


def targets_of(slo: Slo) -> dict[str, tuple[Targets, ...]]:
    """Targets by latency; the 95th and the 99th percentile may both have one."""
    return {
        "ttft": (Targets(slo.ttft_p95_s, 0.05), Targets(slo.ttft_p99_s, 0.01)),
        "tpot": (Targets(slo.tpot_p95_s, 0.05), Targets(slo.tpot_p99_s, 0.01)),
    }
