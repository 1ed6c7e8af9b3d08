"""The fitted model: parameters with their uncertainty, and what they say of operating points under a load.

An interval is the deviation of the prediction (parameters as uncertain as the rows leave them, and the noise of a row) times the
factor that held nine tenths of the rows when each was left out; it is wider up to one grid step outside what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pals.core.errors import OutsideProfileError
from pals.core.load import Load, Mix
from pals.core.quantities import OperatingPoint, Prediction
from pals.models.crowd import FEW_MORE, HALF_WIDTHS, Crowd
from pals.models.engine_facts import EngineFacts
from pals.models.fit import Calibration, fit_rows, precision_at
from pals.models.forecast import Estimates, Forecast
from pals.models.hull import CORNER, WIDER_BETWEEN, WIDER_PER_STEP, Hull, hull_of
from pals.models.node_power import node_power_w
from pals.models.observed import FREE_MHZ, OBSERVED, UNSEEN, Conditions, jacobian, sequences_of, told
from pals.models.parameters import values_of
from pals.models.physics import Base, Work, base_of, work_of
from pals.models.row import ProfileRow

FloatArray = NDArray[np.float64]

#: Outputs whose uncertainty guides the sweep, in this order.
DESIGN_OUTPUTS = ("power", "step", "tpot_p95", "ttft_p95")
Level = TypeVar("Level", int, float)
_DESIGN = (0, 1, 4, 6)  # their places in OBSERVED
_AT = {name: i for i, name in enumerate((*OBSERVED, *UNSEEN))}
_TOKENS, _TPOT = _AT["tokens_per_s"], _AT["tpot_p50_s"]
CROWD_HALF = np.array([HALF_WIDTHS.get(name, 0.0) for name in (*OBSERVED, *UNSEEN, "tokens_per_j")])
MOST_LEVELS = 12  # of each lever among the points to choose from


@dataclass(frozen=True)
class Fitted:
    """See the module. A `PointModel` over the measured levels; at `mixes[0]` unless a load says otherwise."""

    facts: EngineFacts
    mixes: tuple[Mix, ...]
    rows: tuple[ProfileRow, ...]
    x: FloatArray  # deviations from the priors
    calibration: Calibration
    wider: float = 1.0  # factor on every half width: a profile measured on something else and accepted

    @cached_property
    def base(self) -> Base:
        """What sizes and datasheets say."""
        return base_of(self.facts)

    @cached_property
    def hull(self) -> Hull | None:
        """What was measured; None: nothing, everything rests on priors."""
        return hull_of(self.rows, self.mixes)

    @cached_property
    def precision(self) -> FloatArray:
        """Inverse covariance of x, priors included, shape (parameters, parameters)."""
        return precision_at(self.x, self.base, rows=self.rows, mixes=self.mixes, noise=self.calibration.noise)

    @cached_property
    def covariance(self) -> FloatArray:
        """Of x."""
        return np.asarray(np.linalg.inv(self.precision))

    @cached_property
    def kv_tokens(self) -> float:
        """KV tokens that the cache held when rows ran into its end; infinite where none did."""
        tokens = self.facts.step_tokens
        full = [r for r in self.rows if sequences_of(r, self.mixes[r.mix], tokens) < r.active_sequences > 1]
        return max((r.running * self.mixes[r.mix].context_tokens for r in full), default=math.inf)

    @cached_property
    def points(self) -> tuple[OperatingPoint, ...]:
        """The measured levels, crossed: limits × active sequences, and locks at the highest limit × active sequences."""
        free = [r for r in self.rows if r.sm_clock_lock_mhz is None] or list(self.rows)
        limits = _thinned(sorted({r.power_limit_w for r in free}))
        levels = _thinned(sorted({r.active_sequences for r in self.rows}))
        locks = _thinned(sorted({r.sm_clock_lock_mhz for r in self.rows if r.sm_clock_lock_mhz is not None}))
        levers: list[tuple[float, int | None]] = [(w, None) for w in limits]
        levers += [(max(limits), mhz) for mhz in locks] if limits else []
        return tuple(
            OperatingPoint(power_limit_w=w, sm_clock_mhz=mhz, active_sequences=n) for n in levels for w, mhz in levers
        )

    @property
    def quality(self) -> dict[str, tuple[float, float]]:
        """Median relative error by quantity: of the fitted rows, and of rows as if each had been left out; those measured."""
        c = self.calibration
        return {
            name: (float(c.in_sample[i]), float(c.error[i]))
            for i, name in enumerate(OBSERVED)
            if np.isfinite(c.error[i])
        }

    def widened(self, factor: float) -> Fitted:
        """The same with half widths `factor` times as large."""
        return replace(self, wider=self.wider * factor)

    def predict(self, point: OperatingPoint) -> Prediction:
        """Throughput and power at `point` with enough work of the first mix; inputs are clipped to what was measured.

        Raises:
            ValueError: `point` locks the clock and no row did.
        """
        if point.sm_clock_mhz is not None and self.hull is not None and self.hull.clock_mhz is None:
            raise ValueError(f"no row of this profile locks the SM clock: {point.sm_clock_mhz} MHz is unknown")
        here = np.exp(
            told(values_of(self.x), self.base, self._conditions([self._clipped(point)], Load(mix=self.mixes[0])))
        )
        return Prediction(point=point, tokens_per_s=float(here[_TOKENS, 0]), power_w=float(here[0, 0]))

    def forecast(self, points: Sequence[OperatingPoint], load: Load) -> Forecast:
        """Every quantity with its 90 % interval.

        Raises:
            OutsideProfileError: a point or the load lies more than a grid step outside what was measured.
        """
        return self.assembled(self.told(points, load), self.half_widths(points, load), load)

    def told(self, points: Sequence[OperatingPoint], load: Load) -> FloatArray:
        """Logarithms of OBSERVED and UNSEEN, shape (quantities, points), whether or not anything was measured near."""
        at = self._conditions(points, load)
        here = told(values_of(self.x), self.base.under(load), at)
        if load.prefill_tokens_per_s is None:
            return here
        asked = load.prefill_tokens_per_s / load.mix.prefill_per_output
        duty = np.maximum(1e-9, np.minimum(1.0, asked / np.exp(here[_TOKENS])))  # below 1: one at a time would do more
        self._crowd(here, points, load, running=at.work.sequences[at.batch] * duty, asked=asked)
        idle_w = values_of(self.x).static * self.base.static_w * self.facts.boards
        here[_TOKENS] += np.log(duty)
        here[0] = np.log(duty * np.exp(here[0]) + (1.0 - duty) * idle_w)
        return here

    def _crowd(
        self, here: FloatArray, points: Sequence[OperatingPoint], load: Load, *, running: FloatArray, asked: float
    ) -> None:
        """Put the tails of random arrivals into `here`: the p95 is met where many run, and some wait for a slot.

        Where more arrives than every slot together answers, the queue grows for ever: TTFT is infinite.
        """
        slots = self._slots(points, load)
        slower = self._told_at(np.maximum(1.0, running) * FEW_MORE, points, load)[_TPOT] - here[_TPOT]
        crowd = Crowd.of(running, slots, np.exp(slower))
        first = self._told_at(crowd.at_arrival, points, load)
        waits_s = crowd.waiting * np.exp(first[_TPOT]) * load.mix.output_tokens / slots
        here[_AT["tpot_p95_s"]] = self._told_at(crowd.during_answers, points, load)[_AT["tpot_p95_s"]]
        here[_AT["ttft_p95_s"]] = np.log(np.exp(first[_AT["ttft_p95_s"]]) + waits_s)
        answered = math.log(max(asked, 1e-12)) < self._told_at(slots, points, load)[_TOKENS]
        for q in (_AT["ttft_p50_s"], _AT["ttft_p95_s"]):
            here[q] = np.where(answered, here[q], np.inf)

    def _told_at(self, n: FloatArray, points: Sequence[OperatingPoint], load: Load) -> FloatArray:
        """As `told`, with so many sequences at each point."""
        return told(values_of(self.x), self.base.under(load), self._at(n, points, load))

    def half_widths(self, points: Sequence[OperatingPoint], load: Load) -> FloatArray:
        """Half the 90 % intervals of the logarithms of OBSERVED, UNSEEN and tokens per joule, shape (quantities + 1, points).

        Raises:
            OutsideProfileError: a point or the load lies more than a grid step outside what was measured.
        """
        steps = self._checked_reach(points, load)
        slopes = jacobian(self.x, self.base.under(load), self._conditions(points, load))
        c = self.calibration
        slopes = np.concatenate([slopes, (slopes[_TOKENS] - slopes[0])[None]])
        noise = np.append(c.noise, math.hypot(c.noise[0], c.noise[_TOKENS]))[:, None]
        width = np.append(c.width, max(c.width[0], c.width[_TOKENS]))[:, None]
        half = width * np.hypot(_deviation(slopes, self.covariance), noise)
        between = self.hull.between(points, launch=self.facts.launch_sequences) if self.hull is not None else 0.0
        factor = self.wider * (1.0 + WIDER_PER_STEP * steps) * (1.0 + WIDER_BETWEEN * between)
        half = half * factor + CORNER * steps
        return np.asarray(half if load.prefill_tokens_per_s is None else np.hypot(half, CROWD_HALF[:, None]))

    def assembled(self, here: FloatArray, half: FloatArray, load: Load) -> Forecast:
        """A forecast from logarithms and half widths of OBSERVED, UNSEEN and tokens per joule."""
        every = np.concatenate([here, (here[_TOKENS] - here[0])[None]])
        value, low, high = np.exp(every), np.exp(every - half), np.exp(every + half)
        if load.queued_tokens > 0:
            rate = _AT["prefill_tokens_per_s"]
            for q in (_AT["ttft_p50_s"], _AT["ttft_p95_s"]):
                value[q] += load.queued_tokens / value[rate]
                low[q] += load.queued_tokens / high[rate]
                high[q] += load.queued_tokens / low[rate]
        known = {name: Estimates(value[i], low[i], high[i]) for name, i in _AT.items()}
        return Forecast(
            **known,
            tokens_per_j=Estimates(value[-1], low[-1], high[-1]),
            node_power_w=node_power_w(known["power_w"], self.facts.boards),
        )

    def sensitivities(self, points: Sequence[OperatingPoint], mixes: Sequence[Mix]) -> FloatArray:
        """How the logarithm of each of DESIGN_OUTPUTS follows each parameter, over that output's own noise.

        One mix a point. Shape (points, outputs, parameters). A measurement at point i adds S[i].T @ S[i] to the precision.
        """
        slopes = self._design_slopes(points, mixes) / self.calibration.noise[list(_DESIGN), None, None]
        return np.asarray(slopes.transpose(1, 0, 2))

    def relative_sd(self, points: Sequence[OperatingPoint], mixes: Sequence[Mix]) -> FloatArray:
        """Relative standard deviation of each of DESIGN_OUTPUTS as predicted, shape (points, outputs)."""
        return np.asarray(_deviation(self._design_slopes(points, mixes), self.covariance).T)

    def _design_slopes(self, points: Sequence[OperatingPoint], mixes: Sequence[Mix]) -> FloatArray:
        """d told / d x of DESIGN_OUTPUTS, shape (outputs, points, parameters)."""
        found = np.zeros((len(_DESIGN), len(points), len(self.x)))
        for mix in dict.fromkeys(mixes):
            mine = [i for i, m in enumerate(mixes) if m == mix]
            at = self._conditions([points[i] for i in mine], Load(mix=mix))
            found[:, mine] = jacobian(self.x, self.base, at)[list(_DESIGN)]
        return found

    def reach(self, points: Sequence[OperatingPoint], load: Load) -> FloatArray:
        """Grid steps that each point lies outside what was measured; 0 inside, and where nothing was measured at all."""
        if self.hull is None:
            return np.zeros(len(points))
        context, launch = load.context_tokens or load.mix.context_tokens, self.facts.launch_sequences
        if load.running is not None:
            most = max(1, round(load.running))
            points = [replace(p, active_sequences=min(p.active_sequences or launch, most)) for p in points]
        return self.hull.outside(points, load.mix, launch=launch, context_tokens=context)

    def _checked_reach(self, points: Sequence[OperatingPoint], load: Load) -> FloatArray:
        steps = self.reach(points, load)
        if (steps > 1.0 + 1e-9).any():
            worst = points[int(np.argmax(steps))]
            raise OutsideProfileError(
                f"{_told_point(worst)} under {load.mix.name!r} ({load.mix.prompt_tokens:.0f} tokens in, {load.mix.output_tokens:.0f} "
                f"out) lies {float(steps.max()):.1f} grid steps outside what was measured, and a profile speaks of one at most. "
                "Nothing was predicted; measure there with `pals profile`"
            )
        return steps

    def _conditions(self, points: Sequence[OperatingPoint], load: Load) -> Conditions:
        """The points as the model takes them: sequences that the load, the engine and its cache allow."""
        n = self._slots(points, load)
        if load.running is not None:
            n = np.minimum(n, max(1.0, load.running))
        if load.prefill_tokens_per_s is not None:
            n = self._served(points, n, load)
        return self._at(n, points, load)

    def _slots(self, points: Sequence[OperatingPoint], load: Load) -> FloatArray:
        """Sequences that each point and the KV cache have room for."""
        n = np.array([float(p.active_sequences or self.facts.launch_sequences) for p in points])
        return np.asarray(np.minimum(n, max(1.0, self.kv_tokens / (load.context_tokens or load.mix.context_tokens))))

    def _at(self, n: FloatArray, points: Sequence[OperatingPoint], load: Load) -> Conditions:
        """The points with so many sequences each."""
        work, batch = self._batches(n, load)
        limits = np.array([p.power_limit_w for p in points])
        ceilings = np.array([float(p.sm_clock_mhz or FREE_MHZ) for p in points])
        return Conditions(work, batch, limits, ceilings, mid_step=load.prefill_tokens_per_s is not None)

    def _batches(self, n: FloatArray, load: Load) -> tuple[Work, NDArray[np.intp]]:
        levels, batch = np.unique(n, return_inverse=True)
        work = work_of(levels, load.mix, context_tokens=load.context_tokens, distinct=load.distinct_experts)
        return work, batch.reshape(-1)

    def _served(self, points: Sequence[OperatingPoint], most: FloatArray, load: Load) -> FloatArray:
        """Sequences that run at each point when so much arrives: those at which output keeps up, at most `most`."""
        asked = (load.prefill_tokens_per_s or 0.0) / load.mix.prefill_per_output
        levels = np.geomspace(1.0, max(2.0, float(most.max())), 12)
        busy = replace(load, prefill_tokens_per_s=None, running=None)
        found = np.empty(len(points))
        for lever in {(p.power_limit_w, p.sm_clock_mhz) for p in points}:
            mine = [i for i, p in enumerate(points) if (p.power_limit_w, p.sm_clock_mhz) == lever]
            work, batch = self._batches(levels, busy)
            held = Conditions(work, batch, np.full(12, lever[0]), np.full(12, float(lever[1] or FREE_MHZ)))
            rate = np.maximum.accumulate(np.exp(told(values_of(self.x), self.base.under(load), held)[_TOKENS]))
            found[mine] = np.interp(asked, rate, levels)
        return np.minimum(most, found)

    def _clipped(self, point: OperatingPoint) -> OperatingPoint:
        if self.hull is None:
            return point
        h, n = self.hull, point.active_sequences or self.facts.launch_sequences
        return OperatingPoint(
            power_limit_w=min(h.limit_w.high, max(h.limit_w.low, point.power_limit_w)),
            sm_clock_mhz=point.sm_clock_mhz,
            active_sequences=round(min(2**h.sequences.high, max(2**h.sequences.low, n))),
        )


def _told_point(point: OperatingPoint) -> str:
    lock = f", clock at most {point.sm_clock_mhz} MHz" if point.sm_clock_mhz is not None else ""
    return f"{point.power_limit_w:.0f} W{lock}, {point.active_sequences or 'all'} active sequences"


def _deviation(slopes: FloatArray, covariance: FloatArray) -> FloatArray:
    """Standard deviation of predictions with these slopes, shape (outputs, candidates)."""
    return np.asarray(np.sqrt(np.maximum(0.0, np.einsum("qri,qri->qr", slopes @ covariance, slopes))))


def _thinned(levels: Sequence[Level]) -> list[Level]:
    """At most `MOST_LEVELS` of them, the ends among them."""
    if len(levels) <= MOST_LEVELS:
        return list(levels)
    return [levels[round(i * (len(levels) - 1) / (MOST_LEVELS - 1))] for i in range(MOST_LEVELS)]


def fit(rows: Sequence[ProfileRow], mixes: Sequence[Mix], facts: EngineFacts) -> Fitted:
    """Fit robustly; with no rows, what the priors alone say.

    Raises:
        ConfigError: scipy is not installed.
    """
    found = fit_rows(rows, mixes, facts)
    return Fitted(facts=facts, mixes=tuple(mixes), rows=tuple(rows), x=found.x, calibration=found.calibration)
