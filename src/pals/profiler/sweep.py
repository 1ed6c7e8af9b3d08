"""The sweep behind `pals profile`: choose a point, visit it, keep its row at once, until the profile is good enough.

Rows already in the partial file are not measured again, so Ctrl-C loses at most the point being measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pals.core.errors import ConfigError
from pals.models.engine_facts import EngineFacts
from pals.models.row import ProfileRow
from pals.profiler.chooser import Chooser, Fit
from pals.profiler.load import LoadDriver
from pals.profiler.partial import PartialRows
from pals.profiler.plan import SweepPlan
from pals.profiler.repeats import Drift, drift_of
from pals.profiler.visit import Interrupted, Visitor
from pals.runtime.loop import GridClock
from pals.runtime.tick import Rig

__all__ = ["Fit", "Interrupted", "Progress", "SweepPlan", "sweep"]

LEFT_OUT_IN_A_ROW = 3  # then something is wrong that another point would not cure


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
    if rig.setter is None or not rig.actuators:
        raise ConfigError(
            "a sweep writes limits: it needs --mode auto and a process that may write; nothing was changed"
        )
    chooser = Chooser(plan, facts, fit)
    spent_s = max((r.at_s for r in partial.rows), default=0.0)
    begun_s = clock.now_s() - spent_s
    visitor = Visitor(rig, rig.setter, plan, load=load, facts=facts, clock=clock, begun_s=begun_s)

    def tell(row: ProfileRow | None, notes: tuple[str, ...] = ()) -> None:
        left_s = max(0.0, begun_s + plan.seconds - clock.now_s())
        progress(
            Progress(
                rows=len(partial.rows), points=plan.points, row=row, error=chooser.error, seconds_left=left_s,
                drift=drift_of(partial.rows), notes=notes,
            )
        )  # fmt: skip

    tell(None)
    failed = 0
    while (wanted := chooser.next(partial.rows, plan.seconds - (clock.now_s() - begun_s))) is not None:
        visited = visitor.measure(wanted, until_s=begun_s + plan.seconds)
        chooser.visited(wanted, visited)
        if visited.row is not None:
            partial.add(visited.row)
        chooser.learn(partial.rows)
        tell(visited.row, visited.notes)
        failed = 0 if visited.row is not None or visited.lock_refused else failed + 1
        if failed == LEFT_OUT_IN_A_ROW or (failed and not partial.rows):
            raise ConfigError(
                f"{failed} point{'s' * (failed > 1)} in a row could not be measured: {visited.notes[-1]}. The "
                f"{len(partial.rows)} rows so far are kept; run the same command to go on"
            )
    return partial.rows
