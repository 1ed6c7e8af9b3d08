"""The shared-memory channel between an engine and the agent: one small file, one writer per block, no lock.

Block 1 (engine writes once): JSON of `EngineInfo`. Block 2 (engine writes each step): telemetry.
Block 3 (agent writes): the setpoint with its expiry. Then one small block for each API server: whom it refused. Each
changing block carries a sequence number that is odd while it is being written; a reader that sees it odd or changed reads
again. Times are CLOCK_MONOTONIC seconds, which all processes of one machine share, or those of a virtual clock that
all ends were given.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import time
from collections.abc import Callable, Collection
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from pals.core.architecture import ModelShape
from pals.core.errors import EngineGoneError
from pals.core.plain import decode
from pals.core.quantities import LATENCY_BOUNDS_S, LOWERINGS, EngineInfo, EngineSample
from pals.runtime import expert_channel
from pals.runtime.blocks import SEQ, Block
from pals.runtime.files import own_folder, replace_file
from pals.runtime.processes import process_alive
from pals.runtime.refusals import Refusals

MAGIC = b"PALSCH02"
SUFFIX = ".channel"
_BUCKETS = len(LATENCY_BOUNDS_S) + 1
_GAUGES = (
    "time_s",
    "steps",
    "running",
    "waiting",
    "arrived_requests",
    "arrived_prompt_tokens",
    "prefill_tokens",
    "decode_tokens",
    "output_tokens",
    "finished_requests",
    "aborted_requests",
    "preemptions",
    "kv_usage",
    "busy_s",
    "last_step_s",
    "oldest_waiting_s",
    "active_limit",
    "launch_limit",
    "scheduled",
    "lowering",
)
_FLOATS = {"time_s", "kv_usage", "busy_s", "last_step_s", "oldest_waiting_s"}
_INFO_OFFSET, _INFO_SIZE = 16, 4080
#: What an engine whose plugin is older than this agent does not tell.
_INFO_MAY_LACK = frozenset(
    f.name
    for kind in (EngineInfo, ModelShape)
    for f in fields(kind)
    if (f.default, f.default_factory) != (MISSING, MISSING)
)
_TELEMETRY_OFFSET = 4096
_TELEMETRY = struct.Struct(f"<{len(_GAUGES) + 2 * _BUCKETS}d")
_GAUGE_PART = struct.Struct(f"<{len(_GAUGES)}d")
_COUNT_PART = struct.Struct(f"<{_BUCKETS}d")
_SETPOINT_OFFSET = 8192
#: Active sequences, expires at, written at, index in LOWERINGS, most waiting, and until when that holds (0.0: any number
#: may wait). The bound has its own expiry because an agent of before there was one leaves those two doubles as they are.
_SETPOINT = struct.Struct("<6d")
_REFUSALS_OFFSET = 8704
SIZE = 12288


def run_dir(environ: dict[str, str] | os._Environ[str]) -> Path:
    """Where channels and agent state live: $PALS_RUN_DIR, else /run/pals for root, else /tmp/pals-UID."""
    if given := environ.get("PALS_RUN_DIR"):
        return Path(given)
    return Path("/run/pals") if os.geteuid() == 0 else Path(f"/tmp/pals-{os.geteuid()}")


class Setpoint(NamedTuple):
    """What the agent wants of the engine."""

    active_sequences: int
    lowering: str  # one of LOWERINGS
    most_waiting: int | None = None  # requests that may wait; None: any number


class EngineChannel:
    """The engine's end: creates the file, publishes telemetry, reads the setpoint."""

    def __init__(self, folder: Path, info: EngineInfo, *, name: str) -> None:
        self.path = own_folder(folder) / f"{name}{SUFFIX}"
        text = json.dumps(asdict(info)).encode()
        if len(text) > _INFO_SIZE:
            raise ValueError(f"engine description of {len(text)} bytes exceeds {_INFO_SIZE}")
        replace_file(self.path, (MAGIC + SEQ.pack(len(text)) + text).ljust(SIZE, b"\0"))
        self._mapped, _ = _map(self.path)
        self._telemetry = Block(self._mapped, _TELEMETRY_OFFSET, _TELEMETRY)
        self._setpoint = Block(self._mapped, _SETPOINT_OFFSET, _SETPOINT)

    def publish(
        self, gauges: Collection[float], ttft_counts: list[int] | None = None, tpot_counts: list[int] | None = None
    ) -> None:
        """Write one step's telemetry; `gauges` in the order of `GAUGES`, counts only where they changed."""
        parts: list[tuple[int, struct.Struct, Collection[float]]] = [(0, _GAUGE_PART, gauges)]
        if ttft_counts is not None:
            parts.append((_GAUGE_PART.size, _COUNT_PART, ttft_counts))
        if tpot_counts is not None:
            parts.append((_GAUGE_PART.size + _COUNT_PART.size, _COUNT_PART, tpot_counts))
        self._telemetry.write_parts(parts)

    def setpoint(self, now_s: float) -> Setpoint | None:
        """Return what the agent wants, or None when that is nothing or has expired."""
        return _fresh(self._setpoint, now_s)

    def close(self) -> None:
        """Remove the file; the agent reads that as an orderly end."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self._mapped.close()


def _map(path: Path) -> tuple[mmap.mmap, int]:
    """The file's bytes, shared, and its inode; not those of a file elsewhere that a link points to."""
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return mmap.mmap(handle, SIZE), os.fstat(handle).st_ino
    finally:
        os.close(handle)


def _fresh(setpoint: Block, now_s: float) -> Setpoint | None:
    """What a setpoint block holds, or None when that is nothing or has expired."""
    values = setpoint.read()
    if values is None or now_s >= values[1]:
        return None
    return Setpoint(int(values[0]), LOWERINGS[int(values[3])], int(values[4]) if now_s < values[5] else None)


#: Order of the gauges in `EngineChannel.publish`.
GAUGES: tuple[str, ...] = _GAUGES


class AgentChannel:
    """The agent's end of one engine's channel: an `EngineMeter` and an `EngineActuator`."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self._clock = path, clock
        self._mapped, self._file_id = _map(path)
        if self._mapped[: len(MAGIC)] != MAGIC:
            raise ValueError(f"{path} is not a PALS channel (or of another version)")
        size = SEQ.unpack_from(self._mapped, len(MAGIC))[0]
        try:
            told = json.loads(self._mapped[_INFO_OFFSET : _INFO_OFFSET + min(size, _INFO_SIZE)])
            self._info: EngineInfo = decode(EngineInfo, told, may_lack=_INFO_MAY_LACK)
        except ValueError as e:
            raise ValueError(f"{path} is a channel of another PALS version ({e})") from e
        self._telemetry = Block(self._mapped, _TELEMETRY_OFFSET, _TELEMETRY)
        self._setpoint = Block(self._mapped, _SETPOINT_OFFSET, _SETPOINT)
        self.refusals = Refusals(self._mapped, _REFUSALS_OFFSET)

    @property
    def info(self) -> EngineInfo:
        """What the engine said of itself at start; "refuse" is among its capabilities once an API server has come that can."""
        if not self._info.capabilities.get("refuse", False) and self.refusals.servers:
            self._info = replace(self._info, capabilities={**self._info.capabilities, "refuse": True})
        return self._info

    def alive(self) -> bool:
        """Whether the engine's process exists and is not a zombie."""
        return process_alive(self._info.pid)

    def read(self) -> EngineSample:
        """Return the latest telemetry.

        An idle engine takes no step in which to tell that its setpoint has expired: its launch limit is what it will obey.

        Raises:
            EngineGoneError: the engine's process has ended, or took its channel away.
        """
        if not self.alive():
            raise EngineGoneError(f"the engine (process {self._info.pid}, {self._info.model}) has ended")
        if not self._there():
            raise EngineGoneError(
                f"the engine (process {self._info.pid}, {self._info.model}) took its channel away: it is stopping, or its PALS "
                "plugin switched itself off (vLLM's log then says 'PALS plugin failed') and it serves on at its launch limits"
            )
        return self.last()

    def last(self) -> EngineSample:
        """What the engine published last, also after its end."""
        values = self._telemetry.read()
        if values is None:
            values = self._before_first_step()
        gauges: dict[str, Any] = {k: v if k in _FLOATS else int(v) for k, v in zip(_GAUGES, values, strict=False)}
        gauges["lowering"] = LOWERINGS[gauges["lowering"]]
        if gauges["running"] + gauges["waiting"] == 0 and self.setpoint(self._clock()) is None:
            gauges |= {"active_limit": gauges["launch_limit"], "lowering": LOWERINGS[0]}
        counts = tuple(int(v) for v in values[len(_GAUGES) :])
        return EngineSample(
            **gauges, ttft_counts=counts[:_BUCKETS], tpot_counts=counts[_BUCKETS:], refused_requests=self.refusals.total
        )

    def _there(self) -> bool:
        """Whether the file mapped here still has its name."""
        try:
            return self.path.stat().st_ino == self._file_id
        except FileNotFoundError:
            return False

    def _before_first_step(self) -> tuple[float, ...]:
        values = [0.0] * (len(_GAUGES) + 2 * _BUCKETS)
        for name in ("active_limit", "launch_limit"):
            values[_GAUGES.index(name)] = float(self._info.launch_sequences)
        return tuple(values)

    def apply(
        self, active_sequences: int, *, lease_s: float, lowering: str = "drain", most_waiting: int | None = None
    ) -> None:
        """Ask the engine for a limit, how to reach it from above, and how many may wait; forgotten after `lease_s` seconds.

        Raises:
            ValueError: the limit is below 1 or above the launch limit, `lowering` is unknown, or fewer than none may wait;
                nothing was changed.
        """
        if most_waiting is not None and most_waiting < 0:
            raise ValueError(
                f"{most_waiting} requests cannot wait; give 0 or more, or None. The last setpoint stays in force"
            )
        if lowering not in LOWERINGS:
            raise ValueError(
                f"lowering {lowering!r} is none of {', '.join(LOWERINGS)}; the last setpoint stays in force"
            )
        if not 1 <= active_sequences <= self._info.launch_sequences:
            raise ValueError(
                f"active-sequence limit {active_sequences} lies outside 1..{self._info.launch_sequences} "
                "(the engine's launch limit); the last setpoint stays in force"
            )
        now_s = self._clock()
        until_s, way = now_s + lease_s, float(LOWERINGS.index(lowering))
        bound = (0.0, 0.0) if most_waiting is None else (float(most_waiting), until_s)
        self._setpoint.write((float(active_sequences), until_s, now_s, way, *bound))

    def setpoint(self, now_s: float) -> Setpoint | None:
        """What was last asked for, by this agent or another, or None when that is nothing or has expired."""
        return _fresh(self._setpoint, now_s)

    def release(self) -> None:
        """Let the engine return to its launch limit at its next step."""
        self._setpoint.write((float(self._info.launch_sequences), 0.0, self._clock(), 0.0, 0.0, 0.0))


def open_channels(folder: Path, clock: Callable[[], float] = time.monotonic) -> list[AgentChannel]:
    """All channels in `folder` that can be read, of living engines or not, oldest first."""
    found = []
    for path in sorted(folder.glob(f"*{SUFFIX}"), key=_made_at):
        try:
            found.append(AgentChannel(path, clock))
        except (ValueError, OSError):
            continue
    return found


def _made_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it went meanwhile, or the folder is closed to us
        return 0.0


def find_engines(folder: Path, clock: Callable[[], float] = time.monotonic) -> list[AgentChannel]:
    """The channels of all living engines in `folder`, oldest first; those of dead ones and of dead workers are removed."""
    expert_channel.sweep(folder)
    living = []
    for channel in open_channels(folder, clock):
        if channel.alive():
            living.append(channel)
        else:
            channel.path.unlink(missing_ok=True)
    return living
