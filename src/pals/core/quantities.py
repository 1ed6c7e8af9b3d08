"""Data that crosses a boundary: frozen, keyword-only, SI units in the names, and never NaN."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from math import isfinite
from operator import attrgetter

from pals.core.architecture import ModelShape
from pals.core.experts import ExpertSummary


@cache
def _floats_of(kind: type) -> Callable[[object], tuple[object, ...]]:
    """Reads a dataclass's fields that may be floats, all at once; asked for at every birth, so made once a class."""
    names = [f.name for f in fields(kind) if "float" in str(f.type)]
    if len(names) > 1:
        return attrgetter(*names)
    return lambda owner: tuple(getattr(owner, name) for name in names)


def refuse_nan(owner: object) -> None:
    """Raise `ValueError` if any float field of the dataclass `owner` is NaN or infinite."""
    kind: type = type(owner)
    for value in _floats_of(kind)(owner):
        if isinstance(value, float) and not isfinite(value):
            bad = next(f.name for f in fields(kind) if getattr(owner, f.name) is value)
            raise ValueError(f"{kind.__name__}.{bad} is {value}; unknown values are None, never NaN")


class Checked:
    """Base of the quantities: refuses NaN at birth."""

    __slots__ = ()

    def __post_init__(self) -> None:
        refuse_nan(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint(Checked):
    """What PALS steers: one power limit for every board of an engine, an SM-clock ceiling, a live batch."""

    power_limit_w: float  # per board
    sm_clock_mhz: int | None = None  # None: no clock lock
    active_sequences: int | None = None  # None: the engine's launch limit


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardInfo(Checked):
    """What a board is and what it accepts, read from the driver at start."""

    index: int
    uuid: str
    name: str
    driver: str
    min_limit_w: float
    max_limit_w: float
    default_limit_w: float
    found_limit_w: float  # enforced when PALS first looked; restored on exit
    max_sm_clock_mhz: int
    sm_clocks_mhz: tuple[int, ...] = ()  # supported, rising; empty: the driver does not list them

    @property
    def lockable_clocks_mhz(self) -> tuple[int, ...]:
        """SM clocks a lock may name, rising: those the driver lists, else 15 MHz steps below the top clock."""
        return self.sm_clocks_mhz or tuple(sorted(range(self.max_sm_clock_mhz, 209, -15)))


#: Watts by which two limits of a board may differ and still be the same one: a driver rounds what it is told.
SAME_LIMIT_W = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardWrite(Checked):
    """What a board is about to be told, and what to put it back to: enough to undo it after a crash."""

    uuid: str
    found_limit_w: float  # to put back: the limit found, or the one another hand set since
    written_w: tuple[float, ...] = ()  # limits that are ours if it stands there: the last one and the next; empty: none
    clock_locked: bool = False  # a clock lock of ours may be in force

    def left_at(self, limit_w: float) -> bool:
        """Whether a board that stands at `limit_w` was left there by this write, and not at its found limit anyway."""
        ours = any(abs(limit_w - w) < SAME_LIMIT_W for w in self.written_w)
        return ours and abs(limit_w - self.found_limit_w) >= SAME_LIMIT_W


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerSample(Checked):
    """One reading of one board."""

    time_s: float  # monotonic clock of the reading process
    power_w: float  # board power, averaged by the driver over its own window
    energy_j: float | None  # counter since driver load: only differences mean anything; None: the board has none
    enforced_limit_w: float  # what the driver says is in force
    sm_clock_mhz: int
    temperature_c: float | None = None
    throttled_by_power: bool = False
    memory_clock_mhz: int | None = None
    busy_ratio: float | None = None  # share of the driver's last window in which a kernel ran


#: How an engine gets under a lowered active-sequence limit: admit nobody until enough have ended (`drain`), let the
#: running ones take turns from the next step on (`time-slice`), or send the newest back to the queue (`preempt`).
LOWERINGS: tuple[str, ...] = ("drain", "time-slice", "preempt")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSample(Checked):
    """What an engine did, as cumulative counts and present gauges; differences over a window give rates."""

    time_s: float  # monotonic time of the engine's last step
    steps: int
    running: int
    waiting: int
    arrived_requests: int
    arrived_prompt_tokens: int
    prefill_tokens: int  # scheduled, cumulative
    decode_tokens: int  # scheduled, cumulative
    output_tokens: int
    finished_requests: int
    aborted_requests: int
    preemptions: int
    kv_usage: float  # 0..1
    busy_s: float  # time spent in steps, cumulative
    last_step_s: float
    oldest_waiting_s: float  # 0.0 when nothing waits
    active_limit: int  # the active-sequence limit the engine now obeys
    launch_limit: int
    ttft_counts: tuple[int, ...]  # of requests that got a first token, cumulative, by LATENCY_BOUNDS_S
    tpot_counts: tuple[int, ...]  # of finished requests, cumulative, by LATENCY_BOUNDS_S
    scheduled: int | None = None  # requests in the newest step; fewer than `running` while a time slice holds some out
    lowering: str = "drain"  # one of LOWERINGS: how the engine now gets under a lowered limit
    refused_requests: int = 0  # answered 503 because too many waited, cumulative; not among those that arrived


def _latency_bounds() -> tuple[float, ...]:
    return tuple(0.001 * 1.25**i for i in range(56))


#: Upper bounds of the TTFT/TPOT histogram buckets, seconds: 1 ms to 214 s in 25 % steps; one more bucket lies above.
LATENCY_BOUNDS_S: tuple[float, ...] = _latency_bounds()


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget(Checked):
    """Watts the boards of an engine may draw together; None: no budget."""

    power_w: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo(Checked):
    """Targets the operator gave; None: no target."""

    throughput_tokens_s: float | None = None  # output tokens per second
    ttft_p95_s: float | None = None
    tpot_p95_s: float | None = None
    ttft_p99_s: float | None = None
    tpot_p99_s: float | None = None
    throughput_share: float | None = None  # 0..1 of what the engine answers at most where the boards were found


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetrySample(Checked):
    """Everything the controller may know at one tick."""

    time_s: float
    window_s: float  # since the previous tick
    boards: tuple[PowerSample, ...]  # those that could be read, in the order of their positions
    power_w: float | None  # all boards, from the energy counters over the window; None: unknown
    engine: EngineSample | None  # None: no engine telemetry yet
    absent: tuple[int, ...] = ()  # positions of boards that could not be read
    experts: ExpertSummary | None = None  # routing of the last seconds; None: not measured, or not to be used

    @property
    def positions(self) -> tuple[int, ...]:
        """The position in its group of each of `boards`."""
        return tuple(i for i in range(len(self.boards) + len(self.absent)) if i not in self.absent)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateEstimate(Checked):
    """Load and output of the engine, estimated from the samples of a short window."""

    tokens_per_s: float
    arrivals_per_s: float
    prompt_tokens_per_s: float
    power_w: float | None
    running: int
    waiting: int
    idle: bool  # no unfinished request, engine alive
    ttft_p95_s: float | None
    tpot_p95_s: float | None
    popularity_cv: float | None = (
        None  # of the experts, coefficient of variation, measured; None like the next two: unknown or old
    )
    distinct_experts: float | None = None  # touched in a layer and step
    routing_drift: float | None = None  # Jensen-Shannon distance from the reference
    experts_age_s: float | None = None  # of these figures; None: there are none


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction(Checked):
    """What a profile expects of an operating point when the engine has enough work."""

    point: OperatingPoint
    tokens_per_s: float
    power_w: float  # all boards of the engine

    @property
    def tokens_per_j(self) -> float:
        """Output tokens per joule of GPU energy."""
        return self.tokens_per_s / self.power_w if self.power_w > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision(Checked):
    """The point wanted now, and why."""

    point: OperatingPoint
    reason: str  # a short word of the field, counted in the metrics
    detail: str = ""  # one sentence for people
    most_waiting: int | None = None  # requests that may wait; those beyond are refused (503); None: any number
    arm: str | None = None  # "on": the policy acts, "off": its baseline does; None: nothing is compared


#: Fields of a fingerprint that profiles made before they existed may lack.
FINGERPRINT_ADDED = frozenset({"engine_build", "flags", "config_digest", "dtype"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What a profile was measured on; a profile is refused where any of these differs (`core/fingerprint.py`)."""

    engine: str
    engine_version: str
    model: str
    board: str
    driver: str
    boards: int
    parallelism: str  # "tp4 pp1 dp1 ep0"
    launch_sequences: int
    engine_build: str | None = None  # commit or build; "": the engine has none; None: it could not be read
    flags: str | None = None  # resolved settings that change performance, "name=value name=value", sorted
    config_digest: str | None = None  # of the model's sizes and weight formats
    dtype: str | None = None  # of activations

    def differences(self, other: Fingerprint) -> list[str]:
        """Return "field: mine, other's" for each field, and each flag, that differs; what was not read here is not compared."""
        return [
            f"{name}: {mine!r} in the profile, {'not readable' if theirs is None else repr(theirs)} here"
            for name, mine, theirs in self.differing(other)
        ]

    def differing(self, other: Fingerprint) -> list[tuple[str, object, object]]:
        """Name, mine and other's of each field or flag that differs; flags one by one where both sides have them."""
        found: list[tuple[str, object, object]] = []
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if mine is None or mine == theirs:
                continue
            if f.name == "flags" and theirs is not None:
                found += differing_flags(mine, theirs)
            else:
                found.append((f.name, mine, theirs))
        return found


def flags_of(text: str) -> dict[str, str]:
    """ "a=1 b=x" as {"a": "1", "b": "x"}."""
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def flags_text(flags: Mapping[str, object]) -> str:
    """The same the other way round, sorted; truths as 1 and 0, no white space inside a value."""
    plain = {k: str(int(v)) if isinstance(v, bool) else "".join(str(v).split()) for k, v in flags.items()}
    return " ".join(f"{k}={plain[k]}" for k in sorted(plain))


#: Told, but not compared: a prefix cache changes which tokens are computed, which is the load, and not how fast they are.
LOAD_FLAGS = frozenset({"prefix_caching"})


def differing_flags(mine: str, theirs: str) -> list[tuple[str, object, object]]:
    """Name, my value and theirs of each flag that differs; None where a side has no such flag."""
    a, b = flags_of(mine), flags_of(theirs)
    return [(f"flag {k}", a.get(k), b.get(k)) for k in sorted({*a, *b} - LOAD_FLAGS) if a.get(k) != b.get(k)]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine said of itself when it started."""

    pid: int
    engine: str
    version: str
    model: str
    parallelism: str
    boards: tuple[int, ...]
    launch_sequences: int
    capabilities: dict[str, bool] = field(default_factory=dict)
    served_as: str = ""  # the name in the API; empty: the model's
    cuda_order: bool = False  # boards count fastest first, as CUDA does by default; NVML counts by PCI bus
    data_parallel: bool = False  # one rank of several: those of the same parent process belong together
    bank: str | None = None  # the file of its emulated boards; None: it runs on real ones
    build: str | None = None  # as in a fingerprint, like the next three; None: not known
    flags: str | None = None
    config_digest: str | None = None
    dtype: str | None = None
    shape: ModelShape | None = None  # None: the model's config could not be read, or cannot be sized
    step_tokens: int | None = None  # most tokens of one step

    @property
    def name(self) -> str:
        """What people call the engine: its served name."""
        return self.served_as or self.model


def fingerprint_of(engine: EngineInfo, boards: Sequence[BoardInfo]) -> Fingerprint:
    """What a profile made now, here, would carry."""
    first = boards[0]
    return Fingerprint(
        engine=engine.engine,
        engine_version=engine.version,
        model=engine.model,
        board=first.name,
        driver=first.driver,
        boards=len(boards),
        parallelism=engine.parallelism,
        launch_sequences=engine.launch_sequences,
        engine_build=engine.build,
        flags=engine.flags,
        config_digest=engine.config_digest,
        dtype=engine.dtype,
    )
