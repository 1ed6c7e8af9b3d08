"""The sweep behind `pals profile`: choose a point, visit it, measure it, keep its row at once, until the profile is good enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pals.core.load import Mix
from pals.models.engine_facts import EngineFacts
from pals.models.row import ProfileRow
from pals.profiler.design import Drift, SweepModel
from pals.profiler.load import LoadDriver
from pals.profiler.partial import PartialRows
from pals.profiler.plan import SweepPlan
from pals.runtime.loop import GridClock
from pals.runtime.tick import Rig


class Interrupted(Exception):
    """The sweep was told to stop; the rows so far are in the partial file."""


class Fit(Protocol):
    """Fits a model to the rows so far; with none, it says what the priors say."""

    def __call__(self, rows: Sequence[ProfileRow], mixes: Sequence[Mix], facts: EngineFacts, /) -> SweepModel: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a sweep is; told at its begin, after each row, and where a point is left out."""

    rows: int  # measured so far, those of an earlier run too
    points: int  # most rows
    row: ProfileRow | None  # the newest; None: none is new
    error: float | None  # mean predicted relative standard deviation; None: nothing was fitted yet
    seconds_left: float  # of the budget of engine time
    drift: Drift | None  # of points measured again
    notes: tuple[str, ...] = ()  # windows measured again, a point left out, requests preempted


def sweep(
    rig: Rig,
    plan: SweepPlan,
    *,
    load: LoadDriver,
    facts: EngineFacts,
    partial: PartialRows,
    clock: GridClock,
    fit: Fit,
    progress: Callable[[Progress], None],
) -> list[ProfileRow]:
    """Measure until the error asked for, the points or the time are reached; return all rows, the partial file's too.

    Boards and engine are left as the last point has them: the caller puts them back (`boards_as_found`, `release`).

    Raises:
        Interrupted: the clock said stop.
        ConfigError: nothing may be written, or several points in a row could not be measured.
        EngineGoneError, PermissionDeniedError: as the parts raise them.
    """
    raise NotImplementedError
