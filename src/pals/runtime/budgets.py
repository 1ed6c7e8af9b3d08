"""Budget sources: where the watts that an engine may draw come from, as a function of the time since start."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from pals.core.errors import ConfigError
from pals.core.quantities import Budget

Step = tuple[float, float | None]  # from so many seconds on, so many watts (None: no budget)


@dataclass(frozen=True, slots=True)
class BudgetSchedule:
    """A step function: from `times_s[i]` on, `watts[i]` (None: no budget)."""

    times_s: tuple[float, ...] = ()
    watts: tuple[float | None, ...] = ()

    def at(self, elapsed_s: float) -> Budget:
        """The budget `elapsed_s` seconds after the agent's start."""
        i = bisect_right(self.times_s, elapsed_s) - 1
        return Budget(power_w=self.watts[i] if i >= 0 else None)


def parse_budget(text: str) -> BudgetSchedule:
    """Parse "1200" (constant watts), "0:none,30:1000,60:1600" (seconds since start : watts), or the name of a CSV file.

    The file, named *.csv, has the columns `time_s` and `power_w`, which may be `none`.

    Raises:
        ConfigError: not of that form, times not rising, or watts not positive.
    """
    try:
        if text.endswith(".csv"):
            steps = _steps_of(Path(text))
        elif ":" not in text:
            steps = [(0.0, float(text))]
        else:
            steps = [_step(*part.split(":")) for part in text.split(",")]
    except (ValueError, TypeError) as e:
        raise ConfigError(
            f"budget {text!r}: expected watts, steps like '0:none,30:1000,60:1600' (seconds:watts), or a file named *.csv with "
            "the columns time_s,power_w; nothing was changed"
        ) from e
    times = [t for t, _ in steps]
    bad_watts = [w for _, w in steps if w is not None and not 0 < w < 1e7]
    if not times or not all(map(math.isfinite, times)) or times != sorted(set(times)) or times[0] < 0 or bad_watts:
        raise ConfigError(
            f"budget {text!r}: times must be numbers that rise from 0 or later and watts be positive; nothing was changed"
        )
    return BudgetSchedule(tuple(times), tuple(w for _, w in steps))


def _step(time_s: str, power_w: str) -> Step:
    return float(time_s), None if power_w.strip() == "none" else float(power_w)


def _steps_of(path: Path) -> list[Step]:
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read the budget {path}: {e}; nothing was changed") from e
    if lines[:1] != ["time_s,power_w"]:
        raise ValueError("no header time_s,power_w")
    return [_step(*line.split(",")) for line in lines[1:]]
