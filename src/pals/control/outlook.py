"""What every candidate would do under the demand: power, running sequences, latencies and what they cost; arrays, no decisions.

Three kinds of demand: *open*, requests arrive whatever the engine does; *closed*, as many are inside all the time, so that a
slower engine is asked less; *full*, more arrives than the engine answers and every slot is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pals.control.lever_table import (
    CLOCK,
    ELASTIC,
    NATURAL,
    POWER,
    PREFILL,
    STEP,
    TOKENS,
    TPOT,
    TPOT95,
    TPOT_HALF,
    TTFT,
    TTFT95,
    TTFT_HALF,
    Rows,
    running_at,
)
from pals.models.crowd import Crowd
from pals.models.forecast import FloatArray
from pals.models.node_power import OFFSET_W, SLOPE

OPEN, CLOSED, FULL = "open", "closed", "full"
BUSIEST = 0.95  # share of what an engine answers at most that may arrive for good
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
    places: float = np.inf  # sequences that the KV cache has room for
    tail: bool = False  # whether 99th percentiles matter


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
    tpot99_s: FloatArray  # the 95th percentile where nobody asks for this
    ttft_s: FloatArray  # p95; infinite where the queue grows for ever
    ttft99_s: FloatArray
    now_s: FloatArray  # TTFT of who waits, or comes, now
    tpot_half: FloatArray
    ttft_half: FloatArray
    clock_mhz: FloatArray
    natural_w: FloatArray


def outlook(rows: Rows, batches: FloatArray, a: Asked, bias: Bias, boards: Boards) -> Outlook:
    """Every lever of `rows` with the first of its batches, shape (batches,)."""
    slots = np.empty((len(rows.levers), len(batches)))
    slots[:] = np.minimum(batches, a.places)
    full = rows.full[:, : len(batches)] if a.places >= batches[0] else rows.at(slots)
    most = full[..., TOKENS] / bias.step
    running = _running(rows, slots, a, bias)
    at = rows.at(running)
    if a.kind == OPEN:
        crowd = Crowd.elastic(running, slots, at[..., ELASTIC])
    else:
        crowd = Crowd(running, running, np.zeros_like(running))
    many = np.minimum(slots, np.maximum(crowd.during_answers, a.running / BEYOND))
    during, first = _columns(rows, many, crowd.at_arrival)
    tokens = np.minimum(a.tokens_per_s, most) if a.kind == OPEN else at[..., TOKENS] / bias.step
    power = _power(at[..., POWER], running, boards.idle_w) * bias.power
    tpot, tpot50 = during[..., TPOT95] * bias.step, at[..., TPOT] * bias.step
    ttft, ttft50 = _first_token(slots, a, bias, crowd, at, first, most)
    paid = SLOPE * power + boards.node_share * OFFSET_W if boards.node_share else power
    return Outlook(
        running=running,
        tokens_per_s=tokens,
        most_per_s=most,
        power_w=power,
        cost_j=paid / np.maximum(tokens, 1e-9),
        tpot_s=tpot,
        tpot99_s=_p99(tpot50, tpot) if a.tail else tpot,
        ttft_s=ttft,
        ttft99_s=_p99(ttft50, ttft) if a.tail else ttft,
        now_s=_first_token_now(slots, a, bias, full),
        tpot_half=at[..., TPOT_HALF],
        ttft_half=at[..., TTFT_HALF] * _own_share(first[..., TTFT95] * bias.step, ttft),
        clock_mhz=at[..., CLOCK],
        natural_w=at[..., NATURAL] * bias.power,
    )


def _running(rows: Rows, slots: FloatArray, a: Asked, bias: Bias) -> FloatArray:
    """Sequences that run, mean."""
    if a.kind == OPEN:
        return np.minimum(running_at(rows.rates, rows.levels, a.tokens_per_s * bias.step)[:, None], slots)
    return np.minimum(slots, max(1.0, a.inside)) if a.kind == CLOSED else slots


def _columns(rows: Rows, *running: FloatArray) -> list[FloatArray]:
    """`rows.at` each of them, asked at once: most of its time is the asking."""
    count = running[0].shape[1]
    every = rows.at(np.concatenate(running, axis=1))
    return [every[:, i * count : (i + 1) * count] for i in range(len(running))]


def _power(power: FloatArray, running: FloatArray, idle_w: float) -> FloatArray:
    """Mean power; where less than one sequence runs, the engine is idle part of the time."""
    duty = np.minimum(1.0, running)
    return np.asarray(duty * power + (1.0 - duty) * idle_w)


def _p99(p50: FloatArray, p95: FloatArray) -> FloatArray:
    """From two quantiles, as if the logarithm were normal; infinite where they are."""
    ratio = np.divide(p95, p50, out=np.ones_like(p95), where=np.isfinite(p95))
    return np.asarray(p95 * np.maximum(1.0, ratio) ** TAIL)


def _first_token(
    slots: FloatArray, a: Asked, bias: Bias, crowd: Crowd, at: FloatArray, first: FloatArray, most: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """TTFT at p95 and p50 of requests to come, when the queue of now is gone."""
    if a.kind == FULL:
        endless = np.full_like(most, np.inf)
        return endless, endless
    slot_s = first[..., TPOT] * a.output_tokens / slots  # between two free slots, when all are taken
    ttft95, ttft50 = first[..., TTFT95], at[..., TTFT]
    if a.kind == CLOSED:
        more_s = np.maximum(0.0, a.inside - slots) * slot_s
        return (ttft95 + more_s) * bias.step, (ttft50 + more_s) * bias.step
    ttft95 = (ttft95 + REST * first[..., STEP] + crowd.waiting * slot_s) * bias.step
    ttft50 = (ttft50 + 0.5 * first[..., STEP]) * bias.step
    grows = a.tokens_per_s > BUSIEST * most
    return np.where(grows, np.inf, ttft95), np.where(grows, np.inf, ttft50)


def _own_share(own_s: FloatArray, ttft_s: FloatArray) -> FloatArray:
    """How much of TTFT is what the profile is unsure of: the wait for a slot follows from TPOT and counts."""
    return np.asarray(np.minimum(1.0, np.divide(own_s, ttft_s, out=np.ones_like(own_s), where=np.isfinite(ttft_s))))


def _first_token_now(slots: FloatArray, a: Asked, bias: Bias, full: FloatArray) -> FloatArray:
    """TTFT of who waits now, or comes now: the prompts before it, and the slots that must come free."""
    if a.waiting == 0:
        return np.zeros_like(slots)
    prompts_s = a.waiting * a.prompt_tokens / np.maximum(full[..., PREFILL], 1e-9)
    slots_s = np.maximum(0.0, a.inside - slots) * full[..., TPOT] * a.output_tokens / slots
    return np.maximum(a.oldest_s, (prompts_s + slots_s) * bias.step)
