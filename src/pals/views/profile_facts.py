"""What there is to say of a profile: one record of plain figures, for text and JSON alike; predictions with 90 % intervals.

Every prediction is of an engine that has enough work of one mix; watts are of all boards, except where a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from pals.core.errors import ConfigError, OutsideProfileError
from pals.core.load import Mix
from pals.core.quantities import Fingerprint, OperatingPoint
from pals.models.fitted import Fitted
from pals.models.forecast import QUANTITIES, Estimates, Forecast
from pals.models.hull import Hull
from pals.models.profile import Profile
from pals.views.profile_parameters import ParameterFacts, parameters_of
from pals.views.profile_points import (
    BestPoint,
    Estimate,
    Known,
    PointFacts,
    best_points,
    estimate,
    known_of,
    number,
    point_facts,
    reference_facts,
    reference_of,
)

MOST_BATCHES = 5  # of a mix, whose natural draw is told
#: Whether the found limit binds: natural draw surely above it; on average below it, while steps that prefill exceed it and
#: are slowed; an interval that holds the limit; nothing exceeds it.
Binds = Literal["yes", "prefill steps", "perhaps", "no"]
SLOWED = 0.99  # of the natural draw, below which a limit has taken something


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
    """How far a quantity may be trusted; errors are median absolute, relative; None: rows cannot measure it."""

    quantity: str
    error_in_sample_ratio: float | None
    error_left_out_ratio: float | None
    half_width_median_ratio: float  # of the interval, over all points and mixes that were measured
    half_width_largest_ratio: float


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
    references: tuple[
        PointFacts, ...
    ]  # by mix: the found limit with the launch batch, or the nearest that was measured
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
    told, outside = _predictable(model, mixes, _batches(model))
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
        draws=tuple(d for k in told for d in draws_of(k)), quality=quality_of(told),
        parameters=parameters_of(model), energy_of="node" if node else "boards",
        references=tuple(reference_facts(k) for k in told),
        best_points=tuple(b for k in told for b in best_points(k, node=node)),
        points=() if point is None else tuple(point_facts(model, point, k.mix) for k in told),
        notes=profile.notes, not_predicted=tuple(outside),
    )  # fmt: skip


def _batches(model: Fitted) -> list[OperatingPoint]:
    """The found limit with some of the batches measured, the smallest and the largest among them."""
    levels = sorted({r.active_sequences for r in model.rows})
    kept = sorted({levels[round(i * (len(levels) - 1) / (MOST_BATCHES - 1))] for i in range(MOST_BATCHES)})
    return [replace(reference_of(model), active_sequences=n) for n in kept]


def _predictable(
    model: Fitted, mixes: Sequence[Mix], batches: Sequence[OperatingPoint]
) -> tuple[list[Known], list[str]]:
    """The mixes that the profile may speak of, and what is said of the others."""
    told, outside = list[Known](), list[str]()
    for mix in mixes:
        try:
            told.append(known_of(model, mix, batches))
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


def draws_of(known: Known) -> list[DrawFacts]:
    """By batch: natural draw, and what the found limit makes of it."""
    limit_w, boards, f = reference_of(known.model).power_limit_w, known.model.facts.boards, known.others
    found = []
    for i, point in enumerate(_batches(known.model)):
        natural, drawn = estimate(f.natural_draw_w, i, over=boards), estimate(f.power_w, i, over=boards)
        found.append(
            DrawFacts(
                mix=known.mix.name,
                active_sequences=point.active_sequences or known.model.facts.launch_sequences,
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


def quality_of(known: Sequence[Known]) -> tuple[QualityFacts, ...]:
    """Errors by quantity as the profile has them, and how wide intervals are where it was measured."""
    return tuple(_quality(known[0].model, name, [k.levels for k in known]) for name in QUANTITIES)


def _quality(model: Fitted, name: str, forecasts: Sequence[Forecast]) -> QualityFacts:
    inside, left_out = model.quality.get(name, (None, None))
    every: list[Estimates] = [getattr(f, name) for f in forecasts]
    half = np.concatenate([(e.high - e.low) / (2.0 * e.value) for e in every])
    return QualityFacts(
        quantity=name, error_in_sample_ratio=inside, error_left_out_ratio=left_out,
        half_width_median_ratio=float(np.median(half)), half_width_largest_ratio=float(half.max()),
    )  # fmt: skip
