"""Data-parallel ranks of one model as one engine: counters add up, and one decision reaches every rank.

They share a budget and, for a mixture model, run in lock-step; steering one rank alone would leave the others' boards
outside the budget. Active sequences of a group are the sum over its ranks; each rank gets an equal part.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from pals.core.errors import ConfigError
from pals.core.quantities import LOWERINGS, EngineInfo, EngineSample
from pals.runtime.channel import AgentChannel, Setpoint

_ADDED = (
    "steps running waiting arrived_requests arrived_prompt_tokens prefill_tokens decode_tokens output_tokens "
    "finished_requests aborted_requests preemptions active_limit launch_limit refused_requests"
)
_LARGEST = "kv_usage busy_s last_step_s oldest_waiting_s"
_OPTIONAL = "scheduled"  # summed where every rank tells it


class Steered(Protocol):
    """What is known of an engine that is steered, whatever it runs on."""

    @property
    def info(self) -> EngineInfo:
        """What it is."""
        ...

    @property
    def pids(self) -> frozenset[int]:
        """Its processes."""
        ...

    def told(self) -> str:
        """Its name, for messages."""
        ...


class EngineGroup:
    """One or more ranks; an `EngineMeter` and an `EngineActuator`."""

    def __init__(self, ranks: Sequence[AgentChannel]) -> None:
        if not ranks:
            raise ValueError("a group needs at least one rank")
        self.ranks = tuple(ranks)

    @property
    def info(self) -> EngineInfo:
        """The first rank's description, with the boards and launch limits of all; boards are () where a rank's are unknown.

        Ranks of a dense model are independent for vLLM, which tells each that it is the only one: they are counted here.
        """
        infos = [r.info for r in self.ranks]
        known = all(i.boards for i in infos)
        return replace(
            infos[0],
            capabilities={k: all(i.capabilities.get(k, False) for i in infos) for k in infos[0].capabilities},
            boards=tuple(sorted({b for i in infos for b in i.boards})) if known else (),
            launch_sequences=sum(i.launch_sequences for i in infos),
            parallelism=re.sub(r"\bdp1\b", f"dp{len(infos)}", infos[0].parallelism),
        )

    @property
    def pids(self) -> frozenset[int]:
        """The processes of all ranks."""
        return frozenset(r.info.pid for r in self.ranks)

    def told(self) -> str:
        """The engine's name with its processes, for messages."""
        processes = ", ".join(str(p) for p in sorted(self.pids))
        return f"{self.info.name} (process{'es' if len(self.pids) > 1 else ''} {processes})"

    @property
    def complete(self) -> bool:
        """Whether as many ranks are here as the engine was started with, as far as the ranks know."""
        wanted = re.search(r"dp(\d+)", self.ranks[0].info.parallelism)
        return wanted is None or len(self.ranks) >= int(wanted[1])

    def alive(self) -> bool:
        """Whether every rank's process lives."""
        return all(r.alive() for r in self.ranks)

    def read(self) -> EngineSample:
        """Counters of all ranks together.

        Raises:
            EngineGoneError: a rank has ended.
        """
        return self._merged([r.read() for r in self.ranks])

    def last(self) -> EngineSample:
        """What the ranks published last, whether or not they live."""
        return self._merged([r.last() for r in self.ranks])

    @property
    def api_servers(self) -> int:
        """API servers that have come and can refuse requests."""
        return self.ranks[0].refusals.servers

    def setpoint(self, now_s: float) -> Setpoint | None:
        """What was last asked of all ranks together; None where a rank was asked nothing, or it has expired."""
        parts = [s for s in (r.setpoint(now_s) for r in self.ranks) if s is not None]
        if len(parts) < len(self.ranks):
            return None
        waiting = [s.most_waiting for s in parts if s.most_waiting is not None]
        return Setpoint(
            sum(s.active_sequences for s in parts),
            parts[0].lowering,
            sum(waiting) if len(waiting) == len(parts) else None,
        )

    @staticmethod
    def _merged(samples: Sequence[EngineSample]) -> EngineSample:
        """Counters of all ranks together."""
        if len(samples) == 1:
            return samples[0]
        merged: dict[str, Any] = {name: sum(getattr(s, name) for s in samples) for name in _ADDED.split()}
        merged |= {name: max(getattr(s, name) for s in samples) for name in _LARGEST.split()}
        # a rank that stands still is not hidden by the others
        merged["time_s"] = min((s.time_s for s in samples if s.running), default=max(s.time_s for s in samples))
        for name in ("ttft_counts", "tpot_counts"):
            merged[name] = tuple(sum(column) for column in zip(*(getattr(s, name) for s in samples), strict=True))
        for name in _OPTIONAL.split():
            told = [getattr(s, name) for s in samples]
            merged[name] = None if None in told else sum(told)
        merged["lowering"] = min(
            (s.lowering for s in samples), key=LOWERINGS.index
        )  # the group is as slow as its slowest
        return EngineSample(**merged)

    def apply(
        self, active_sequences: int, *, lease_s: float, lowering: str = "drain", most_waiting: int | None = None
    ) -> None:
        """Ask every rank for its part; the parts add up to `active_sequences`, but each rank gets at least one.

        They are reached as `lowering` says. The parts of `most_waiting` add up too.

        Raises:
            ValueError: above the group's launch limit, or fewer than none may wait; nothing was changed.
        """
        if most_waiting is not None and most_waiting < 0:
            raise ValueError(
                f"{most_waiting} requests cannot wait; give 0 or more, or None. The last setpoint stays in force"
            )
        if not 1 <= active_sequences <= self.info.launch_sequences:
            raise ValueError(
                f"active-sequence limit {active_sequences} lies outside 1..{self.info.launch_sequences} "
                "(the launch limits of all ranks); the last setpoint stays in force"
            )
        left, waiting = active_sequences, most_waiting
        smallest_first = sorted(self.ranks, key=lambda r: r.info.launch_sequences)
        for n, rank in enumerate(smallest_first):
            part = max(1, min(rank.info.launch_sequences, left // (len(self.ranks) - n)))
            queue = None if waiting is None else waiting // (len(self.ranks) - n)
            rank.apply(part, lease_s=lease_s, lowering=lowering, most_waiting=queue)
            left, waiting = left - part, None if waiting is None or queue is None else waiting - queue

    def release(self) -> None:
        """Let every rank return to its launch limit, and refuse nobody."""
        for rank in self.ranks:
            rank.release()


def group_ranks(engines: Sequence[AgentChannel]) -> list[EngineGroup]:
    """Engines in groups: data-parallel ranks of one parent process together, every other engine alone."""
    groups: dict[tuple[str, str, int], list[AgentChannel]] = {}
    for engine in engines:
        info = engine.info
        together = parent_of(info.pid) if info.data_parallel else -info.pid
        groups.setdefault((info.model, info.parallelism, together), []).append(engine)
    return [EngineGroup(ranks) for ranks in groups.values()]


def unique_name(group: EngineGroup, groups: Sequence[EngineGroup]) -> str:
    """The engine's served name; with its process where another of `groups` serves under the same."""
    info = group.info
    same = [g for g in groups if g.info.name == info.name and g.pids != group.pids]
    return f"{info.name}:{info.pid}" if same else info.name


def refuse_shared_boards(groups: Sequence[Steered]) -> None:
    """Raise `ConfigError` where two engines use the same board: it cannot have two limits."""
    for i, one in enumerate(groups):
        for other in groups[i + 1 :]:
            if both := sorted(set(one.info.boards) & set(other.info.boards)):
                raise ConfigError(
                    f"{one.told()} and {other.told()} both use boards {', '.join(map(str, both))}; a board cannot have two "
                    "limits. Nothing was written: start one of them on other boards (CUDA_VISIBLE_DEVICES, or `pals serve "
                    "--boards`), or steer only one with --engine PID"
                )


def parent_of(pid: int) -> int:
    """The parent of process `pid`; 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
