"""The fitted model: interface while it is being built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pals.core.load import Load, Mix
from pals.core.quantities import OperatingPoint
from pals.models.engine_facts import EngineFacts
from pals.models.forecast import FloatArray, Forecast
from pals.models.row import ProfileRow

#: Outputs whose uncertainty guides the sweep, in this order.
DESIGN_OUTPUTS = ("power", "step", "tpot_p95", "ttft_p95")


@dataclass(frozen=True, slots=True)
class Fitted:
    """Parameters with their uncertainty; predicts any point inside the sampled hull and one grid step around it."""

    def forecast(self, points: Sequence[OperatingPoint], load: Load) -> Forecast:
        """Every quantity with its 90 % interval.

        Raises:
            OutsideProfileError: a point or the load lies more than a grid step outside what was sampled.
        """
        raise NotImplementedError

    def sensitivities(self, points: Sequence[OperatingPoint], mixes: Sequence[Mix]) -> FloatArray:
        """How the logarithm of each of DESIGN_OUTPUTS follows each parameter, over that output's own noise.

        One mix a point. Shape (points, outputs, parameters). A measurement at point i adds S[i].T @ S[i] to the precision.
        """
        raise NotImplementedError

    @property
    def precision(self) -> FloatArray:
        """Inverse covariance of the parameters, priors included; shape (parameters, parameters)."""
        raise NotImplementedError

    def relative_sd(self, points: Sequence[OperatingPoint], mixes: Sequence[Mix]) -> FloatArray:
        """Relative standard deviation of each of DESIGN_OUTPUTS as predicted, shape (points, outputs)."""
        raise NotImplementedError


def fit(rows: Sequence[ProfileRow], mixes: Sequence[Mix], facts: EngineFacts) -> Fitted:
    """Fit robustly; with no rows, what the priors alone say."""
    raise NotImplementedError
