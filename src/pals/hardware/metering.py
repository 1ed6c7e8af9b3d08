"""What a board's meters do, told from watching them: how often energy refreshes, what power is averaged over. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pals.core.diagnosis import MeterFacts

Floats = NDArray[np.float64]

#: Averaging windows that boards are known to use, s.
WINDOWS_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
MIN_CHANGES = 4
MIN_SWING_W = 5.0
MIN_SWING_RATIO = 0.03
CLEARLY = 1.5  # the second-best window must fit this much worse


def judge_meters(readings: Sequence[tuple[float, float, float]]) -> MeterFacts:
    """Make facts of readings (time s, energy counter J, driver's power W), oldest first; at least two."""
    times_s, energy_j, power_w = np.array(readings, dtype=np.float64).T
    seen = changes(energy_j)
    known = len(seen) >= MIN_CHANGES
    refresh_s = float(np.median(np.diff(times_s[seen]))) if known else None
    first, last = (seen[0], seen[-1]) if known else (0, 0)
    shown = changes(power_w)
    mean_w = float((energy_j[last] - energy_j[first]) / (times_s[last] - times_s[first])) if known else None
    return MeterFacts(
        seconds=float(times_s[-1] - times_s[0]),
        sampled_every_s=float(np.median(np.diff(times_s))),
        power_w=mean_w,
        swing_w=float(power_w.std()),
        energy_refresh_s=refresh_s,
        power_window_s=window_s(times_s, energy_j, power_w) if known else None,
        power_refresh_s=float(np.median(np.diff(times_s[shown]))) if len(shown) >= MIN_CHANGES else None,
    )


def changes(shown: Floats) -> NDArray[np.intp]:
    """Where a meter shows a new value, shape (changes,)."""
    return np.flatnonzero(np.diff(shown) != 0.0) + 1


def window_s(times_s: Floats, energy_j: Floats, power_w: Floats) -> float | None:
    """The averaging window with which energy differences reproduce the driver's power; all shapes (n,).

    Returns:
        One of `WINDOWS_S`, s. None where the power was too steady for windows to differ, or none fits clearly best.
    """
    seen = changes(energy_j)
    at_s, counted_j = times_s[seen], energy_j[seen]
    refresh_s = float(np.median(np.diff(at_s)))
    candidates = [w for w in WINDOWS_S if w >= refresh_s and at_s[-1] - at_s[0] > 1.2 * w]
    if len(candidates) < 2:
        return None
    usable = (times_s >= at_s[0] + candidates[-1]) & (times_s <= at_s[-1])
    if usable.sum() < 10:
        return None
    instant_w = mean_before(times_s[usable], candidates[0], at_s, counted_j)
    if instant_w.std() < max(MIN_SWING_W, MIN_SWING_RATIO * float(instant_w.mean())):
        return None
    misfits = sorted(
        (float(np.sqrt(np.mean((power_w[usable] - mean_before(times_s[usable], w, at_s, counted_j)) ** 2))), w)
        for w in candidates
    )
    (best, window), (second, _) = misfits[0], misfits[1]
    explained = best < 0.5 * float(power_w[usable].std())
    return window if explained and second > CLEARLY * best else None


def mean_before(times_s: Floats, window: float, at_s: Floats, counted_j: Floats) -> Floats:
    """Mean power over the `window` seconds before each time, W, shape of `times_s`; the counter is linear in between."""
    end, start = np.interp(times_s, at_s, counted_j), np.interp(times_s - window, at_s, counted_j)
    return np.asarray((end - start) / window, dtype=np.float64)
