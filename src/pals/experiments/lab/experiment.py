"""What an experiment is: cells that can be run anywhere in any order, plain rows, and verdicts on targets that were written before the runs.

A cell holds everything that decides its rows, seeds included; nothing else may.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]  # plain JSON values


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a user asked for; None or empty: the experiment's own choice."""

    full: bool = False  # more seeds, or longer runs
    seed: int = 1  # the first; others follow it
    policies: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    boards: tuple[str, ...] = ()
    trace: str | None = None  # name or file

    def seeds(self, few: int, many: int) -> tuple[int, ...]:
        """So many from the first on."""
        return tuple(range(self.seed, self.seed + (many if self.full else few)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """Where an experiment's figures come from, as its page says it."""

    word: str
    told: str  # one sentence; {seeds} stands for the seeds


SIMULATED = Basis(
    word="simulated",
    told="Every watt and second here is simulated, on plants with moved constants ({seeds}); each engine has a profile learned on its own plant.",
)


def basis_of(experiment: Experiment) -> Basis:
    """Its attribute `basis`, which only an experiment that does more than simulate has."""
    basis: Basis = getattr(experiment, "basis", SIMULATED)
    return basis


class Cell(Protocol):
    """A frozen dataclass that can be pickled."""

    @property
    def slug(self) -> str:
        """Names the cell among the experiment's; fit for a file name."""
        ...

    @property
    def seed(self) -> int:
        """Of the plant."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One promise, and what became of it."""

    what: str
    target: str
    measured: float | None  # mean over seeds, or the worst seed; None: no row tells it
    spread: tuple[float, float] | None = None  # least and most over seeds
    seeds: int = 0
    reached: bool | None = None  # None: not judged, `note` says why
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What people look at: one line a group of rows."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    caption: str = ""


class Experiment(Protocol):
    """One question; an object without state that can be pickled, made of a module's functions."""

    @property
    def name(self) -> str:
        """On the command line."""
        ...

    @property
    def title(self) -> str:
        """Of its report."""
        ...

    @property
    def question(self) -> str:
        """One sentence."""
        ...

    @property
    def targets(self) -> str:
        """What is promised; written before the runs."""
        ...

    @property
    def sources(self) -> Sequence[str]:
        """Patterns of `src/pals` that decide its rows, beside those of every run."""
        ...

    @property
    def takes(self) -> frozenset[str]:
        """Names of the fields of `Wish` that make sense beside `full` and `seed`: policies, models, boards, trace."""
        ...

    def cells(self, wish: Wish) -> Sequence[Cell]:
        """What is to be run.

        Raises:
            ConfigError: a wish that makes no sense here; nothing was run.
        """
        ...

    def run(self, cell: Any, place: Path) -> list[Row]:
        """The rows of one cell; profiles are kept below `place`.

        Raises:
            PalsError: it cannot be run; says why.
        """
        ...

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """For people."""
        ...

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """Every promise that the rows can judge."""
        ...

    def figures(self, rows: Sequence[Row]) -> Sequence[str]:
        """Names of the figures that a report can draw of these rows."""
        ...


def verdict_of(
    what: str,
    by_seed: Mapping[int, float],
    *,
    least: float | None = None,
    most: float | None = None,
    unit: str = "",
    note: str = "",
    every_seed: bool = False,
) -> Verdict:
    """The mean over seeds against a bound, or with `every_seed` the seed furthest from it; not judged where there is no value."""
    bound = f"≥ {least:g}{unit}" if least is not None else f"≤ {most:g}{unit}"
    if not by_seed:
        return Verdict(what=what, target=bound, measured=None, note=note or "no rows tell it")
    values = list(by_seed.values())
    mean = sum(values) / len(values)
    measured = mean if not every_seed else min(values) if least is not None else max(values)
    reached = (least is None or measured >= least) and (most is None or measured <= most)
    return Verdict(
        what=what, target=bound, measured=measured, spread=(min(values), max(values)), seeds=len(values), reached=reached, note=note
    )  # fmt: skip
