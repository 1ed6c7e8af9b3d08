"""Which rows a method learns from, and which it is asked about: never the same measurement.

Every split of a grid starts from one random draw of at most `TRAIN_ROWS` rows, as many as a profile may have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pals.models.row import ProfileRow

TRAIN_ROWS = 50
RANDOM, SWEEP = "random split", "sweep"
INTERIOR = {"limit": "interior cap withheld", "batch": "interior batch withheld", "clock": "interior clock withheld"}
LOWEST = "lowest cap withheld"
EDGE = "outermost level withheld"  # of measured sets: the highest level of the knob, and its lowest if it is no limit
UNSWEPT = "a mix that no row has"
FEW, FEW_ROWS = "sweep, first 10 rows", 10
PRIORS = "no rows, priors alone"
KINDS = (RANDOM, SWEEP, FEW, PRIORS, UNSWEPT, *INTERIOR.values(), LOWEST, EDGE)
SHORT, DRAWS, DRAWN_SHARE = 8, 3, 0.7  # of measured sweeps
NO_LOCK = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One division of rows."""

    kind: str  # one of KINDS
    train: tuple[ProfileRow, ...]
    test: tuple[ProfileRow, ...]
    level: float | None = None  # that was withheld


#: Reads a row's level of a knob. A limit is a level only where no lock binds first.
LEVELS: dict[str, Callable[[ProfileRow], float | None]] = {
    "limit": lambda row: row.power_limit_w if row.sm_clock_lock_mhz is None else None,
    "batch": lambda row: float(row.active_sequences),
    "clock": lambda row: NO_LOCK if row.sm_clock_lock_mhz is None else float(row.sm_clock_lock_mhz),
}


def grid_splits(
    grid: Sequence[ProfileRow],
    swept: Sequence[ProfileRow],
    unswept: Sequence[ProfileRow],
    seed: int,
    *,
    levels: bool = True,
) -> list[Split]:
    """All splits of a dense grid, and the sweep's own rows against it and against a mix that neither has."""
    drawn, rest = drawn_rows(grid, TRAIN_ROWS, seed)
    splits = [Split(kind=RANDOM, train=drawn, test=rest)]
    if swept:
        splits.append(Split(kind=SWEEP, train=tuple(swept), test=tuple(grid)))
        splits.append(Split(kind=FEW, train=tuple(swept[:FEW_ROWS]), test=tuple(grid)))
        splits.append(Split(kind=PRIORS, train=(), test=tuple(grid)))
        splits.append(Split(kind=UNSWEPT, train=tuple(swept), test=tuple(unswept)))
    if not levels:
        return splits
    for knob in LEVELS:
        splits += withheld(grid, drawn, knob)
    return [*splits, *lowest_withheld(grid, drawn)]


def drawn_rows(
    rows: Sequence[ProfileRow], count: int, seed: int
) -> tuple[tuple[ProfileRow, ...], tuple[ProfileRow, ...]]:
    """So many random rows (at most all but one), and the others, each in the order given."""
    count = min(count, len(rows) - 1)
    chosen = set(np.random.default_rng([seed, 5]).choice(len(rows), size=count, replace=False).tolist())
    train = tuple(row for i, row in enumerate(rows) if i in chosen)
    return train, tuple(row for i, row in enumerate(rows) if i not in chosen)


def withheld(grid: Sequence[ProfileRow], drawn: Sequence[ProfileRow], knob: str) -> list[Split]:
    """For each interior level of a knob: the draw without it, asked about every row of the grid at it."""
    return [_without(grid, drawn, knob, level, INTERIOR[knob]) for level in levels_of(grid, knob)[1:-1]]


def lowest_withheld(grid: Sequence[ProfileRow], drawn: Sequence[ProfileRow]) -> list[Split]:
    """The draw without the lowest limit, asked about it: where physics turns a corner. Empty where there is one limit."""
    levels = levels_of(grid, "limit")
    return [_without(grid, drawn, "limit", levels[0], LOWEST)] if len(levels) > 1 else []


def measured_splits(rows: Sequence[ProfileRow], knob: str, seed: int) -> list[Split]:
    """Of a measured sweep of one knob: random splits (leave-one-out where it is short), and each level withheld in turn."""
    if len(rows) < SHORT:
        splits = [Split(kind=RANDOM, train=(*rows[:i], *rows[i + 1 :]), test=(row,)) for i, row in enumerate(rows)]
    else:
        drawn = (drawn_rows(rows, round(DRAWN_SHARE * len(rows)), seed + i) for i in range(DRAWS))
        splits = [Split(kind=RANDOM, train=train, test=test) for train, test in drawn]
    splits += withheld(rows, rows, knob)
    levels = levels_of(rows, knob)
    if len(levels) < 3:
        return splits
    lowest = LOWEST if knob == "limit" else EDGE
    ends = ((levels[0], lowest), (levels[-1], EDGE))
    return [*splits, *(_without(rows, rows, knob, level, kind) for level, kind in ends)]


def levels_of(rows: Sequence[ProfileRow], knob: str) -> list[float]:
    """Levels of a knob in these rows, rising."""
    return sorted({level for row in rows if (level := LEVELS[knob](row)) is not None})


def _without(
    grid: Sequence[ProfileRow], drawn: Sequence[ProfileRow], knob: str, level: float, kind: str
) -> Split:  # fmt: skip
    read = LEVELS[knob]
    return Split(
        kind=kind,
        level=level,
        train=tuple(row for row in drawn if read(row) != level),
        test=tuple(row for row in grid if read(row) == level),
    )
