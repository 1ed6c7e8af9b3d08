"""Points measured again in between: whether the engine or its boards changed while they were profiled; pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pals.core.quantities import SAME_LIMIT_W, Checked, OperatingPoint
from pals.models.row import ProfileRow

REACHED = 0.8  # of the level: an engine that runs fewer sequences has no room for more
EVERY = 8  # measurements, of which one is a repeat


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift(Checked):
    """What points measured again say: the last measurement over the first, geometric mean over those points."""

    points: int  # measured more than once
    power: float  # ratio
    tokens_per_s: float  # ratio
    temperature_k: float | None  # mean change; None: no board tells its temperature


def is_at(row: ProfileRow, point: OperatingPoint, mix: int) -> bool:
    """Whether `row` was measured at `point` under `mix`."""
    levels = (row.active_sequences, row.sm_clock_lock_mhz, row.mix)
    same = levels == (point.active_sequences, point.sm_clock_mhz, mix)
    return same and abs(row.power_limit_w - point.power_limit_w) < SAME_LIMIT_W


def due_repeat(rows: Sequence[ProfileRow]) -> ProfileRow | None:
    """The early row to measure again now: every `EVERY`-th time that which was measured least often; None: not now."""
    if len(rows) % EVERY != EVERY - 1:
        return None
    early = [r for r in rows[: EVERY - 1] if r.running >= REACHED * r.active_sequences] or rows[: EVERY - 1]
    return min(early, key=lambda row: sum(is_at(r, row.point, row.mix) for r in rows))


def drift_of(rows: Sequence[ProfileRow]) -> Drift | None:
    """What the repeats say; None without any."""
    places = defaultdict[tuple[int, int | None, int, int], list[ProfileRow]](list)
    for row in rows:
        key = (row.mix, row.sm_clock_lock_mhz, row.active_sequences, round(row.power_limit_w / SAME_LIMIT_W))
        places[key].append(row)
    pairs = [(found[0], found[-1]) for found in places.values() if len(found) > 1]
    if not pairs:
        return None
    warmer = [
        b.temperature_c - a.temperature_c
        for a, b in pairs
        if a.temperature_c is not None and b.temperature_c is not None
    ]
    return Drift(
        points=len(pairs),
        power=float(np.exp(np.mean([np.log(b.power_w / a.power_w) for a, b in pairs]))),
        tokens_per_s=float(np.exp(np.mean([np.log(b.tokens_per_s / a.tokens_per_s) for a, b in pairs]))),
        temperature_k=float(np.mean(warmer)) if warmer else None,
    )
