"""Requests as they arrive: arrays of one length, in order of arrival."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Arrivals and lengths of requests, each array of shape (requests,)."""

    name: str
    arrival_s: NDArray[np.float64]  # from the start, not falling
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    prefix_tokens: NDArray[np.int32]  # leading prompt tokens that an unbounded prefix cache would hold

    def __len__(self) -> int:
        return len(self.arrival_s)
