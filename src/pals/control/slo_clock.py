"""The `slo-clock` policy: the lowest SM clock whose predicted latencies meet the targets; limit and batch are left as found.

In the manner of throttLL'eM (arXiv:2408.05235): each period the load is projected (what runs and waits will run together),
the latencies are predicted at every clock, and the lowest one that meets the targets is locked; none meets them: no lock.
And of GreenLLM's decode loop (arXiv:2508.16449): a feedback in fine steps with hysteresis raises the clock while measured
latencies miss, and lets go slowly. Predicted values count, not their intervals; p99 targets are held to predictions at p95.

Ours, where the papers name no figure: `SloClockSettings`. Theirs, and not here: the prediction of each answer's length, separate
queues by prompt length, engines of several sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, log

import numpy as np

from pals.control.estimator import count_above, remember
from pals.control.guard import Guard
from pals.core.errors import ConfigError
from pals.core.load import Load, Mix
from pals.core.quantities import Budget, Decision, EngineSample, OperatingPoint, Slo, TelemetrySample
from pals.models.fitted import Fitted
from pals.models.observed import OBSERVED, UNSEEN

_AT = {name: i for i, name in enumerate((*OBSERVED, *UNSEEN))}
GRID = log(1.05)  # loads are rounded to these steps; the same load has the same answer
KEPT = 4096  # answers


@dataclass(frozen=True, slots=True, kw_only=True)
class SloClockSettings:
    """Constants of the policy."""

    margin: float = 0.0  # of the targets, that predictions stay below them
    window_periods: int = 60  # lengths of requests are means over so long
    feedback_periods: int = 10  # measured latencies are judged over so long
    allowed_p95: float = 0.05  # share of requests that may miss before the feedback acts
    allowed_p99: float = 0.01
    step_mhz: float = 60.0  # of the feedback
    most_steps: int = 10
    calm_periods: int = 40  # without a miss, before it lets go of a step


@dataclass(frozen=True, slots=True, kw_only=True)
class SloClockState:
    """What the policy remembers."""

    window: tuple[TelemetrySample, ...] = ()
    steps: int = 0  # of the feedback, above the predicted clock
    since_step: int = 0  # periods
    calm: int = 0  # periods without a miss
    mhz: int | None = None  # wanted last


class SloClockPolicy:
    """See the module."""

    def __init__(self, model: Fitted, guard: Guard, settings: SloClockSettings | None = None) -> None:
        """Choose among the clocks of `guard` that lie within the profiled ones.

        Raises:
            ConfigError: the profile has no rows of locked clocks; nothing was written.
        """
        measured = model.hull.clock_mhz if model.hull is not None else None
        self._clocks = [c for c in guard.sm_clocks_mhz if measured is not None and c >= measured.low]
        if not self._clocks:
            raise ConfigError(
                "policy slo-clock cannot use this profile: the profile has no rows of these boards' SM clocks. Make one with "
                "`pals profile --clocks …`; nothing was written"
            )
        self._model, self._guard, self._settings = model, guard, settings or SloClockSettings()
        self._points = tuple(self._at(mhz) for mhz in (*self._clocks, None))
        self._latencies = lru_cache(KEPT)(self._predict)

    def initial(self) -> SloClockState:
        """Nothing seen yet."""
        return SloClockState()

    def step(
        self, state: SloClockState, sample: TelemetrySample, budget: Budget, slo: Slo, now_s: float
    ) -> tuple[Decision, SloClockState]:
        """Return the clock for this period; see the module for the rule."""
        window = remember(state.window, sample, self._settings.window_periods)
        engine = sample.engine
        steps, since_step, calm = self._feedback(state, window, slo)
        if engine is None or not _targets(slo):
            mhz, reason, detail = None, "no-target", "no telemetry of the engine, or no latency target: no lock"
        elif engine.running + engine.waiting == 0:
            mhz, reason, detail = state.mhz, "idle", "nothing runs; the lock stays"
        else:
            lowest = self._lowest(window, engine, slo)
            mhz = self._raised(lowest, steps)
            reason = "slo-clock" if steps == 0 else "slo-feedback"
            told = "no clock meets the targets: no lock" if lowest is None else f"{lowest} MHz meets the targets"
            detail = f"{engine.running} run, {engine.waiting} wait; {told}" + f", {steps} steps above" * (steps > 0)
        remembered = SloClockState(window=window, steps=steps, since_step=since_step, calm=calm, mhz=mhz)
        return Decision(point=self._at(mhz), reason=reason, detail=detail), remembered

    def _at(self, mhz: int | None) -> OperatingPoint:
        guard = self._guard
        return OperatingPoint(
            power_limit_w=guard.max_limit_w, sm_clock_mhz=mhz, active_sequences=guard.launch_sequences
        )

    def _lowest(self, window: Sequence[TelemetrySample], engine: EngineSample, slo: Slo) -> int | None:
        """The lowest clock that is predicted to meet the targets; None: no lock."""
        launch = self._guard.launch_sequences
        unended = engine.running + engine.waiting
        prompt, output = lengths(window, self._model.mixes[0])
        load = tuple(round(log(max(1.0, v)) / GRID) for v in (prompt, output, min(unended, launch)))
        tpot_s, ttft_s, prefill_s = self._latencies(*load)
        queued = max(0, unended - launch)
        waits_s = engine.waiting * prompt * prefill_s + queued * output * tpot_s / launch  # for prefill, for slots
        kept = np.ones(len(self._points), bool)
        for ttft, target_s, _ in _targets(slo):
            kept &= (ttft_s + waits_s if ttft else tpot_s) <= target_s * (1.0 - self._settings.margin)
        return self._points[int(kept.argmax())].sm_clock_mhz if kept.any() else None

    def _predict(self, prompt: int, output: int, running: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """TPOT and TTFT at p95, s, and seconds per prompt token, at each point; the load in steps of `GRID`."""
        mix = Mix(name="seen", prompt_tokens=exp(prompt * GRID), output_tokens=exp(output * GRID))
        here = np.exp(self._model.told(self._points, Load(mix=mix, running=exp(running * GRID))))
        return here[_AT["tpot_p95_s"]], here[_AT["ttft_p95_s"]], 1.0 / here[_AT["prefill_tokens_per_s"]]

    def _raised(self, mhz: int | None, steps: int) -> int | None:
        if mhz is None or steps == 0:
            return mhz
        wanted = mhz + steps * self._settings.step_mhz
        return None if wanted >= self._clocks[-1] else self._guard.supported_clock_mhz(round(wanted))

    def _feedback(self, state: SloClockState, window: Sequence[TelemetrySample], slo: Slo) -> tuple[int, int, int]:
        """Steps above the predicted clock, periods since the last change, and periods without a miss."""
        s, since = self._settings, state.since_step + 1
        missing = self._missing(window[-(s.feedback_periods + 1) :], slo)
        calm = 0 if missing else state.calm + 1
        if missing and since >= s.feedback_periods:
            return min(s.most_steps, state.steps + 1), 0, 0
        if calm >= s.calm_periods and state.steps > 0:
            return state.steps - 1, 0, 0
        return state.steps, since, calm

    def _missing(self, window: Sequence[TelemetrySample], slo: Slo) -> bool:
        """Whether more requests than may miss a measured target."""
        before, now = window[0].engine, window[-1].engine
        if before is None or now is None:
            return False
        for ttft, target_s, at_p99 in _targets(slo):
            a, b = (before.ttft_counts, now.ttft_counts) if ttft else (before.tpot_counts, now.tpot_counts)
            allowed = self._settings.allowed_p99 if at_p99 else self._settings.allowed_p95
            if count_above(a, b, target_s) > allowed * (sum(b) - sum(a)):
                return True
        return False


def _targets(slo: Slo) -> list[tuple[bool, float, bool]]:
    """Whether TTFT (else TPOT), seconds, and whether at p99, of each latency target."""
    known = (
        (True, slo.ttft_p95_s, False), (False, slo.tpot_p95_s, False), (True, slo.ttft_p99_s, True),
        (False, slo.tpot_p99_s, True),
    )  # fmt: skip
    return [(ttft, seconds, at_p99) for ttft, seconds, at_p99 in known if seconds is not None]


def lengths(window: Sequence[TelemetrySample], usual: Mix) -> tuple[float, float]:
    """Mean prompt tokens computed and output tokens of a request over the window; of `usual` where none came."""
    told = [s.engine for s in window if s.engine is not None]
    first, now = told[0], told[-1]
    begun = sum(now.ttft_counts) - sum(first.ttft_counts)
    ended = now.finished_requests - first.finished_requests
    prompt = (now.prefill_tokens - first.prefill_tokens) / begun if begun > 0 else usual.prompt_tokens
    output = (now.output_tokens - first.output_tokens) / ended if ended > 0 else usual.output_tokens
    return max(1.0, prompt), max(1.0, output)
