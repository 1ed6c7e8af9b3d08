"""The rivals: what others fit to the same rows. Each learns logarithms of figures, which suits the relative errors counted.

Features: limit, lock (the top clock where there is none), active sequences, and the mix's prompt and output tokens. None of
them knows physics or an interval, or refuses; outside the rows a forest and boosting hold their last value, interpolation too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pals.core.load import Mix
from pals.experiments.profile_checks.question import (
    FloatArray,
    Learned,
    Method,
    Question,
    Told,
    questions_of,
    truth_of,
)
from pals.models.engine_facts import EngineFacts
from pals.models.row import ProfileRow

TREES = 300
SEED = 0  # of the trees' draws
RIDGE = 1e-6  # keeps a polynomial solvable where rows lack a level
Guess = Callable[[FloatArray], FloatArray]  # features of shape (questions, features) to one figure each
Learner = Callable[[FloatArray, FloatArray], Guess]


@dataclass(frozen=True, slots=True)
class Fit:
    """One fitted function a quantity."""

    guesses: Mapping[str, Guess]
    mixes: tuple[Mix, ...]
    top_mhz: float

    def answer(self, questions: Sequence[Question], quantities: Sequence[str]) -> Mapping[str, Told]:
        """Values alone."""
        asked = features_of(questions, self.mixes, self.top_mhz)
        return {q: Told(np.exp(self.guesses[q](asked))) for q in quantities if q in self.guesses}


def rival(learn: Learner) -> Method:
    """A method of a learner: one function a quantity, on the rows that measured it."""

    def method(
        rows: Sequence[ProfileRow], mixes: Sequence[Mix], facts: EngineFacts, quantities: Sequence[str]
    ) -> Learned:
        asked, guesses = features_of(questions_of(rows), mixes, facts.max_sm_clock_mhz), {}
        for quantity in quantities:
            truth = truth_of(rows, quantity)
            known = np.isfinite(truth)
            if known.any():
                guesses[quantity] = learn(asked[known], np.log(truth[known]))
        return Fit(guesses, tuple(mixes), facts.max_sm_clock_mhz)

    return method


def features_of(questions: Sequence[Question], mixes: Sequence[Mix], top_mhz: float) -> FloatArray:
    """Logarithms of limit, clock ceiling, sequences, prompt and output tokens; shape (questions, 5)."""
    rows = [
        (
            q.point.power_limit_w,
            q.point.sm_clock_mhz or top_mhz,
            q.point.active_sequences or 1,
            mixes[q.mix].prompt_tokens,
            mixes[q.mix].output_tokens,
        )
        for q in questions
    ]
    return np.log(np.array(rows, dtype=np.float64))


def forest(features: FloatArray, target: FloatArray) -> Guess:
    """The paper's random forest: 300 trees."""
    from sklearn.ensemble import RandomForestRegressor

    return _predict(RandomForestRegressor(TREES, random_state=SEED, n_jobs=1).fit(features, target))


def boosting(features: FloatArray, target: FloatArray) -> Guess:
    """Gradient boosting with scikit-learn's defaults."""
    from sklearn.ensemble import GradientBoostingRegressor

    return _predict(GradientBoostingRegressor(random_state=SEED).fit(features, target))


def polynomial(features: FloatArray, target: FloatArray) -> Guess:
    """Nine terms in logarithms: limit and batch with their squares, clock, prompt, output, and batch × prompt/output."""
    middle, scale = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-9)

    def terms(asked: FloatArray) -> FloatArray:
        limit, clock, batch, prompt, output = ((asked - middle) / scale).T
        mix = asked[:, 3] - asked[:, 4] - (middle[3] - middle[4])
        one = np.ones_like(limit)
        return np.stack([one, limit, limit**2, batch, batch**2, clock, prompt, output, batch * mix], axis=1)

    a = terms(features)
    solved = np.linalg.solve(a.T @ a + RIDGE * np.eye(a.shape[1]), a.T @ target)
    return lambda asked: np.asarray(terms(asked) @ solved)


def interpolation(features: FloatArray, target: FloatArray) -> Guess:
    """Cubic radial basis functions through every row, features scaled to the rows' range and clipped to it outside."""
    from scipy.interpolate import RBFInterpolator

    low, span = features.min(axis=0), np.ptp(features, axis=0)
    used = span > 0

    def scaled(asked: FloatArray) -> FloatArray:
        return np.asarray(np.clip((asked[:, used] - low[used]) / span[used], 0.0, 1.0))

    places, inverse = np.unique(scaled(features), axis=0, return_inverse=True)  # repeats count once, by their mean
    means = np.bincount(inverse.ravel(), weights=target) / np.bincount(inverse.ravel())
    if len(places) < 2:
        return lambda asked: np.full(len(asked), float(target.mean()))
    flat = np.linalg.matrix_rank(np.column_stack([np.ones(len(places)), places])) <= places.shape[1]  # no plane fits
    kernel = {"kernel": "linear", "degree": 0} if flat else {"kernel": "cubic", "degree": 1}
    through = RBFInterpolator(places, means, **kernel)
    return lambda asked: np.asarray(through(scaled(asked)))


def _predict(model: Any) -> Guess:
    return lambda asked: np.asarray(model.predict(asked), dtype=np.float64)


#: By the name that the table gives them.
RIVALS: dict[str, Method] = {
    "random forest": rival(forest),
    "polynomial": rival(polynomial),
    "boosting": rival(boosting),
    "interpolation": rival(interpolation),
}
