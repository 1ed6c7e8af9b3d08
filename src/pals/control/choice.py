"""Which candidate to take: the cheapest that keeps every target, or, where none does, what the order of sacrifice leaves.

Efficiency goes first, then TPOT, then TTFT, then admission; the budget never, as no candidate stands above its ceiling.
"""

from __future__ import annotations

from math import exp, log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pals.control.margins import Margins
from pals.control.outlook import BUSIEST, FULL, OPEN, Asked, Outlook
from pals.core.quantities import Slo
from pals.models.forecast import FloatArray

BoolArray = NDArray[np.bool_]
ALL, NO_TPOT, NO_TTFT = "all", "tpot", "ttft"  # which target is given up
NO_LOSS = 0.998  # of the most throughput, where nobody said that it may be less
QUEUE = 0.7  # of the TTFT target: who waits so long is in danger
NEAR_BEST = 0.005  # of a logarithm: candidates so near the least excess count as equal
MORE = 1.1  # of a throughput target
STEADY_ROOM = 0.007  # of a logarithm
FAR = 50.0  # stands for an infinite excess
_E_FAR = exp(FAR)


class Excess(NamedTuple):
    """By how much each candidate misses, as logarithms with margins; at most 0: kept. Shape (levers, batches)."""

    rate: FloatArray
    ttft: FloatArray
    tpot: FloatArray
    queue: FloatArray | None = None  # of those who wait now; None: nobody does

    def kept(self, room: float = 0.0, rate_room: float = 0.0) -> BoolArray:
        """Which keep everything, with so much room."""
        lasting = self.lasting(room, rate_room)
        return lasting if self.queue is None else np.asarray(lasting & (self.queue <= -room))

    def lasting(self, room: float = 0.0, rate_room: float = 0.0) -> BoolArray:
        """Which keep everything once nobody waits any more."""
        return np.asarray((self.rate <= -rate_room) & (self.ttft <= -room) & (self.tpot <= -room))


def needed_tokens_s(a: Asked, slo: Slo, most_found: float, most_now: float) -> float:
    """Output tokens per second that a candidate must be able to give.

    Args:
        a: the demand.
        slo: its throughput target, absolute or as a share of the most.
        most_found: what the engine answers at most at the limit found, without a lock, as many inside as now.
        most_now: the same under the ceiling in force.
    """
    wanted = slo.throughput_tokens_s
    if slo.throughput_share is not None:
        wanted = max(wanted or 0.0, slo.throughput_share * most_found)
    if a.kind == OPEN:
        asked = a.tokens_per_s / BUSIEST
        enough = wanted is not None and a.tokens_per_s > MORE * wanted  # more arrives than anybody asks to be answered
        return wanted if enough and wanted is not None else max(asked, wanted or 0.0)
    return NO_LOSS * most_now if wanted is None else wanted


def spare_of(slo: Slo, needed: float, most_found: float, margins: Margins) -> float:
    """What throughput must have above a target that was given: at most half of what there is between that and the most."""
    if slo.throughput_tokens_s is None and slo.throughput_share is None:
        return 0.0
    return min(margins.rate, 0.5 * max(0.0, log(most_found / max(needed, 1e-9))))


def excess(o: Outlook, a: Asked, slo: Slo, needed: float, margins: Margins, wider: float, spare: float) -> Excess:
    """What each candidate misses; `wider`: factor on margins while the profile has drifted; `spare`: above the throughput needed."""
    nothing = np.full_like(o.cost_j, -FAR)
    can = o.most_per_s if a.kind == OPEN else o.tokens_per_s
    rate = np.log(needed / np.maximum(can, 1e-9)) + spare if needed > 0 else nothing
    tpot, ttft = (
        _over(o.tpot_s, slo.tpot_p95_s, o.tpot99_s, slo.tpot_p99_s), _over(o.ttft_s, slo.ttft_p95_s, o.ttft99_s, slo.ttft_p99_s)
    )  # fmt: skip
    tpot = nothing if tpot is None else tpot + wider * margins.tpot * o.tpot_half
    if ttft is None:
        return Excess(rate, nothing, tpot)
    ttft = ttft + wider * margins.ttft * o.ttft_half
    if not a.waiting:
        return Excess(rate, ttft, tpot)
    danger_s = QUEUE * max(t for t in (slo.ttft_p95_s, slo.ttft_p99_s) if t is not None)
    return Excess(rate, ttft, tpot, np.log(np.maximum(o.now_s, 1e-9) / danger_s))


def _over(
    p95_s: FloatArray, target95_s: float | None, p99_s: FloatArray, target99_s: float | None
) -> FloatArray | None:
    """The larger logarithm of figure over target, at most `FAR`; None where there is no target."""
    if target95_s is None and target99_s is None:
        return None
    ratio = p95_s / target95_s if target95_s is not None else p99_s / (target99_s or 1.0)
    if target95_s is not None and target99_s is not None:
        ratio = np.maximum(ratio, p99_s / target99_s)
    return np.asarray(np.log(np.minimum(ratio, _E_FAR)))


def rate_room(a: Asked, room: float) -> float:
    """The room that throughput needs to be moved to: a share that arrives varies, one that is asked for is only measured."""
    return room if a.kind == OPEN else min(room, STEADY_ROOM)


class Pick(NamedTuple):
    """Where a candidate stands, and what is given up for it."""

    lever: int
    batch: int
    given_up: str = ALL


def best(o: Outlook, e: Excess, a: Asked, *, room: float = 0.0, among: BoolArray | None = None) -> Pick:
    """The candidate to take; see the module. `room`: so far below its targets where that is possible; `among`: no others.

    Where TTFT is given up, what is taken answers most.
    """
    kept = e.kept(room, rate_room(a, room))
    if among is not None:
        kept = kept & among
    if kept.any():
        return _at(np.where(kept, o.cost_j, np.inf))
    if room > 0.0:
        return best(o, e, a, among=among)
    allowed = np.ones_like(kept) if among is None else among
    rated = allowed & (e.rate <= 0.0) & (e.ttft <= 0.0)
    if e.queue is not None:
        rated = rated & (e.queue <= 0.0)
    if rated.any():
        least = np.where(rated, e.tpot, np.inf).min()
        return _at(np.where(rated & (e.tpot <= least + NEAR_BEST), o.cost_j, np.inf), NO_TPOT)
    most = np.where(allowed, o.tokens_per_s if a.kind != OPEN else o.most_per_s, -np.inf)
    near = most >= most.max() * (1.0 - NEAR_BEST)
    return _at(np.where(near, o.cost_j, np.inf), NO_TTFT)


def _at(cost: FloatArray, given_up: str = ALL) -> Pick:
    lever, batch = np.unravel_index(int(np.argmin(cost)), cost.shape)
    return Pick(int(lever), int(batch), given_up)


def most_waiting(o: Outlook, at: Pick, a: Asked, slo: Slo) -> int | None:
    """Requests that may wait so that those who are let in keep the TTFT target; None: no target, or all will be answered."""
    targets_s = [t for t in (slo.ttft_p95_s, slo.ttft_p99_s) if t is not None]
    if not targets_s or at.given_up != NO_TTFT:
        return None
    answers_per_s = (
        float(o.tokens_per_s[at.lever, at.batch] if a.kind == FULL else o.most_per_s[at.lever, at.batch])
        / a.output_tokens
    )
    return max(1, int(QUEUE * min(targets_s) * answers_per_s))
