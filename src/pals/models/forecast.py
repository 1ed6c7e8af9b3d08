"""What a profile expects of operating points under a load: figures with intervals; `models/fitted.py` makes them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

#: What is predicted, by its name in `Forecast`; watts are of all boards, except where said.
QUANTITIES = (
    "power_w", "node_power_w", "natural_draw_w", "sm_clock_mhz", "step_s", "tpot_p50_s", "tpot_p95_s",
    "prefill_tokens_per_s", "ttft_p50_s", "ttft_p95_s", "tokens_per_s", "tokens_per_j",
)  # fmt: skip


class Estimates(NamedTuple):
    """A quantity for each candidate, with its 90 % interval; arrays of shape (candidates,)."""

    value: FloatArray
    low: FloatArray
    high: FloatArray


class Forecast(NamedTuple):
    """Every quantity for each candidate; see `QUANTITIES`."""

    power_w: Estimates  # all boards, mean
    node_power_w: Estimates
    natural_draw_w: Estimates  # all boards, were no limit set and no clock locked
    sm_clock_mhz: Estimates
    step_s: Estimates
    tpot_p50_s: Estimates
    tpot_p95_s: Estimates
    prefill_tokens_per_s: Estimates  # what a full step prefills
    ttft_p50_s: Estimates  # at the load's queue
    ttft_p95_s: Estimates
    tokens_per_s: Estimates  # output tokens
    tokens_per_j: Estimates  # of the boards' energy
