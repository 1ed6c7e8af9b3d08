"""The oracle: it sees the requests to come and the plant itself, and takes in each window the point that turns out best.

At the start of a window every candidate is served on a clone, through that window and one more; the cheapest that keeps
the targets is then taken for real. No controller can know what it knows: it bounds what any could save.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from pals.control.guard import Guard
from pals.core.quantities import OperatingPoint
from pals.experiments.fixed_run import (
    RivalOutcome,
    RivalTask,
    Target,
    Trial,
    allowed_point,
    ends_s,
    found_point,
    needed_tokens_per_s,
    start,
    targets_of,
)
from pals.experiments.outcome import FloatArray
from pals.experiments.static_best import grid_of
from pals.plant.replica import SentRequests

WINDOW_S = 30.0


class Tried(NamedTuple):
    """What a candidate came to on its clone, the window after included."""

    point: OperatingPoint
    live: int  # requests that were there in this window
    beyond: Mapping[Target, float]  # misses above the quota, of those; below 0: what is left of it
    lacking: float  # share of the throughput needed that is not there
    waiting: int  # requests, at the end
    tokens: int  # output
    cost_j: float  # energy per token


class Quota:
    """How many of the first requests may miss a target: what the fastest point misses anyway, and a fair part of the rest.

    What the SLO leaves beyond the unavoidable goes to all requests alike, and stays when it was not used. So a window of
    ordinary load may miss the SLO's share of its requests, and a hopeless burst later is provided for. A closed loop has no
    bursts: each window may miss the SLO's share.
    """

    def __init__(self, task: RivalTask, fastest: Trial | None) -> None:
        self._upto = {t: _allowances(t, fastest.replica.sent()) for t in targets_of(task.slo)} if fastest else {}

    def of(self, target: Target, requests: int) -> float:
        """For the first `requests` of all."""
        upto = self._upto.get(target)
        return target.allowed * requests if upto is None else float(upto[requests])


def _allowances(target: Target, sent: SentRequests) -> FloatArray:
    missed = missed_of(target, sent, float("inf"), 0.0)
    spare = max(0.0, target.allowed * len(missed) - missed.sum())
    return np.concatenate([[0.0], np.cumsum(missed + spare / len(missed))])


def missed_of(target: Target, sent: SentRequests, now_s: float, pace_s: float) -> np.ndarray:
    """Which of these requests miss the target, or will if they go on at `pace_s` a token; shape (requests,)."""
    if target.ttft:
        came_s = np.where(np.isnan(sent.first_token_s), now_s, sent.first_token_s)
        return np.asarray(came_s - sent.arrival_s > target.seconds)
    ended = ~np.isnan(sent.last_token_s)
    gaps = np.maximum(1, sent.output_tokens - 1)
    tpot_s = np.where(ended, (sent.last_token_s - sent.first_token_s) / gaps, pace_s)
    return np.asarray((tpot_s > target.seconds) & (sent.output_tokens > 1) & ~np.isnan(sent.first_token_s))


class Oracle:
    """One load's oracle; see the module."""

    def __init__(self, task: RivalTask, candidates: Sequence[OperatingPoint], window_s: float, guard: Guard) -> None:
        self._task, self._guard, self._window_s, self._candidates = task, guard, window_s, candidates
        self._targets, self._needed = targets_of(task.slo), needed_tokens_per_s(task, guard)
        self._fastest = found_point(task)
        self._quota = Quota(task, self._served_fastest())
        load = task.sim.workload if task.loop is None else task.loop.supply
        self._answer_tokens = float(load.output_tokens.mean())
        self._live, self._settled = 0, dict.fromkeys(self._targets, 0)  # requests before have ended; of them missed

    def _served_fastest(self) -> Trial | None:
        if self._task.loop is not None or not self._targets:
            return None
        trial = start(self._task, self._fastest, self._guard)
        trial.serve(ends_s(self._task))
        return trial

    def run(self) -> RivalOutcome:
        """Serve the load."""
        trial, end_s = start(self._task, self._fastest, self._guard), ends_s(self._task)
        taken, edges_s = list[OperatingPoint](), list[float]()
        while trial.now_s < end_s and not trial.finished:
            self._settle(trial)
            until_s = min(end_s, self._edge_after(trial.now_s))
            tried = [self._tried(trial, p, until_s) for p in self._choice(trial)]
            best = min(tried, key=lambda t: self._rank(t, tried[0]))
            taken.append(best.point)
            edges_s.append(trial.now_s)
            trial.want(best.point)
            trial.serve(until_s)
        return trial.outcome(taken, edges_s, needed_tokens_per_s=self._needed)

    def _choice(self, trial: Trial) -> list[OperatingPoint]:
        """The fastest point and the candidates, as the budget lets them be."""
        budget = self._task.budget.at(trial.now_s)
        return list(dict.fromkeys(allowed_point(self._guard, p, budget) for p in (self._fastest, *self._candidates)))

    def _rank(self, tried: Tried, fastest: Tried) -> tuple[float, float]:
        """Smaller is better: by how much the targets are missed, in hundredths, then energy.

        A queue outlasts any look ahead: where somebody waits at the end, the answers by which the fastest point is ahead
        count as first tokens that will come late. In a closed loop the queue is part of the load.
        """
        behind = (fastest.tokens - tried.tokens) / self._answer_tokens
        late = max(0.0, tried.waiting - fastest.waiting, behind) if tried.waiting and self._task.loop is None else 0.0
        beyond = sum(max(0.0, n + (late if t.ttft else 0.0)) for t, n in tried.beyond.items())
        violation = tried.lacking + beyond / max(1, tried.live)
        return (max(0.01, round(violation, 2)) if violation > 0 else 0.0, tried.cost_j)

    def _edge_after(self, now_s: float) -> float:
        """Where the window that begins now ends: after its length, or where the budget changes."""
        changes = [t for t in self._task.budget.times_s if t > now_s]
        return min([now_s + self._window_s, *changes])

    def _settle(self, trial: Trial) -> None:
        """Count what requests that have ended since the last window missed for good."""
        sent = trial.replica.sent(self._live)
        unended = np.isnan(sent.last_token_s)
        ended = int(unended.argmax()) if unended.any() else len(unended)
        for t in self._targets:
            self._settled[t] += int(missed_of(t, sent, trial.now_s, 0.0)[:ended].sum())
        self._live += ended

    def _tried(self, trial: Trial, point: OperatingPoint, until_s: float) -> Tried:
        """Serve this window at `point`, and the next at the fastest, on a clone."""
        twin, task = trial.fork(), self._task
        twin.want(point)
        twin.serve(until_s)
        lacking = self._lacking(twin)
        twin.want(self._fastest)
        twin.serve(min(ends_s(task), until_s + self._window_s))
        before, after = trial.replica.counters(), twin.replica.counters()
        tokens = after.output_tokens - before.output_tokens
        pace_s = (after.busy_s - before.busy_s) / max(1, after.steps - before.steps)
        energy_j = task.energy_j(twin.replica.energy_j() - trial.replica.energy_j(), twin.now_s - trial.now_s)
        live, beyond = self._beyond(twin, until_s, pace_s)
        return Tried(point, live, beyond, lacking, after.waiting, tokens, energy_j / max(1, tokens))

    def _lacking(self, twin: Trial) -> float:
        """Share of the throughput needed since the mark that is not there; open loads are behind only by their queue."""
        passed_s = twin.now_s - twin.mark.time_s
        if self._needed <= 0 or self._task.loop is None or passed_s <= 0:
            return 0.0
        tokens = twin.replica.counters().output_tokens - twin.mark.tokens
        return max(0.0, 1.0 - tokens / passed_s / self._needed)

    def _beyond(self, twin: Trial, until_s: float, pace_s: float) -> tuple[int, dict[Target, float]]:
        """Requests that live in this window, and how many miss each target beyond the quota up to there."""
        sent = twin.replica.sent(self._live)
        live = int((sent.arrival_s < until_s).sum())
        upto, beyond = self._live + live, dict[Target, float]()
        for t in self._targets:
            missed = self._settled[t] + int(missed_of(t, sent, twin.now_s, pace_s)[:live].sum())
            beyond[t] = missed - self._quota.of(t, upto)
        return live, beyond


def oracle(
    task: RivalTask, candidates: Sequence[OperatingPoint] | None = None, *, window_s: float = WINDOW_S
) -> RivalOutcome:
    """What can be had at most with one of `candidates` in each window; by default sixty over the whole range.

    Raises:
        ConfigError: nothing is served, or faults are asked for.
    """
    guard = task.guard
    if candidates is None:
        candidates = grid_of(guard, limits=3, clocks=7, batches=3).points
    return replace(Oracle(task, candidates, window_s, guard).run(), runs=1)
