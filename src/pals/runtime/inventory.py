"""What the run directory says of engines and agents, and which engines of this node say nothing there; reads only."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from pals.core.diagnosis import AgentFacts, EngineFacts, RunDirFacts, WriterFacts
from pals.core.errors import ConfigError, EngineGoneError
from pals.runtime.agent import FOUND_RECORD
from pals.runtime.channel import SUFFIX, open_channels
from pals.runtime.found import read_found
from pals.runtime.group import EngineGroup, group_ranks

AGENT_RECORDS = "agent-status*.json"
ENGINE_TITLE = b"VLLM::EngineCore"  # how vLLM names its engine processes


def look_into(folder: Path, *, now_s: Callable[[], float] = time.monotonic, proc: Path = Path("/proc")) -> RunDirFacts:
    """Facts of the run directory `folder`; it need not exist."""
    exists = os.path.isdir(folder)  # unlike Path.is_dir, False where a parent is closed to us
    channels = open_channels(folder) if exists else []
    living = [c for c in channels if c.alive()]
    known = {c.path for c in channels}
    pids = {c.info.pid for c in living}
    return RunDirFacts(
        path=str(folder),
        exists=exists,
        writable=os.access(folder if exists else nearest(folder), os.W_OK | os.X_OK),
        engines=tuple(engine_facts(g, now_s()) for g in group_ranks(living)),
        killed=tuple(f"process {c.info.pid} ({c.info.model})" for c in channels if c not in living),
        unreadable=tuple(sorted(p.name for p in folder.glob(f"*{SUFFIX}") if p not in known)) if exists else (),
        without_plugin=tuple(p for p in vllm_engines(proc) if p not in pids),
        writer=writer_facts(folder / FOUND_RECORD),
        agents=tuple(a for a in map(agent_facts, sorted(folder.glob(AGENT_RECORDS))) if a is not None)
        if exists
        else (),
    )


def nearest(folder: Path) -> Path:
    """The nearest parent that exists."""
    return next((p for p in folder.absolute().parents if os.path.isdir(p)), Path("/"))


def engine_facts(group: EngineGroup, now_s: float) -> EngineFacts:
    """Facts of one engine."""
    try:
        sample = group.read()
    except EngineGoneError:
        sample = None
    setpoints = [r.setpoint(now_s) for r in group.ranks]
    known = [s for s in setpoints if s is not None]
    return EngineFacts(
        info=group.info,
        pids=tuple(r.info.pid for r in group.ranks),
        complete=group.complete,
        sample=sample,
        age_s=max(0.0, now_s - sample.time_s) if sample is not None else 0.0,
        setpoint=sum(s.active_sequences for s in known) if len(known) == len(setpoints) else None,
    )


def writer_facts(record: Path) -> WriterFacts:
    """Who wrote down the limits it found."""
    try:
        found = read_found(record)
    except ConfigError as e:
        return WriterFacts(error=str(e))
    if found is None:
        return WriterFacts()
    return WriterFacts(pid=found.pid, alive=found.alive, boards=len(found.boards))


def agent_facts(status: Path) -> AgentFacts | None:
    """The agent's newest record; None where there is none, or one of another version."""
    try:
        age_s = time.time() - status.stat().st_mtime
        data = json.loads(status.read_text())
        header, record = data["header"], data["record"]
        return AgentFacts(
            model=str(header["engine"]["model"]),
            policy=str(header["policy"]),
            mode=str(record["mode"]),
            tick=int(record["index"]),
            period_s=float(header["period_s"]),
            age_s=max(0.0, age_s),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def vllm_engines(proc: Path) -> list[int]:
    """Processes that run a vLLM engine, by the title vLLM gives them."""
    found = []
    for path in proc.glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(ENGINE_TITLE):
                found.append(int(path.parent.name))
        except OSError:  # it ended meanwhile, or is not ours to read
            continue
    return sorted(found)
