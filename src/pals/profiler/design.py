"""Which point a sweep measures next: a start that always looks at the corners, then whatever promises most per second; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pals.core.load import Mix
from pals.core.quantities import Checked, OperatingPoint
from pals.models.forecast import FloatArray


class SweepModel(Protocol):
    """What the design needs of a fitted model; see `pals.models.fitted.Fitted`."""

    def sensitivities(self, points: Sequence[OperatingPoint], mixes: Sequence[Mix]) -> FloatArray: ...
    @property
    def precision(self) -> FloatArray: ...
    def relative_sd(self, points: Sequence[OperatingPoint], mixes: Sequence[Mix]) -> FloatArray: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift(Checked):
    """What points measured again say: the last over the first, geometric mean over those points."""

    points: int  # measured more than once
    power: float  # ratio
    tokens_per_s: float  # ratio
    temperature_k: float | None  # mean change; None: no board tells its temperature
