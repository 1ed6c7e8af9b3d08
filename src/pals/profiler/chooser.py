"""Chooses point after point: corners, repeats, then what the model says it would learn most from per second; no I/O.

The sweep stops by the mean over all candidates of what the model says of its own error, in power or in step time,
whichever is larger: the largest of all candidates would be ruled by one corner that nobody visits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from pals.core.load import Mix
from pals.core.quantities import SAME_LIMIT_W
from pals.models.engine_facts import EngineFacts
from pals.models.forecast import FloatArray
from pals.models.row import ProfileRow
from pals.profiler.costs import seconds_of
from pals.profiler.design import Candidate, Mask, Space, SweepModel, gains, next_corner, scores
from pals.profiler.plan import SweepPlan
from pals.profiler.repeats import due_repeat, is_at
from pals.profiler.visit import Visited

REFIT_EVERY = 4  # rows; in between the precision grows by the sensitivities of what was measured
STOP_OUTPUTS = 2  # power and step time decide when to stop; tails are noisy and only guide


class Fit(Protocol):
    """Fits a model to the rows so far; with none, it says what the priors say."""

    def __call__(self, rows: Sequence[ProfileRow], mixes: Sequence[Mix], facts: EngineFacts, /) -> SweepModel: ...


@dataclass(slots=True)
class Chooser:
    """What is to be measured next, given the rows; refits now and then."""

    plan: SweepPlan
    facts: EngineFacts
    fit: Fit
    space: Space = field(init=False)
    error: float | None = None
    _model: SweepModel | None = None
    _sensitivities: FloatArray = field(init=False)
    _precision: FloatArray = field(init=False)
    _fitted: int = 0  # rows the model was fitted to
    _left_out: set[Candidate] = field(default_factory=set)
    _now: Candidate | None = None

    def __post_init__(self) -> None:
        self.space = Space.of(self.plan, self.facts)

    def next(self, rows: Sequence[ProfileRow], seconds_left: float) -> Candidate | None:
        """The next point; None: the rows suffice, or the budget does not."""
        if len(rows) >= self.plan.points:
            return None
        seconds = seconds_of(self.space, rows, self.plan, self.facts, self._now)
        wanted = next_corner(self.space, rows, self._left_out, self.facts)
        if wanted is None:
            self.learn(rows)
            if self.error is not None and self.error <= self.plan.error:
                return None
            wanted = self._repeat(rows) or self._best(rows, seconds, seconds_left)
        if wanted is None or seconds[self.space.candidates.index(wanted)] > seconds_left:
            return None
        return wanted

    def visited(self, wanted: Candidate, visited: Visited) -> None:
        """Remember where the engine is, and what is not to be tried again."""
        self._now, row = wanted, visited.row
        if row is None or not is_at(row, wanted.point, wanted.mix):
            self._left_out.add(wanted)
        if row is not None and row.power_limit_w < wanted.point.power_limit_w - SAME_LIMIT_W:
            self._lower(row.power_limit_w)
        if visited.lock_refused:
            self._left_out.update(c for c in self.space.candidates if c.point.sm_clock_mhz is not None)

    def _lower(self, ceiling_w: float) -> None:
        """Somebody else holds the limit down: that is the highest now."""
        below = {w for w in self.plan.limits_w if w < ceiling_w - SAME_LIMIT_W}
        self.plan = replace(self.plan, limits_w=tuple(sorted({*below, ceiling_w})))
        self.space, self._model = Space.of(self.plan, self.facts), None

    def learn(self, rows: Sequence[ProfileRow]) -> None:
        """Fit again where enough is new, once the corners are measured; else add what the newest row tells."""
        if not rows or next_corner(self.space, rows, self._left_out, self.facts) is not None:
            return
        new = len(rows) - self._fitted
        if self._model is None or new >= REFIT_EVERY or (new and len(rows) >= self.plan.points):
            self._refit(rows)

    def _refit(self, rows: Sequence[ProfileRow]) -> None:
        self._model = self.fit(rows, self.space.mixes, self.facts)
        self._fitted = len(rows)
        points, loads = self.space.points, self.space.loads
        with np.errstate(
            invalid="ignore"
        ):  # far from what was measured a first fit may say nonsense: it counts for nothing
            self._sensitivities = np.nan_to_num(self._model.sensitivities(points, loads))
        self._precision = self._model.precision
        sd = np.nan_to_num(self._model.relative_sd(points, loads))[self.space.possible(rows)]
        self.error = float(sd[:, :STOP_OUTPUTS].mean(axis=0).max())

    def _repeat(self, rows: Sequence[ProfileRow]) -> Candidate | None:
        row = due_repeat(rows)
        at = self.space.where(row) if row is not None else None
        found = self.space.candidates[at] if at is not None else None
        return found if found not in self._left_out else None

    def _best(self, rows: Sequence[ProfileRow], seconds: FloatArray, seconds_left: float) -> Candidate | None:
        """The free candidate that promises most per second."""
        possible = self.space.possible(rows)
        free = possible & ~self.space.measured(rows) & (seconds <= seconds_left) & self._kept()
        if not free.any():
            return None
        covariance = np.asarray(np.linalg.inv(self._precision_with(rows[self._fitted :])), dtype=np.float64)
        gain = gains(self._sensitivities, covariance, possible)
        score = np.where(free, scores(self.space, rows, gain, seconds), -np.inf)
        order = np.random.default_rng(self.plan.seed).permutation(len(score))
        return self.space.candidates[int(order[np.argmax(score[order])])]

    def _kept(self) -> Mask:
        return np.array([c not in self._left_out for c in self.space.candidates])

    def _precision_with(self, rows: Sequence[ProfileRow]) -> FloatArray:
        """The model's precision, and what rows measured since its fit add."""
        precision = self._precision
        for at in map(self.space.where, rows):
            if at is not None:
                precision = precision + self._sensitivities[at].T @ self._sensitivities[at]
        return precision
