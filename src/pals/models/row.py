"""One measured point of a profile: a window in which an engine was kept busy at one operating point with one mix."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pals.core.quantities import OperatingPoint, refuse_nan


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRow:
    """Means over the window; the closed loop kept as many requests in flight as the point allows."""

    power_limit_w: float  # per board, as enforced
    sm_clock_lock_mhz: int | None = None  # as accepted; None: no lock
    active_sequences: int
    mix: int  # position in the profile's mixes
    running: float  # sequences, mean
    power_w: float  # all boards, from the energy counters
    tokens_per_s: float  # output tokens
    prefill_tokens_per_s: float
    steps_per_s: float
    sm_clock_mhz: float | None  # of the slowest board, mean of the readings; None: not measured
    ttft_p50_s: float | None = None  # None: too few requests got a first token
    ttft_p95_s: float | None = None
    tpot_p50_s: float | None = None  # None: too few requests ended
    tpot_p95_s: float | None = None
    window_s: float
    at_s: float = 0.0  # end of the window, from the start of the sweep
    temperature_c: float | None = None  # hottest board
    distinct_experts: float | None = None  # per layer and decode step; None: not measured

    @property
    def point(self) -> OperatingPoint:
        """The configuration measured."""
        return OperatingPoint(
            power_limit_w=self.power_limit_w,
            sm_clock_mhz=self.sm_clock_lock_mhz,
            active_sequences=self.active_sequences,
        )

    def to_dict(self) -> dict[str, Any]:
        """The row for a file; what is unknown is left out."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    def __post_init__(self) -> None:
        refuse_nan(self)
        if min(self.power_limit_w, self.active_sequences, self.running, self.power_w, self.tokens_per_s) <= 0:
            raise ValueError(f"a figure is not above 0: {self.to_dict()}")
        times = (self.ttft_p50_s, self.ttft_p95_s, self.tpot_p50_s, self.tpot_p95_s)
        known = (v for v in (self.steps_per_s, self.window_s, self.sm_clock_mhz, *times) if v is not None)
        if min(known) <= 0:
            raise ValueError(f"a figure is not above 0: {self.to_dict()}")
