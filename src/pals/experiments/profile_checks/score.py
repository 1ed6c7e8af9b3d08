"""How far answers are from what was measured: relative errors, refusals, and whether intervals hold the truth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pals.experiments.profile_checks.question import FloatArray, Told

SLACK = 1e-9  # of a comparison of floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Sums over tested rows, so that scores add up."""

    asked: int = 0  # rows with a measured figure
    answered: int = 0
    error_sum: float = 0.0  # of |predicted / measured - 1| over those answered
    judged: int = 0  # answered with an interval
    inside: int = 0  # of these: the truth lies in it
    width_sum: float = 0.0  # of (high - low) / value
    farthest: float = 0.0  # that a truth lay outside its interval, relative to the nearer end

    def __add__(self, other: Score) -> Score:
        return Score(
            asked=self.asked + other.asked,
            answered=self.answered + other.answered,
            error_sum=self.error_sum + other.error_sum,
            judged=self.judged + other.judged,
            inside=self.inside + other.inside,
            width_sum=self.width_sum + other.width_sum,
            farthest=max(self.farthest, other.farthest),
        )

    @property
    def mape(self) -> float | None:
        """Mean absolute relative error of what was answered; None: nothing was."""
        return self.error_sum / self.answered if self.answered else None

    @property
    def coverage(self) -> float | None:
        """Share of intervals that hold the truth; None: there are none."""
        return self.inside / self.judged if self.judged else None

    @property
    def width(self) -> float | None:
        """Mean width of the intervals relative to the value; None: there are none."""
        return self.width_sum / self.judged if self.judged else None

    @property
    def refused(self) -> int:
        """Rows that the method declined."""
        return self.asked - self.answered

    @property
    def confident_misses(self) -> int:
        """Rows answered with an interval that does not hold the truth."""
        return self.judged - self.inside


def score(told: Told, truth: FloatArray, among: FloatArray | None = None) -> Score:
    """Compare; `truth` NaN: not measured, not asked. `among` (bool) restricts the rows, to those another method answered."""
    known = np.isfinite(truth) if among is None else np.isfinite(truth) & among.astype(bool)
    answered = known & np.isfinite(told.value)
    value, true = told.value[answered], truth[answered]
    plain = Score(
        asked=int(known.sum()), answered=int(answered.sum()), error_sum=float(np.abs(value / true - 1.0).sum())
    )
    if told.low is None or told.high is None:
        return plain
    low, high = told.low[answered], told.high[answered]
    beyond = np.maximum(np.maximum(low / true - 1.0, 1.0 - high / true), 0.0)
    inside = beyond <= SLACK
    return plain + Score(
        judged=len(true),
        inside=int(inside.sum()),
        width_sum=float(((high - low) / value).sum()),
        farthest=float(beyond[~inside].max(initial=0.0)),
    )


def added(scores: Iterable[Score]) -> Score:
    """All of them together."""
    total = Score()
    for one in scores:
        total = total + one
    return total


def spread_of(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, median and largest."""
    return float(np.mean(values)), float(np.median(values)), float(np.max(values))
