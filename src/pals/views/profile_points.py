"""Operating points as a profile predicts them under a mix, and the best one for each load; every figure with its 90 % interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pals.core.errors import ConfigError, OutsideProfileError
from pals.core.load import Load, Mix
from pals.core.quantities import OperatingPoint
from pals.models.fitted import Fitted
from pals.models.forecast import QUANTITIES, Estimates, Forecast
from pals.models.node_power import SLOPE

SHARES = (0.25, 0.5, 0.75, 0.95)  # of the largest throughput: the loads that a best point is told for


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure with the ends of its interval."""

    value: float
    low: float
    high: float


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
    tokens_per_j: Estimate | None  # of the boards' energy, or of the node's where that was asked for
    saved_energy_ratio: float | None  # energy per token against the reference


class Known(NamedTuple):
    """What the model says of one mix, all of it asked for at once."""

    model: Fitted
    mix: Mix
    levels: Forecast  # of the model's points, in their order
    reference: Forecast  # of the reference, alone
    others: Forecast  # of the points asked for beside these


def known_of(model: Fitted, mix: Mix, others: Sequence[OperatingPoint] = ()) -> Known:
    """Predict the model's points, the reference and `others`.

    Raises:
        OutsideProfileError: the mix, or one of `others`, lies too far from what was measured.
    """
    levels = len(model.points)
    f = model.forecast([*model.points, reference_of(model), *others], Load(mix=mix))
    parts = (slice(levels), slice(levels, levels + 1), slice(levels + 1, None))
    return Known(model, mix, *(Forecast(*(Estimates(*(a[part] for a in e)) for e in f)) for part in parts))


def reference_of(model: Fitted) -> OperatingPoint:
    """The found limit with the launch batch; where nobody measured there, the highest limit and batch that were."""
    limit_w = min(model.facts.max_limit_w, max(r.power_limit_w for r in model.rows))
    sequences = min(model.facts.launch_sequences, max(r.active_sequences for r in model.rows))
    return OperatingPoint(power_limit_w=limit_w, active_sequences=sequences)


def reference_facts(known: Known) -> PointFacts:
    """What is saved against."""
    return _told(known.model, reference_of(known.model), known.mix, known.reference, 0)


def best_points(known: Known, *, node: bool, shares: Sequence[float] = SHARES) -> list[BestPoint]:
    """For each share of the largest throughput, the measured level with most tokens per joule that surely keeps it."""
    f = known.levels
    per_j, was = tokens_per_j(f, node=node), float(tokens_per_j(known.reference, node=node).value[0])
    largest, sure = float(f.tokens_per_s.value.max()), f.tokens_per_s.low
    found = []
    for share in shares:
        keeps = sure >= share * largest
        i = int(np.argmax(np.where(keeps, per_j.value, -np.inf))) if keeps.any() else None
        point = None if i is None else _told(known.model, known.model.points[i], known.mix, f, i)
        found.append(
            BestPoint(
                mix=known.mix.name,
                load_ratio=share,
                target_tokens_per_s=share * largest,
                largest_pessimistic_tokens_per_s=float(sure.max()),
                best=point,
                tokens_per_j=None if i is None else estimate(per_j, i),
                saved_energy_ratio=None if i is None else 1.0 - was / float(per_j.value[i]),
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
