"""How far a profile is off now: one factor per quantity, learnt slowly from comparable windows, and whether it has drifted.

Everything is judged by the minute: the median of `MINUTE_WINDOWS` residuals, each the logarithm of measured over
predicted. Equations, constants and measured delays: docs/correction.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import exp, isfinite, log, sqrt
from statistics import median
from typing import NamedTuple

from pals.control.drift_cause import Shifts, guess_cause
from pals.control.routing import UNKNOWN, RoutingTrack
from pals.models.forecast import Estimates, FloatArray, Forecast

QUANTITIES = ("power", "step", "clock")
SAID = ("power", "step")  # whose drift is told; the clock only helps to guess why
WINDOW_S = 4.0  # one residual
MINUTE_WINDOWS = 15  # residuals of one update: a minute of comparable time
FORGET_MINUTES = 10.0  # time constant of the bias, in comparable time: an idle night forgets nothing
RELEARN_MINUTES = 3.0  # the same while a quantity has drifted, and least weight at the start
HUBER = 1.5  # residuals count up to so many scales
BIAS_LIMIT = log(2.0)  # beyond it the profile is useless, not biased
SD_RANGE = (
    0.03,
    0.10,
)  # of a prediction's relative standard deviation; no less, as a window's load is known by means only
Z90 = 1.645
NOISE_MINUTES, NOISE_PRIOR = 600, 30  # memory of the residuals' variance, and weight of what is assumed before
NOISE_BEFORE = (0.35, 0.14)  # variance and lag-one covariance assumed, in the prediction's variances
BASELINE_MINUTES, BASELINE_PRIOR = 240, 3  # memory of the mean residual
BASELINE_RANGE = 0.75  # standard deviations that a profile may be off for ever without being told of
SLACK = 1.0  # standard deviations beyond the baseline that count for nothing
CLIP = 3.0  # standard deviations that one minute counts at most
THRESHOLD = 4.5  # sum of excess that is drift: a minute of garbage adds 2
PER_NOISE = 9.0  # or so many times the long-run variance of the residuals, if that is more
KEPT = 1.5  # the sum is kept below so many thresholds, so that an end is found too


class Observation(NamedTuple):
    """A quantity predicted, with its 90 % interval, and measured over the same window."""

    predicted: float
    low: float
    high: float
    measured: float


class Drift(NamedTuple):
    """A quantity that left what the profile allows."""

    quantity: str
    since_s: float  # when the excess began
    found_s: float
    ratio: float  # measured over predicted, mean since it began
    cause: str  # a guess, unless it was measured
    measured: bool = False

    def told(self) -> str:
        """One sentence for people, the same as long as the drift lasts."""
        name = {"power": "power", "step": "step time"}[self.quantity]
        return (
            f"profile drift: {name} is {self.ratio - 1:+.1%} against the profile and began about {self.found_s - self.since_s:.0f} s "
            f"before it was noticed; {'measured' if self.measured else 'a guess'}: {self.cause}"
        )


class Side(NamedTuple):
    """The sum of excess one way, and the residuals since it left 0."""

    excess: float = 0.0
    since_s: float = 0.0
    total_log: float = 0.0
    minutes: int = 0


class Track(NamedTuple):
    """What is remembered of one quantity; logarithms of measured over predicted."""

    pending: tuple[tuple[float, float], ...] = ()  # residual and its standard deviation, of the minute not yet full
    bias_log: float = 0.0
    weight: float = 0.0  # minutes, forgotten exponentially
    mean_log: float = 0.0  # slow
    minutes: int = 0
    variance: float = NOISE_BEFORE[0]  # about the slow mean, in the prediction's variances
    covariance: float = NOISE_BEFORE[1]  # of a minute with the one before
    judged_by: tuple[float, float] = NOISE_BEFORE  # both, before the present excess began: a drift is not noise
    last: float = 0.0  # deviation of the minute before
    recent: float = 0.0  # deviation, mean of about three minutes
    above: Side = Side()
    below: Side = Side()
    drift: Drift | None = None

    @property
    def bias(self) -> float:
        """Factor on the prediction."""
        return exp(self.bias_log)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a record keeps of a correction."""

    bias: dict[str, float] = field(default_factory=dict)  # factor by quantity, of those ever measured
    drift: dict[str, float] = field(default_factory=dict)  # measured over predicted, of those that have drifted
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """All quantities; `told` is made anew only when something changed."""

    tracks: dict[str, Track] = field(default_factory=lambda: {q: Track() for q in QUANTITIES})
    told: Told = field(default_factory=Told)
    routing: RoutingTrack = UNKNOWN

    @property
    def drifted(self) -> bool:
        """Whether the profile no longer holds, by what it predicts or by the routing it was measured under."""
        return bool(self.told.drift) or self.routing.drift is not None

    def routed(self, routing: RoutingTrack) -> Correction:
        """The same, with the routing as it is now."""
        if routing == self.routing:
            return self
        told = self.told if routing.drift == self.routing.drift else _told(self.tracks, routing)
        return replace(self, routing=routing, told=told)

    def bias(self, quantity: str) -> float:
        """Factor on predictions of `quantity`; 1 before anything was measured."""
        return self.tracks[quantity].bias


def update(
    correction: Correction,
    window: Mapping[str, Observation],
    now_s: float,
    *,
    experts: bool = False,
    temperature_c: float | None = None,
) -> tuple[Correction, tuple[str, ...]]:
    """Take one comparable window; the correction after it, and a sentence for each drift that began or ended.

    Args:
        correction: before.
        window: by quantity; one that was not measured is left out.
        now_s: end of the window.
        experts: whether the model has experts.
        temperature_c: of the hottest board, for the guess of a cause.
    """
    tracks, full = dict(correction.tracks), []
    for quantity, seen in window.items():
        residual = _residual(seen)
        if residual is None:
            continue
        track = tracks[quantity]._replace(pending=(*tracks[quantity].pending, residual))
        if len(track.pending) >= MINUTE_WINDOWS:
            track = _minute(track, now_s)
            full.append(quantity)
        tracks[quantity] = track
    if not full:
        return replace(correction, tracks=tracks), ()
    said = []
    for quantity in [q for q in full if q in SAID]:
        track, sentence = _judged(
            quantity, tracks, now_s, experts=experts, temperature_c=temperature_c, routing=correction.routing
        )
        tracks[quantity] = track
        said += [sentence] if sentence else []
    return replace(correction, tracks=tracks, told=_told(tracks, correction.routing)), tuple(said)


def _residual(seen: Observation) -> tuple[float, float] | None:
    """Logarithm of measured over predicted, and its standard deviation by the prediction; None where one makes no sense."""
    if not all(isfinite(x) and x > 0 for x in seen):
        return None
    sd = log(max(seen.high / seen.low, 1.0)) / (2 * Z90)
    low, high = SD_RANGE
    wide = 2 * BIAS_LIMIT
    return max(-wide, min(wide, log(seen.measured / seen.predicted))), max(low, min(high, sd))


def _minute(track: Track, now_s: float) -> Track:
    """One update, with the median of the residuals of a minute."""
    residual, sd = median(r for r, _ in track.pending), median(s for _, s in track.pending)
    if track.above.excess == track.below.excess == 0.0:
        track = track._replace(judged_by=(track.variance, track.covariance))
    scale = max(1.0, sqrt(track.judged_by[0]))  # in prediction's standard deviations
    weight = min(
        track.weight * exp(-1.0 / FORGET_MINUTES) + 1.0, RELEARN_MINUTES if track.drift else FORGET_MINUTES + 1
    )
    step = max(-1.0, min(1.0, (residual - track.bias_log) / (HUBER * scale * sd))) * HUBER * scale * sd
    bias_log = track.bias_log + step / max(weight, RELEARN_MINUTES)
    track = track._replace(
        pending=(), weight=weight, bias_log=max(-BIAS_LIMIT, min(BIAS_LIMIT, bias_log)),
    )  # fmt: skip
    return _noise(_excess(track, residual, sd, scale, now_s), residual, sd, scale)


def _excess(track: Track, residual: float, sd: float, scale: float, now_s: float) -> Track:
    """The two-sided sum of what lies beyond the baseline and the slack."""
    allowed = BASELINE_RANGE * sd
    baseline = max(-allowed, min(allowed, track.mean_log))
    z = max(-CLIP, min(CLIP, (residual - baseline) / (sd * scale)))
    most, began_s = KEPT * threshold(track), now_s - MINUTE_WINDOWS * WINDOW_S

    def side(before: Side, more: float) -> Side:
        excess = min(most, max(0.0, before.excess + more))
        if excess == 0.0:
            return Side()
        since_s = before.since_s if before.excess > 0 else began_s
        return Side(excess, since_s, before.total_log + residual, before.minutes + 1)

    return track._replace(
        above=side(track.above, z - SLACK),
        below=side(track.below, -z - SLACK),
        recent=track.recent + (z - track.recent) / RELEARN_MINUTES,
    )


def threshold(track: Track) -> float:
    """The sum of excess that is drift: higher where residuals wander, so that wandering is not taken for drift."""
    variance, covariance = track.judged_by
    correlation = max(0.0, min(0.9, covariance / max(variance, 1e-9)))
    long_run = variance / max(1.0, variance) * (1 + correlation) / (1 - correlation)
    return max(THRESHOLD, PER_NOISE * long_run)


def _noise(track: Track, residual: float, sd: float, scale: float) -> Track:
    """Variance, lag-one covariance and slow mean of the residuals; they rest during a drift, which is not noise."""
    if track.drift is not None:
        return track
    deviation = max(-CLIP * scale, min(CLIP * scale, (residual - track.mean_log) / sd))
    gain = 1.0 / (min(track.minutes, NOISE_MINUTES) + NOISE_PRIOR)
    return track._replace(
        minutes=track.minutes + 1,
        mean_log=track.mean_log + deviation * sd / (min(track.minutes, BASELINE_MINUTES) + BASELINE_PRIOR),
        variance=track.variance + gain * (deviation * deviation - track.variance),
        covariance=track.covariance + gain * (deviation * track.last - track.covariance),
        last=deviation,
    )


def _judged(
    quantity: str,
    tracks: Mapping[str, Track],
    now_s: float,
    *,
    experts: bool,
    temperature_c: float | None,
    routing: RoutingTrack,
) -> tuple[Track, str | None]:
    """The track with its drift begun or ended, and the sentence that says so."""
    track = tracks[quantity]
    side = max(track.above, track.below)
    if track.drift is not None and side.excess == 0.0:
        name = {"power": "power", "step": "step time"}[quantity]
        return track._replace(drift=None), f"profile drift of {name} has ended: it is as the profile says again"
    if track.drift is not None or side.excess < threshold(track):
        return track, None
    shifts = Shifts(**{q: t.recent for q, t in tracks.items()})
    drift = Drift(
        quantity=quantity,
        since_s=side.since_s,
        found_s=now_s,
        ratio=exp(side.total_log / side.minutes),
        cause=guess_cause(quantity, shifts, experts=experts, temperature_c=temperature_c, routing=routing),
        measured=quantity == "step" and routing.drift is not None,
    )
    return track._replace(drift=drift), drift.told()


def _told(tracks: Mapping[str, Track], routing: RoutingTrack) -> Told:
    drifts = [t.drift for t in tracks.values() if t.drift is not None]
    return Told(
        bias={q: round(t.bias, 5) for q, t in tracks.items() if t.weight > 0},
        drift={d.quantity: round(d.ratio, 5) for d in drifts},
        notes=(*(d.told() for d in drifts), *((routing.drift.told(),) if routing.drift is not None else ())),
    )


def corrected(forecast: Forecast, correction: Correction, most_w: FloatArray) -> Forecast:
    """`forecast` with each quantity moved by its factor, intervals as wide as they were.

    Args:
        forecast: of a profile.
        correction: what was learnt of it.
        most_w: limits of all boards together, shape (candidates,), W: no factor lifts power above what firmware holds.
    """
    power, step, clock = (correction.bias(q) for q in QUANTITIES)

    def times(e: Estimates, factor: float) -> Estimates:
        return Estimates(e.value * factor, e.low * factor, e.high * factor)

    drawn = times(forecast.power_w, power)
    return forecast._replace(
        power_w=Estimates(*(figure.clip(max=most_w) for figure in drawn)),
        node_power_w=times(forecast.node_power_w, power),
        natural_draw_w=times(forecast.natural_draw_w, power),
        sm_clock_mhz=times(forecast.sm_clock_mhz, clock),
        step_s=times(forecast.step_s, step),
        tpot_p50_s=times(forecast.tpot_p50_s, step),
        tpot_p95_s=times(forecast.tpot_p95_s, step),
        ttft_p50_s=times(forecast.ttft_p50_s, step),
        ttft_p95_s=times(forecast.ttft_p95_s, step),
        prefill_tokens_per_s=times(forecast.prefill_tokens_per_s, 1 / step),
        tokens_per_s=times(forecast.tokens_per_s, 1 / step),
        tokens_per_j=times(forecast.tokens_per_j, 1 / (step * power)),
    )
