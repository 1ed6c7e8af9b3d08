"""What a board settles at when the same work repeats under a power limit and a clock lock; pure, on floats or arrays alike.

The governor of `plant/governor.py` in its limit: no ticks, no filter, the mean of its dither. Equations, valid range and
residuals: docs/models/caps.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pals.plant.silicon import Silicon, board_power_w, static_power_w

HALVINGS = 32  # of the clock range: far below the steps of a numerical derivative
SPREAD_NODES, SPREAD_WEIGHTS = np.polynomial.hermite_e.hermegauss(5)
SPREAD_WEIGHTS = SPREAD_WEIGHTS / SPREAD_WEIGHTS.sum()


class Work(NamedTuple):
    """A step that repeats. Seconds are those at the reference clock; floats or arrays of one shape."""

    memory_s: Any  # HBM-bound, whatever the clock
    core_s: Any  # clock-bound, at `reference_mhz`
    host_s: Any  # no kernel runs
    overlap: Any  # p of the p-norm: 1 one after the other, large: whichever is longer
    activity: Any  # tensor and issue activity while clock-bound, 0..1
    reference_mhz: Any


class Settled(NamedTuple):
    """Where the board comes to rest, means over its dither."""

    clock_mhz: Any
    power_w: Any
    step_s: Any
    duty: Any  # below 1 where kernels are held back at the clock floor
    binds: Any  # whether the limit holds the clock down


def kernel_s(work: Work, clock_mhz: Any) -> Any:
    """Seconds of a step in which kernels run: memory- and clock-bound time as a p-norm."""
    core_s = work.core_s * work.reference_mhz / clock_mhz
    longer = np.maximum(np.maximum(work.memory_s, core_s), 1e-300)  # taken out, so that no power overflows
    p = work.overlap
    return longer * ((work.memory_s / longer) ** p + (core_s / longer) ** p) ** (1.0 / p)


def step_s(work: Work, clock_mhz: Any) -> Any:
    """Seconds of a step."""
    return kernel_s(work, clock_mhz) + work.host_s


def shares(work: Work, clock_mhz: Any) -> tuple[Any, Any, Any]:
    """Compute, memory and busy shares of a step's time, 0..1, as `silicon.Load` holds them."""
    kernels = kernel_s(work, clock_mhz)
    whole = kernels + work.host_s
    core_s = work.core_s * work.reference_mhz / clock_mhz
    return work.activity * core_s / whole, work.memory_s / whole, kernels / whole


def draw_w(k: Silicon, work: Work, clock_mhz: Any, temperature_c: Any) -> Any:
    """Mean board power of the repeated step at a clock, W. It never falls with the clock: see docs/models/caps.md."""
    compute, memory, busy = shares(work, clock_mhz)
    return board_power_w(k, compute, memory, busy, clock_mhz, temperature_c)


def settle(
    k: Silicon,
    work: Work,
    *,
    limit_w: Any,
    floor_mhz: Any,
    ceiling_mhz: Any,
    temperature_c: Any = None,
    scale: Any = 1.0,
    lowest_duty: float = 1.0,
    aim_below_w: float = 0.0,
) -> Settled:
    """The highest clock in `floor_mhz`..`ceiling_mhz` whose mean power is within `limit_w`.

    Args:
        k: the board's constants.
        work: the repeated step.
        limit_w: power limit in force, W.
        floor_mhz: lowest clock of the board; where firmware skips cycles below it, what that leaves of it.
        ceiling_mhz: highest clock of the board, or of its lock: an upper bound, a limit may hold the clock below it.
        temperature_c: of the board; None: that at which the static part was measured.
        scale: of what is drawn above the static part, for boards or moments that differ from the nominal.
        lowest_duty: at the floor, kernels may be held back to this share of time; 1: the limit is exceeded there.
        aim_below_w: firmware aims so far below the limit.
    """
    temperature_c = k.leak_reference_c if temperature_c is None else temperature_c
    static_w = static_power_w(k, temperature_c)

    def power_w(clock_mhz: Any) -> Any:
        return static_w + scale * (draw_w(k, work, clock_mhz, temperature_c) - static_w)

    goal_w = limit_w - aim_below_w
    ceiling = np.maximum(floor_mhz, ceiling_mhz)
    binds = power_w(ceiling) > goal_w
    low, high = floor_mhz, ceiling
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        over = power_w(middle) > goal_w
        low, high = np.where(over, low, middle), np.where(over, middle, high)
    clock = np.where(binds, low, ceiling)
    running_w = power_w(clock)
    duty = np.clip((goal_w - static_w) / np.maximum(running_w - static_w, 1e-9), lowest_duty, 1.0)
    duty = np.where(binds, duty, 1.0)
    return Settled(clock, static_w + duty * (running_w - static_w), step_s(work, clock) / duty, duty, binds)


def settle_spread(
    k: Silicon, work: Work, *, spread: float, limit_w: Any, floor_mhz: Any, ceiling_mhz: Any, temperature_c: Any = None
) -> Settled:
    """As `settle`, for work whose dynamic power varies from moment to moment by the relative deviation `spread`.

    The limit clips each moment by itself, so near natural draw it already bites on the upper half: the mean power of a
    soft clamp. Arguments are scalars or arrays that broadcast; means over a normal law of five nodes.
    """
    shape = np.broadcast_shapes(*(np.shape(a) for a in (*work, limit_w, floor_mhz, ceiling_mhz)))
    moments = 1.0 + spread * SPREAD_NODES.reshape(-1, *([1] * len(shape)))
    each = settle(
        k, work, limit_w=limit_w, floor_mhz=floor_mhz, ceiling_mhz=ceiling_mhz, temperature_c=temperature_c, scale=moments,
    )  # fmt: skip
    every = (len(moments), *shape)
    mean = [np.tensordot(SPREAD_WEIGHTS, np.broadcast_to(values, every), 1) for values in each]
    return Settled(mean[0], mean[1], mean[2], mean[3], mean[4] > 0.5)
