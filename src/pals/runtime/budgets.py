"""Budget schedules: the watts that all engines together may draw, as a function of the time since start."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pals.core import units
from pals.core.errors import ConfigError
from pals.core.quantities import Budget

HEADERS = ("time_s,power_w", "time_s,power_w,expires_s")


class Step(NamedTuple):
    """From `time_s` on `power_w` (None: no budget), until the next step, or until it expires."""

    time_s: float
    power_w: float | None
    expires_s: float | None = None  # seconds since start; None: it does not


@dataclass(frozen=True, slots=True, kw_only=True)
class InForce:
    """A budget, where it comes from, and until when that is known to hold."""

    power_w: float | None
    source: str  # "put", "schedule", "default" or "none"
    until_s: float | None = None  # seconds since start; None: open
    by: str = ""  # who put it


@dataclass(frozen=True, slots=True)
class BudgetSchedule:
    """A step function with gaps: before the first step, and where a step has expired, the default holds."""

    times_s: tuple[float, ...] = ()
    watts: tuple[float | None, ...] = ()
    expires_s: tuple[float | None, ...] = ()  # of each step; empty: none expires
    default_w: float | None = None  # None: no budget

    def at(self, elapsed_s: float) -> Budget:
        """The budget `elapsed_s` seconds after the agent's start."""
        return Budget(power_w=self.in_force(elapsed_s).power_w)

    def in_force(self, elapsed_s: float) -> InForce:
        """The same, with its source and its end."""
        i = bisect_right(self.times_s, elapsed_s) - 1
        next_s = self.times_s[i + 1] if i + 1 < len(self.times_s) else math.inf
        expires_s = self.expires_s[i] if i >= 0 and self.expires_s else None
        if i < 0 or (expires_s is not None and expires_s <= elapsed_s):
            source = "none" if self.default_w is None else "default"
            return InForce(power_w=self.default_w, source=source, until_s=_finite(next_s))
        until_s = min(next_s, math.inf if expires_s is None else expires_s)
        return InForce(power_w=self.watts[i], source="schedule", until_s=_finite(until_s))


def parse_budget(text: str, *, default_w: float | None = None) -> BudgetSchedule:
    """Parse "2.4kW" (constant), "0:none,30:1kW,60:1600" (seconds since start : watts), or the name of a CSV file.

    The file, named *.csv, has the columns `time_s` and `power_w`, which may be `none`, and perhaps `expires_s`: the second
    since start from which that row no longer holds; empty: it holds until the next row.

    Raises:
        ConfigError: not of that form, times not rising, or watts not positive.
    """
    try:
        if text.endswith(".csv"):
            steps = _steps_of(Path(text))
        elif ":" not in text:
            steps = [Step(0.0, _watts(text))]
        else:
            steps = [_step(*part.split(":")) for part in text.split(",")]
    except (ValueError, TypeError) as e:
        raise ConfigError(
            f"budget {text!r}: expected watts, steps like '0:none,30:1000,60:1.6kW' (seconds:watts), or a file named *.csv with "
            "the columns time_s,power_w and perhaps expires_s; watts are written 1200, 1200W or 1.2kW. Nothing was changed"
        ) from e
    _check(text, steps)
    times, watts, expires = zip(*steps, strict=True)
    return BudgetSchedule(times, watts, expires if any(e is not None for e in expires) else (), default_w)


def parse_default(given: object, option: str) -> float | None:
    """ "800W" or 800: that; "none": no budget.

    Raises:
        ConfigError: neither.
    """
    return None if isinstance(given, str) and given.strip() == "none" else units.watts(given, option)


def _check(text: str, steps: list[Step]) -> None:
    times = [s.time_s for s in steps]
    if not times or not all(map(math.isfinite, times)) or times != sorted(set(times)) or times[0] < 0:
        raise ConfigError(f"budget {text!r}: times must be numbers that rise from 0 or later; nothing was changed")
    for step in steps:
        if step.expires_s is not None and not step.time_s < step.expires_s < math.inf:
            raise ConfigError(
                f"budget {text!r}: the step at {step.time_s:g} s expires at {step.expires_s:g} s, which must be a later second "
                "since start; nothing was changed"
            )


def _step(time_s: str, power_w: str, expires_s: str = "") -> Step:
    expires = expires_s.strip()
    return Step(
        float(time_s),
        None if power_w.strip() == "none" else _watts(power_w),
        None if expires in ("", "none") else float(expires),
    )


def _watts(text: str) -> float:
    try:
        return units.watts(text, "budget")
    except ConfigError as e:
        raise ValueError(str(e)) from e


def _steps_of(path: Path) -> list[Step]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read the budget {path}: {e}; nothing was changed") from e
    if lines[:1] not in ([h] for h in HEADERS):
        raise ValueError("no header")
    columns = lines[0].count(",") + 1
    rows = [line.split(",") for line in lines[1:] if line]
    if any(len(row) != columns for row in rows):
        raise ValueError("a row of another length")
    return [_step(*row) for row in rows]


def _finite(time_s: float) -> float | None:
    return time_s if time_s < math.inf else None
