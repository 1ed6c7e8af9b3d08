"""Faults and drifting routing in event time: each begins exactly when it says, between two ticks or in the middle of a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pals.experiments.simulated_node import SimulatedGroup
from pals.plant.faults import BOARD_KINDS, FaultEvent, FaultSchedule, load_faults
from pals.plant.llm_step import StepModel
from pals.plant.replica import Replica
from pals.plant.routing_schedule import RoutingChange, RoutingSchedule

#: A step model with this popularity of experts (coefficient of variation; None: the board's) and factor on host time.
ModelOf = Callable[[float | None, float], StepModel]


def read_faults(path: Path, *, boards: int) -> FaultSchedule:
    """A schedule for `boards` boards.

    Raises:
        ConfigError: unreadable, or a board that is not there.
    """
    schedule = load_faults(path)
    schedule.check_boards(boards)
    return schedule


class TimedFaults:
    """Advances a replica and lets faults happen on the way, and its routing drift."""

    def __init__(
        self,
        schedule: FaultSchedule,
        replica: Replica,
        group: SimulatedGroup,
        model_of: ModelOf,
        routing: RoutingSchedule | None = None,
    ) -> None:
        changes = routing.changes(replica.model.constants.popularity_cv) if routing is not None else ()
        events: list[FaultEvent | RoutingChange] = [*schedule.events, *changes]
        self._events, self._next = sorted(events, key=lambda e: e.time_s), 0
        self._replica, self._group, self._model_of = replica, group, model_of
        self._popularity_cv: float | None = None
        self._host_factor = 1.0

    def advance(self, until_s: float) -> None:
        """Go on to `until_s`."""
        while self._next < len(self._events) and self._events[self._next].time_s <= until_s:
            event = self._events[self._next]
            self._replica.advance(event.time_s)
            self._happen(event)
            self._next += 1
        self._replica.advance(until_s)

    def _happen(self, e: FaultEvent | RoutingChange) -> None:
        if isinstance(e, RoutingChange):
            if e.swap is not None:
                self._replica.swap_experts(*e.swap)
            if e.cv is None:
                return
            self._popularity_cv = e.cv
        elif e.kind == "routing_drift":
            self._popularity_cv = e.value
        elif e.kind == "engine_build":
            self._host_factor = e.value
        else:
            for i in range(self._group.count) if e.board is None else (e.board,):
                self._group.inject(i, BOARD_KINDS[e.kind], e.value)
            return
        self._replica.swap_model(self._model_of(self._popularity_cv, self._host_factor))
