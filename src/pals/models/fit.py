"""Fitting a profile: robust least squares of log quantities over rows, priors as further residuals, intervals calibrated.

What a quantity's rows scatter about the fit, each as if it had been left out, becomes its noise; and the factor on the
predicted deviation that holds nine tenths of those residuals becomes its interval's (a jackknife, linearised).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pals.core.errors import INSTALL, ConfigError
from pals.core.load import Mix
from pals.models.engine_facts import EngineFacts
from pals.models.observed import FIRST_NOISE, Conditions, conditions_of, jacobian, observations_of, told
from pals.models.parameters import NAMES, values_of
from pals.models.physics import Base, base_of
from pals.models.row import ProfileRow

FloatArray = NDArray[np.float64]

ROBUST_AT = 2.0  # standard deviations beyond which a residual counts linearly
STEPS = 40
TOLERANCE = 3e-4
PASSES = 2  # the noise found in the first weighs the second
SHARE = 0.9  # of the intervals
NORMAL_HALF_WIDTH = 1.645  # of a normal law at that share
WIDEST, NARROWEST = 3.0, 0.4  # what noise may become, relative to FIRST_NOISE
ENOUGH = 12  # rows of a quantity before its noise and width are its own
LEAST_WIDTH = 0.1  # where rows agree to the last digit, as a clock that never left its top: others need not
FEW_ROWS = 2.0  # of which over their number widths grow: a quantile of few rows is itself uncertain


class Calibration(NamedTuple):
    """What the rows say of the fit's honesty, by quantity of OBSERVED, then UNSEEN."""

    noise: FloatArray  # relative deviation of a row
    width: FloatArray  # half an interval, in predicted deviations
    error: FloatArray  # median absolute relative error of rows left out; NaN where none was measured
    in_sample: FloatArray


class Fit(NamedTuple):
    """Where a fit came to rest."""

    x: FloatArray
    calibration: Calibration


def fit_rows(rows: Sequence[ProfileRow], mixes: Sequence[Mix], facts: EngineFacts) -> Fit:
    """Fit `rows`; with none, what the priors say.

    Raises:
        ConfigError: scipy is not installed.
    """
    b = base_of(facts)
    x, noise = np.zeros(len(NAMES)), FIRST_NOISE.copy()
    if not rows:
        width = np.full(len(FIRST_NOISE), NORMAL_HALF_WIDTH)
        unknown = np.full(len(FIRST_NOISE), np.nan)
        return Fit(x, Calibration(noise, width, unknown, unknown))
    measured = _Measured(b, conditions_of(rows, mixes, b.step_tokens), observations_of(rows))
    for _ in range(PASSES):
        x = _least_squares(x, measured, noise)
        left_out, spread = _left_out(x, measured, noise)
        noise = _noise(left_out, spread, noise)
    left_out, spread = _left_out(x, measured, noise)
    return Fit(x, _calibrated(left_out, spread, noise, measured.off(x)))


class _Measured(NamedTuple):
    """Rows as the fit takes them: what holds for each, and logarithms of what was seen, shape (quantities, rows)."""

    base: Base
    at: Conditions
    seen: FloatArray

    def off(self, x: FloatArray) -> FloatArray:
        """Seen less told."""
        return self.seen - told(values_of(x), self.base, self.at)


def _least_squares(x: FloatArray, measured: _Measured, noise: FloatArray) -> FloatArray:
    try:
        from scipy.optimize import least_squares
    except ImportError as e:
        raise ConfigError(f"fitting a profile needs scipy ({e}); {INSTALL}. Nothing was fitted") from e
    known = np.isfinite(measured.seen)

    def off(trial: FloatArray) -> FloatArray:
        return np.asarray((-measured.off(trial) / noise[:, None])[known])

    def residuals(trial: FloatArray) -> FloatArray:
        r = off(trial)
        soft = ROBUST_AT * np.sqrt(2.0 * (np.sqrt(1.0 + (r / ROBUST_AT) ** 2) - 1.0)) * np.sign(r)
        return np.concatenate([soft, trial])  # priors are never cut

    def slopes(trial: FloatArray) -> FloatArray:
        r = off(trial)
        root = np.sqrt(1.0 + (r / ROBUST_AT) ** 2)
        soft = ROBUST_AT * np.sqrt(np.maximum(1e-24, 2.0 * (root - 1.0)))
        gain = np.where(np.abs(r) < 1e-6, 1.0, np.abs(r) / (root * np.maximum(soft, 1e-12)))
        moved = (jacobian(trial, measured.base, measured.at) / noise[:, None, None])[known]
        return np.concatenate([gain[:, None] * moved, np.eye(len(trial))])

    found: Any = least_squares(residuals, x, jac=slopes, max_nfev=STEPS, ftol=TOLERANCE, xtol=TOLERANCE, gtol=TOLERANCE)
    return np.asarray(found.x)


class _Weighted(NamedTuple):
    """Slopes and residuals of rows in units of noise, and how much each counts, shapes (quantities, rows[, parameters])."""

    slopes: FloatArray
    off: FloatArray
    weight: FloatArray  # 0 where nothing was measured, below 1 where robustness cuts

    @property
    def precision(self) -> FloatArray:
        """Inverse covariance of the parameters, priors included."""
        scaled = self.slopes * np.sqrt(self.weight)[:, :, None]
        return np.asarray(np.eye(self.slopes.shape[2]) + np.einsum("qri,qrj->ij", scaled, scaled, optimize=True))


def precision_at(
    x: FloatArray, b: Base, *, rows: Sequence[ProfileRow], mixes: Sequence[Mix], noise: FloatArray
) -> FloatArray:
    """Inverse covariance of x after these rows, priors included."""
    if not rows:
        return np.eye(len(x))
    measured = _Measured(b, conditions_of(rows, mixes, b.step_tokens), observations_of(rows))
    return _weighted(x, measured, noise).precision


def _weighted(x: FloatArray, measured: _Measured, noise: FloatArray) -> _Weighted:
    off = measured.off(x) / noise[:, None]
    known = np.isfinite(off)
    off = np.where(known, off, 0.0)
    weight = np.where(known, 1.0 / np.sqrt(1.0 + (off / ROBUST_AT) ** 2), 0.0)
    return _Weighted(jacobian(x, measured.base, measured.at) / noise[:, None, None], off, weight)


def _left_out(x: FloatArray, measured: _Measured, noise: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Residuals of rows as if each had not been fitted, and the prediction's deviation there; shape (quantities, rows).

    A row's quantities are left out together: they come from one window.
    """
    w = _weighted(x, measured, noise)
    covariance = np.linalg.inv(w.precision)
    left, spread = np.empty_like(w.off), np.empty_like(w.off)
    for i in range(w.off.shape[1]):
        root = np.sqrt(np.maximum(w.weight[:, i], 1e-12))
        s = w.slopes[:, i] * root[:, None]
        hat = s @ covariance @ s.T
        solved = np.linalg.solve(np.eye(len(root)) - hat, np.column_stack([w.off[:, i] * root, hat]))
        left[:, i] = solved[:, 0] / root
        spread[:, i] = np.sqrt(np.maximum(np.diag(solved[:, 1:]), 0.0)) / root
    return np.where(w.weight > 0, left, np.nan) * noise[:, None], spread * noise[:, None]


def _noise(left_out: FloatArray, spread: FloatArray, noise: FloatArray) -> FloatArray:
    """Deviation of rows that is left when the prediction's own is taken away, robustly."""
    found = noise.copy()
    for q, first in enumerate(FIRST_NOISE):
        values = left_out[q][np.isfinite(left_out[q])]
        if len(values) < ENOUGH:
            continue
        scale = 1.4826 * float(np.median(np.abs(values)))
        own = float(np.median(spread[q][np.isfinite(left_out[q])]))
        found[q] = min(WIDEST * first, max(NARROWEST * first, math.sqrt(max(0.0, scale**2 - own**2))))
    return found


def _calibrated(left_out: FloatArray, spread: FloatArray, noise: FloatArray, off: FloatArray) -> Calibration:
    width, error, inside = (np.full(len(FIRST_NOISE), v) for v in (NORMAL_HALF_WIDTH, np.nan, np.nan))
    for q in range(len(FIRST_NOISE)):
        known = np.isfinite(left_out[q])
        if not known.any():
            continue
        error[q] = float(np.median(np.abs(np.expm1(np.clip(left_out[q][known], -5.0, 5.0)))))
        inside[q] = float(np.median(np.abs(np.expm1(off[q][known]))))
        count = int(known.sum())
        if count >= ENOUGH:
            ratio = np.abs(left_out[q][known]) / np.hypot(spread[q][known], noise[q])
            width[q] = max(LEAST_WIDTH, float(np.quantile(ratio, min(1.0, SHARE * (1.0 + 1.0 / count)))))
        width[q] *= 1.0 + FEW_ROWS / count
    return Calibration(noise, width, error, inside)
