"""When the routing of experts drifts: a short text, or a JSON or TOML file, of swaps and changed spreads at times of the engine.

`60:swap=0.5;120+30:cv=0.3` swaps at 60 s, and from 120 s to 150 s moves the coefficient of variation to 0.3, in `PARTS` steps.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from pals.core.errors import ConfigError
from pals.plant.routing import Routing

PARTS = 10  # of an event that spans some time
SWAP = 0.5  # share of the more popular half, where an event does not say
MOST_CV = 5.0  # beyond it one expert has nearly everything, and the draw of a popularity is noise
_FIELDS = ("time_s", "span_s", "swap", "cv")
_EXAMPLE = "write e.g. 60:swap=0.5;120+30:cv=0.3 (seconds[+span]:swap=share,cv=spread), or name a .json or .toml file"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingEvent:
    """What drifts, when, and over how long."""

    time_s: float  # of the engine
    span_s: float = 0.0
    swap: float | None = (
        None  # share of the more popular half of the experts that changes places with the least popular
    )
    cv: float | None = None  # coefficient of variation at the end

    def __post_init__(self) -> None:
        for name in ("time_s", "span_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} {value:g} is not a time of at least 0 s")
        if self.swap is None and self.cv is None:
            raise ValueError(f"nothing drifts at {self.time_s:g} s: give swap or cv")
        if self.swap is not None and not 0.0 < self.swap <= 1.0:
            raise ValueError(f"swap {self.swap:g} is not a share above 0, up to 1")
        if self.cv is not None and not 0.0 <= self.cv <= MOST_CV:
            raise ValueError(f"cv {self.cv:g} is not a coefficient of variation of 0 to {MOST_CV:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingChange:
    """A part of an event, at once."""

    time_s: float
    swap: tuple[float, float] | None = None  # where in the more popular half it begins and ends, as shares
    cv: float | None = None

    def of(self, routing: Routing) -> Routing:
        """The routing afterwards."""
        if self.swap is not None:
            routing = routing.swapped(*self.swap)
        return routing if self.cv is None else routing.with_cv(self.cv)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSchedule:
    """Events in order of time, none begun before the last has ended."""

    events: tuple[RoutingEvent, ...] = ()
    seed: int = 0  # of who is popular at the start

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} must be 0 or more")
        object.__setattr__(self, "events", tuple(sorted(self.events, key=lambda e: e.time_s)))
        for a, b in pairwise(self.events):
            if b.time_s < a.time_s + a.span_s:
                raise ValueError(f"the event at {b.time_s:g} s begins before that of {a.time_s:g} s has ended")

    def changes(self, cv: float) -> tuple[RoutingChange, ...]:
        """All changes in order of time, from a routing of this coefficient of variation on."""
        made: list[RoutingChange] = []
        for e in self.events:
            parts = PARTS if e.span_s > 0.0 else 1
            for i in range(1, parts + 1):
                made.append(
                    RoutingChange(
                        time_s=e.time_s + e.span_s * i / parts,
                        swap=None if e.swap is None else (e.swap * (i - 1) / parts, e.swap * i / parts),
                        cv=None if e.cv is None else cv + (e.cv - cv) * i / parts,
                    )
                )
            cv = cv if e.cv is None else e.cv
        return tuple(made)

    def text(self) -> str:
        """What `parse_routing` reads as this schedule."""
        return ";".join([*([f"seed={self.seed}"] if self.seed else []), *map(_event_text, self.events)])


def parse_routing(text: str) -> RoutingSchedule:
    """A schedule from its short text, `[seed=N;]TIME[+SPAN]:swap[=SHARE][,cv=CV];…`, seconds.

    Raises:
        ConfigError: it says none; the part is named.
    """
    events, seed = [], 0
    for part in filter(None, (p.strip() for p in text.split(";"))):
        try:
            if part.startswith("seed="):
                seed = int(part[5:])
            else:
                events.append(_event_of(part))
        except ValueError as e:
            raise ConfigError(f"routing drift {part!r}: {e}; {_EXAMPLE}. Nothing was started") from e
    return _schedule(tuple(events), seed, "routing drift")


def load_routing(given: str) -> RoutingSchedule:
    """A schedule from its short text, or from the .json or .toml file that `given` names.

    A file holds `events`, a list of objects with time_s and span_s, swap or cv, and perhaps a `seed`; JSON may be the list alone.

    Raises:
        ConfigError: the file cannot be read, or says no schedule; the event is named.
    """
    path = Path(given)
    if path.suffix not in (".json", ".toml"):
        return parse_routing(given)
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"cannot read the routing drift {path}: {e}. Nothing was started") from e
    table = {"events": data} if isinstance(data, list) else data
    if not isinstance(table, dict) or not set(table) <= {"events", "seed"} or not isinstance(table.get("events"), list):
        raise ConfigError(f"{path} does not hold events (a list), and perhaps a seed, alone. Nothing was started")
    seed, events = table.get("seed", 0), []
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"{path}: seed {seed!r} is not a whole number. Nothing was started")
    for number, row in enumerate(table["events"], start=1):
        try:
            events.append(_event_from(row))
        except (TypeError, ValueError) as e:
            raise ConfigError(f"{path}, event {number}: {e}. Nothing was started") from e
    return _schedule(tuple(events), seed, str(path))


def _schedule(events: tuple[RoutingEvent, ...], seed: int, source: str) -> RoutingSchedule:
    try:
        return RoutingSchedule(events=events, seed=seed)
    except ValueError as e:
        raise ConfigError(f"{source}: {e}. Nothing was started") from e


def _event_of(part: str) -> RoutingEvent:
    when, colon, what = part.partition(":")
    if not colon:
        raise ValueError("it lacks a time and a colon")
    time_s, _, span_s = when.partition("+")
    values: dict[str, float] = {}
    for item in what.split(","):
        name, equals, value = (x.strip() for x in item.partition("="))
        if name not in ("swap", "cv") or name in values:
            raise ValueError(f"{name!r} is neither swap nor cv, or is given twice")
        values[name] = SWAP if name == "swap" and not equals else _number(value, name)
    event = RoutingEvent(time_s=_number(time_s, "time"), swap=values.get("swap"), cv=values.get("cv"))
    return replace(event, span_s=_number(span_s, "span")) if span_s else event


def _event_from(row: Any) -> RoutingEvent:
    if not isinstance(row, Mapping):
        raise TypeError("it is not an object")
    if unknown := [str(k) for k in row if k not in _FIELDS]:
        raise ValueError(f"unknown field {', '.join(unknown)}; known: {', '.join(_FIELDS)}")
    if "time_s" not in row:
        raise ValueError("time_s must be given")
    return RoutingEvent(**{k: _number(v, k) for k, v in row.items() if v is not None})


def _number(value: Any, name: str) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} {value!r} is not a number") from None


def _event_text(e: RoutingEvent) -> str:
    values = {k: v for k, v in asdict(e).items() if k in ("swap", "cv") and v is not None}
    span = f"+{e.span_s!r}" if e.span_s else ""
    return f"{e.time_s!r}{span}:" + ",".join(f"{k}={v!r}" for k, v in values.items())
