"""The fitted profile as one method among the others: a point that it refuses is refused alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pals.core.errors import OutsideProfileError
from pals.core.load import Load, Mix
from pals.experiments.profile_checks.question import Learned, Question, Told
from pals.models.engine_facts import EngineFacts
from pals.models.fitted import Fitted, fit
from pals.models.forecast import Forecast
from pals.models.row import ProfileRow

OWN = "pals"


@dataclass(frozen=True, slots=True)
class OwnFit:
    """A `Fitted` that answers questions."""

    fitted: Fitted
    mixes: tuple[Mix, ...]

    def answer(self, questions: Sequence[Question], quantities: Sequence[str]) -> Mapping[str, Told]:
        """Values with their 90 % intervals."""
        columns = {q: np.full((3, len(questions)), np.nan) for q in quantities}
        for mix in sorted({q.mix for q in questions}):
            places = [i for i, q in enumerate(questions) if q.mix == mix]
            for where, forecast in self._forecasts([questions[i] for i in places], places, Load(mix=self.mixes[mix])):
                for quantity, column in columns.items():
                    column[:, where] = np.stack(getattr(forecast, quantity))
        return {q: Told(*column) for q, column in columns.items()}

    def _forecasts(
        self, questions: Sequence[Question], places: Sequence[int], load: Load
    ) -> list[tuple[list[int], Forecast]]:
        """All at once where none is refused, else each half by itself."""
        try:
            return [(list(places), self.fitted.forecast([q.point for q in questions], load))]
        except OutsideProfileError:
            half = len(places) // 2
            if not half:
                return []
            first = self._forecasts(questions[:half], places[:half], load)
            return first + self._forecasts(questions[half:], places[half:], load)


def own(
    rows: Sequence[ProfileRow], mixes: Sequence[Mix], facts: EngineFacts, quantities: Sequence[str]
) -> Learned:  # fmt: skip
    """Fit the profile's model; what it learns does not depend on what is asked."""
    return OwnFit(fit(rows, mixes, facts), tuple(mixes))
