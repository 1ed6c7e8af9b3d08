"""An engine that works steadily, as samples, and a stand-in for a fitted profile that knows it exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import exp

import numpy as np

from pals.core.errors import ConfigError
from pals.core.load import Load
from pals.core.quantities import OperatingPoint, PowerSample, TelemetrySample
from pals.models.forecast import Estimates, Forecast
from tests.worlds import engine_sample

HALF = exp(1.645 * 0.03)
STEP_S, POWER_W, CLOCK_MHZ, RUNNING = 0.02, 600.0, 1400, 40


@dataclass
class Forecaster:
    """Forecasts what `steady` does; asked is what it was asked."""

    asked: list[tuple[OperatingPoint, Load]] = field(default_factory=list)
    reaches: bool = True

    def forecast(self, points: Sequence[OperatingPoint], load: Load) -> Forecast:
        self.asked.append((points[0], load))
        if not self.reaches:
            raise ConfigError("outside the profile")
        ones = np.ones(len(points))

        def around(value: float) -> Estimates:
            return Estimates(value * ones, value / HALF * ones, value * HALF * ones)

        known = {"power_w": POWER_W, "step_s": STEP_S, "sm_clock_mhz": float(CLOCK_MHZ)}
        return Forecast(**{name: around(known.get(name, 1.0)) for name in Forecast._fields})


def steady(
    seconds: float, *, step: Callable[[float], float] = lambda t: 1.0, power: Callable[[float], float] = lambda t: 1.0
) -> Iterator[TelemetrySample]:
    """Samples each half second; `step` and `power` are factors at a time."""
    busy_s = steps = tokens = finished = 0.0
    for i in range(round(2 * seconds)):
        t = 0.5 * (i + 1)
        new = 0.5 / (STEP_S * step(t))
        busy_s, steps, tokens, finished = busy_s + 0.5, steps + new, tokens + new * RUNNING, finished + 2.0
        engine = replace(
            engine_sample(t, tokens=int(tokens), running=RUNNING, waiting=2), steps=int(steps), busy_s=busy_s,
            arrived_requests=int(finished), finished_requests=int(finished), arrived_prompt_tokens=int(finished) * 900,
            prefill_tokens=int(finished) * 600,
        )  # fmt: skip
        board = PowerSample(
            time_s=t,
            power_w=POWER_W / 2,
            energy_j=1.0,
            enforced_limit_w=400.0,
            sm_clock_mhz=CLOCK_MHZ,
            temperature_c=70.0,
        )
        yield TelemetrySample(time_s=t, window_s=0.5, boards=(board, board), power_w=POWER_W * power(t), engine=engine)
