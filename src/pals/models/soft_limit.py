"""Power of one board under a limit: the soft minimum of the limit and its natural draw.

P = (limit^-q + natural^-q)^(-1/q). Far from the corner it is the smaller of the two; near it, it lies below both,
because an engine's draw is no constant: the limit cuts the prefill bursts of a mean that lies below it. The steadier
the draw, the larger q. Natural draw is a quadratic in log n, fitted together with q to all rows, so that a highest
limit which itself binds does no harm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
SHARPNESS = tuple(float(q) for q in np.geomspace(2.0, 60.0, 64))  # tried, softest first; at 60 the corner is hard
DEGREE = 2
STEPS = 40
UNDETERMINED = 1e-3  # directions this much weaker than the strongest are left as they started


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftLimit:
    """A board's draw at a power limit and so many active sequences."""

    natural: tuple[float, ...]  # coefficients of log natural draw, W, in log(n / 16), rising powers
    sharpness: float  # q

    def natural_draw_w(self, active_sequences: FloatArray) -> FloatArray:
        """Draw with no limit binding, W; shape as given."""
        draw_w: FloatArray = np.exp(_terms(active_sequences, len(self.natural)) @ np.array(self.natural))
        return draw_w

    def power_w(self, power_limit_w: FloatArray, active_sequences: FloatArray) -> FloatArray:
        """Draw of one board, W, never above the limit; arguments of one shape (points,)."""
        return soft_minimum(power_limit_w, self.natural_draw_w(active_sequences), self.sharpness)


def soft_minimum(a: FloatArray, b: FloatArray, sharpness: float) -> FloatArray:
    """(a^-q + b^-q)^(-1/q), without overflow."""
    low, high = np.minimum(a, b), np.maximum(a, b)
    soft: FloatArray = low * (1.0 + (low / high) ** sharpness) ** (-1.0 / sharpness)
    return soft


def fit_soft_limit(*, power_limit_w: FloatArray, active_sequences: FloatArray, power_w: FloatArray) -> SoftLimit:
    """Least squares in logs over rows of shape (rows,), all per board; the best of `SHARPNESS`."""
    top = power_limit_w == power_limit_w.max()
    count = min(DEGREE, len(set(active_sequences)) - 1) + 1
    start = np.zeros(count)
    usable = min(count, len(set(active_sequences[top])))
    start[:usable] = np.linalg.lstsq(_terms(active_sequences[top], usable), np.log(power_w[top]), rcond=None)[0]
    tried = [_natural(power_limit_w, active_sequences, power_w, start, q) for q in SHARPNESS]
    best = min(range(len(tried)), key=lambda i: tried[i][1])
    return SoftLimit(natural=tuple(float(c) for c in tried[best][0]), sharpness=SHARPNESS[best])


def _natural(
    limit_w: FloatArray, n: FloatArray, power_w: FloatArray, start: FloatArray, sharpness: float
) -> tuple[FloatArray, float]:
    """Gauss-Newton with step halving for the natural draw at one sharpness: coefficients and squared error."""
    terms = _terms(n, len(start))

    def error_of(coefficients: FloatArray) -> tuple[FloatArray, FloatArray]:
        draw_w = np.exp(terms @ coefficients)
        told_w = soft_minimum(limit_w, draw_w, sharpness)
        return np.log(power_w / told_w), terms * ((told_w / draw_w) ** sharpness)[:, None]

    best = start
    error, slope = error_of(best)
    for _ in range(STEPS):
        step, *_ = np.linalg.lstsq(slope, error, rcond=UNDETERMINED)
        step = np.clip(step, -0.5, 0.5)
        while np.abs(step).max() > 1e-9:
            new_error, new_slope = error_of(best + step)
            if new_error @ new_error < error @ error:
                break
            step = step / 2
        else:
            break
        best, error, slope = best + step, new_error, new_slope
    return best, float(error @ error)


def _terms(n: FloatArray, count: int) -> FloatArray:
    return np.vander(np.log(np.asarray(n) / 16.0), count, increasing=True)
