"""What goes wrong in a run, and when: one schedule, read from a small JSON or CSV file, applied to a bank of boards.

Faults of boards go through `BoardBank.inject`. Events of the engine (routing that drifts, another build) travel in the
same schedule; whoever simulates the engine takes them with `engine_events`.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pals.core.errors import ConfigError
from pals.plant.boards import BoardBank

#: Kinds that concern boards, with the name `BoardBank.inject` has for them. The value 0 ends each.
BOARD_KINDS: Mapping[str, str] = {
    "lost": "lost",  # 1
    "not_supported": "not_supported",  # 1: no setters
    "denied": "denied",  # 1: no permission
    "stuck_meter": "stuck",  # 1: power and energy stand still
    "external_limit": "external_limit",  # W, set by another hand
    "thermal_slowdown": "thermal",  # 1: the hardware halves the clock
    "hot_air": "ambient",  # °C at the board
    "current_dip": "dip",  # s for which current protection holds the clock down
    "slow_setter": "slow_setter",  # s longer that each call takes
}
#: Kinds that concern the engine: coefficient of variation of the experts' popularity; factor on the host's time per step.
ENGINE_KINDS = ("routing_drift", "engine_build")
KINDS = (*BOARD_KINDS, *ENGINE_KINDS)
_SWITCHES = ("lost", "not_supported", "denied", "stuck_meter", "thermal_slowdown")
_FIELDS = ("time_s", "kind", "board", "value")


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultEvent:
    """One change at one time."""

    time_s: float  # of the run
    kind: str  # one of KINDS
    board: int | None = None  # None: all boards
    value: float = 1.0  # what it means depends on the kind; 0 ends a board's fault

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            near = difflib.get_close_matches(self.kind, KINDS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown kind {self.kind!r}; {hint}Known: {', '.join(KINDS)}")
        if not (math.isfinite(self.time_s) and self.time_s >= 0.0):
            raise ValueError(f"time_s {self.time_s} is not a time of at least 0 s")
        if not (math.isfinite(self.value) and self.value >= 0.0):
            raise ValueError(f"value {self.value} of {self.kind} is not a number of at least 0")
        if self.kind in _SWITCHES and self.value not in (0.0, 1.0):
            raise ValueError(f"{self.kind} is 1 (begins) or 0 (ends), not {self.value:g}")
        if self.kind == "engine_build" and self.value == 0.0:
            raise ValueError("engine_build is a factor on the host's time per step and cannot be 0")
        if self.board is not None and (self.board < 0 or self.kind in ENGINE_KINDS):
            raise ValueError(f"board {self.board} of {self.kind}: boards count from 0, and engine events name none")


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultSchedule:
    """Events of a run in order of time."""

    events: tuple[FaultEvent, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "events", tuple(sorted(self.events, key=lambda e: e.time_s)))

    def due(self, after_s: float, until_s: float) -> tuple[FaultEvent, ...]:
        """Events later than `after_s`, up to and with `until_s`."""
        return tuple(e for e in self.events if after_s < e.time_s <= until_s)

    def times_s(self) -> tuple[float, ...]:
        """When something happens, each time once."""
        return tuple(sorted({e.time_s for e in self.events}))

    def check_boards(self, count: int) -> None:
        """That every board named is there.

        Raises:
            ConfigError: one is not.
        """
        for e in self.events:
            if e.board is not None and e.board >= count:
                raise ConfigError(
                    f"{e.kind} at {e.time_s:g} s names board {e.board}; there are {count}, counted from 0. Nothing was started"
                )


def board_faults(events: Iterable[FaultEvent], count: int) -> Iterator[tuple[int, str, float]]:
    """Board, fault and value, as `inject` of a bank (or of a simulated replica) takes them; engine events give nothing."""
    for e in events:
        if e.kind in BOARD_KINDS:
            for i in range(count) if e.board is None else (e.board,):
                yield i, BOARD_KINDS[e.kind], e.value


def apply_to(bank: BoardBank, events: Iterable[FaultEvent], now_s: float) -> None:
    """Inject the boards' faults among `events`."""
    for i, fault, value in board_faults(events, bank.count):
        bank.inject(i, fault, value, now_s)


def engine_events(events: Iterable[FaultEvent]) -> tuple[FaultEvent, ...]:
    """Those that concern the engine."""
    return tuple(e for e in events if e.kind in ENGINE_KINDS)


def load_faults(path: Path) -> FaultSchedule:
    """Read a schedule: a JSON list of objects, or a CSV with a header; fields time_s, kind, board (may be empty), value.

    Raises:
        ConfigError: the file cannot be read, or a row is wrong; the row is named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read the faults {path}: {e}. Nothing was started") from e
    rows = _json_rows(text, path) if path.suffix == ".json" else _csv_rows(text, path)
    events = []
    for number, row in rows:
        try:
            events.append(_event(row))
        except (ValueError, TypeError) as e:
            raise ConfigError(f"{path}, row {number}: {e}. Nothing was started") from e
    return FaultSchedule(events=tuple(events))


def _event(row: Mapping[str, Any]) -> FaultEvent:
    if unknown := [str(k) for k in row if k not in _FIELDS]:
        raise ValueError(f"unknown field {', '.join(unknown)}; known: {', '.join(_FIELDS)}")
    if lacking := [k for k in ("time_s", "kind") if row.get(k) in (None, "")]:
        raise ValueError(f"{' and '.join(lacking)} must be given")
    board, value = row.get("board"), row.get("value")
    return FaultEvent(
        time_s=_number(row["time_s"], "time_s"),
        kind=str(row["kind"]),
        board=None if board in (None, "") else _index(board),
        value=1.0 if value in (None, "") else _number(value, "value"),
    )


def _number(value: Any, name: str) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} {value!r} is not a number") from None


def _index(value: Any) -> int:
    number = _number(value, "board")
    if not math.isfinite(number) or number != int(number):
        raise ValueError(f"board {value!r} is not a whole number")
    return int(number)


def _json_rows(text: str, path: Path) -> Sequence[tuple[int, Mapping[str, Any]]]:
    try:
        rows = json.loads(text)
    except ValueError as e:
        raise ConfigError(f"{path} is not JSON: {e}. Nothing was started") from e
    if not (isinstance(rows, list) and all(isinstance(r, dict) for r in rows)):
        raise ConfigError(f"{path} is not a list of objects with {', '.join(_FIELDS)}. Nothing was started")
    return list(enumerate(rows, start=1))


def _csv_rows(text: str, path: Path) -> Sequence[tuple[int, Mapping[str, Any]]]:
    """Rows as the lines of the file count them; lines that begin with # are comments."""
    lines = [(n, line) for n, line in enumerate(text.splitlines(), start=1) if line.strip() and line[0] != "#"]
    reader = csv.DictReader(io.StringIO("\n".join(line for _, line in lines)))
    header = reader.fieldnames or ()
    if not {"time_s", "kind"} <= set(header):
        raise ConfigError(f"{path} lacks a header with {', '.join(_FIELDS)}; it begins {header!r}. Nothing was started")
    return [(n, row) for (n, _), row in zip(lines[1:], reader, strict=True)]
