"""The `static` policy: one operating point for ever; what every deployment without PALS does."""

from __future__ import annotations

from dataclasses import dataclass

from pals.core.quantities import Budget, Decision, OperatingPoint, Slo, TelemetrySample


@dataclass(frozen=True, slots=True)
class StaticPolicy:
    """Always wants `point`."""

    point: OperatingPoint
    reason: str = "static"
    detail: str = "default limit and launch batch"

    def initial(self) -> None:
        """Nothing to remember."""

    def step(
        self, state: None, sample: TelemetrySample, budget: Budget, slo: Slo, now_s: float
    ) -> tuple[Decision, None]:
        """The same decision each period."""
        return Decision(point=self.point, reason=self.reason, detail=self.detail), None
