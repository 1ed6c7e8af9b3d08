"""One engine's rows with all that its methods are told and judged by."""

from __future__ import annotations

from dataclasses import dataclass

from pals.core.load import Mix
from pals.experiments.profile_checks.splits import Split, grid_splits, measured_splits
from pals.models.engine_facts import EngineFacts
from pals.models.row import ProfileRow

SIMULATED, SILICON = "simulated", "silicon"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A simulated engine's grid and sweep, or a measured sweep of one knob."""

    name: str  # also of the file that keeps its result
    group: str  # boards or data set: what figures are averaged over
    basis: str  # SIMULATED or SILICON
    facts: EngineFacts
    mixes: tuple[Mix, ...]
    rows: tuple[ProfileRow, ...]  # the grid, or everything that was measured
    seed: int
    swept: tuple[ProfileRow, ...] = ()
    choices: tuple[ProfileRow, ...] = ()  # finer than the grid: what is chosen among
    unswept: tuple[ProfileRow, ...] = ()  # under the last of the mixes, which no other row has
    knob: str = ""  # of a measured sweep: "limit", "batch" or "clock"
    levels: bool = True  # whether levels of a grid are withheld too, which takes most of the time

    def splits(self) -> list[Split]:
        """All that it is judged on."""
        if self.basis == SIMULATED:
            return grid_splits(self.rows, self.swept, self.unswept, self.seed, levels=self.levels)
        return measured_splits(self.rows, self.knob, self.seed)
