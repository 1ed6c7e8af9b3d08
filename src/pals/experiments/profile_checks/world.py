"""A combination's rows: the sweep that a user would run, and the truth of a dense grid, both measured on the same plant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pals.core.load import Mix
from pals.core.quantities import OperatingPoint
from pals.experiments.profile_checks.case import SIMULATED, Case
from pals.experiments.profile_checks.combination import Combination, choices_of, grid_of, simulation_of, unswept_mix
from pals.experiments.profile_checks.kept import SWEPT, TRUTH, keep, read_kept
from pals.experiments.simulated_profile import facts_of, measured_truth, plan_of, simulated_sweep
from pals.experiments.simulated_run import Simulation
from pals.models.fitted import fit
from pals.models.row import ProfileRow


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A case, and the engine time of its sweep."""

    case: Case
    sweep_s: float


def world_of(c: Combination, folder: Path, *, choices: bool) -> World:
    """Measured, or as kept in `folder`; `choices`: also the finer grid that points are chosen from."""
    sim = simulation_of(c)
    mixes = (*plan_of(sim).mixes, unswept_mix(sim))
    truth = _truth(c, sim, grid_of(sim), mixes, folder / "rows" / f"{c.slug}-grid.json")
    fine = _truth(c, sim, choices_of(sim), mixes[:-1], folder / "rows" / f"{c.slug}-choices.json") if choices else []
    swept, sweep_s = _swept(c, sim, folder / "rows" / f"{c.slug}-sweep.json")
    last = len(mixes) - 1
    case = Case(
        name=c.slug,
        group=c.boards,
        basis=SIMULATED,
        facts=facts_of(sim),
        mixes=mixes,
        rows=tuple(r for r in truth if r.mix != last),
        choices=tuple(fine),
        unswept=tuple(r for r in truth if r.mix == last),
        swept=swept,
        seed=c.seed,
    )
    return World(case=case, sweep_s=sweep_s)


def _truth(
    c: Combination, sim: Simulation, points: Sequence[OperatingPoint], mixes: tuple[Mix, ...], path: Path
) -> list[ProfileRow]:
    """Every point under every mix."""
    if (kept := read_kept(path, TRUTH)) is not None:
        return _rows(kept["rows"])
    rows = [
        replace(row, mix=i)
        for i, mix in enumerate(mixes)
        for row in measured_truth(sim, points, mix, seed=c.seed)
    ]  # fmt: skip
    keep(path, TRUTH, {"rows": [r.to_dict() for r in rows]})
    return rows


def _swept(c: Combination, sim: Simulation, path: Path) -> tuple[tuple[ProfileRow, ...], float]:
    """What the default sweep measures, and the engine time it takes, s."""
    kept = read_kept(path, SWEPT)
    if kept is None:
        sweep = simulated_sweep(sim, fit=fit, seed=c.seed, plan=plan_of(sim, seed=c.seed))
        kept = {"rows": [r.to_dict() for r in sweep.rows], "seconds": sweep.event_s}
        keep(path, SWEPT, kept)
    return tuple(_rows(kept["rows"])), float(kept["seconds"])


def _rows(kept: list[dict[str, Any]]) -> list[ProfileRow]:
    return [ProfileRow(**r) for r in kept]
