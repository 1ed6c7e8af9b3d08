"""The journal: JSON lines, one header and then one `TickRecord` a line; what `pals replay` reproduces decisions from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pals.control.interleaved import Interleaving
from pals.core.errors import ConfigError
from pals.core.plain import decode
from pals.core.quantities import LATENCY_BOUNDS_S, BoardInfo, EngineInfo
from pals.runtime.tick import TickRecord

FORMAT = "pals-journal/1"
#: Fields that journals of this format may lack, being older; all others must be there.
ADDED_LATER = frozenset(
    {
        *("lowering", "clock", "accepted_clocks_mhz", "scheduled", "sm_clocks_mhz"),
        *("memory_clock_mhz", "busy_ratio", "served_as", "data_parallel", "cuda_order", "absent", "bank"),
        *(
            "build",
            "flags",
            "config_digest",
            "dtype",
            "shape",
            "step_tokens",
            "accepted_mismatch",
            "correction",
            "drift",
            "ttft_p99_s",
            "tpot_p99_s",
            "throughput_share",
            "most_waiting",
            "refused_requests",
            "arm",
            "interleaving",
            "experts",
        ),
    }
)
TEXT_SETTINGS = frozenset({"objective"})  # of a policy; all its others are numbers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JournalHeader:
    """What a replay needs beside the records: the policy with its settings and profile, the boards as found."""

    policy: str
    policy_settings: dict[str, float | str | None]
    profile_json: str | None
    boards: tuple[BoardInfo, ...]
    engine: EngineInfo
    period_s: float
    emulated: bool
    started_at: str  # ISO; in virtual time the epoch, and the engine's process id is 0
    command: str
    lowering: str = "drain"  # asked for; what is in force is in each engine sample
    clock: str = "wall"  # or "virtual": times are of a virtual clock that began at 0
    accepted_mismatch: tuple[
        str, ...
    ] = ()  # differences from the profile that were accepted: its intervals are widened
    interleaving: Interleaving | None = None  # in canary mode: which windows are the policy's


class Journal:
    """Appends records to a file; each line is flushed, so a crash loses at most the line being written."""

    def __init__(self, path: Path, header: JournalHeader) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file: IO[str] = path.open("w", encoding="utf-8")
        try:
            self._write({"format": FORMAT, **encode(header)})
        except OSError:
            with contextlib.suppress(OSError):  # closing writes again
                self._file.close()
            raise

    def append(self, record: TickRecord) -> None:
        """Write one record."""
        self._write(encode(record))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, data: dict[str, Any]) -> None:
        self._file.write(json.dumps(data, separators=(",", ":"), allow_nan=False) + "\n")
        self._file.flush()


def encode(value: Any) -> Any:
    """A dataclass tree as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [encode(v) for v in value]
    return value


def read_journal(path: Path) -> tuple[JournalHeader, Iterator[TickRecord]]:
    """Open a journal; the records are read as they are asked for. A last line cut off by a crash is left out.

    Raises:
        ConfigError: the file is missing, no journal, or damaged; asking for a damaged record raises it too. It names the
            line and says what before it is sound.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read the journal {path}: {e}") from e
    try:
        head = _parse(lines[0])
        written_as = head.pop("format")
        if written_as != FORMAT:
            raise ValueError(f"format {written_as!r}, this PALS reads {FORMAT!r}")
    except (IndexError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        raise ConfigError(f"{path} is not a PALS journal ({type(e).__name__}: {e})") from e
    try:
        header = decode(JournalHeader, head, may_lack=ADDED_LATER)
        _check_header(header)
    except ValueError as e:
        raise ConfigError(f"{path}, line 1: {e}. That is the header: without it nothing can be replayed") from e
    return header, _records(path, lines[1:])


def _parse(line: str) -> Any:
    """JSON without NaN and Infinity, which it does not have."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON; unknown values are null, never NaN")

    return json.loads(line, parse_constant=refuse)


def _check_header(header: JournalHeader) -> None:
    """What every replay rests on; raises `ValueError`."""
    for key, value in header.policy_settings.items():
        if isinstance(value, str) and key not in TEXT_SETTINGS:
            raise ValueError(f"policy_settings.{key} is {value!r}, not a number")
    if not header.boards:
        raise ValueError("boards is empty")
    for i, board in enumerate(header.boards):
        if not 0 < board.min_limit_w <= board.max_limit_w:
            raise ValueError(f"boards[{i}] accepts {board.min_limit_w:g}..{board.max_limit_w:g} W, which is no range")
    if header.engine.launch_sequences < 1 or header.period_s <= 0:
        raise ValueError("engine.launch_sequences and period_s must be above 0")


def _records(path: Path, lines: list[str]) -> Iterator[TickRecord]:
    for number, line in enumerate(lines, start=2):
        try:
            data = _parse(line)
        except json.JSONDecodeError as e:
            if number == len(lines) + 1:
                return
            raise _damaged(path, number, f"not JSON ({e})") from e
        except (ValueError, RecursionError) as e:
            raise _damaged(path, number, str(e)) from e
        try:
            record: TickRecord = decode(TickRecord, data, may_lack=ADDED_LATER)
            _check_record(record, number - 2)
        except ValueError as e:
            raise _damaged(path, number, str(e)) from e
        yield record


def _damaged(path: Path, number: int, why: str) -> ConfigError:
    sound = {2: "the header before it is sound", 3: "the header and the record before it are sound"}.get(
        number, f"the header and the {number - 2} records before it are sound"
    )
    return ConfigError(f"{path}, line {number}: {why}; {sound}")


def _check_record(record: TickRecord, nth: int) -> None:
    """What types do not say; raises `ValueError`."""
    if record.index != nth:
        raise ValueError(f"index is {record.index} where tick {nth} should stand: lines are missing or out of order")
    engine = record.sample.engine
    if engine is not None and {len(engine.ttft_counts), len(engine.tpot_counts)} != {len(LATENCY_BOUNDS_S) + 1}:
        raise ValueError(
            f"sample.engine: {len(engine.ttft_counts)} TTFT and {len(engine.tpot_counts)} TPOT counts, not "
            f"{len(LATENCY_BOUNDS_S) + 1}"
        )
