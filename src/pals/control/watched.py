"""A policy whose profile is watched: what the profile forecast for the point in force is compared with what was measured.

The wrapped policy decides as it would alone. The watch rests on samples only, so it replays from a journal. Windows that
say nothing of the profile are left out: a point that moved, an engine that lacked work or steps, a board or meter absent.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

from pals.control.correction import WINDOW_S, Correction, Observation, Told, update
from pals.control.forecast_table import ForecastTable, PointForecaster
from pals.control.routing import judged
from pals.core.load import Mix
from pals.core.protocols import AnyController, WorthOfWatts
from pals.core.quantities import Budget, Decision, EngineSample, OperatingPoint, Slo, TelemetrySample

SETTLE_S = 3.0  # after a point moved, before a window may begin
SAME_LIMIT = 0.03  # share by which a limit may move within a window: less than its effect can be told from noise
SAME_RUNNING = 0.25  # the same for running sequences, about the window's mean
FEW_RUNNING = 2.0  # or so many sequences
BUSY = 0.95  # share of a window that the engine must have spent in steps
FEWEST_STEPS = 20
FEWEST_REQUESTS = 20  # before lengths of prompts and answers mean anything
MIX_WINDOWS = 150.0  # memory of those lengths
LOCK_SLACK_MHZ = 30.0  # a lock is taken to be in force where no board runs faster


@runtime_checkable
class CorrectedPolicy(Protocol):
    """A policy that wants to know how far its profile is off; others are stepped as if nobody watched."""

    def step_corrected(
        self, state: Any, sample: TelemetrySample, budget: Budget, slo: Slo, now_s: float, correction: Correction
    ) -> tuple[Decision, Any]:
        """As `step`."""
        ...


class Lengths(NamedTuple):
    """Counts of the last minutes, older ones fading."""

    arrived: float = 0.0
    prompts: float = 0.0  # tokens
    prefilled: float = 0.0
    output: float = 0.0
    finished: float = 0.0

    def and_of(self, a: EngineSample, b: EngineSample) -> Lengths:
        """With what came between two samples."""
        keep = 1.0 - 1.0 / MIX_WINDOWS
        return Lengths(
            self.arrived * keep + b.arrived_requests - a.arrived_requests,
            self.prompts * keep + b.arrived_prompt_tokens - a.arrived_prompt_tokens,
            self.prefilled * keep + b.prefill_tokens - a.prefill_tokens,
            self.output * keep + b.output_tokens - a.output_tokens,
            self.finished * keep + b.finished_requests - a.finished_requests,
        )

    def mix(self) -> Mix | None:
        """Mean lengths; None where too few requests came or ended."""
        if min(self.arrived, self.finished) < FEWEST_REQUESTS:
            return None
        computed = max(1.0, self.prefilled / self.arrived)
        return Mix(
            name="seen", prompt_tokens=computed, output_tokens=max(1.0, self.output / self.finished),
            cached_tokens=max(0.0, self.prompts / self.arrived - computed),
        )  # fmt: skip


class Window(NamedTuple):
    """A window as it fills; sums over its ticks."""

    first: TelemetrySample
    settles_s: float  # no window before
    limit_w: float  # of a board, at its begin
    active_limit: int
    clock_mhz: int | None  # the lock asked for
    ticks: int = 0
    limits: float = 0.0
    energy_j: float | None = 0.0  # None: power was not known all along
    running: float = 0.0
    fewest: int = 1 << 30
    most: int = 0
    clock: float = 0.0  # of the slowest board


class ControllerState(NamedTuple):
    """What a watched policy remembers: its own state, the window as it fills, and the correction."""

    inner: Any
    correction: Correction
    window: Window | None = None
    lengths: Lengths = Lengths()
    before: TelemetrySample | None = None  # where the lengths were counted last
    asked_mhz: int | None = None  # the clock lock of the last decision


class Watched:
    """See the module; a `Controller` around another one."""

    def __init__(
        self, policy: AnyController, forecaster: PointForecaster, *, top_w: float, experts: bool = False
    ) -> None:
        """Watch `forecaster`; `top_w`: the highest limit of a board; `experts`: whether the model has any, to guess a cause."""
        self.policy, self._experts = policy, experts
        self._table = ForecastTable(forecaster, top_w=top_w)
        self._corrected = policy if isinstance(policy, CorrectedPolicy) else None
        self._valuing = policy if isinstance(policy, WorthOfWatts) else None

    def initial(self) -> ControllerState:
        """Nothing learnt yet."""
        return ControllerState(self.policy.initial(), Correction())

    def tell(self, state: ControllerState) -> Told:
        """What a record keeps of the correction."""
        return state.correction.told

    def worth(self, state: ControllerState) -> tuple[tuple[float, float], ...]:
        """What watts are worth to the policy; empty where it does not say."""
        return self._valuing.worth(state.inner) if self._valuing is not None else ()

    def needed_w(self, state: ControllerState) -> float | None:
        """The share the policy's targets need; None where it does not say."""
        return self._valuing.needed_w(state.inner) if self._valuing is not None else None

    def step(
        self, state: ControllerState, sample: TelemetrySample, budget: Budget, slo: Slo, now_s: float
    ) -> tuple[Decision, ControllerState]:
        """The policy's decision; its detail also says when a drift began or ended."""
        routing, turned = judged(state.correction.routing, sample)
        state = state._replace(correction=state.correction.routed(routing))
        watched, said = self._watch(state, sample, now_s)
        said = said if turned is None else (*said, turned)
        if self._corrected is not None:
            decision, inner = self._corrected.step_corrected(
                state.inner, sample, budget, slo, now_s, watched.correction
            )
        else:
            decision, inner = self.policy.step(state.inner, sample, budget, slo, now_s)
        if said:
            decision = replace(decision, detail="; ".join(part for part in (decision.detail, *said) if part))
        return decision, watched._replace(inner=inner, asked_mhz=decision.point.sm_clock_mhz)

    def _watch(
        self, state: ControllerState, sample: TelemetrySample, now_s: float
    ) -> tuple[ControllerState, tuple[str, ...]]:
        """Go on with the window, or begin another; at its end, learn."""
        engine = sample.engine
        if engine is None or not sample.boards or sample.absent:
            return (state if state.window is None else state._replace(window=None)), ()
        w, limit_w = state.window, sample.boards[0].enforced_limit_w
        if (
            w is None
            or abs(limit_w - w.limit_w) > SAME_LIMIT * w.limit_w
            or engine.active_limit != w.active_limit
            or state.asked_mhz != w.clock_mhz
        ):
            begun = Window(sample, now_s + SETTLE_S, limit_w, engine.active_limit, state.asked_mhz)
            return state._replace(window=begun), ()
        if now_s <= w.settles_s:
            return state._replace(window=w._replace(first=sample)), ()
        w = _with(w, sample, engine, limit_w)
        if sample.time_s - w.first.time_s < WINDOW_S - 1e-6:
            return state._replace(window=w), ()
        state = state._replace(window=Window(sample, w.settles_s, limit_w, engine.active_limit, w.clock_mhz))
        return self._learn(state, w, sample, now_s)

    def _learn(
        self, state: ControllerState, w: Window, last: TelemetrySample, now_s: float
    ) -> tuple[ControllerState, tuple[str, ...]]:
        """Compare a full window with the forecast of its point."""
        a, b = w.first.engine, last.engine
        assert a is not None  # for the type checker: both were looked at before
        assert b is not None
        since = state.before.engine if state.before is not None else None
        state = state._replace(lengths=state.lengths.and_of(since or a, b), before=last)
        mix = state.lengths.mix()
        if mix is None or not _comparable(w, a, b, last.time_s - w.first.time_s):
            return state, ()
        seen = self._observe(w, a, b, last, mix)
        if not seen:
            return state, ()
        hottest_c = max((p.temperature_c for p in last.boards if p.temperature_c is not None), default=None)
        correction, said = update(state.correction, seen, now_s, experts=self._experts, temperature_c=hottest_c)
        return state._replace(correction=correction), said

    def _observe(
        self, w: Window, a: EngineSample, b: EngineSample, last: TelemetrySample, mix: Mix
    ) -> dict[str, Observation]:
        """Prediction and measurement of each quantity; none where the profile does not reach."""
        passed_s, steps = last.time_s - w.first.time_s, b.steps - a.steps
        point = OperatingPoint(
            power_limit_w=w.limits / w.ticks, sm_clock_mhz=w.clock_mhz, active_sequences=w.active_limit
        )
        prefilled, output = b.prefill_tokens - a.prefill_tokens, b.output_tokens - a.output_tokens
        told = self._table.look(point, mix, ratio=prefilled / max(1, output), running=w.running / w.ticks)
        if told is None:
            return {}
        measured = {"step": (b.busy_s - a.busy_s) / steps, "clock": w.clock / w.ticks}
        if w.energy_j is not None:
            measured["power"] = w.energy_j / passed_s
        return {q: Observation(*told[q], m) for q, m in measured.items()}


def _with(w: Window, sample: TelemetrySample, engine: EngineSample, limit_w: float) -> Window:
    """The window with one more tick."""
    running = engine.running if engine.scheduled is None else min(engine.running, engine.scheduled)
    known = w.energy_j is not None and sample.power_w is not None
    return Window(
        w.first, w.settles_s, w.limit_w, w.active_limit, w.clock_mhz, w.ticks + 1, w.limits + limit_w,
        w.energy_j + sample.power_w * sample.window_s if known else None,  # type: ignore[operator]
        w.running + running, min(w.fewest, running), max(w.most, running),
        w.clock + min([b.sm_clock_mhz for b in sample.boards]),
    )  # fmt: skip


def _comparable(w: Window, a: EngineSample, b: EngineSample, passed_s: float) -> bool:
    """Whether the engine worked all along at one point, with about the same load."""
    mean = w.running / w.ticks
    apart = max(FEW_RUNNING, SAME_RUNNING * mean)
    return (
        w.fewest >= 1
        and w.most - mean <= apart
        and mean - w.fewest <= apart
        and w.most <= w.active_limit
        and b.steps - a.steps >= FEWEST_STEPS
        and b.busy_s - a.busy_s >= BUSY * passed_s
        and (w.clock_mhz is None or w.clock / w.ticks <= w.clock_mhz + LOCK_SLACK_MHZ)
        and b.preemptions == a.preemptions
    )
