"""The record of what the boards were found at, for whoever puts them back when the agent is killed.

It is written *before* each write to a board: what to put back, what the board is about to be told, whether a clock lock
may be left. A board that stands at anything else was set by somebody else since, and is left alone. The writer is named
by process id and start time, so that a reused id is not taken for a living agent.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pals.core.errors import ConfigError, PalsError
from pals.core.protocols import PowerMeter
from pals.core.quantities import BoardWrite
from pals.runtime.files import replace_file
from pals.runtime.processes import process_started, same_process

FORMAT = "pals-limits-found/2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one agent wrote down of its boards, by UUID."""

    pid: int
    started: int  # of that process, in the kernel's clock ticks since boot
    boards: Mapping[str, BoardWrite] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        """Whether the agent that wrote it lives."""
        return same_process(self.pid, self.started)


def read_found(record: Path) -> Found | None:
    """What `record` says; None where there is none.

    Raises:
        ConfigError: unreadable, damaged or of another version.
    """
    try:
        return _parse(json.loads(record.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except OSError as e:
        raise ConfigError(f"{record} cannot be read ({e.strerror}): run as the user of the agent that wrote it") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigError(
            f"{record} is damaged or of another version of PALS ({type(e).__name__}: {e}); nothing was written. Check the "
            "limits with `nvidia-smi -q -d POWER`, set them by hand where they are too low, then remove the file"
        ) from e


def left_by_dead_agent(record: Path) -> dict[str, BoardWrite]:
    """The boards that an agent wrote to and, killed, never put back; empty where there is nothing to mend.

    Raises:
        ConfigError: a living agent owns the boards, or the record cannot be understood.
    """
    found = read_found(record)
    if found is None:
        return {}
    if found.pid != os.getpid() and found.alive:
        raise ConfigError(
            f"another PALS agent (process {found.pid}) steers these boards; two would fight. Nothing was changed: stop it first, "
            "or serve without one (`pals serve --no-agent`)"
        )
    return {uuid: b for uuid, b in found.boards.items() if b.written_w or b.clock_locked}


def add_found(record: Path, meters: Sequence[PowerMeter]) -> None:
    """Write down the limits these boards were found at; what others left there is kept.

    Raises:
        PalsError: the record cannot be written.
    """
    note_writes(record, [BoardWrite(uuid=m.info.uuid, found_limit_w=m.info.found_limit_w) for m in meters])


def note_writes(record: Path, writes: Iterable[BoardWrite]) -> None:
    """Write down, atomically, what boards are about to be told.

    Raises:
        PalsError: the record cannot be written.
    """
    found = read_found(record)
    _replace(record, {**(found.boards if found else {}), **{w.uuid: w for w in writes}})


def forget_found(record: Path, uuids: Iterable[str]) -> None:
    """Take boards that were put back out of `record`; the last one removes it."""
    found = read_found(record)
    if found is None:
        return
    gone = set(uuids)
    left = {uuid: b for uuid, b in found.boards.items() if uuid not in gone}
    if left:
        _write(record, replace(found, boards=left))
    else:
        record.unlink(missing_ok=True)


def _replace(record: Path, boards: Mapping[str, BoardWrite]) -> None:
    _write(record, Found(pid=os.getpid(), started=process_started(os.getpid()) or 0, boards=boards))


def _write(record: Path, found: Found) -> None:
    told = {
        uuid: {"found_w": b.found_limit_w, "written_w": list(b.written_w), "clock_locked": b.clock_locked}
        for uuid, b in found.boards.items()
    }
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, "pid": found.pid, "started": found.started, "boards": told})
        replace_file(record, text.encode())
    except OSError as e:
        raise PalsError(
            f"{record} cannot be written ({e.strerror}), and without it a killed agent's limits could not be put back: no "
            "board was written. Free the disk, or choose another run directory with PALS_RUN_DIR"
        ) from e


def _parse(data: Any) -> Found:
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']!r}")
    boards = {
        str(uuid): BoardWrite(
            uuid=str(uuid),
            found_limit_w=_watts(b["found_w"]),
            written_w=tuple(_watts(w) for w in b["written_w"]),
            clock_locked=_flag(b["clock_locked"]),
        )
        for uuid, b in data["boards"].items()
    }
    return Found(pid=_count(data["pid"]), started=_count(data["started"]), boards=boards)


def _watts(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{value!r} is not a power limit in W")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a process id or start time")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value
