"""How far the rows on disk are what the experiment asks for: which of its own cells are there, and whether present sources made them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pals.experiments.lab.experiment import Cell, Experiment, Wish
from pals.experiments.lab.store import Kept, digest_of_cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Counts of cells."""

    wanted: int  # the experiment's own choice: the usual one, or that of `--full` where a cell of it is there
    full: bool
    there: int  # of these, on disk
    outdated: int  # of those there, made by other sources than the present
    own: int  # on disk beside them: a user's models, boards, traces or seeds; nobody knows by which sources

    @property
    def told(self) -> str:
        """For a table."""
        own = f" + {self.own} of a user's choice" if self.own else ""
        return f"{self.there} of {self.wanted}{' (full)' if self.full else ''}{own}"


def coverage_of(experiment: Experiment, kept: Mapping[str, Kept]) -> Coverage:
    """Compares slugs and digests; the cells of a full run are asked for only where others than the usual ones are there."""
    usual = _cells(experiment, full=False)
    every = usual if kept.keys() <= usual.keys() else {**usual, **_cells(experiment, full=True)}
    full = bool((kept.keys() & every.keys()) - usual.keys())
    wanted = every if full else usual
    there = [cell for slug, cell in every.items() if slug in kept]
    return Coverage(
        wanted=len(wanted), full=full, there=len(there), own=len(kept) - len(there),
        outdated=sum(kept[c.slug].digest != digest_of_cell(experiment, c) for c in there),
    )  # fmt: skip


def _cells(experiment: Experiment, *, full: bool) -> dict[str, Cell]:
    return {cell.slug: cell for cell in experiment.cells(Wish(full=full))}
