"""What every candidate would do under the demand: power, running sequences, latencies and what they cost; arrays, no decisions.

Three kinds of demand: *open*, requests arrive whatever the engine does; *closed*, as many are inside all the time, so that a
slower engine is asked less; *full*, more arrives than the engine answers and every slot is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pals.control.lever_table import (
    CLOCK,
    NATURAL,
    POWER,
    PREFILL,
    STEP,
    TOKENS,
    TPOT,
    TPOT95,
    TTFT,
    TTFT95,
    Rows,
    places,
    read,
    running_at,
)
from pals.models.crowd import FEW_MORE, Crowd
from pals.models.forecast import FloatArray
from pals.models.node_power import OFFSET_W, SLOPE

OPEN, CLOSED, FULL = "open", "closed", "full"
BUSIEST = 0.93  # share of what an engine answers at most that may arrive for good
REST = 0.8  # of a step, that a request which comes in its middle waits longer at p95
BEYOND = 1.15  # more than the expected crowd's 95th percentile by so much is a surge
TAIL = 0.414  # from p50 and p95 to p99 of a logarithm: (2.326 - 1.645) / 1.645


class Bias(NamedTuple):
    """Factors on the profile's step time and power, learnt in place."""

    step: float = 1.0
    power: float = 1.0


class Asked(NamedTuple):
    """The demand as candidates meet it."""

    kind: str  # OPEN, CLOSED or FULL
    tokens_per_s: float  # output tokens that are asked for
    output_tokens: float
    prompt_tokens: float
    inside: float  # requests in flight now
    running: float  # mean of the last seconds
    waiting: int
    oldest_s: float  # the longest wait so far


class Boards(NamedTuple):
    """What turns boards' watts into what is paid for."""

    idle_w: float  # all boards
    node_share: float  # of a node's fixed power; 0: only the boards count


class Outlook(NamedTuple):
    """Figures of every candidate, shape (levers, batches); seconds, watts of all boards."""

    running: FloatArray
    tokens_per_s: FloatArray  # what comes out
    most_per_s: FloatArray  # what could
    power_w: FloatArray
    cost_j: FloatArray  # per output token
    tpot_s: FloatArray  # p95
    tpot99_s: FloatArray
    ttft_s: FloatArray  # p95; infinite where the queue grows for ever
    ttft99_s: FloatArray
    now_s: FloatArray  # TTFT of who waits, or comes, now
    tpot_half: FloatArray
    ttft_half: FloatArray
    rate_half: FloatArray
    clock_mhz: FloatArray
    natural_w: FloatArray


def outlook(rows: Rows, batches: FloatArray, a: Asked, bias: Bias, boards: Boards) -> Outlook:
    """Every lever of `rows` with every batch of `batches`, shape (batches,)."""
    f, levels = rows.figures, rows.levels
    lever = np.arange(len(rows.levers))[:, None]
    slots = np.broadcast_to(batches[None, :], (len(rows.levers), len(batches)))
    rate = f[TOKENS] / bias.step
    full = places(levels, slots)
    most = read(rate, full, lever)
    if a.kind == OPEN:
        running = np.minimum(running_at(rate, levels, a.tokens_per_s)[:, None], slots)
    else:
        running = np.minimum(slots, max(1.0, a.inside)) if a.kind == CLOSED else slots
    at = places(levels, running)
    tpot = read(f[TPOT], at, lever)
    crowd = _crowd(f[TPOT], levels, lever, running, slots, tpot) if a.kind == OPEN else Crowd(running, running, slots * 0.0)
    tokens = np.minimum(a.tokens_per_s, most) if a.kind == OPEN else read(rate, at, lever)
    power = _power(f[POWER], at, lever, running, boards.idle_w) * bias.power
    during = places(levels, np.minimum(slots, np.maximum(crowd.during_answers, a.running / BEYOND)))
    tpot95 = read(f[TPOT95], during, lever) * bias.step
    tpot50 = tpot * bias.step
    wait = _Waits(f, levels, lever, slots, bias.step, a)
    ttft95, ttft50 = wait.to_come(crowd, at, most)
    return Outlook(
        running=running,
        tokens_per_s=tokens,
        most_per_s=most,
        power_w=power,
        cost_j=(SLOPE * power + boards.node_share * OFFSET_W if boards.node_share else power) / np.maximum(tokens, 1e-9),
        tpot_s=tpot95,
        tpot99_s=tpot95 * np.maximum(1.0, tpot95 / tpot50) ** TAIL,
        ttft_s=ttft95,
        ttft99_s=ttft95 * np.maximum(1.0, ttft95 / ttft50) ** TAIL,
        now_s=wait.now(ttft50),
        tpot_half=read(rows.half[TPOT95], at, lever),
        ttft_half=read(rows.half[TTFT95], at, lever),
        rate_half=read(rows.half[TOKENS], at, lever),
        clock_mhz=read(f[CLOCK], at, lever),
        natural_w=read(f[NATURAL], at, lever) * bias.power,
    )


def _crowd(
    tpot: FloatArray, levels: FloatArray, lever: np.ndarray, running: FloatArray, slots: FloatArray, here: FloatArray
) -> Crowd:
    """How many run at the 95th percentile under random arrivals."""
    more = read(tpot, places(levels, np.maximum(1.0, running) * FEW_MORE), lever)
    return Crowd.of(running, slots, more / here)


def _power(power: FloatArray, at: object, lever: np.ndarray, running: FloatArray, idle_w: float) -> FloatArray:
    """Mean power; where less than one sequence runs, the engine is idle part of the time."""
    duty = np.minimum(1.0, running)
    return np.asarray(duty * read(power, at, lever) + (1.0 - duty) * idle_w)  # type: ignore[arg-type]


class _Waits(NamedTuple):
    """What requests wait for their first token."""

    figures: FloatArray
    levels: FloatArray
    lever: np.ndarray
    slots: FloatArray
    step: float  # bias
    asked: Asked

    def to_come(self, crowd: Crowd, at: object, most: FloatArray) -> tuple[FloatArray, FloatArray]:
        """TTFT at p95 and p50 of requests to come, when the queue of now is gone."""
        f, a = self.figures, self.asked
        first = places(self.levels, crowd.at_arrival)
        slot_s = read(f[TPOT], first, self.lever) * a.output_tokens / self.slots  # between two free slots, when all are taken
        ttft95, ttft50 = read(f[TTFT95], first, self.lever), read(f[TTFT], at, self.lever)  # type: ignore[arg-type]
        if a.kind == OPEN:
            rest_s = read(f[STEP], first, self.lever)
            ttft95 = ttft95 + REST * rest_s + crowd.waiting * slot_s
            ttft50 = ttft50 + 0.5 * rest_s
            lost = a.tokens_per_s > BUSIEST * most
            ttft95, ttft50 = np.where(lost, np.inf, ttft95), np.where(lost, np.inf, ttft50)
        elif a.kind == CLOSED:
            more_s = np.maximum(0.0, a.inside - self.slots) * slot_s
            ttft95, ttft50 = ttft95 + more_s, ttft50 + more_s
        else:
            ttft95 = ttft50 = np.full_like(ttft95, np.inf)
        return ttft95 * self.step, ttft50 * self.step

    def now(self, ttft50_s: FloatArray) -> FloatArray:
        """TTFT of who waits now, or comes now: the prompts before it, and the slots that must come free."""
        f, a = self.figures, self.asked
        if a.waiting == 0:
            return np.zeros_like(ttft50_s)
        full = places(self.levels, self.slots)
        prompts_s = a.waiting * a.prompt_tokens / np.maximum(read(f[PREFILL], full, self.lever), 1e-9)
        beyond = np.maximum(0.0, a.inside - self.slots)
        slots_s = beyond * read(f[TPOT], full, self.lever) * a.output_tokens / self.slots
        return np.maximum(a.oldest_s, (prompts_s + slots_s) * self.step)
