"""How far a point and a load lie outside what was measured, in steps of each lever's own grid.

Inside the hull a prediction is interpolation. Up to one step outside, intervals widen; beyond, a profile refuses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pals.core.load import Mix
from pals.core.quantities import OperatingPoint
from pals.models.row import ProfileRow

FloatArray = NDArray[np.float64]
WIDER_PER_STEP = 2.0  # one step outside, half widths are 1 + this times as large ...
CORNER = 0.06  # ... and this much more: below the lowest limit physics may turn a corner
WIDER_BETWEEN = 0.15  # a step from the next level measured, half widths are 1 + this times as large


class Range(NamedTuple):
    """What was measured of one lever: ends, and the step that counts as one; on a logarithmic scale where that is natural."""

    low: float
    high: float
    step: float
    levels: FloatArray

    def between(self, values: FloatArray) -> FloatArray:
        """Steps to the nearest level measured, at most 1."""
        return np.asarray(np.minimum(1.0, np.abs(values[:, None] - self.levels).min(axis=1) / self.step))

    def outside(self, values: FloatArray) -> FloatArray:
        """Steps outside, 0 inside."""
        return np.asarray(np.maximum(0.0, np.maximum(self.low - values, values - self.high)) / self.step)


class Hull(NamedTuple):
    """Ranges of the levers and of the load; None where nothing was measured."""

    limit_w: Range
    clock_mhz: Range | None  # of locks
    sequences: Range  # log2
    prefill: Range  # log2 of prompt tokens per output token
    context: Range  # log2 of KV tokens

    def outside(self, points: Sequence[OperatingPoint], mix: Mix, *, launch: int, context_tokens: float) -> FloatArray:
        """Steps outside of each point under this load, the largest of all levers; infinite where a lock was never measured."""
        limits = np.array([p.power_limit_w for p in points])
        n = np.log2([float(p.active_sequences or launch) for p in points])
        load = max(
            float(self.prefill.outside(np.array(math.log2(mix.prefill_per_output)))),
            float(self.context.outside(np.array(math.log2(context_tokens)))),
        )
        far = np.maximum(np.maximum(self.limit_w.outside(limits), self.sequences.outside(n)), load)
        locked = np.array([p.sm_clock_mhz is not None for p in points])
        if not locked.any():
            return np.asarray(far)
        if self.clock_mhz is None:
            return np.where(locked, np.inf, far)
        mhz = np.array([float(p.sm_clock_mhz or 0) for p in points])
        # above the highest lock lies the free clock, which was measured
        below = np.maximum(0.0, self.clock_mhz.low - mhz) / self.clock_mhz.step
        return np.where(locked, np.maximum(far, below), far)

    def between(self, points: Sequence[OperatingPoint], *, launch: int) -> FloatArray:
        """Steps from each point to the nearest level measured of the levers it moves, the largest of them, at most 1."""
        free = self.limit_w.between(np.array([p.power_limit_w for p in points]))
        n = self.sequences.between(np.log2([float(p.active_sequences or launch) for p in points]))
        if self.clock_mhz is None:
            return np.asarray(np.maximum(free, n))
        mhz = self.clock_mhz.between(np.array([float(p.sm_clock_mhz or self.clock_mhz.low) for p in points]))
        return np.asarray(np.maximum(np.maximum(free, n), mhz))


def hull_of(rows: Sequence[ProfileRow], mixes: Sequence[Mix]) -> Hull | None:
    """The hull of measured rows; None for none."""
    if not rows:
        return None
    locks = [float(r.sm_clock_lock_mhz) for r in rows if r.sm_clock_lock_mhz is not None]
    seen = [mixes[i] for i in sorted({r.mix for r in rows})]
    return Hull(
        limit_w=_range([r.power_limit_w for r in rows], least_step=1.0),
        clock_mhz=_range(locks, least_step=15.0) if locks else None,
        sequences=_range([math.log2(r.active_sequences) for r in rows], least_step=1.0),
        prefill=_range([math.log2(m.prefill_per_output) for m in seen], least_step=1.0),
        context=_range([math.log2(m.context_tokens) for m in seen], least_step=1.0),
    )


def _range(values: Sequence[float], *, least_step: float) -> Range:
    """Ends and mean step of the distinct levels; a lone level's step is `least_step`, or a tenth of it."""
    levels = sorted(set(values))
    span = levels[-1] - levels[0]
    step = span / (len(levels) - 1) if len(levels) > 1 else 0.1 * abs(levels[0])
    return Range(levels[0], levels[-1], max(least_step, step), np.array(levels))
