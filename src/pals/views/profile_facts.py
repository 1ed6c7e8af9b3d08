"""What there is to say of a profile: one record of plain figures, for text and JSON alike; predictions with 90 % intervals.

Every prediction is of an engine that has enough work of one mix; watts are of all boards, except where a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pals.core.errors import ConfigError, OutsideProfileError
from pals.core.load import Load, Mix
from pals.core.quantities import Fingerprint, OperatingPoint
from pals.models.fitted import Fitted
from pals.models.forecast import QUANTITIES, Estimates, Forecast
from pals.models.hull import Hull
from pals.models.node_power import SLOPE
from pals.models.profile import Profile
from pals.views.profile_parameters import ParameterFacts, parameters_of

SHARES = (0.25, 0.5, 0.75, 0.95)  # of the largest throughput: the loads that a best point is told for
MOST_BATCHES = 5  # of a mix, whose natural draw is told
#: Whether the found limit binds: natural draw surely above it; on average below it, while steps that prefill exceed it and
#: are slowed; an interval that holds the limit; nothing exceeds it.
Binds = Literal["yes", "prefill steps", "perhaps", "no"]
SLOWED = 0.99  # of the natural draw, below which a limit has taken something


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure with the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MixFacts:
    """A mix of requests, and how much of it was measured."""

    name: str
    prompt_tokens: float
    output_tokens: float
    length_spread_ratio: float
    cached_tokens: float
    rows: int
    sequences_in_kv_cache: float | None  # None: no row ran into its end


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawFacts:
    """What boards do at the found limit, without a clock lock, with so many active sequences."""

    mix: str
    active_sequences: int
    natural_draw_per_board_w: Estimate
    power_per_board_w: Estimate
    sm_clock_mhz: Estimate
    limit_binds: Binds


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityFacts:
    """How far a quantity may be trusted; errors are mean absolute, relative; None: rows cannot measure it."""

    quantity: str
    error_in_sample_ratio: float | None
    error_left_out_ratio: float | None
    half_width_median_ratio: float  # of the interval, over all points and mixes that were measured
    half_width_largest_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PointFacts:
    """A point under a mix, with every quantity."""

    mix: str
    power_limit_w: float  # per board
    sm_clock_lock_mhz: int | None
    active_sequences: int
    predicted: dict[str, Estimate]


@dataclass(frozen=True, slots=True, kw_only=True)
class BestPoint:
    """The point with most tokens per joule whose pessimistic throughput keeps a target; `best` is None where none does."""

    mix: str
    load_ratio: float  # of the largest throughput
    target_tokens_per_s: float
    largest_pessimistic_tokens_per_s: float
    best: PointFacts | None
    reference: PointFacts  # the found limit with the launch batch, or the nearest to it that was measured
    tokens_per_j: Estimate | None  # of the boards' energy, or of the node's where that was asked for
    saved_energy_ratio: float | None  # energy per token against the reference


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileFacts:
    """Everything; its fields, and those of its parts, are the keys of `pals profile show --json`."""

    file: str
    bytes: int
    source: str
    made_at: str
    command: str
    fingerprint: Fingerprint
    rows: int
    measured_s: float
    mixes: tuple[MixFacts, ...]
    min_limit_w: float
    found_limit_w: float
    min_sm_clock_mhz: int
    max_sm_clock_mhz: int
    step_tokens: int
    measured_limits_w: tuple[float, ...]
    measured_locks_mhz: tuple[int, ...]
    measured_sequences: tuple[int, ...]
    draws: tuple[DrawFacts, ...]
    quality: tuple[QualityFacts, ...]
    parameters: tuple[ParameterFacts, ...]
    energy_of: Literal["boards", "node"]
    best_points: tuple[BestPoint, ...]
    points: tuple[PointFacts, ...] = ()  # those asked for
    notes: tuple[str, ...] = ()
    not_predicted: tuple[str, ...] = field(default=())  # mixes too far from every row, and why


def facts_of(
    profile: Profile, *, file: str, size: int, mixes: Sequence[Mix], node: bool, point: OperatingPoint | None
) -> ProfileFacts:
    """All there is to say of a profile under `mixes`.

    Args:
        profile: what is told.
        file: its name.
        size: its bytes.
        mixes: loads for which predictions are made: its own, or another one.
        node: best points by the node's energy instead of the boards'.
        point: None: no single point was asked for.

    Raises:
        ConfigError: no row, or every mix, or the point, lies further outside what was measured than may be told.
    """
    model, rows = profile.model(), profile.rows
    if not rows:
        raise ConfigError(f"{file} holds no measured row; let `pals profile` finish. Nothing was shown")
    told, outside = _predictable(model, mixes)
    if not told:
        raise ConfigError(f"{file}: {outside[0]}")
    return ProfileFacts(
        file=file, bytes=size, source=profile.source, made_at=profile.made_at, command=profile.command,
        fingerprint=profile.fingerprint, rows=len(rows), measured_s=max(r.at_s for r in rows),
        mixes=tuple(_mix_facts(model, m) for m in dict.fromkeys((*profile.mixes, *mixes))),
        min_limit_w=profile.facts.min_limit_w, found_limit_w=profile.facts.max_limit_w,
        min_sm_clock_mhz=profile.facts.min_sm_clock_mhz, max_sm_clock_mhz=profile.facts.max_sm_clock_mhz,
        step_tokens=profile.facts.step_tokens, measured_limits_w=tuple(sorted({r.power_limit_w for r in rows})),
        measured_locks_mhz=tuple(sorted({r.sm_clock_lock_mhz for r in rows if r.sm_clock_lock_mhz is not None})),
        measured_sequences=tuple(sorted({r.active_sequences for r in rows})),
        draws=tuple(d for m in told for d in draws_of(model, m)), quality=quality_of(model, told),
        parameters=parameters_of(model), energy_of="node" if node else "boards",
        best_points=tuple(b for m in told for b in best_points(model, m, node=node)),
        points=() if point is None else tuple(point_facts(model, point, m) for m in told),
        notes=profile.notes, not_predicted=tuple(outside),
    )  # fmt: skip


def _predictable(model: Fitted, mixes: Sequence[Mix]) -> tuple[list[Mix], list[str]]:
    """Those that the profile may speak of, and what is said of the others."""
    told, outside = list[Mix](), list[str]()
    for mix in mixes:
        try:
            model.forecast([reference_of(model)], Load(mix=mix))
            told.append(mix)
        except OutsideProfileError:
            outside.append(_too_far(model.hull, mix))
    return told, outside


def _too_far(hull: Hull | None, mix: Mix) -> str:
    if hull is None:
        return f"{mix.name}: nothing was measured"
    p, c = hull.prefill, hull.context
    return (
        f"{mix.name}, {mix.prompt_tokens:.0f} prompt and {mix.output_tokens:.0f} output tokens, lies more than a grid step outside what "
        f"was measured. A profile speaks of {number(2 ** (p.low - p.step))}..{number(2 ** (p.high + p.step))} prompt tokens per output token "
        f"(here {number(mix.prefill_per_output)}) and of contexts of {2 ** (c.low - c.step):.0f}..{2 ** (c.high + c.step):.0f} tokens "
        f"(here {mix.context_tokens:.0f}). Nothing was predicted; measure there: pals profile --prompt-tokens "
        f"{mix.prompt_tokens:.0f} --output-tokens {mix.output_tokens:.0f}"
    )


def _mix_facts(model: Fitted, mix: Mix) -> MixFacts:
    return MixFacts(
        name=mix.name, prompt_tokens=mix.prompt_tokens, output_tokens=mix.output_tokens, length_spread_ratio=mix.spread,
        cached_tokens=mix.cached_tokens, rows=sum(1 for r in model.rows if model.mixes[r.mix] == mix),
        sequences_in_kv_cache=model.kv_tokens / mix.context_tokens if np.isfinite(model.kv_tokens) else None,
    )  # fmt: skip


def reference_of(model: Fitted) -> OperatingPoint:
    """The found limit with the launch batch; where nobody measured there, the highest limit and batch that were."""
    limit_w = min(model.facts.max_limit_w, max(r.power_limit_w for r in model.rows))
    sequences = min(model.facts.launch_sequences, max(r.active_sequences for r in model.rows))
    return OperatingPoint(power_limit_w=limit_w, active_sequences=sequences)


def draws_of(model: Fitted, mix: Mix) -> list[DrawFacts]:
    """By batch: natural draw, and what the found limit makes of it."""
    levels = sorted({r.active_sequences for r in model.rows})
    kept = sorted({levels[round(i * (len(levels) - 1) / (MOST_BATCHES - 1))] for i in range(MOST_BATCHES)})
    limit_w, boards = reference_of(model).power_limit_w, model.facts.boards
    f = model.forecast([OperatingPoint(power_limit_w=limit_w, active_sequences=n) for n in kept], Load(mix=mix))
    found = []
    for i, n in enumerate(kept):
        natural, drawn = estimate(f.natural_draw_w, i, over=boards), estimate(f.power_w, i, over=boards)
        found.append(
            DrawFacts(
                mix=mix.name,
                active_sequences=n,
                natural_draw_per_board_w=natural,
                power_per_board_w=drawn,
                sm_clock_mhz=estimate(f.sm_clock_mhz, i),
                limit_binds=_binds(natural, drawn, limit_w),
            )
        )
    return found


def _binds(natural: Estimate, drawn: Estimate, limit_w: float) -> Binds:
    if natural.low > limit_w:
        return "yes"
    if drawn.value < SLOWED * min(natural.value, limit_w):
        return "prefill steps"
    return "no" if natural.high < limit_w else "perhaps"


def quality_of(model: Fitted, mixes: Iterable[Mix]) -> tuple[QualityFacts, ...]:
    """Errors by quantity as the profile has them, and how wide intervals are where it was measured."""
    forecasts = [model.forecast(model.points, Load(mix=m)) for m in mixes]
    return tuple(_quality(model, name, forecasts) for name in QUANTITIES)


def _quality(model: Fitted, name: str, forecasts: Sequence[Forecast]) -> QualityFacts:
    inside, left_out = model.quality.get(name, (None, None))
    every: list[Estimates] = [getattr(f, name) for f in forecasts]
    half = np.concatenate([(e.high - e.low) / (2.0 * e.value) for e in every])
    return QualityFacts(
        quantity=name, error_in_sample_ratio=inside, error_left_out_ratio=left_out,
        half_width_median_ratio=float(np.median(half)), half_width_largest_ratio=float(half.max()),
    )  # fmt: skip


def best_points(model: Fitted, mix: Mix, *, node: bool, shares: Sequence[float] = SHARES) -> list[BestPoint]:
    """For each share of the largest throughput, the measured level with most tokens per joule that surely keeps it."""
    points = model.points
    f = model.forecast(points, Load(mix=mix))
    reference = reference_of(model)
    there = model.forecast([reference], Load(mix=mix))
    per_j, was = tokens_per_j(f, node=node), tokens_per_j(there, node=node)
    largest, sure = float(f.tokens_per_s.value.max()), f.tokens_per_s.low
    found = []
    for share in shares:
        keeps = sure >= share * largest
        i = int(np.argmax(np.where(keeps, per_j.value, -np.inf))) if keeps.any() else None
        found.append(
            BestPoint(
                mix=mix.name,
                load_ratio=share,
                target_tokens_per_s=share * largest,
                largest_pessimistic_tokens_per_s=float(sure.max()),
                best=None if i is None else _told(model, points[i], mix, f, i),
                reference=_told(model, reference, mix, there, 0),
                tokens_per_j=None if i is None else estimate(per_j, i),
                saved_energy_ratio=None if i is None else 1.0 - float(was.value[0] / per_j.value[i]),
            )
        )
    return found


def tokens_per_j(f: Forecast, *, node: bool) -> Estimates:
    """Output tokens per joule of the boards, or of the node: its offset over the tokens comes to the boards' joules per token."""
    if not node:
        return f.tokens_per_j
    return Estimates(
        *(
            1.0 / (SLOPE / per_j + (watts - SLOPE * boards_w) / rate)
            for per_j, rate, watts, boards_w in (
                (f.tokens_per_j.value, f.tokens_per_s.value, f.node_power_w.value, f.power_w.value),
                (f.tokens_per_j.low, f.tokens_per_s.low, f.node_power_w.high, f.power_w.high),
                (f.tokens_per_j.high, f.tokens_per_s.high, f.node_power_w.low, f.power_w.low),
            )
        )
    )


def point_facts(model: Fitted, point: OperatingPoint, mix: Mix) -> PointFacts:
    """One point in full.

    Raises:
        ConfigError: it lies further outside what was measured than may be told.
    """
    try:
        return _told(model, point, mix, model.forecast([point], Load(mix=mix)), 0)
    except OutsideProfileError as e:
        raise ConfigError(f"{point_text(point)}: {_measured_levers(model)}. Nothing was predicted") from e


def _measured_levers(model: Fitted) -> str:
    limits, levels = (sorted({getattr(r, k) for r in model.rows}) for k in ("power_limit_w", "active_sequences"))
    locks = sorted({r.sm_clock_lock_mhz for r in model.rows if r.sm_clock_lock_mhz is not None})
    clocks = f"clock locks of {locks[0]}..{locks[-1]} MHz" if locks else "no clock lock"
    return (
        f"more than a grid step outside what was measured: {limits[0]:.0f}..{limits[-1]:.0f} W, {clocks}, "
        f"{levels[0]}..{levels[-1]} sequences"
    )


def point_text(p: OperatingPoint) -> str:
    """ "300 W, 1200 MHz, 32 sequences"."""
    clock = "no clock lock" if p.sm_clock_mhz is None else f"{p.sm_clock_mhz} MHz"
    return f"{p.power_limit_w:.0f} W, {clock}, {p.active_sequences or 'launch'} sequences"


def _told(model: Fitted, point: OperatingPoint, mix: Mix, f: Forecast, i: int) -> PointFacts:
    return PointFacts(
        mix=mix.name, power_limit_w=point.power_limit_w, sm_clock_lock_mhz=point.sm_clock_mhz,
        active_sequences=point.active_sequences or model.facts.launch_sequences,
        predicted={name: estimate(getattr(f, name), i) for name in QUANTITIES},
    )  # fmt: skip


def estimate(e: Estimates, i: int, *, over: float = 1.0) -> Estimate:
    """One candidate's, divided by `over`."""
    return Estimate(value=float(e.value[i]) / over, low=float(e.low[i]) / over, high=float(e.high[i]) / over)


def number(value: float) -> str:
    """Three significant digits, whole from 100 on; an exponent only where nobody would count the digits."""
    size = abs(value)
    if size >= 1e7:
        return f"{value:.2g}"
    if size >= 99.95 or value == 0:
        return f"{value:.0f}"
    digits = 1 if size >= 9.995 else 2 if size >= 0.9995 else 3 if size >= 0.09995 else 4
    return f"{value:.{digits}f}"
