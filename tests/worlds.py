"""Small pure worlds for the tests: a board, an engine and a clock that do what the protocols promise, no patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pals.core.errors import DeviceLostError, EngineGoneError, NotSupportedError, PermissionDeniedError
from pals.core.quantities import (
    LATENCY_BOUNDS_S,
    BoardInfo,
    BoardWrite,
    EngineInfo,
    EngineSample,
    OperatingPoint,
    PowerSample,
    TelemetrySample,
)
from pals.hardware.limit_owner import LimitOwner

BUCKETS = len(LATENCY_BOUNDS_S) + 1


def board_info(index: int = 0, *, found_w: float = 400.0, clocks_mhz: tuple[int, ...] = ()) -> BoardInfo:
    return BoardInfo(
        index=index,
        uuid=f"GPU-{index}",
        name="Test board",
        driver="1.0",
        min_limit_w=100.0,
        max_limit_w=400.0,
        default_limit_w=400.0,
        found_limit_w=found_w,
        max_sm_clock_mhz=1410,
        sm_clocks_mhz=clocks_mhz,
    )


def engine_info(pid: int = 1, *, launch: int = 64) -> EngineInfo:
    return EngineInfo(
        pid=pid,
        engine="vllm",
        version="0.32.0",
        model="test/model",
        parallelism="tp1 pp1 dp1 ep0",
        boards=(0,),
        launch_sequences=launch,
        capabilities={"live_limit": True},
    )


def engine_sample(time_s: float = 0.0, *, tokens: int = 0, running: int = 0, waiting: int = 0) -> EngineSample:
    return EngineSample(
        time_s=time_s,
        steps=0,
        running=running,
        waiting=waiting,
        arrived_requests=0,
        arrived_prompt_tokens=0,
        prefill_tokens=0,
        decode_tokens=tokens,
        output_tokens=tokens,
        finished_requests=0,
        aborted_requests=0,
        preemptions=0,
        kv_usage=0.0,
        busy_s=0.0,
        last_step_s=0.0,
        oldest_waiting_s=0.0,
        active_limit=64,
        launch_limit=64,
        ttft_counts=(0,) * BUCKETS,
        tpot_counts=(0,) * BUCKETS,
    )


def telemetry(time_s: float, *, tokens: int = 0, running: int = 0, waiting: int = 0) -> TelemetrySample:
    return TelemetrySample(
        time_s=time_s,
        window_s=0.5,
        boards=(),
        power_w=None,
        engine=engine_sample(time_s, tokens=tokens, running=running, waiting=waiting),
    )


@dataclass
class Clock:
    """Time that passes only when somebody waits; says stop after `until_s`."""

    until_s: float = 1e9
    now: float = 100.0
    waits: list[float] = field(default_factory=list)

    def now_s(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += max(0.0, seconds)
        return self.now >= self.until_s


@dataclass
class Board:
    """A board that draws the smaller of its limit and its natural draw."""

    clock: Clock
    index: int = 0
    natural_w: float = 320.0
    limit_w: float = 400.0
    external_w: float = 1e9
    denied: bool = False
    lost: bool = False
    fails: Exception | None = None  # raised by every reading
    energy_counter: bool = True
    refusal: str | None = None
    no_clock_lock: bool = False
    lock_mhz: int | None = None
    locks_asked: list[int] = field(default_factory=list)
    written_w: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._energy_j, self._since_s = 0.0, self.clock.now
        self.opened()

    def opened(self) -> None:
        """An agent opens the board: what it finds is the limit of this moment."""
        self.found_w = self.limit_w
        self._owner = LimitOwner(self.info.uuid, self.found_w)
        self.announce_to(lambda write: None)

    @property
    def other_hand_w(self) -> float | None:
        return self._owner.other_hand_w

    def announce_to(self, write_ahead: Callable[[BoardWrite], None]) -> None:
        self._write_ahead = write_ahead

    @property
    def info(self) -> BoardInfo:
        return board_info(self.index, found_w=self.found_w)

    @property
    def enforced_w(self) -> float:
        return min(self.limit_w, self.external_w)

    def read(self) -> PowerSample:
        if self.lost:
            raise DeviceLostError(f"GPU-{self.index}: lost")
        if self.fails is not None:
            raise self.fails
        self._integrate()
        return PowerSample(
            time_s=self.clock.now,
            power_w=min(self.natural_w, self.enforced_w),
            energy_j=self._energy_j if self.energy_counter else None,
            enforced_limit_w=self.enforced_w,
            sm_clock_mhz=min(1410, self.lock_mhz or 1410),
        )

    def apply(self, wanted: OperatingPoint) -> OperatingPoint:
        if self.denied:
            raise PermissionDeniedError(f"GPU-{self.index}: no permission; {self.enforced_w:.0f} W is still in force.")
        self._integrate()
        self._owner.seen(self.limit_w)
        limit_w = self._owner.capped(wanted.power_limit_w)
        self._owner.about_to_write(limit_w)
        self._write_ahead(self._owner.told(clock_locked=bool(wanted.sm_clock_mhz or self.lock_mhz)))
        self.write(limit_w)
        self._owner.wrote(limit_w)
        if wanted.sm_clock_mhz is not None:
            self.locks_asked.append(wanted.sm_clock_mhz)
            if self.no_clock_lock:
                raise NotSupportedError(f"GPU-{self.index}: no clock lock here; {self.enforced_w:.0f} W is in force.")
        self.lock_mhz = wanted.sm_clock_mhz
        return OperatingPoint(power_limit_w=self.enforced_w, sm_clock_mhz=self.lock_mhz)

    def write(self, limit_w: float) -> None:
        self.limit_w = limit_w
        self.written_w.append(limit_w)

    def restore(self) -> None:
        if self.lost:
            raise DeviceLostError(f"GPU-{self.index}: lost")
        self._integrate()
        if self._owner.written and self._owner.is_mine(self.limit_w):
            self.limit_w = self._owner.restore_w
        self.lock_mhz = None

    def _integrate(self) -> None:
        self._energy_j += min(self.natural_w, self.enforced_w) * (self.clock.now - self._since_s)
        self._since_s = self.clock.now


@dataclass
class Engine:
    """An engine whose throughput follows its active-sequence limit."""

    clock: Clock
    launch: int = 64
    per_sequence: float = 20.0
    gone_at_s: float = 1e9
    limit: int = 64
    lease_until_s: float = 0.0
    lowering: str = "drain"
    most_waiting: int | None = None
    _tokens: float = 0.0
    _since_s: float = 100.0

    @property
    def info(self) -> EngineInfo:
        return engine_info(launch=self.launch)

    @property
    def in_force(self) -> int:
        return self.limit if self.clock.now < self.lease_until_s else self.launch

    def read(self) -> EngineSample:
        if self.clock.now >= self.gone_at_s:
            raise EngineGoneError("the engine has ended")
        self._tokens += self.in_force * self.per_sequence * (self.clock.now - self._since_s)
        self._since_s = self.clock.now
        return engine_sample(self.clock.now, tokens=int(self._tokens), running=self.in_force, waiting=3)

    def apply(
        self, active_sequences: int, *, lease_s: float, lowering: str = "drain", most_waiting: int | None = None
    ) -> None:
        self.lowering, self.most_waiting = lowering, most_waiting
        self.limit, self.lease_until_s = active_sequences, self.clock.now + lease_s

    def release(self) -> None:
        self.lease_until_s = 0.0
