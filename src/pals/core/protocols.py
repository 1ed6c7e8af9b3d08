"""The few narrow promises between the parts; whoever only watches is never handed an actuator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from pals.core.experts import ExpertSummary
from pals.core.quantities import (
    BoardInfo,
    BoardWrite,
    Budget,
    Decision,
    EngineInfo,
    EngineSample,
    OperatingPoint,
    PowerSample,
    Prediction,
    Slo,
    TelemetrySample,
)

State = TypeVar("State")


class PowerMeter(Protocol):
    """Reads one board. Needs no privilege; changes nothing."""

    @property
    def info(self) -> BoardInfo:
        """What the board is and accepts."""
        ...

    def read(self) -> PowerSample:
        """Return a fresh reading.

        Raises:
            PalsError, ValueError: it cannot be read now; `DeviceLostError`: it is gone.
        """
        ...


class PowerActuator(Protocol):
    """Writes one board, and puts it back as found; never above a limit that another hand set meanwhile."""

    @property
    def refusal(self) -> str | None:
        """Why this board must not be written at all; None: it may be."""
        ...

    @property
    def other_hand_w(self) -> float | None:
        """The limit another hand set since PALS came: now the ceiling, and what is put back; None: nobody did."""
        ...

    def announce_to(self, write_ahead: Callable[[BoardWrite], None]) -> None:
        """Call `write_ahead` before each write from now on; where it raises, nothing is written."""
        ...

    def apply(self, wanted: OperatingPoint) -> OperatingPoint:
        """Ask for `wanted`; return the limit the driver then reports in force and the clock lock it accepted.

        Raises:
            PermissionDeniedError: no privilege; nothing was changed.
            NotSupportedError: the board has no such control; a limit asked for with a clock lock is in force.
            ValueError: `wanted` lies outside the board's range; nothing was changed.
            DeviceLostError: the board is gone.
        """
        ...

    def restore(self) -> None:
        """Write back the limit found at start, unless another hand changed it since, and release any lock of ours.

        Raises:
            PalsError, ValueError: refused; the message says what is in force.
        """
        ...


@runtime_checkable
class FollowsLater(Protocol):
    """An actuator whose raises may wait a moment: whoever writes for it brings the board there by itself."""

    @property
    def follows_w(self) -> float | None:
        """The limit it will come to, asked for by the newest `apply`; None: nothing is under way."""
        ...


class EngineMeter(Protocol):
    """Reads one engine's telemetry."""

    @property
    def info(self) -> EngineInfo:
        """What the engine said of itself at start."""
        ...

    def read(self) -> EngineSample:
        """Return the latest counters, or raise `EngineGoneError`."""
        ...


class ExpertMeter(Protocol):
    """Reads the routing of one engine's experts."""

    @property
    def note(self) -> str | None:
        """What people should know of the figures, said once; None: nothing."""
        ...

    def read(self) -> ExpertSummary | None:
        """The last window; None where nothing is counted, or none is full yet."""
        ...


class EngineActuator(Protocol):
    """Sets the engine's active-sequence limit, and how many requests may wait."""

    def apply(
        self, active_sequences: int, *, lease_s: float, lowering: str = "drain", most_waiting: int | None = None
    ) -> None:
        """Ask for a limit that the engine forgets after `lease_s` seconds, reached as `lowering` (of LOWERINGS) says.

        Requests that come while `most_waiting` wait are refused; forgotten with the limit; None: any number may wait.
        """
        ...

    def release(self) -> None:
        """Let the engine return to its launch limit now, and refuse nobody."""
        ...


class PointModel(Protocol):
    """Predicts what operating points do; the controller's view of a profile."""

    @property
    def points(self) -> Sequence[OperatingPoint]:
        """The configurations that may be chosen."""
        ...

    def predict(self, point: OperatingPoint) -> Prediction:
        """Throughput and power at `point` with enough work."""
        ...


class Controller(Protocol[State]):
    """A policy: a pure function of what is remembered and what is now known."""

    def initial(self) -> State:
        """The state before the first tick."""
        ...

    def step(
        self, state: State, sample: TelemetrySample, budget: Budget, slo: Slo, now_s: float
    ) -> tuple[Decision, State]:
        """Return the decision for this tick, and what to remember."""
        ...


AnyController = Controller[Any]


class ProfileNews(Protocol):
    """How far a profile is off, for the record."""

    @property
    def bias(self) -> dict[str, float]:
        """Factor on the profile's predictions, by quantity."""
        ...

    @property
    def drift(self) -> dict[str, float]:
        """Measured over predicted when a drift was found, by quantity; of those that lasts."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for each drift, the same as long as it lasts."""
        ...


@runtime_checkable
class WatchesProfile(Protocol):
    """A controller that compares its profile with what is measured."""

    def tell(self, state: Any) -> ProfileNews:
        """What `state` knows of the profile."""
        ...


@runtime_checkable
class WorthOfWatts(Protocol):
    """A controller that knows what its engine's share of a budget is worth, so that several engines may divide one well."""

    def worth(self, state: Any) -> tuple[tuple[float, float], ...]:
        """(share in W of all its boards, predicted worth there), such as tokens/s; empty: not known now.

        Between engines only the worth of one more watt is compared, so all of a node must mean the same by it.
        """
        ...

    def needed_w(self, state: Any) -> float | None:
        """The smallest share, W, at which its targets are predicted to hold; None: not known, or there is none."""
        ...
