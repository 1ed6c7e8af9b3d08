"""What every method is asked and answers; a method sees the rows it learns from, and of tested rows the question alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pals.core.load import Mix
from pals.core.quantities import OperatingPoint
from pals.models.engine_facts import EngineFacts
from pals.models.row import ProfileRow

FloatArray = NDArray[np.float64]

#: Figures that are judged; so named in a row and in a forecast.
POWER, THROUGHPUT, TPOT, TTFT = "power_w", "tokens_per_s", "tpot_p95_s", "ttft_p95_s"
QUANTITIES = (POWER, THROUGHPUT, TPOT, TTFT)


class Question(NamedTuple):
    """One operating point under one mix, more work than the point can do."""

    point: OperatingPoint
    mix: int


class Told(NamedTuple):
    """One figure for each question, arrays of shape (questions,); NaN where the method refuses to answer."""

    value: FloatArray
    low: FloatArray | None = None  # of the 90 % interval; None: the method has none
    high: FloatArray | None = None


class Learned(Protocol):
    """A method that has seen its rows."""

    def answer(self, questions: Sequence[Question], quantities: Sequence[str]) -> Mapping[str, Told]:
        """Each of the quantities that it knows anything of."""
        ...


class Method(Protocol):
    """A way to learn from rows."""

    def __call__(
        self, rows: Sequence[ProfileRow], mixes: Sequence[Mix], facts: EngineFacts, quantities: Sequence[str]
    ) -> Learned:
        """Learn these quantities; the same rows give the same answers."""
        ...


def questions_of(rows: Sequence[ProfileRow]) -> list[Question]:
    """What is asked of tested rows: nothing that was measured."""
    return [Question(row.point, row.mix) for row in rows]


def truth_of(rows: Sequence[ProfileRow], quantity: str) -> FloatArray:
    """A measured figure of each row; NaN where it was not measured."""
    values = (getattr(row, quantity) for row in rows)
    return np.array([np.nan if value is None else float(value) for value in values])
