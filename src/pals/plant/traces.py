"""Traces from files: arrivals and lengths of requests as others published them; what is not understood is refused, not guessed.

A format is known by its header. Whatever does not fit (an unknown column, a time that falls, a length that is no whole
number) is a `ConfigError` that names file and row. Formats, origins and rules: docs/models/workload.md.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np

from pals.core.errors import ConfigError
from pals.plant.workload import LengthPairs, LengthSource, Workload, lengths_of

BLOCK_TOKENS = 512  # of Mooncake's hashes
CHARACTERS_PER_TOKEN = 4.0  # of texts without a tokenizer: English prose under current vocabularies
MOST_TOKENS = 2**31 - 1

#: Committed traces by the name people give, and their files below the folder of traces.
COMMITTED: dict[str, str] = {
    "azure-2023-conv": "azure_2023_conv.csv.gz",
    "azure-2023-code": "azure_2023_code.csv.gz",
    "mooncake-synthetic": "mooncake_synthetic.jsonl.gz",
    "vidur-arxiv": "vidur_arxiv_summarization_lengths.csv.gz",
}


def seconds(text: str) -> float:
    """Seconds as a decimal number."""
    return float(text)


def date_seconds(text: str) -> float:
    """Seconds since 1970 of an ISO date and time; without a time zone it is UTC."""
    when = datetime.fromisoformat(text)
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Columns of a CSV format."""

    name: str
    prompt: str
    output: str
    time: str | None = None  # None: lengths without arrivals
    prefix: str | None = None  # a column that may be there
    beside: frozenset[str] = frozenset()  # columns that may be there and are not needed
    time_of: Callable[[str], float] = seconds
    since_first: bool = False  # times count from the first request
    failed_output: str = ""  # what a request that failed has as output; such rows are left out

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns that must be there."""
        return tuple(c for c in (self.time, self.prompt, self.output) if c is not None)


FORMATS: tuple[Format, ...] = (
    Format(
        name="azure",  # 2023 and 2024 differ in how they write the time alone
        time="TIMESTAMP",
        prompt="ContextTokens",
        output="GeneratedTokens",
        time_of=date_seconds,
        since_first=True,
    ),
    Format(
        name="burstgpt",
        time="Timestamp",
        prompt="Request tokens",
        output="Response tokens",
        beside=frozenset({"Session ID", "Elapsed time", "Model", "Total tokens", "Log Type"}),
        since_first=True,
        failed_output="0",
    ),
    Format(
        name="pals",
        time="arrival_s",
        prompt="input_tokens",
        output="output_tokens",
        prefix="cached_prefix_tokens_inf",
        beside=frozenset({"request", "queued_s", "scheduled_s", "first_token_s", "last_token_s"}),  # of llmservingsim
    ),
    Format(
        name="vidur",
        prompt="num_prefill_tokens",
        output="num_decode_tokens",
        beside=frozenset({"num_total_tokens", "pd_ratio"}),
    ),
    Format(name="lengths", prompt="input_tokens", output="output_tokens"),
)
LATEST_START_S = 30 * 86400.0  # of the first request: later than this it is no time from the start
MOONCAKE, CONVERSATIONS = "mooncake", "json-lengths"
NAMES = (*(f.name for f in FORMATS), MOONCAKE, CONVERSATIONS)


@dataclass(slots=True)
class Rows:
    """What has been read so far, as compact arrays."""

    path: Path
    time_s: array[float] = field(default_factory=lambda: array("d"))
    prompt: array[int] = field(default_factory=lambda: array("i"))
    output: array[int] = field(default_factory=lambda: array("i"))
    prefix: array[int] = field(default_factory=lambda: array("i"))

    def add(self, row: int, time_s: float | None, prompt: int, output: int, prefix: int = 0) -> None:
        """Append one request.

        Raises:
            ConfigError: a time that is negative or falls, a length below 1.
        """
        if time_s is not None:
            if not 0 <= time_s < math.inf:
                raise bad_row(self.path, row, f"the time {time_s:g} lies before the start; count times from the start")
            if not self.time_s and time_s > LATEST_START_S:
                raise bad_row(
                    self.path,
                    row,
                    f"the first request comes after {time_s:g} s, as in Unix times; count times from the start",
                )
            if self.time_s and time_s < self.time_s[-1]:
                raise bad_row(
                    self.path, row, f"the time falls from {self.time_s[-1]:g} s to {time_s:g} s; sort the file by time"
                )
            self.time_s.append(time_s)
        for what, tokens in (("prompt", prompt), ("output", output)):
            if not 1 <= tokens <= MOST_TOKENS:
                raise bad_row(self.path, row, f"a request with {tokens} {what} tokens; remove it, or give its length")
        if not 0 <= prefix <= prompt:
            raise bad_row(self.path, row, f"{prefix} cached of {prompt} prompt tokens; correct one of them")
        self.prompt.append(prompt)
        self.output.append(output)
        self.prefix.append(prefix)

    def lengths(self, name: str) -> LengthPairs:
        """The lengths alone.

        Raises:
            ConfigError: no row.
        """
        if not self.prompt:
            raise ConfigError(f"{self.path} holds no request. Nothing was started")
        prompt, output = np.array(self.prompt, np.int32), np.array(self.output, np.int32)
        return LengthPairs(name=name, prompt_tokens=prompt, output_tokens=output)

    def result(self, name: str) -> Workload | LengthPairs:
        """The arrays; a `Workload` where there are times; see `lengths`."""
        lengths = self.lengths(name)
        if not self.time_s:
            return lengths
        return Workload(
            name=name,
            arrival_s=np.array(self.time_s, np.float64),
            prompt_tokens=lengths.prompt_tokens,
            output_tokens=lengths.output_tokens,
            prefix_tokens=np.array(self.prefix, np.int32),
        )


def trace_path(trace: str, folder: Path | None) -> Path:
    """The file of a committed trace, looked up in `folder`, or the file named.

    Raises:
        ConfigError: neither.
    """
    if trace in COMMITTED and folder is not None:
        return folder / COMMITTED[trace]
    path = Path(trace)
    if not path.is_file():
        raise ConfigError(
            f"no trace {trace!r}: no such file, and the traces known by name are {', '.join(COMMITTED)} and servegen-m-large. Nothing was started"
        )
    return path


def read_trace(path: Path, *, name: str | None = None, kind: str | None = None) -> Workload:
    """Arrivals and lengths from a file.

    Args:
        path: CSV, JSON or JSON lines, also gzipped.
        name: for people; None: the file's.
        kind: one of `NAMES`; None: known from its header.

    Raises:
        ConfigError: missing, unreadable, of no known format, or without arrivals.
    """
    found = _read(path, name, kind)
    if isinstance(found, Workload):
        return found
    raise ConfigError(
        f"{path} holds lengths without arrival times; say when requests arrive (--arrivals poisson --rate X). Nothing was started"
    )


def read_lengths(path: Path, *, name: str | None = None, kind: str | None = None) -> LengthSource:
    """Lengths from a file of lengths, or of a trace, whose arrivals are then left out; see `read_trace`."""
    found = _read(path, name, kind)
    return lengths_of(found) if isinstance(found, Workload) else found


def _read(path: Path, name: str | None, kind: str | None) -> Workload | LengthPairs:
    if kind is not None and kind not in NAMES:
        raise ConfigError(f"unknown format {kind!r} of a trace; known: {', '.join(NAMES)}. Nothing was started")
    name = name or path.name
    try:
        with opened(path) as lines:
            start = lines.read(1)
            lines.seek(0)
            if kind == MOONCAKE or (kind is None and start == "{"):
                return _mooncake(path, lines).result(name)
            if kind == CONVERSATIONS or (kind is None and start == "["):
                return _json(path, json.load(lines), name)
            return _csv(path, lines, kind).result(name)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as e:
        raise ConfigError(f"cannot read the trace {path}: {e}. Nothing was started") from e
    except json.JSONDecodeError as e:
        raise ConfigError(f"{path} is not JSON ({e}). Nothing was started") from e


@contextmanager
def opened(path: Path) -> Iterator[IO[str]]:
    """The text of a file, gzipped or not, whatever its name says."""
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        plain = gzip.GzipFile(fileobj=raw) if packed else raw
        yield io.TextIOWrapper(plain, encoding="utf-8-sig", newline="")


def bad_row(path: Path, row: int, why: str) -> ConfigError:
    """The error of one row, counted from 1 without the header."""
    return ConfigError(f"{path}, row {row}: {why}. Nothing was started")


def _csv(path: Path, lines: IO[str], kind: str | None) -> Rows:
    reader = csv.reader(lines)
    header = [c.strip() for c in next(reader, [])]
    form = _format_of(path, header, kind)
    time, prompt, output = (header.index(c) if c is not None else None for c in (form.time, form.prompt, form.output))
    prefix = header.index(form.prefix) if form.prefix in header else None
    rows, zero_s = Rows(path), None
    for n, row in enumerate(reader, start=1):
        if len(row) != len(header):
            raise bad_row(path, n, f"{len(row)} values where the header names {len(header)}; complete or remove it")
        time_s = None if time is None else _number(path, n, form.time, row[time], form.time_of)
        if time_s is not None and form.since_first:
            zero_s = time_s if zero_s is None else zero_s
            time_s = _since(path, n, time_s, zero_s)
        if form.failed_output and row[output or 0].strip() == form.failed_output:
            continue
        rows.add(
            n, time_s, _whole(path, n, form.prompt, row[prompt or 0]), _whole(path, n, form.output, row[output or 0]),
            0 if prefix is None else _whole(path, n, str(form.prefix), row[prefix]),
        )  # fmt: skip
    return rows


def _since(path: Path, n: int, time_s: float, zero_s: float) -> float:
    if time_s < zero_s:
        raise bad_row(path, n, "its time lies before that of the first row; sort the file by time")
    return time_s - zero_s


def _format_of(path: Path, header: Sequence[str], kind: str | None) -> Format:
    """The format whose columns the header has, and no others."""
    if not header:
        raise ConfigError(f"{path} is empty. Nothing was started")
    for form in FORMATS:
        if kind in (None, form.name) and set(form.needed) <= set(header):
            known = {*form.needed, *form.beside, *([form.prefix] if form.prefix else [])}
            if unknown := [c for c in header if c not in known]:
                raise ConfigError(
                    f"{path}, row 0: unknown column {unknown[0]!r} beside those of the format {form.name!r}; remove it, or rename "
                    f"it to one of {', '.join(sorted(known - set(header))) or 'none: all known ones are there'}. Nothing was started"
                )
            if len(set(header)) != len(header):
                raise ConfigError(f"{path}, row 0: a column is there twice: {', '.join(header)}. Nothing was started")
            return form
    formats = "; ".join(f"{f.name}: {', '.join(f.needed)}" for f in FORMATS if kind in (None, f.name))
    raise ConfigError(
        f"{path}, row 0: the columns {', '.join(header)} are of no known format; rename them to those of one of: {formats}. "
        "Nothing was started"
    )


def _number(path: Path, n: int, column: str | None, text: str, time_of: Callable[[str], float]) -> float:
    try:
        value = time_of(text.strip())
    except ValueError as e:
        raise bad_row(path, n, f"{column} is {text!r}, which is no time ({e}); correct it") from e
    if not math.isfinite(value):
        raise bad_row(path, n, f"{column} is {text!r}, which is no time; correct it")
    return value


def _whole(path: Path, n: int, column: str, value: Any) -> int:
    """A number of tokens: a whole number, also written as 12.0."""
    try:
        number = float(value) if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, int | float) or number != int(number):
            raise ValueError(value)
    except (ValueError, OverflowError) as e:
        raise bad_row(path, n, f"{column} is {value!r}, not a whole number of tokens; correct it") from e
    return int(number)


def _mooncake(path: Path, lines: IO[str]) -> Rows:
    """JSON lines, one at a time; prefixes by a cache of blocks that never evicts."""
    rows, held = Rows(path), set[int]()
    for n, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as e:
            raise bad_row(path, n, f"not JSON ({e}); remove or correct it") from e
        _check_keys(path, n, request, ("timestamp", "input_length", "output_length"), ("hash_ids",))
        blocks = request.get("hash_ids", [])
        if not isinstance(blocks, list) or not all(isinstance(b, int) for b in blocks):
            raise bad_row(path, n, "hash_ids is no list of whole numbers; correct it")
        time_ms, prompt = request["timestamp"], _whole(path, n, "input_length", request["input_length"])
        if not isinstance(time_ms, int | float):
            raise bad_row(path, n, f"timestamp is {time_ms!r}, not milliseconds; correct it")
        known = next((i for i, b in enumerate(blocks) if b not in held), len(blocks))
        held.update(blocks)
        output = _whole(path, n, "output_length", request["output_length"])
        rows.add(n, time_ms / 1000.0, prompt, output, min(prompt, known * BLOCK_TOKENS))
    return rows


def _check_keys(path: Path, n: int, request: Any, needed: Sequence[str], beside: Sequence[str]) -> None:
    if not isinstance(request, dict):
        raise bad_row(path, n, "not an object; remove or correct it")
    for key in needed:
        if key not in request:
            raise bad_row(path, n, f"{key} is missing; add it")
    for key in request:
        if key not in needed and key not in beside:
            raise bad_row(path, n, f"unknown key {key!r}; known: {', '.join([*needed, *beside])}. Remove it")


def _json(path: Path, data: Any, name: str) -> LengthPairs:
    """A list of lengths or of conversations."""
    if not isinstance(data, list):
        raise ConfigError(
            f"{path} is neither a list of {{'input_tokens': …, 'output_tokens': …}} nor of conversations. Nothing was started"
        )
    rows = Rows(path)
    for n, entry in enumerate(data, start=1):
        pair = _first_turn(path, n, entry) if isinstance(entry, dict) and "conversations" in entry else entry
        if pair is None:
            continue
        _check_keys(path, n, pair, ("input_tokens", "output_tokens"), ())
        rows.add(n, None, *(_whole(path, n, k, pair[k]) for k in ("input_tokens", "output_tokens")))
    return rows.lengths(name)


def _first_turn(path: Path, n: int, entry: Mapping[str, Any]) -> dict[str, int] | None:
    """Lengths of a conversation's first question and answer, by characters; None: it has none, as in many published ones."""
    turns = entry["conversations"]
    if not isinstance(turns, list):
        raise bad_row(path, n, "conversations is no list; correct it")
    told = [t.get("value") for t in turns[:2] if isinstance(t, dict)]
    texts = [t for t in told if isinstance(t, str) and t]
    if len(texts) < 2:
        return None
    tokens = [math.ceil(len(t) / CHARACTERS_PER_TOKEN) for t in texts]
    return {"input_tokens": tokens[0], "output_tokens": tokens[1]}
