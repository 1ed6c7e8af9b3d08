"""What a profile costs: rows, engine time, bytes, and the time of a decision; timed here, on this machine, the best of a few."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import count

from pals.core.load import Load
from pals.core.quantities import fingerprint_of
from pals.experiments.profile_checks.combination import Combination, simulation_of
from pals.experiments.profile_checks.world import World
from pals.experiments.simulated_node import SimulatedBoard, SimulatedGroup
from pals.models.candidates import Candidates, candidates_of
from pals.models.profile import Profile

REPEATS = 15
NEAR, FAR = 1.0005, 1.3  # factors on a load's context, from one decision to the next
COMMAND = "pals profile simulate MODEL --boards BOARDS --out profile.json"


def costs_of(c: Combination, world: World) -> Mapping[str, float]:
    """By the names of `summary.COSTS`."""
    began = time.perf_counter()
    profile = _profile(c, world)
    fit_s = time.perf_counter() - began
    text, fitted = profile.to_json(), profile.model()
    load = Load(mix=profile.mixes[0])
    candidates = candidates_of(fitted, fitted.points, load)
    return {
        "rows": float(len(profile.rows)),
        "sweep_minutes": world.sweep_s / 60.0,
        "file_bytes": float(len(text.encode())),
        "candidates": float(len(candidates.points)),
        "decision_us": 1e6 * best_s(_decisions(candidates, load, NEAR)),
        "new_load_us": 1e6 * best_s(_decisions(candidates, load, FAR), 3),
        "forecast_us": 1e6 * best_s(lambda: fitted.forecast(candidates.points, load), 3),
        "load_ms": 1e3 * best_s(lambda: Profile.from_json(text).model()),
        "fit_ms": 1e3 * fit_s,
    }


def _profile(c: Combination, world: World) -> Profile:
    """As `pals profile simulate` writes it."""
    case, sim = world.case, simulation_of(c)
    group = SimulatedGroup(sim.replica(), sim.spec, sim.boards)
    boards = [SimulatedBoard(group, i).info for i in range(sim.boards)]
    return Profile.of(
        case.swept, case.mixes[: 1 + max(r.mix for r in case.swept)], case.facts, fingerprint_of(sim.engine, boards),
        source="simulated", made_at="2026-01-01", command=COMMAND,
    )  # fmt: skip


def _decisions(candidates: Candidates, load: Load, factor: float) -> Callable[[], object]:
    """Forecasts of one load after the other, the context some factor away from what it was; the first is already made."""
    contexts: Iterator[float] = (load.mix.context_tokens / factor**i for i in count())

    def decide() -> object:
        return candidates.forecast(replace(load, context_tokens=next(contexts)))

    decide()
    return decide


def best_s(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Seconds of the fastest of a few calls: what the machine does beside it only makes them slower."""
    least = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - began)
    return least
