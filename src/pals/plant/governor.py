"""What firmware does with the clock under a power limit: one 10 ms tick, vectorised over boards, pure.

Tick, filter and step limits reproduce the published bursts of a capped board (docs/plant.md): 15 MHz steps, at most
25 down and 4 up a tick, a 15 ms filter on power. Near the limit real clocks dither between neighbouring steps faster
than a tick; a fractional clock stands for that mean, so the mean power lies within a watt or two of the limit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pals.plant.specs import CLOCK_STEP_MHZ

FloatArray = NDArray[np.float64]

TICK_S = 0.010
FILTER_S = 0.015
STEPS_DOWN, STEPS_UP = 25, 4
DEAD_BAND_W = 0.5
SAFETY_W = 0.5  # firmware aims a little below the limit
_GAIN = 1.0 - float(np.exp(-TICK_S / FILTER_S))


def govern(
    filtered_w: FloatArray,
    power_w: FloatArray,
    limit_w: FloatArray,
    core_w: FloatArray,
    clock_mhz: FloatArray,
    floor_mhz: FloatArray,
    ceiling_mhz: FloatArray,
) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
    """Return the next filtered power, the next clock, and whether the limit holds the clock down.

    All arguments have shape (boards,), or are numbers where the simulator calls it compiled, board by board (which is why
    they are no keyword-only ones, and why there is no `where` here). `core_w` is the part of `power_w` that follows the clock; its slope is
    about twice the average, because voltage rises too.
    """
    filtered = filtered_w + (power_w - filtered_w) * _GAIN
    slope_w = np.maximum(0.05, 2.0 * core_w / np.maximum(clock_mhz, 1.0)) * CLOCK_STEP_MHZ
    error_w = limit_w - SAFETY_W - filtered
    steps = np.minimum(np.maximum(error_w / slope_w, -STEPS_DOWN), STEPS_UP) * (np.abs(error_w) >= DEAD_BAND_W)
    clock = np.minimum(clock_mhz + CLOCK_STEP_MHZ * steps, np.maximum(floor_mhz, ceiling_mhz))
    clock = np.maximum(clock, floor_mhz)
    limited = (clock < ceiling_mhz) & (error_w < slope_w)
    return filtered, clock, limited
