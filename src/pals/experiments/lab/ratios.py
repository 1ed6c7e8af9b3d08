"""A policy's figure over another's in the same place, and what remains of many such ratios for each seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, median

from pals.experiments.lab.experiment import Row

Place = tuple[object, ...]
Fold = Callable[[Sequence[float]], float]
FOLDS: dict[str, Fold] = {"mean": fmean, "median": median, "least": min, "most": max}


def ratios(rows: Sequence[Row], figure: str, policy: str, over: str, places: Sequence[str]) -> dict[Place, float]:
    """`policy`'s figure over that of `over`, by place: the values of the columns `places`, the seed last.

    Places where one of them has no row, or the denominator is 0, do not appear.
    """
    keys = (*places, "seed")
    mine, theirs = (
        {tuple(r[k] for k in keys): float(r[figure]) for r in rows if r["policy"] == name} for name in (policy, over)
    )
    return {place: value / theirs[place] for place, value in mine.items() if theirs.get(place)}


def by_seed(found: dict[Place, float], fold: str = "mean") -> dict[int, float]:
    """One number a seed, of all places of that seed."""
    seeds = sorted({int(str(place[-1])) for place in found})
    return {s: FOLDS[fold]([v for place, v in found.items() if place[-1] == s]) for s in seeds}


def told(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and least to most where there are several; a dash where there is none."""
    if not values:
        return "–"
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}–{max(values):.{digits}f})"
