"""What one scheduler did, as counters: kept from what `schedule` and `update_from_output` hand over, never by scanning.

Touches only requests that arrive, prefill or finish, so its cost does not grow with the number of running sequences.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection
from typing import Any, Protocol

from pals.core.quantities import LATENCY_BOUNDS_S, LOWERINGS
from pals.runtime.channel import GAUGES


class Publisher(Protocol):
    """Where telemetry goes; `EngineChannel`."""

    def publish(
        self, gauges: Collection[float], ttft_counts: list[int] | None = None, tpot_counts: list[int] | None = None
    ) -> None:
        """Write one step; counts only where they changed."""
        ...


class _Request:
    """One unfinished request; `request` is vLLM's own object."""

    __slots__ = ("arrived_s", "first_token_s", "request")

    def __init__(self, request: Any, arrived_s: float) -> None:
        self.request, self.arrived_s = request, arrived_s
        self.first_token_s: float | None = None


class StepTelemetry:
    """Counters of one engine; all times are seconds of the engine's clock."""

    def __init__(self, launch_limit: int) -> None:
        self._requests: dict[str, _Request] = {}
        self._waiting: dict[str, float] = {}  # by arrival
        self._prefilling: dict[str, int] = {}  # tokens to prefill, by request
        self._ttft = [0] * (len(LATENCY_BOUNDS_S) + 1)
        self._tpot = [0] * (len(LATENCY_BOUNDS_S) + 1)
        self._ttft_new = self._tpot_new = False
        self._now = dict.fromkeys(GAUGES, 0.0)
        self._now["launch_limit"] = self._now["active_limit"] = float(launch_limit)
        self._last_update_s: float | None = None
        self._busy_since_s: float | None = None

    def arrived(self, request: Any, now_s: float) -> None:
        """A request was accepted by the engine."""
        self._requests[request.request_id] = _Request(request, now_s)
        self._waiting[request.request_id] = now_s
        self._now["arrived_requests"] += 1
        self._now["arrived_prompt_tokens"] += request.num_prompt_tokens
        if self._busy_since_s is None:
            self._busy_since_s = now_s

    def scheduled(self, output: Any) -> None:
        """A step was planned: `output` is the scheduler's."""
        for rid in output.finished_req_ids:
            self._finished(rid)
        for new in output.scheduled_new_reqs:
            self._waiting.pop(new.req_id, None)
            known = self._requests.get(new.req_id)
            self._prefilling[new.req_id] = known.request.num_tokens if known is not None else 0
        for rid in output.scheduled_cached_reqs.resumed_req_ids:
            known = self._requests.get(rid)
            self._prefilling[rid] = known.request.num_tokens if known is not None else 0
        self._now["preemptions"] += len(_preempted(output))
        self._now["scheduled"] = len(output.num_scheduled_tokens)
        prefill = sum(self._prefilled(rid, output.num_scheduled_tokens.get(rid, 0)) for rid in self._prefilling)
        self._now["prefill_tokens"] += prefill
        self._now["decode_tokens"] += output.total_num_scheduled_tokens - prefill

    def updated(self, output_tokens: int, now_s: float) -> None:
        """A step came back, and so many tokens of it were given to requests."""
        now = self._now
        now["output_tokens"] += output_tokens
        if self._prefilling:
            self._first_tokens(now_s)
        if self._busy_since_s is not None:
            now["last_step_s"] = now_s - self._busy_since_s
            now["busy_s"] += now["last_step_s"]
            self._busy_since_s = now_s
        self._last_update_s = now_s
        now["steps"] += 1

    def publish(
        self,
        channel: Publisher,
        *,
        running: int,
        waiting: int,
        kv_usage: float,
        limit: int,
        lowering: str,
        now_s: float,
    ) -> None:
        """Write the counters out."""
        now = self._now
        now["time_s"], now["running"], now["waiting"] = now_s, running, waiting
        now["kv_usage"], now["active_limit"], now["lowering"] = kv_usage, limit, LOWERINGS.index(lowering)
        oldest_s = next(iter(self._waiting.values()), None)
        now["oldest_waiting_s"] = now_s - oldest_s if oldest_s is not None and waiting else 0.0
        if running + waiting == 0:
            self._busy_since_s = None
        channel.publish(now.values(), self._ttft if self._ttft_new else None, self._tpot if self._tpot_new else None)
        self._ttft_new = self._tpot_new = False

    def _prefilled(self, rid: str, scheduled: int) -> int:
        """How many of the tokens just scheduled for `rid` are prefill; its computed count includes them already."""
        known = self._requests.get(rid)
        if known is None or scheduled == 0:
            return 0
        before = known.request.num_computed_tokens - scheduled
        return int(max(0, min(scheduled, self._prefilling[rid] - before)))

    def _first_tokens(self, now_s: float) -> None:
        done = []
        for rid in self._prefilling:
            known = self._requests.get(rid)
            if known is None:
                done.append(rid)
            elif known.request.num_output_tokens > 0 and not _prefill_again(known):
                done.append(rid)
                if known.first_token_s is None:
                    known.first_token_s = now_s
                    self._ttft[bisect_left(LATENCY_BOUNDS_S, now_s - known.arrived_s)] += 1
                    self._ttft_new = True
        for rid in done:
            del self._prefilling[rid]

    def _finished(self, rid: str) -> None:
        known = self._requests.pop(rid, None)
        self._waiting.pop(rid, None)
        self._prefilling.pop(rid, None)
        if known is None:
            return
        status = getattr(known.request.status, "name", "")
        self._now["aborted_requests" if "ABORTED" in status else "finished_requests"] += 1
        tokens = known.request.num_output_tokens
        if known.first_token_s is not None and tokens > 1 and self._last_update_s is not None:
            tpot_s = max(0.0, self._last_update_s - known.first_token_s) / (tokens - 1)
            self._tpot[bisect_left(LATENCY_BOUNDS_S, tpot_s)] += 1
            self._tpot_new = True


def tokens_given(engine_outputs: Any, sampled_token_ids: Any) -> int:
    """Tokens that a step gave to its requests, of what the scheduler's `update_from_output` returned, one item a client.

    Fewer than were sampled: under async scheduling a request that ends at EOS has one more step in flight, whose token
    vLLM discards. A release that returns something else is counted by what was sampled.
    """
    try:
        return sum(len(out.new_token_ids) for client in engine_outputs.values() for out in client.outputs)
    except (AttributeError, TypeError):
        return sum(map(len, sampled_token_ids))


def _preempted(output: Any) -> Collection[str]:
    """Whom a step sent back to the queue; a scheduler that does not tell is counted when they come back."""
    told = getattr(output, "preempted_req_ids", None)
    return told if told is not None else output.scheduled_cached_reqs.resumed_req_ids


def _prefill_again(known: _Request) -> bool:
    """Whether a resumed request is still recomputing what it had."""
    request = known.request
    return bool(request.num_computed_tokens < request.num_tokens - 1)
