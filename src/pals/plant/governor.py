"""What firmware makes of a limit, a load and the heat in one 10 ms tick: power, the next clock, the next temperature.

Plain arithmetic on numbers or on arrays of shape (boards,), positional and without `where`, so that the emulated boards call
it for all boards at once and the compiled simulator for each board by itself. `tick` is the whole; `govern` and
`thermal_ceiling_mhz` are its parts. Equations and acceptance tests: docs/models/boards.md, "Governor".

Near the limit real clocks dither between neighbouring steps faster than a tick; a fractional clock stands for that mean.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from pals.plant.silicon import Silicon, core_power_w, static_power_w

TICK_S = 0.010


class Firmware(NamedTuple):
    """Constants of the governor and of cooling; W, s, °C, MHz. Shares hold for one tick of `TICK_S`."""

    clock_step_mhz: float
    filter_share: float  # of the difference that filtered power takes over in a tick
    steps_down: float  # most clock steps in a tick
    steps_up: float
    dead_band_w: float  # no step for a smaller error
    aim_below_w: float  # firmware aims so far below the limit
    debt_s: float  # energy above the limit is paid back with this time constant
    debt_limit_s: float  # what is owed is capped at so many seconds of the limit
    skip_share: float  # below the lowest clock cycles are skipped, down to this share of it
    awake_s: float  # clocks stay up this long after the last kernel
    ambient_c: float
    thermal_k_per_w: float
    thermal_share: float  # of the difference to the resting temperature that a tick brings
    slowdown_c: float  # software slowdown begins
    slowdown_per_k: float  # of the ceiling, above that
    hardware_slowdown_c: float  # the clock is halved
    dip_interval_s: float  # mean time between current-protection dips of a loaded board; 0: none
    dip_s: float
    dip_share: float  # of the ceiling, that a dip takes away
    dip_power_share: float  # of the limit, that must be drawn for a dip to happen


def share_of_tick(time_constant_s: float) -> float:
    """What a first-order lag takes over of a difference in one tick."""
    return 1.0 - math.exp(-TICK_S / time_constant_s)


def govern(
    g: Firmware, filtered_w: Any, debt_j: Any, power_w: Any, limit_w: Any, core_w: Any, clock_mhz: Any, floor_mhz: Any,
    ceiling_mhz: Any,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """Next filtered power W, energy owed J, clock MHz, and whether the limit holds the clock down.

    `core_w` is the part of `power_w` that follows the clock; its slope is about twice the average, because voltage rises
    too. Energy drawn above the limit is owed and paid back, so that the mean of a fluctuating load stays at the limit.
    """
    filtered = filtered_w + (power_w - filtered_w) * g.filter_share
    debt = np.minimum(np.maximum(debt_j + (power_w - limit_w) * TICK_S, 0.0), limit_w * g.debt_limit_s)
    slope_w = np.maximum(0.05, 2.0 * core_w / np.maximum(clock_mhz, 1.0)) * g.clock_step_mhz
    error_w = limit_w - g.aim_below_w - debt / g.debt_s - filtered
    steps = np.minimum(np.maximum(error_w / slope_w, -g.steps_down), g.steps_up) * (np.abs(error_w) >= g.dead_band_w)
    clock = np.minimum(clock_mhz + g.clock_step_mhz * steps, np.maximum(floor_mhz, ceiling_mhz))
    clock = np.maximum(clock, floor_mhz)
    limited = (clock < ceiling_mhz) & (error_w < slope_w)
    return filtered, debt, clock, limited


def thermal_ceiling_mhz(g: Firmware, temperature_c: Any, ceiling_mhz: Any) -> Any:
    """The clock that heat allows: a share less for each kelvin too many, half of it once the hardware steps in."""
    share = np.maximum(0.3, 1.0 - g.slowdown_per_k * np.maximum(0.0, temperature_c - g.slowdown_c))
    return ceiling_mhz * share * (1.0 - 0.5 * (temperature_c >= g.hardware_slowdown_c))


def tick(
    k: Silicon, g: Firmware, compute: Any, memory: Any, busy: Any, awake: Any, limit_w: Any, floor_mhz: Any,
    ceiling_mhz: Any, core_factor: Any, idle_factor: Any, ambient_c: Any,
    clock_mhz: Any, filtered_w: Any, debt_j: Any, temperature_c: Any,
) -> tuple[Any, Any, Any, Any, Any, Any]:  # fmt: skip
    """One tick of a board: power W, then clock, filtered power, energy owed and temperature after it, and whether limited.

    Args:
        k, g: constants of the type.
        compute, memory, busy: shares of the tick, 0..1.
        awake: 1 where clocks are up, 0 asleep.
        limit_w: the lowest limit in force.
        floor_mhz: lowest clock of the board.
        ceiling_mhz: the highest that locks allow where awake, what the board rests at where asleep.
        core_factor, idle_factor: of this specimen.
        ambient_c: air at this board.
        clock_mhz, filtered_w, debt_j, temperature_c: state before the tick.
    """
    static_w = (k.idle_w + (static_power_w(k, temperature_c) - k.idle_w) * awake) * idle_factor
    core_w = core_power_w(k, compute, memory, busy, clock_mhz) * core_factor * awake
    power_w = static_w + core_w + k.hbm_w * memory
    temperature = temperature_c + (ambient_c + g.thermal_k_per_w * power_w - temperature_c) * g.thermal_share
    top_mhz = thermal_ceiling_mhz(g, temperature, ceiling_mhz)
    filtered, debt, clock, limited = govern(
        g, filtered_w, debt_j, power_w, limit_w, core_w, clock_mhz, floor_mhz * g.skip_share, top_mhz
    )
    return power_w, clock, filtered, debt, temperature, limited
