"""A combination's rows: the sweep that a user would run, and the truth of a dense grid, both measured on the same plant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pals.core.load import Mix
from pals.experiments.profile_checks.case import SIMULATED, Case
from pals.experiments.profile_checks.combination import Combination, grid_of, simulation_of, unswept_mix
from pals.experiments.profile_checks.kept import SWEPT, TRUTH, keep, read_kept
from pals.experiments.simulated_profile import facts_of, measured_truth, simulated_sweep
from pals.experiments.simulated_run import Simulation
from pals.models.row import ProfileRow
from pals.profiler.plan import default_mixes


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A case, and the engine time of its sweep."""

    case: Case
    sweep_s: float


def world_of(c: Combination, folder: Path) -> World:
    """Measured, or as kept in `folder`."""
    sim = simulation_of(c)
    swept_mixes = default_mixes(sim.model_context)
    mixes = (*swept_mixes, unswept_mix(sim))
    truth = _truth(c, sim, mixes, folder / "rows" / f"{c.slug}-grid.json")
    swept = _swept(sim, swept_mixes, folder / "rows" / f"{c.slug}-sweep.json")
    last = len(mixes) - 1
    case = Case(
        name=c.slug,
        group=c.boards,
        basis=SIMULATED,
        facts=facts_of(sim),
        mixes=mixes,
        rows=tuple(r for r in truth if r.mix != last),
        unswept=tuple(r for r in truth if r.mix == last),
        swept=swept,
        seed=c.seed,
    )
    return World(case=case, sweep_s=max((r.at_s for r in swept), default=0.0))


def _truth(c: Combination, sim: Simulation, mixes: tuple[Mix, ...], path: Path) -> list[ProfileRow]:
    """Every point of the grid under every mix."""
    if (kept := read_kept(path, TRUTH)) is not None:
        return _rows(kept["rows"])
    points = grid_of(sim)
    rows = [r for i, mix in enumerate(mixes) for r in measured_truth(sim, points, mix, mix_index=i)]
    keep(path, TRUTH, {"rows": [r.to_dict() for r in rows]})
    return rows


def _swept(sim: Simulation, mixes: tuple[Mix, ...], path: Path) -> tuple[ProfileRow, ...]:
    """What the sweep measures, at most 50 rows."""
    if (kept := read_kept(path, SWEPT)) is not None:
        return tuple(_rows(kept["rows"]))
    rows = tuple(simulated_sweep(sim, mixes))
    keep(path, SWEPT, {"rows": [r.to_dict() for r in rows]})
    return rows


def _rows(kept: list[dict[str, Any]]) -> list[ProfileRow]:
    return [ProfileRow(**r) for r in kept]
