"""Two ways to get under a lowered active-sequence limit at the very next step, laid around vLLM's own `schedule()`.

`preempt` sends the newest running requests back to the queue. `TimeSlice` lets vLLM see only `limit` of the running
requests in each step, in turns: the others keep their place and their KV cache, nobody is admitted, and a prefill
chunk keeps the launch token budget (a budget of `limit` tokens would stretch a 1,200-token prompt over 1,200 / limit
turns). The third way, draining, needs neither. Both touch private attributes, so they are probed, never assumed.
"""

from __future__ import annotations

import inspect
from typing import Any


def possible(scheduler: Any) -> dict[str, bool]:
    """Which of the two this scheduler allows; asked of the object, not of a version number."""
    listed = isinstance(getattr(scheduler, "running", None), list)
    admission = hasattr(scheduler, "max_num_active_reqs") or hasattr(scheduler, "max_num_running_reqs")
    return {"time-slice": listed and admission, "preempt": listed and admission and _preempts(scheduler)}


def _preempts(scheduler: Any) -> bool:
    function = getattr(scheduler, "_preempt_request", None)
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(None, 0.0)
    except (TypeError, ValueError):
        return False
    return True


def preempt_down(scheduler: Any, limit: int, now_s: float) -> int:
    """Send running requests back to the queue until `limit` run; return how many.

    The newest go first, or under priority scheduling the least urgent: whom vLLM itself would pick.
    """
    sent = 0
    extra = _stale_output(scheduler) if len(scheduler.running) > limit else {}
    while len(scheduler.running) > limit:
        victim = _last(scheduler)
        scheduler.running.remove(victim)
        try:
            scheduler._preempt_request(victim, now_s, **extra)
        except Exception:
            if getattr(victim.status, "name", "") == "RUNNING":  # nothing happened to it: it must not get lost
                scheduler.running.append(victim)
            raise
        sent += 1
    return sent


def _last(scheduler: Any) -> Any:
    if _by_priority(scheduler):
        return max(scheduler.running, key=lambda r: (r.priority, r.arrival_time))
    return scheduler.running[-1]


def _by_priority(scheduler: Any) -> bool:
    return getattr(getattr(scheduler, "policy", None), "name", "") == "PRIORITY"


def _stale_output(scheduler: Any) -> dict[str, bool]:
    """Tokens of steps in flight: delivered, unless a connector needs the KV cache that goes (vLLM's own rule)."""
    if "drop_stale_output" not in inspect.signature(scheduler._preempt_request).parameters:
        return {}
    return {"drop_stale_output": bool(getattr(scheduler, "requires_kv_delivery", False))}


class TimeSlice:
    """Turns of `limit` running requests: whoever has waited longest for one comes next, the most urgent first."""

    def __init__(self) -> None:
        self._turn = 0
        self._last_turn: dict[str, int] = {}  # by request; kept until twice as many are known as run
        self._everyone: list[Any] | None = None  # while some are held out
        self._chosen: set[str] = set()

    def hold(self, scheduler: Any, limit: int) -> None:
        """Leave `limit` requests in `running` for the coming step; none is held where no more than `limit` run."""
        everyone, last = scheduler.running, self._last_turn
        if len(everyone) <= limit:
            last.clear()
            return
        if len(last) > 2 * len(everyone):
            last = self._last_turn = {r.request_id: last.get(r.request_id, 0) for r in everyone}
        urgent_first = sorted(everyone, key=lambda r: r.priority) if _by_priority(scheduler) else everyone
        queue = sorted(urgent_first, key=lambda r: last.get(r.request_id, 0))
        self._turn += 1
        self._chosen = {r.request_id for r in queue[:limit]}
        last.update(dict.fromkeys(self._chosen, self._turn))
        scheduler.running = [r for r in everyone if r.request_id in self._chosen]
        self._everyone = everyone

    def put_back(self, scheduler: Any) -> None:
        """Everybody runs again, in the old order, without those that the step itself sent back to the queue."""
        everyone, self._everyone = self._everyone, None
        if everyone is None:
            return
        planned = scheduler.running
        kept, known = {id(r) for r in planned}, {id(r) for r in everyone}
        scheduler.running = [r for r in everyone if id(r) in kept or r.request_id not in self._chosen]
        scheduler.running += [r for r in planned if id(r) not in known]
