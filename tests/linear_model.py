"""A small stand-in for the fitted model: logarithms that are linear in a few features, least squares with a weak prior."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pals.core.load import Mix
from pals.core.quantities import OperatingPoint
from pals.models.engine_facts import EngineFacts
from pals.models.forecast import FloatArray
from pals.models.row import ProfileRow

NOISE = np.array([0.02, 0.03, 0.06, 0.1])  # of the four outputs, relative
PRIOR = 0.5


@dataclass(frozen=True)
class LinearModel:
    """Power, step time and two tails, each with parameters of its own; a `SweepModel`."""

    facts: EngineFacts
    mean: FloatArray  # shape (outputs, features)
    covariance: FloatArray  # of all parameters

    def features(self, points: Sequence[OperatingPoint], mixes: Sequence[Mix]) -> FloatArray:
        limit = np.log([p.power_limit_w / self.facts.max_limit_w for p in points])
        clock = np.log([(p.sm_clock_mhz or self.facts.max_sm_clock_mhz) / self.facts.max_sm_clock_mhz for p in points])
        batch = np.log([p.active_sequences or 1 for p in points])
        share = np.array([m.prefill_share for m in mixes]) - 0.5
        return np.stack(
            [np.ones(len(points)), limit, limit**2, clock, clock**2, batch, batch**2, share, share * batch], 1
        )

    def predict(self, points: Sequence[OperatingPoint], mixes: Sequence[Mix]) -> FloatArray:
        """Power and step time, shape (points, 2)."""
        return np.exp(self.features(points, mixes) @ self.mean[:2].T)

    def sensitivities(self, points: Sequence[OperatingPoint], mixes: Sequence[Mix], /) -> FloatArray:
        x = self.features(points, mixes)
        s = np.zeros((len(x), len(NOISE), len(NOISE) * x.shape[1]))
        for o, noise in enumerate(NOISE):
            s[:, o, o * x.shape[1] : (o + 1) * x.shape[1]] = x / noise
        return s

    @property
    def precision(self) -> FloatArray:
        return np.asarray(np.linalg.inv(self.covariance))

    def relative_sd(self, points: Sequence[OperatingPoint], mixes: Sequence[Mix], /) -> FloatArray:
        s = self.sensitivities(points, mixes) * NOISE[:, None]
        return np.asarray(np.sqrt(np.einsum("nop,pq,noq->no", s, self.covariance, s)))


def linear_fit(rows: Sequence[ProfileRow], mixes: Sequence[Mix], facts: EngineFacts, /) -> LinearModel:
    """Fit power and step time; the tails follow step time."""
    width = 9
    empty = LinearModel(facts, np.zeros((4, width)), np.eye(4 * width) / PRIOR)
    if not rows:
        return empty
    points, loads = [r.point for r in rows], [mixes[r.mix] for r in rows]
    x, s = empty.features(points, loads), empty.sensitivities(points, loads)
    y = np.log([(r.power_w, 1 / r.steps_per_s) for r in rows])
    beta = np.linalg.solve(x.T @ x + 1e-6 * np.eye(width), x.T @ y).T
    precision = PRIOR * np.eye(4 * width) + np.einsum("nop,noq->pq", s, s)
    return LinearModel(facts, np.vstack([beta, beta[1:], beta[1:]]), np.linalg.inv(precision))
