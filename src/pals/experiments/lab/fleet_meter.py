"""Notes what all engines of a fleet draw and give together, tick by tick; powers are the plant's, never a meter's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pals.core.quantities import Budget, Slo
from pals.experiments.lab.figures import WINDOW_S
from pals.plant.replica import Replica

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetLedger:
    """One line a tick of the measured span, shape (ticks,) or (ticks, engines)."""

    time_s: FloatArray
    energy_j: FloatArray  # boards of each engine, shape (ticks, engines)
    tokens: FloatArray  # put out so far, the same shape
    waiting: FloatArray  # requests, the same shape
    budget_w: FloatArray  # of all boards, in force from this tick on; NaN: none
    targets_tokens_s: FloatArray  # of each engine; NaN: none

    @property
    def span_s(self) -> float:
        """From the first tick to the last."""
        return float(self.time_s[-1] - self.time_s[0])

    def windows(self, width_s: float = WINDOW_S) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Of windows side by side: where each begins, mean power of all boards, mean budget; shape (windows,), s and W."""
        step = max(1, round(width_s / float(self.time_s[1] - self.time_s[0])))
        edges = np.arange(0, len(self.time_s), step)
        energy_j = self.energy_j.sum(axis=1)[edges]
        lasted_s = np.diff(self.time_s[edges])
        budget_w = np.array([self.budget_w[a:b].mean() for a, b in pairwise(edges)])
        return self.time_s[edges[:-1]], np.diff(energy_j) / lasted_s, budget_w

    def throughput_missed(self, width_s: float) -> list[float]:
        """Share of control periods whose last `width_s` gave less than the target, of each engine.

        Periods at whose end nobody waits do not miss, as in `pals.control.estimator.violations`.
        """
        step = max(1, round(width_s / float(self.time_s[1] - self.time_s[0])))
        if len(self.time_s) <= step:
            return [0.0] * self.tokens.shape[1]
        rate = (self.tokens[step:] - self.tokens[:-step]) / (self.time_s[step:] - self.time_s[:-step])[:, None]
        missed = (rate < self.targets_tokens_s) & (self.waiting[step:] > 0)
        return [float(m) for m in missed.mean(axis=0)]


class FleetMeter:
    """Notes from `start_s` on."""

    def __init__(self, replicas: Sequence[Replica], slos: Sequence[Slo], start_s: float) -> None:
        self._replicas, self._start_s = replicas, start_s
        targets = [s.throughput_tokens_s for s in slos]
        self._targets = np.array([np.nan if t is None else t for t in targets])
        self._lines: list[tuple[float, float, list[tuple[float, int, int]]]] = []

    def observe(self, now_s: float, budget: Budget) -> None:
        """After all engines' ticks of this moment."""
        if now_s < self._start_s:
            return
        engines = [(r.energy_j(), r.counters()) for r in self._replicas]
        budget_w = np.nan if budget.power_w is None else budget.power_w
        self._lines.append((now_s, budget_w, [(j, c.output_tokens, c.waiting) for j, c in engines]))

    def ledger(self) -> FleetLedger:
        """What was noted.

        Raises:
            ValueError: fewer than two ticks lie in the span.
        """
        if len(self._lines) < 2:
            raise ValueError(f"the run ended {len(self._lines)} ticks into its measured span; two are needed")
        each = np.array([line[2] for line in self._lines], dtype=float)
        return FleetLedger(
            time_s=np.array([line[0] for line in self._lines]), energy_j=each[..., 0], tokens=each[..., 1], waiting=each[..., 2],
            budget_w=np.array([line[1] for line in self._lines]), targets_tokens_s=self._targets,
        )  # fmt: skip
