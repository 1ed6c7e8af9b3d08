"""The best fixed operating point of a load, found by serving that very load at many: what no operator could know beforehand.

From coarse to fine: some points over the whole grid, then the neighbours of the best, until nothing near is better.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pals.control.guard import Guard
from pals.core.quantities import OperatingPoint
from pals.experiments.fixed_run import RivalOutcome, RivalTask, allowed_point, needed_tokens_per_s, run_fixed

LOWEST_CLOCK = 0.45  # of the top clock; below, a board only loses
MOST_RUNS = 40
EXPANDED = 2  # best points whose neighbours are looked at

Index = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Levels of each lever, each from the most to the least."""

    limits_w: tuple[float, ...]
    clocks_mhz: tuple[int | None, ...]  # None: no lock
    sequences: tuple[int, ...]

    @property
    def shape(self) -> Index:
        """Levels of each lever."""
        return (len(self.limits_w), len(self.clocks_mhz), len(self.sequences))

    @property
    def points(self) -> tuple[OperatingPoint, ...]:
        """All of them."""
        limits, clocks, batches = map(range, self.shape)
        return tuple(self.at((i, j, k)) for k in batches for i in limits for j in clocks)

    def at(self, index: Index) -> OperatingPoint:
        """One point."""
        i, j, k = index
        return OperatingPoint(
            power_limit_w=self.limits_w[i], sm_clock_mhz=self.clocks_mhz[j], active_sequences=self.sequences[k]
        )

    def coarse(self) -> Iterator[Index]:
        """First, middle and last limit and clock, with the largest and a middle batch."""
        limits, clocks, batches = self.shape
        for k in sorted({0, batches // 2}):
            for i in sorted({0, limits // 2, limits - 1}):
                for j in sorted({0, clocks // 2, clocks - 1}):
                    yield (i, j, k)

    def beside(self, index: Index, stride: int) -> Iterator[Index]:
        """So many levels of clock or limit up or down, or one batch; or one lever for the other."""
        i, j, k = index
        one_lever = [(0, stride, 0), (0, -stride, 0), (stride, 0, 0), (-stride, 0, 0), (0, 0, 1), (0, 0, -1)]
        for di, dj, dk in [*one_lever, (stride, -stride, 0), (-stride, stride, 0)]:
            near = (i + di, j + dj, k + dk)
            if all(0 <= at < count for at, count in zip(near, self.shape, strict=True)):
                yield near


def grid_of(guard: Guard, *, limits: int = 9, clocks: int = 13, batches: int = 4) -> Grid:
    """So many levels of each lever: limits evenly over the range, clocks from none to `LOWEST_CLOCK`, batches by halves."""
    span_w = (guard.max_limit_w - guard.min_limit_w) / max(1, limits - 1)
    limits_w = [float(round(guard.max_limit_w - i * span_w)) for i in range(limits)]
    levels: list[int | None] = [None]
    if guard.sm_clocks_mhz:
        top_mhz = guard.sm_clocks_mhz[-1]
        step_mhz = top_mhz * (1.0 - LOWEST_CLOCK) / max(1, clocks - 1)
        levels += [guard.supported_clock_mhz(round(top_mhz - j * step_mhz)) for j in range(1, clocks)]
    sequences = dict.fromkeys(max(1, guard.launch_sequences >> k) for k in range(batches))
    return Grid(limits_w=tuple(limits_w), clocks_mhz=tuple(dict.fromkeys(levels)), sequences=tuple(sequences))


class Search:
    """Points served so far; each only once, and what guard and budget make the same counts as the same."""

    def __init__(self, task: RivalTask, guard: Guard, grid: Grid, most_runs: int) -> None:
        self._task, self._guard, self._grid, self._most = task, guard, grid, most_runs
        self._needed = needed_tokens_per_s(task, guard)
        self._runs: dict[tuple[OperatingPoint, ...], RivalOutcome] = {}
        self.seen: dict[Index, RivalOutcome] = {}

    @property
    def runs(self) -> int:
        """Simulations of the whole load."""
        return len(self._runs)

    def serve(self, index: Index) -> None:
        """Serve the load at this point, unless that is known or has become too much."""
        point, task = self._grid.at(index), self._task
        key = tuple(allowed_point(self._guard, point, task.budget.at(t)) for t in (0.0, *task.budget.times_s))
        if key not in self._runs and self.runs < self._most:
            self._runs[key] = run_fixed(task, point, needed_tokens_per_s=self._needed, guard=self._guard)
        if key in self._runs:
            self.seen[index] = self._runs[key]

    def best(self) -> list[Index]:
        """Points seen, the best first; of equals the one with the most of each lever."""
        return sorted(self.seen, key=lambda index: (*self.seen[index].rank, index))


def static_best(task: RivalTask, grid: Grid | None = None, *, most_runs: int = MOST_RUNS) -> RivalOutcome:
    """The fixed point with the least energy per token of those that keep every target; of none does, the fewest misses.

    Under a budget its limit is lowered while the budget wants that, as `static` is by the guard.

    Raises:
        ConfigError: nothing is served, or faults are asked for.
    """
    guard = task.guard
    grid = grid or grid_of(guard)
    search = Search(task, guard, grid, most_runs)
    for index in grid.coarse():
        search.serve(index)
    for stride in dict.fromkeys((max(1, max(grid.shape) // 4), 1)):
        expanded = set[Index]()
        while ahead := [i for i in search.best()[:EXPANDED] if i not in expanded]:
            expanded.add(ahead[0])
            for near in grid.beside(ahead[0], stride):
                search.serve(near)
    return replace(search.seen[search.best()[0]], runs=search.runs)
