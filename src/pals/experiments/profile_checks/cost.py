"""What a profile costs: rows, engine time, bytes, and microseconds of a decision; timed here, on this machine, the best of a few."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from pals.core.load import Load
from pals.experiments.profile_checks.world import World
from pals.models.fitted import fit

REPEATS = 5


def costs_of(world: World) -> Mapping[str, float]:
    """By the names of `summary.COSTS`."""
    case = world.case
    swept_mixes = case.mixes[: 1 + max(r.mix for r in case.swept)]
    began = time.perf_counter()
    fitted = fit(case.swept, swept_mixes, case.facts)
    fit_s = time.perf_counter() - began
    points = [r.point for r in case.rows if r.mix == 0]
    load = Load(mix=case.mixes[0])
    return {
        "rows": float(len(case.swept)),
        "sweep_minutes": world.sweep_s / 60.0,
        "fit_ms": 1e3 * fit_s,
        "forecast_us": 1e6 * best_s(lambda: fitted.forecast(points, load)),
    }


def best_s(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Seconds of the fastest of a few calls: what the machine does beside it only makes them slower."""
    least = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - began)
    return least
