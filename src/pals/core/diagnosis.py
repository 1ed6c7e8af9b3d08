"""What can be known of a node without changing anything: facts as they were read, and findings made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pals.core.diagnosis_writing import BoardTrial, CapdFacts, Program, WriterChoice
from pals.core.quantities import BoardInfo, Checked, EngineInfo, EngineSample, PowerSample

Value = str | float | int | bool | None | list[str] | list[int] | dict[str, bool]


class Status(StrEnum):
    """How a finding is to be taken; the order is that of worry."""

    OK = "ok"
    UNKNOWN = "unknown"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing found out; `remedy` is one line, given where something can be done."""

    area: str  # a heading: driver, boards, permissions, agent, engines, software, environment
    check: str  # stable name within the area
    status: Status
    text: str
    subject: str = ""  # "board 0", "process 4711"; empty: the node
    remedy: str | None = None
    values: Mapping[str, Value] = field(default_factory=dict)  # what was read; units in the names


def finding(
    area: str, check: str, status: Status, text: str, *, subject: str = "", remedy: str | None = None, **values: Value
) -> Finding:
    """A finding in one line; `values` are what was read, with units in their names."""
    return Finding(area=area, check=check, status=status, text=text, subject=subject, remedy=remedy, values=values)


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardSettings(Checked):
    """What a board is set to beside its limit; None: the driver does not say."""

    persistence_mode: bool | None
    mig_mode: bool | None
    clock_reasons: tuple[str, ...] | None  # why the clock is not higher, in NVML's words
    clock_lock_api: bool  # the driver has the call; whether the board obeys is known only by writing


@dataclass(frozen=True, slots=True, kw_only=True)
class MeterFacts(Checked):
    """What a few seconds of watching said of a board's meters."""

    seconds: float
    sampled_every_s: float
    power_w: float | None  # mean, from the energy counter; None: it stood still
    swing_w: float  # standard deviation of the driver's power reading
    energy_refresh_s: float | None  # time between changes of the counter; None: too few seen
    power_window_s: float | None  # what the driver's power reading averages over; None: cannot be told
    power_refresh_s: float | None = None  # time between changes of that reading; None: too few seen


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardFacts:
    """One board; `error` says why it cannot be used, then the rest is None."""

    index: int
    error: str | None = None
    info: BoardInfo | None = None
    now: PowerSample | None = None
    settings: BoardSettings | None = None
    meter: MeterFacts | None = None  # None: not watched


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmlFacts:
    """NVML as this process finds it."""

    emulated: str | None  # the bank file beneath NVML
    emulator_pid: int | None = None  # whose boards they are
    emulator_alive: bool = False
    error: str | None = None  # why NVML cannot be used
    kernel_driver: str | None = None  # version line of the loaded kernel module
    boards: tuple[BoardFacts, ...] = ()
    may_write: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivilegeFacts:
    """What this process may do."""

    euid: int
    sys_admin: bool | None  # the capability CAP_SYS_ADMIN; None: cannot be read


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterFacts:
    """A PALS agent's record of the limits it found: who writes, or who died writing."""

    pid: int | None = None  # None: no record
    alive: bool = False
    boards: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentFacts:
    """The newest record an agent left in this run directory for one engine."""

    model: str
    policy: str
    mode: str
    tick: int
    period_s: float
    age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """One engine with the plugin; data-parallel ranks together."""

    info: EngineInfo
    pids: tuple[int, ...]
    complete: bool  # all data-parallel ranks are here
    sample: EngineSample | None  # None: it ended while being looked at
    age_s: float  # since its last step
    setpoint: int | None  # the active-sequence limit asked for and not yet expired


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDirFacts:
    """The run directory and what is in it."""

    path: str
    exists: bool
    writable: bool
    engines: tuple[EngineFacts, ...] = ()
    killed: tuple[str, ...] = ()  # "process 4711 (model)" of engines that left their channel behind
    unreadable: tuple[str, ...] = ()  # channels of other users or other versions
    without_plugin: tuple[int, ...] = ()  # vLLM engine processes of this node that have no channel here
    writer: WriterFacts = field(default_factory=WriterFacts)
    agents: tuple[AgentFacts, ...] = ()  # one per engine that is steered


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftwareFacts:
    """What is installed in this Python environment, and the variables that change what it does."""

    python: str
    pals: str
    vllm: str | None
    vllm_wanted: str | None  # the versions PALS is made for, as a requirement
    vllm_fits: bool | None
    vllm_has_kernels: bool | None  # False: the pure-Python build
    entry_points: tuple[str, ...]  # "group: name" of PALS's own, as vLLM would see them
    packages: Mapping[str, str | None]  # optional packages, None: missing
    environment: Mapping[str, str]  # of the variables that matter, those set


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """Everything `pals doctor` looks at."""

    nvml: NvmlFacts
    privilege: PrivilegeFacts
    run_dir: RunDirFacts
    software: SoftwareFacts
    capd: CapdFacts
    chosen: WriterChoice
    programs: tuple[Program, ...] | None = None  # that may write, seen in /proc; None: not looked for
    trials: tuple[BoardTrial, ...] | None = None  # None: nothing was tried
