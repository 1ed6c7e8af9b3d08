"""Budget sources: where the watts that an engine may draw come from, as a function of the time since start."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from pals.core.errors import ConfigError
from pals.core.quantities import Budget


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
    """Parse "1200" (constant watts) or "0:none,30:1000,60:1600" (seconds since start : watts).

    Raises:
        ConfigError: not of that form, times not rising, or watts not positive.
    """
    try:
        if ":" not in text:
            steps: list[tuple[float, float | None]] = [(0.0, float(text))]
        else:
            pairs = [part.split(":") for part in text.split(",")]
            steps = [(float(t), None if w.strip() == "none" else float(w)) for t, w in pairs]
    except ValueError as e:
        raise ConfigError(
            f"budget {text!r}: expected watts, or steps like '0:none,30:1000,60:1600' (seconds:watts); nothing was changed"
        ) from e
    times = [t for t, _ in steps]
    bad_watts = [w for _, w in steps if w is not None and not 0 < w < 1e7]
    if not all(map(math.isfinite, times)) or times != sorted(set(times)) or times[0] < 0 or bad_watts:
        raise ConfigError(
            f"budget {text!r}: times must be numbers that rise from 0 or later and watts be positive; nothing was changed"
        )
    return BudgetSchedule(tuple(times), tuple(w for _, w in steps))
