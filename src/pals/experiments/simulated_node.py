"""A simulated replica behind the controller's protocols: what NVML and the vLLM plugin are to the agent, this is to `tick`.

Adapters only: nothing is modelled here. Readings are taken once per instant and kept until something is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pals.core.architecture import ModelShape
from pals.core.errors import NotSupportedError
from pals.core.experts import ExpertCounts
from pals.core.fingerprint import shape_digest
from pals.core.quantities import (
    BoardInfo,
    BoardWrite,
    EngineInfo,
    EngineSample,
    OperatingPoint,
    PowerSample,
    flags_text,
)  # fmt: skip
from pals.plant.specs import CLOCK_STEP_MHZ, DRIVER, BoardSpec

COUNTED_EVERY_S = 0.5  # as vLLM's workers publish; a draw of counts costs about a millisecond
ENGINE, VERSION = "vllm", "simulated"  # the replica follows vLLM's scheduler, no release in particular


class BoardReading(Protocol):
    """What the sensors of one simulated board say."""

    @property
    def power_w(self) -> float: ...
    @property
    def energy_j(self) -> float: ...
    @property
    def sm_clock_mhz(self) -> int: ...
    @property
    def temperature_c(self) -> float: ...
    @property
    def enforced_limit_w(self) -> float: ...
    @property
    def throttled(self) -> bool: ...


class SteeredReplica(Protocol):
    """What is needed of `pals.plant.replica.Replica`."""

    @property
    def now_s(self) -> float: ...
    def boards(self) -> Sequence[BoardReading]: ...
    def board(self, i: int) -> BoardReading: ...
    def limit_w(self, board: int) -> float: ...
    def counters(self) -> EngineSample: ...
    def inject(self, board: int, fault: str, value: float = 1.0) -> None: ...
    def set_limit_w(self, watts: float, board: int | None = None) -> None: ...
    def set_clock_lock(self, mhz: int | None, board: int | None = None) -> None: ...
    def set_active_sequences(self, n: int | None, lowering: str = "drain") -> None: ...
    def set_most_waiting(self, n: int | None) -> None: ...


class SimulatedGroup:
    """The boards of one replica as a driver would show them; all are read at once, unless one is lost."""

    def __init__(self, replica: SteeredReplica, spec: BoardSpec, count: int) -> None:
        self._replica, self.spec, self.count = replica, spec, count
        self._readings: Sequence[BoardReading] = ()
        self._read_at_s = -1.0
        self._asked: list[tuple[float, int | None]] = [(spec.default_limit_w, None)] * count
        self._lost, self._without_setters = set[int](), set[int]()

    def inject(self, i: int, fault: str, value: float) -> None:
        """Begin a fault of board `i`, by the name the plant has for it; the value 0 ends it."""
        concerned = {"lost": self._lost, "not_supported": self._without_setters}.get(fault)
        if concerned is not None:
            (concerned.add if value else concerned.discard)(i)
        if fault != "not_supported":
            self._replica.inject(i, fault, value)
        self._read_at_s = -1.0

    def reading(self, i: int) -> BoardReading:
        """Board `i` now.

        Raises:
            DeviceLostError: it is lost.
        """
        if self._lost:
            return self._replica.board(i)
        if self._read_at_s != self._replica.now_s:
            self._readings, self._read_at_s = self._replica.boards(), self._replica.now_s
        return self._readings[i]

    def limit_w(self, i: int) -> float:
        """The limit that board `i` obeys now."""
        return self._replica.limit_w(i)

    def now_s(self) -> float:
        """Event time."""
        return self._replica.now_s

    def write(self, i: int, limit_w: float, clock_mhz: int | None) -> None:
        """Bring board `i` to this limit and clock ceiling; the driver is not asked for what it was told last.

        Raises:
            ValueError: outside the board's range; nothing was changed.
            DeviceLostError, PermissionDeniedError, NotSupportedError: a fault of the board; nothing was changed.
        """
        asked_w, asked_mhz = self._asked[i]
        if (limit_w, clock_mhz) == (asked_w, asked_mhz) and i not in self._lost:
            return
        if i in self._without_setters:
            raise NotSupportedError(
                f"simulated board {i}: writing is not supported; {self.limit_w(i):.0f} W is still in force."
            )
        if limit_w != asked_w or i in self._lost:
            self._replica.set_limit_w(limit_w, i)
        if clock_mhz != asked_mhz:
            self._replica.set_clock_lock(clock_mhz, i)
        self._asked[i] = (limit_w, clock_mhz)
        self._read_at_s = -1.0


class SimulatedBoard:
    """One board: a `PowerMeter` and a `PowerActuator`."""

    def __init__(self, group: SimulatedGroup, index: int) -> None:
        spec = group.spec
        clocks = tuple(range(spec.min_sm_clock_mhz, spec.max_sm_clock_mhz + 1, CLOCK_STEP_MHZ))
        self._group, self._index = group, index
        self._info = BoardInfo(
            index=index,
            uuid=f"GPU-simulated-{index}",
            name=spec.nvml_name,
            driver=DRIVER,
            min_limit_w=spec.min_limit_w,
            max_limit_w=spec.max_limit_w,
            default_limit_w=spec.default_limit_w,
            found_limit_w=spec.default_limit_w,
            max_sm_clock_mhz=spec.max_sm_clock_mhz,
            sm_clocks_mhz=clocks,
        )

    @property
    def info(self) -> BoardInfo:
        """What the board is and accepts."""
        return self._info

    @property
    def refusal(self) -> str | None:
        """None: a simulated board may be written."""
        return None

    @property
    def other_hand_w(self) -> float | None:
        """None: nobody else sets limits in a simulation."""
        return None

    def announce_to(self, write_ahead: Callable[[BoardWrite], None]) -> None:
        """Nothing is announced: no limit outlives a simulation."""

    def read(self) -> PowerSample:
        """The sensors at this instant of event time.

        Raises:
            DeviceLostError: the board is lost.
        """
        r = self._group.reading(self._index)
        return PowerSample(
            time_s=self._group.now_s(),
            power_w=r.power_w,
            energy_j=r.energy_j,
            enforced_limit_w=r.enforced_limit_w,
            sm_clock_mhz=r.sm_clock_mhz,
            temperature_c=r.temperature_c,
            throttled_by_power=r.throttled,
        )

    def apply(self, wanted: OperatingPoint) -> OperatingPoint:
        """Set the board to `wanted`; return what it then has in force.

        Raises:
            ValueError: outside the board's range; nothing was changed.
            DeviceLostError, PermissionDeniedError, NotSupportedError: a fault of the schedule; nothing was changed.
        """
        self._group.write(self._index, wanted.power_limit_w, wanted.sm_clock_mhz)
        return OperatingPoint(power_limit_w=self._group.limit_w(self._index), sm_clock_mhz=wanted.sm_clock_mhz)

    def restore(self) -> None:
        """Back to the default limit, without a clock lock."""
        self._group.write(self._index, self._info.found_limit_w, None)


class SimulatedEngine:
    """The replica's scheduler: an `EngineMeter` and an `EngineActuator`."""

    def __init__(self, replica: SteeredReplica, info: EngineInfo) -> None:
        self._replica, self._info = replica, info
        self._set: tuple[int | None, str] = (None, "drain")
        self._most_waiting: int | None = None

    @property
    def info(self) -> EngineInfo:
        """The engine as a profile knows it."""
        return self._info

    def read(self) -> EngineSample:
        """Its counters at this instant."""
        return self._replica.counters()

    def apply(
        self, active_sequences: int, *, lease_s: float, lowering: str = "drain", most_waiting: int | None = None
    ) -> None:
        """Set limit and bound; the lease never ends, as the agent of a simulation cannot die before its engine."""
        self._set_to(active_sequences, lowering)
        self._bound(most_waiting)

    def release(self) -> None:
        """Back to the launch limit; nobody is refused."""
        self._set_to(None, "drain")
        self._bound(None)

    def _bound(self, most_waiting: int | None) -> None:
        if most_waiting != self._most_waiting:
            self._replica.set_most_waiting(most_waiting)
            self._most_waiting = most_waiting

    def _set_to(self, sequences: int | None, lowering: str) -> None:
        if (sequences, lowering) != self._set:
            self._replica.set_active_sequences(sequences, lowering)
            self._set = (sequences, lowering)


class CountedReplica(Protocol):
    """What is needed of `pals.plant.replica.Replica` to count its experts."""

    @property
    def now_s(self) -> float: ...
    def expert_counts(self) -> ExpertCounts | None: ...


class SimulatedCounts:
    """The newest publication of workers that count: what a `RoutingMeter` reads; drawn no oftener than they publish."""

    def __init__(self, replica: CountedReplica) -> None:
        self._replica = replica
        self._newest: ExpertCounts | None = None

    def __call__(self) -> ExpertCounts | None:
        """None for a model without experts."""
        newest = self._newest
        if newest is None or self._replica.now_s - newest.time_s >= COUNTED_EVERY_S - 1e-9:
            self._newest = newest = self._replica.expert_counts()
        return newest


def engine_info(
    model: str,
    *,
    boards: int,
    launch_sequences: int,
    shape: ModelShape | None = None,
    step_tokens: int | None = None,
    prefix_caching: bool = True,
) -> EngineInfo:
    """What a simulated engine says of itself; all its boards are one tensor-parallel group."""
    flags: dict[str, object] = {"chunked_prefill": True, "prefix_caching": prefix_caching}
    if step_tokens is not None:
        flags["max_num_batched_tokens"] = step_tokens
    return EngineInfo(
        pid=0,
        engine=ENGINE,
        version=VERSION,
        model=model,
        parallelism=f"tp{boards} pp1 dp1 ep0",
        boards=tuple(range(boards)),
        launch_sequences=launch_sequences,
        capabilities={"time-slice": True, "preempt": True, "refuse": True},
        build="",
        flags=flags_text(flags),
        config_digest=shape_digest(shape) if shape is not None else None,
        dtype="bfloat16",
        shape=shape,
        step_tokens=step_tokens,
    )
