"""Data-parallel ranks of one model as one engine: counters add up, and one decision reaches every rank.

They share a budget and, for a mixture model, run in lock-step; steering one rank alone would leave the others' boards
outside the budget. Active sequences of a group are the sum over its ranks; each rank gets an equal part.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pals.core.quantities import LOWERINGS, EngineInfo, EngineSample
from pals.runtime.channel import AgentChannel

_ADDED = (
    "steps running waiting arrived_requests arrived_prompt_tokens prefill_tokens decode_tokens output_tokens "
    "finished_requests aborted_requests preemptions active_limit launch_limit"
)
_LARGEST = "time_s kv_usage busy_s last_step_s oldest_waiting_s"
_OPTIONAL = "scheduled"  # summed where every rank tells it


class EngineGroup:
    """One or more ranks; an `EngineMeter` and an `EngineActuator`."""

    def __init__(self, ranks: Sequence[AgentChannel]) -> None:
        if not ranks:
            raise ValueError("a group needs at least one rank")
        self.ranks = tuple(ranks)

    @property
    def info(self) -> EngineInfo:
        """The first rank's description, with the boards and launch limits of all."""
        infos = [r.info for r in self.ranks]
        return replace(
            infos[0],
            capabilities={k: all(i.capabilities.get(k, False) for i in infos) for k in infos[0].capabilities},
            boards=tuple(sorted({b for i in infos for b in i.boards})),
            launch_sequences=sum(i.launch_sequences for i in infos),
        )

    @property
    def complete(self) -> bool:
        """Whether as many ranks are here as the engine was started with."""
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
        samples = [r.read() for r in self.ranks]
        if len(samples) == 1:
            return samples[0]
        merged: dict[str, Any] = {name: sum(getattr(s, name) for s in samples) for name in _ADDED.split()}
        merged |= {name: max(getattr(s, name) for s in samples) for name in _LARGEST.split()}
        for name in ("ttft_counts", "tpot_counts"):
            merged[name] = tuple(sum(column) for column in zip(*(getattr(s, name) for s in samples), strict=True))
        for name in _OPTIONAL.split():
            told = [getattr(s, name) for s in samples]
            merged[name] = None if None in told else sum(told)
        merged["lowering"] = min(
            (s.lowering for s in samples), key=LOWERINGS.index
        )  # the group is as slow as its slowest
        return EngineSample(**merged)

    def apply(self, active_sequences: int, *, lease_s: float, lowering: str = "drain") -> None:
        """Ask every rank for its part, at least one, reached as `lowering` says.

        Raises:
            ValueError: above the group's launch limit; nothing was changed.
        """
        if not 1 <= active_sequences <= self.info.launch_sequences:
            raise ValueError(
                f"active-sequence limit {active_sequences} lies outside 1..{self.info.launch_sequences} "
                "(the launch limits of all ranks); the last setpoint stays in force"
            )
        for rank in self.ranks:
            part = max(1, min(rank.info.launch_sequences, active_sequences // len(self.ranks)))
            rank.apply(part, lease_s=lease_s, lowering=lowering)

    def release(self) -> None:
        """Let every rank return to its launch limit."""
        for rank in self.ranks:
            rank.release()


def group_ranks(engines: Sequence[AgentChannel]) -> list[EngineGroup]:
    """Engines in groups: same model, same parallelism, same parent process."""
    groups: dict[tuple[str, str, int], list[AgentChannel]] = {}
    for engine in engines:
        groups.setdefault((engine.info.model, engine.info.parallelism, parent_of(engine.info.pid)), []).append(engine)
    return [EngineGroup(ranks) for ranks in groups.values()]


def parent_of(pid: int) -> int:
    """The parent of process `pid`; 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
