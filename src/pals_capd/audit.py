"""The audit log: one JSON line for everything that was done or refused, numbered without gaps, only ever appended to."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

LARGEST_BYTES, KEPT = 64 << 20, 4


class Audit(Protocol):
    """Where lines go."""

    def write(self, event: str, **facts: object) -> bool:
        """Append one line; whether it is there now."""
        ...


class FileAudit:
    """`audit.jsonl`, and the files before it (`audit.1.jsonl` is the newest of those)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seq = _last_seq(path)
        self._handle: int | None = None

    def write(self, event: str, **facts: object) -> bool:
        """Append one line; a line that the disk did not take whole is taken back, and its number is used again."""
        line = json.dumps({"seq": self._seq + 1, "time": time.time(), "event": event, **facts}, default=str) + "\n"
        try:
            handle = self._opened()
            size = os.fstat(handle).st_size
            if os.write(handle, line.encode()) < len(line.encode()):
                os.ftruncate(handle, size)
                return False
        except OSError:
            self._close()
            return False
        self._seq += 1
        if size > LARGEST_BYTES:
            self._rotate()
        return True

    def _opened(self) -> int:
        if self._handle is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._handle = os.open(self._path, flags, 0o600)
        return self._handle

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _rotate(self) -> None:
        self._close()
        for n in range(KEPT, 0, -1):
            older = _older(self._path, n - 1)
            if older.exists():
                older.replace(_older(self._path, n))


def _older(path: Path, n: int) -> Path:
    return path.with_suffix(f".{n}{path.suffix}") if n else path


def _last_seq(path: Path) -> int:
    """The number of the last whole line; a line cut short by a crash is ended, so that the next stands alone."""
    for candidate in (path, _older(path, 1)):
        try:
            with candidate.open("rb") as f:
                f.seek(max(0, f.seek(0, os.SEEK_END) - 65536))
                tail = f.read()
        except OSError:
            continue
        if candidate == path and tail and not tail.endswith(b"\n"):
            with contextlib.suppress(OSError), candidate.open("ab") as f:  # the first line to be written will tell
                f.write(b"\n")
        numbers = [e["seq"] for line in tail.splitlines() if (e := _parsed(line)) is not None]
        if numbers:
            return int(max(numbers))
    return 0


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    seq = entry.get("seq") if isinstance(entry, dict) else None
    return entry if isinstance(seq, int) and 0 <= seq < 1 << 63 else None


def read_audit(path: Path) -> Iterator[dict[str, Any]]:
    """All lines there are, oldest first; lines cut short by a crash are left out."""
    for n in range(KEPT, -1, -1):
        try:
            with _older(path, n).open("rb") as f:
                yield from (entry for line in f if (entry := _parsed(line)) is not None)
        except FileNotFoundError:
            continue


def check_order(entries: Iterable[dict[str, Any]]) -> list[str]:
    """What is wrong with a log: gaps in its numbers, a board raised into a budget that does not hold it, an unknown before.

    The limits of all boards are told at each start (`boards`), and each change of one is a line; so the sum can be followed.
    """
    wrong, sums, seq = list[str](), _Sums(), None
    for e in entries:
        if seq is not None and e["seq"] != seq + 1:
            wrong.append(f"line {e['seq']} follows line {seq}")
        seq = e["seq"]
        try:
            wrong += [f"line {seq}: {told}" for told in sums.follow(e)]
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as why:  # a damaged disk
            wrong.append(f"line {seq} cannot be understood ({type(why).__name__})")
    return wrong


@dataclass(slots=True)
class _Sums:
    """What the boards stand at together, as a log tells it."""

    limits: dict[str, float] = field(default_factory=dict)
    budgets: list[dict[str, Any]] = field(default_factory=list)

    def follow(self, e: dict[str, Any]) -> Iterator[str]:
        """Take one line; what is wrong with it."""
        limits = self.limits
        if "limits_w" in e:
            self.limits, self.budgets = dict(e["limits_w"]), list(e["budgets"])
        elif e["event"] == "write" and e.get("limit_w") is not None:
            before_w = limits.get(e["uuid"])
            if before_w is not None and abs(before_w - e["before_w"]) >= 1.0:
                yield f"{e['uuid']} stood at {before_w:.0f} W, not at {e['before_w']:.0f} W"
            limits[e["uuid"]] = e["limit_w"]
            for budget in self.budgets if e["limit_w"] > e["before_w"] + 0.5 else ():
                total_w = sum(limits[u] for u in budget["uuids"] if u in limits)
                if e["uuid"] in budget["uuids"] and total_w > budget["watts"] + 1.0:
                    yield f"{e['uuid']} raised to {e['limit_w']:.0f} W, {total_w:.0f} W of {budget['watts']:.0f} W"
        elif e.get("limit_w") is not None and "uuid" in e:  # another hand, a reload of the driver
            limits[e["uuid"]] = e["limit_w"]
