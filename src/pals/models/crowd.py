"""How many requests run at a time when they arrive at random: the number fluctuates, and the tail of latency is where it is high.

Poisson arrivals, and service that slows down as more share it: linearised about the mean r, the number has variance r / (1 − e),
e the elasticity of the time per token in the number (the diffusion limit of a birth-death process). What exceeds the slots waits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

FEW_MORE = 1.1  # factor on the number, for the elasticity
MOST_ELASTIC = 0.85  # above it the linearisation ends
P95 = 1.645
#: Of the variance so much is left in a mean over a request's life, which is about as long as the number's memory.
AVERAGED = 0.75
_LOG_FEW_MORE, _ROOT_AVERAGED = math.log(FEW_MORE), math.sqrt(AVERAGED)

#: What the linearisation adds to half a 90 % interval, by quantity: about nine tenths of the errors that
#: `benchmarks.profile_arrivals` prints between 10 and 85 % of capacity.
HALF_WIDTHS = {
    "power_w": 0.06, "step_s": 0.10, "tokens_per_s": 0.03, "tpot_p50_s": 0.10, "tpot_p95_s": 0.09, "ttft_p50_s": 0.12, "ttft_p95_s": 0.30,
    "tokens_per_j": 0.07,
}  # fmt: skip


class Crowd(NamedTuple):
    """Sequences that run, 95th percentiles, shape (points,)."""

    during_answers: FloatArray  # mean over a request's life
    at_arrival: FloatArray
    waiting: FloatArray  # requests that find no slot then

    @staticmethod
    def of(running: FloatArray, slots: FloatArray, slower: FloatArray) -> Crowd:
        """`slower`: factor on the time per token with `FEW_MORE` times as many running."""
        return Crowd.elastic(running, slots, np.log(slower) / _LOG_FEW_MORE)

    @staticmethod
    def elastic(running: FloatArray, slots: FloatArray, elasticity: FloatArray) -> Crowd:
        """`elasticity`: of the time per token in the number running."""
        elasticity = np.minimum(np.maximum(elasticity, 0.0), MOST_ELASTIC)
        deviation = np.sqrt(running / (1.0 - elasticity))
        high = running + P95 * deviation
        return Crowd(
            np.minimum(np.maximum(running + P95 * _ROOT_AVERAGED * deviation, 1.0), slots),
            np.minimum(np.maximum(high, 1.0), slots),
            np.maximum(0.0, high - slots),
        )
