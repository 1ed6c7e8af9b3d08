"""Budgets that move: steps, a shed, a regulation signal, or a file; shares of a natural draw, or watts.

The regulation signal is synthetic. PJM publishes its fast signal, RegD, as numbers from -1 to 1, sent every 2 s, made to
integrate to zero for resources with little energy of their own (pjm.com, issue "Regulation Performance Impacts"; University of
Delaware, "Fast Regulation Data Explanation"); a consumer follows P = mean + z(t)·R (Chen, Hankendi, Caramanis, Coskun, 2013).
Here z is a sum of whole periods between `SLOWEST_S` and `FASTEST_S` with random phases, amplitudes falling with frequency
as those of a wandering quantity that is pulled back: zero mean and no net energy over its length by construction. The choice
of band and slope is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pals.core.errors import ConfigError
from pals.runtime.budgets import BudgetSchedule, parse_budget

FloatArray = NDArray[np.float64]
SHARE_HEADER = "time_s,share"
EVERY_S = 2.0  # of the regulation signal
SLOWEST_S, FASTEST_S = 600.0, 20.0  # its periods
MEAN, RESERVE = 0.80, 0.15  # shares of the natural draw
STEP_S = 120.0
LEVELS = (1.0, 0.7, 0.85, 0.6, 1.0)
LOW_LEVELS = (0.6, 0.5, 0.45)
SHED_LEVELS, SHED_STEPS_S = (1.0, 0.7), (120.0, 180.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerSignal:
    """A step function of time from its own start: shares of the natural draw, or watts of all boards."""

    name: str
    times_s: tuple[float, ...]
    values: tuple[float, ...]
    span_s: float  # it lasts
    watts: bool = False  # False: shares
    reserve: float | None = None  # R of mean + z(t)·R, in the unit of `values`; None: no such signal

    def schedule(self, natural_w: float, later_s: float) -> BudgetSchedule:
        """As a budget that begins `later_s` later; before, its first value holds."""
        scale = 1.0 if self.watts else natural_w
        times = (0.0, *(t + later_s for t in self.times_s[1:]))
        return BudgetSchedule(times, tuple(v * scale for v in self.values))

    def reserve_w(self, natural_w: float) -> float | None:
        """R in watts."""
        return None if self.reserve is None else self.reserve * (1.0 if self.watts else natural_w)


def levels(name: str, values: Sequence[float], lasting_s: Sequence[float]) -> PowerSignal:
    """One level after the other."""
    ends_s = np.cumsum(lasting_s)
    times = (0.0, *(float(t) for t in ends_s[:-1]))
    return PowerSignal(name=name, times_s=times, values=tuple(values), span_s=float(ends_s[-1]))


def steps() -> PowerSignal:
    """Steps down and up, two minutes each."""
    return levels("steps", LEVELS, [STEP_S] * len(LEVELS))


def low() -> PowerSignal:
    """Little power, in three steps: where the paper has most to gain over a cap alone."""
    return levels("low", LOW_LEVELS, [STEP_S] * len(LOW_LEVELS))


def shed() -> PowerSignal:
    """Thirty percent less at once, as a call for demand response."""
    return levels("shed", SHED_LEVELS, SHED_STEPS_S)


def regulation(span_s: float, seed: int) -> PowerSignal:
    """See the module; about `MEAN`, by at most `RESERVE`."""
    z = regulation_z(round(span_s / EVERY_S), np.random.default_rng([seed, 21]))
    times = tuple(EVERY_S * i for i in range(len(z)))
    values = tuple(float(v) for v in MEAN + RESERVE * z)
    return PowerSignal(name="regulation", times_s=times, values=values, span_s=span_s, reserve=RESERVE)


def regulation_z(count: int, rng: np.random.Generator) -> FloatArray:
    """`count` values every `EVERY_S`, from -1 to 1, their largest size 1, their mean 0.

    Raises:
        ConfigError: no whole period of the band fits.
    """
    frequency_hz = np.fft.rfftfreq(count, EVERY_S)
    inside = (frequency_hz >= 1.0 / SLOWEST_S - 1e-12) & (frequency_hz <= 1.0 / FASTEST_S) & (frequency_hz > 0)
    if not inside.any():
        raise ConfigError(
            f"a regulation signal of {count * EVERY_S:g} s holds no period up to {SLOWEST_S:g} s. Nothing was run"
        )
    size = np.where(inside, 1.0 / np.maximum(frequency_hz, 1e-12), 0.0)
    phases = rng.uniform(0.0, 2.0 * np.pi, len(size))
    z = np.fft.irfft(size * np.exp(1j * phases), count)
    return np.asarray(z / np.abs(z).max())


def read_signal(path: Path) -> PowerSignal:
    """A CSV file with the columns `time_s,share` (of the natural draw of all boards) or `time_s,power_w` (W of all boards).

    Seconds rise from 0; each value holds until the next, the last one as long as the one before it.

    Raises:
        ConfigError: unreadable, of another form, without a second line, or a value that makes no sense.
    """
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read the power signal {path}: {e}. Nothing was run") from e
    shares = lines[:1] == [SHARE_HEADER]
    if not shares and path.suffix != ".csv":
        raise ConfigError(
            f"the power signal {path}: a file of watts is named *.csv, and one of shares begins with {SHARE_HEADER}. Nothing was run"
        )
    given = _shares_of(path, lines[1:]) if shares else parse_budget(str(path))
    times, values = given.times_s, [w for w in given.watts if w is not None]
    if len(times) < 2 or times[0] != 0.0 or len(values) != len(times):
        raise ConfigError(
            f"the power signal {path} needs at least two lines, the first at 0 s, and a value in each. Nothing was run"
        )
    return PowerSignal(
        name=path.stem, times_s=times, values=tuple(values), span_s=2.0 * times[-1] - times[-2], watts=not shares
    )


def _shares_of(path: Path, lines: Sequence[str]) -> BudgetSchedule:
    """Lines of time and share.

    Raises:
        ConfigError: of another form, times that do not rise, or shares outside 0 to 2.
    """
    try:
        rows = [(float(t), float(v)) for t, v in (line.split(",") for line in lines)]
    except ValueError as e:
        raise ConfigError(f"the power signal {path} has a line that is not time_s,share: {e}. Nothing was run") from e
    times = [t for t, _ in rows]
    if times != sorted(set(times)) or not all(0.0 < v <= 2.0 for _, v in rows):
        raise ConfigError(
            f"the power signal {path}: times must rise, and shares lie above 0 and at most at 2. Nothing was run"
        )
    return BudgetSchedule(tuple(times), tuple(v for _, v in rows))
