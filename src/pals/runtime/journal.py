"""The journal: JSON lines, one header and then one `TickRecord` a line; what `pals replay` reproduces decisions from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pals.core.errors import ConfigError
from pals.core.quantities import BoardInfo, EngineInfo
from pals.runtime.tick import TickRecord

FORMAT = "pals-journal/1"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JournalHeader:
    """What a replay needs beside the records: the policy with its settings and profile, the boards as found."""

    policy: str
    policy_settings: dict[str, Any]
    profile_json: str | None
    boards: tuple[BoardInfo, ...]
    engine: EngineInfo
    period_s: float
    emulated: bool
    started_at: str  # ISO; in virtual time the epoch, and the engine's process id is 0
    command: str
    lowering: str = "drain"  # asked for; what is in force is in each engine sample
    clock: str = "wall"  # or "virtual": times are of a virtual clock that began at 0


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


def decode(kind: Any, data: Any) -> Any:
    """The inverse of `encode` for the type `kind`."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(kind) if a is not type(None)]
        return None if data is None else decode(inner[0], data)
    if origin is tuple:
        return tuple(decode(typing.get_args(kind)[0], v) for v in data)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        return kind(**{k: decode(hints[k], v) for k, v in data.items()})
    return data


def read_journal(path: Path) -> tuple[JournalHeader, Iterator[TickRecord]]:
    """Open a journal; the records are read as they are asked for. A last line cut off by a crash is left out.

    Raises:
        ConfigError: the file is missing or no journal.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read the journal {path}: {e}") from e
    try:
        head = json.loads(lines[0])
        if head.pop("format") != FORMAT:
            raise ValueError("another format")
        header = decode(JournalHeader, head)
    except (IndexError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigError(f"{path} is not a PALS journal ({type(e).__name__}: {e})") from e
    return header, _records(path, lines[1:])


def _records(path: Path, lines: list[str]) -> Iterator[TickRecord]:
    for number, line in enumerate(lines, start=2):
        try:
            data = json.loads(line)
        except json.JSONDecodeError as e:
            if number == len(lines) + 1:
                return
            raise ConfigError(f"{path}, line {number}: not JSON ({e}); the lines before it are sound") from e
        yield decode(TickRecord, data)
