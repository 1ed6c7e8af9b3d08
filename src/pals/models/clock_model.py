"""Throughput and power at a locked SM clock: two quadratics in (log clock, log active sequences), fitted to locked rows.

Kept apart from the limit's model on purpose: a later model with the boards' physics in it replaces this one alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
DEGREE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockModel:
    """The two fits, with no limit binding; inputs are clipped to what was measured."""

    exponents: tuple[tuple[int, int], ...]  # of log clock and log sequences, one pair a term
    throughput: tuple[float, ...]  # coefficients of log tokens/s
    power: tuple[float, ...]  # coefficients of log W, all boards
    clock_range_mhz: tuple[float, float]
    n_range: tuple[float, float]

    def predict(self, sm_clock_mhz: FloatArray, active_sequences: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Output tokens per second and watts of all boards; arguments of shape (points,)."""
        mhz = np.clip(sm_clock_mhz, *self.clock_range_mhz)
        n = np.clip(active_sequences, *self.n_range)
        terms = _terms(mhz, n, self.exponents)
        return np.exp(terms @ np.array(self.throughput)), np.exp(terms @ np.array(self.power))


def fit_clocks(
    *, sm_clock_mhz: FloatArray, active_sequences: FloatArray, tokens_per_s: FloatArray, power_w: FloatArray
) -> ClockModel:
    """Least squares in logs over rows of shape (rows,); the degree falls where there are few distinct levels."""
    of_clock = min(DEGREE, len(set(sm_clock_mhz)) - 1)
    of_n = min(DEGREE, len(set(active_sequences)) - 1)
    exponents = tuple((i, j) for i in range(of_clock + 1) for j in range(of_n + 1) if i + j <= DEGREE)
    terms = _terms(sm_clock_mhz, active_sequences, exponents)

    def coefficients(values: FloatArray) -> tuple[float, ...]:
        return tuple(float(c) for c in np.linalg.lstsq(terms, np.log(values), rcond=None)[0])

    return ClockModel(
        exponents=exponents,
        throughput=coefficients(tokens_per_s),
        power=coefficients(power_w),
        clock_range_mhz=(float(sm_clock_mhz.min()), float(sm_clock_mhz.max())),
        n_range=(float(active_sequences.min()), float(active_sequences.max())),
    )


def _terms(mhz: FloatArray, n: FloatArray, exponents: Sequence[tuple[int, int]]) -> FloatArray:
    x, y = np.log(mhz / 1000.0), np.log(n / 16.0)
    return np.stack([x**i * y**j for i, j in exponents], axis=1)
