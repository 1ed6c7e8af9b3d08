"""The `pals-paper` policy: the algorithm of arXiv:2605.21427 as it is written, gaps filled in and marked.

Each period: error = target − measured throughput; of the configurations predicted within the budget, keep those
predicted to meet the target and take the one with the most tokens per joule; if none meets it, the one with the
highest throughput. Apply only if |error| > 5 % of the target for several periods, or if target or budget changed.

The paper leaves open, and this file fills in: "several" is `sustain_periods`; its PID has no stated output or gains,
here a PI trim, at most one grid step either way, of the power limit or of the one lever a policy owns, frozen while
nothing waits and throughput lacks (a shortfall for want of work is not one of watts). `cap-only`, `batch-only` and
`clock-only` are this rule over fewer points (`pals.control.levers`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pals.control.estimator import estimate, remember
from pals.core.protocols import PointModel
from pals.core.quantities import (
    Budget,
    Decision,
    OperatingPoint,
    Prediction,
    Slo,
    StateEstimate,
    TelemetrySample,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperSettings:
    """Constants of the algorithm; the first is the paper's, the rest ours (the paper gives none)."""

    dead_band: float = 0.05  # share of the target
    sustain_periods: int = 4
    window_periods: int = 4  # throughput is measured over this many periods
    trim_p_w: float = 20.0  # W per board for an error of 100 %
    trim_i_w: float = 10.0  # W per board and period for an error of 100 %
    trim_max_w: float = 50.0  # one grid step
    trim_max_sequences: float = 8.0  # the same share of these, where the batch is trimmed instead
    trim_max_mhz: float = 105.0  # or the SM clock


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperState:
    """What the policy remembers."""

    window: tuple[TelemetrySample, ...] = ()
    chosen: Prediction | None = None
    deviating: int = 0
    inputs: tuple[float | None, float | None] | None = None  # target, budget
    integral_w: float = 0.0


class PaperPolicy:
    """See the module."""

    def __init__(
        self,
        model: PointModel,
        *,
        points: Sequence[OperatingPoint],
        trim: Callable[[OperatingPoint, float], OperatingPoint],
        settings: PaperSettings | None = None,
    ) -> None:
        """Choose among `points`, which `model` must cover; `trim` moves a point by a share, -1..1, of one grid step."""
        self._settings = settings or PaperSettings()
        self._trim_by = trim
        self._predictions = tuple(model.predict(p) for p in points)
        if not self._predictions:
            raise ValueError("there is no point to choose from")

    def initial(self) -> PaperState:
        """Nothing chosen yet: the first step counts as changed inputs."""
        return PaperState()

    def step(
        self, state: PaperState, sample: TelemetrySample, budget: Budget, slo: Slo, now_s: float
    ) -> tuple[Decision, PaperState]:
        """Return the point for this period; see the module for the rule."""
        s = self._settings
        window = remember(state.window, sample, s.window_periods)
        now = estimate(window)
        target = slo.throughput_tokens_s or 0.0
        error = (target - now.tokens_per_s) / target if target > 0 else 0.0
        deviating = state.deviating + 1 if abs(error) > s.dead_band else 0
        inputs = (slo.throughput_tokens_s, budget.power_w)
        chosen, reason, detail = state.chosen, "hold", f"throughput error {error:+.1%} of target"
        integral_w = self._integrate(state.integral_w, error, now)
        if chosen is None or inputs != state.inputs or deviating >= s.sustain_periods:
            reason = "sustained-error" if chosen is not None and inputs == state.inputs else "inputs-changed"
            best, detail = self._choose(target, budget)
            deviating = 0
            if chosen is None or best.point != chosen.point:
                chosen, integral_w = best, 0.0
        trimmed = self._trim(chosen, error, integral_w)
        decision = Decision(point=trimmed, reason=reason, detail=detail)
        remembered = PaperState(window=window, chosen=chosen, deviating=deviating, inputs=inputs, integral_w=integral_w)
        return decision, remembered

    def _choose(self, target: float, budget: Budget) -> tuple[Prediction, str]:
        feasible = [p for p in self._predictions if budget.power_w is None or p.power_w <= budget.power_w]
        if not feasible:
            least = min(self._predictions, key=lambda p: p.power_w)
            return least, f"no profiled point fits {budget.power_w:.0f} W; the least hungry one ({least.power_w:.0f} W)"
        meeting = [p for p in feasible if p.tokens_per_s >= target]
        if meeting:
            best = max(meeting, key=lambda p: p.tokens_per_j)
            return best, f"{len(meeting)} of {len(feasible)} feasible points meet the target; most tokens/J"
        best = max(feasible, key=lambda p: p.tokens_per_s)
        return best, f"none of {len(feasible)} feasible points meets {target:.0f} tokens/s; highest throughput"

    def _integrate(self, integral_w: float, error: float, now: StateEstimate) -> float:
        starved = error > 0 and now.waiting == 0
        if starved or abs(error) <= self._settings.dead_band:
            return integral_w
        limit = self._settings.trim_max_w
        return max(-limit, min(limit, integral_w + self._settings.trim_i_w * max(-1.0, min(1.0, error))))

    def _trim(self, chosen: Prediction, error: float, integral_w: float) -> OperatingPoint:
        s = self._settings
        inside = abs(error) <= s.dead_band
        proportional_w = 0.0 if inside or integral_w == 0.0 else s.trim_p_w * max(-1.0, min(1.0, error))
        trim_w = max(-s.trim_max_w, min(s.trim_max_w, proportional_w + integral_w))
        return self._trim_by(chosen.point, trim_w / s.trim_max_w if s.trim_max_w > 0 else 0.0)
