"""What each lever does to an engine at work, as arrays by number of running sequences: made once a mix of lengths, then looked up.

A lever is one way to hold the SM clock: a power limit, a clock lock, or neither. Where a limit and a lock hold together, the one
that draws less is in effect. Figures are a profile's, so a mix it may not speak of has no table.
"""

from __future__ import annotations

from functools import lru_cache
from math import log
from typing import NamedTuple

import numpy as np

from pals.control.guard import Guard
from pals.core.errors import OutsideProfileError
from pals.core.load import Load, Mix
from pals.core.quantities import OperatingPoint
from pals.models.fitted import Fitted
from pals.models.forecast import FloatArray
from pals.models.observed import OBSERVED, UNSEEN

LIMIT_LEVELS, CLOCK_LEVELS, RUNNING_LEVELS = 10, 14, 11
MIX_GRID = 0.125  # of log2 of each length: half a step is 4 %
WIDTH_GRID = 1.0  # intervals follow the mix slowly, and cost most
TABLES, ROWS = 64, 64  # kept
QUANTITIES = (*OBSERVED, *UNSEEN)  # in the order in which a profile tells them
POWER, STEP, TOKENS, TPOT, TPOT95, TTFT, TTFT95, CLOCK, NATURAL, PREFILL = range(len(QUANTITIES))


class MixKey(NamedTuple):
    """Lengths on the grid; steps of `MIX_GRID`."""

    prompt: int
    output: int
    cached: int  # of one more than the tokens

    @property
    def mix(self) -> Mix:
        """Lengths there."""
        return Mix(
            name="seen",
            prompt_tokens=max(1.0, 2.0 ** (self.prompt * MIX_GRID)),
            output_tokens=max(1.0, 2.0 ** (self.output * MIX_GRID)),
            cached_tokens=2.0 ** (self.cached * MIX_GRID) - 1.0,
        )


def key_of(prompt: float, output: float, cached: float, before: MixKey | None) -> MixKey:
    """The grid point of these lengths; `before` is kept as long as none has left it by more than eight tenths of a step."""
    exact = tuple(log(max(1.0, x), 2.0) / MIX_GRID for x in (prompt, output, 1.0 + cached))
    if before is not None and all(abs(x - b) <= 0.8 for x, b in zip(exact, before, strict=True)):
        return before
    return MixKey(*(round(x) for x in exact))


class Lever(NamedTuple):
    """A way to hold the clock."""

    limit_w: float | None = None  # per board; None: as high as the budget and the limit found allow
    clock_mhz: int | None = None  # None: no lock


FREE = Lever()


class Rows(NamedTuple):
    """Levers that may be chosen under one ceiling, and what they do; figures of shape (quantities, levers, levels)."""

    levers: tuple[Lever, ...]
    figures: FloatArray
    half: FloatArray  # half a 90 % interval of the logarithm
    levels: FloatArray  # running sequences, shape (levels,)
    ceiling_w: float

    def position(self, lever: Lever) -> int | None:
        """Where a lever stands; None: it is not among them."""
        return self.levers.index(lever) if lever in self.levers else None


class LeverTables:
    """Tables of one profile on one group of boards."""

    def __init__(self, fitted: Fitted, guard: Guard) -> None:
        """Levels of each lever are even in its logarithm, between what was measured and what may be asked.

        Raises:
            ValueError: no power limit that was measured may be asked of these boards.
        """
        self.fitted, self._guard = fitted, guard
        top_w = guard.max_limit_w
        low_w = max(guard.min_limit_w, fitted.hull.limit_w.low if fitted.hull is not None else 0.0)
        if low_w > top_w:
            raise ValueError(f"the profile's lowest limit, {low_w:.0f} W, lies above {top_w:.0f} W, the most that may be asked")
        count = LIMIT_LEVELS if low_w < top_w else 1
        self.limits_w: tuple[float, ...] = tuple(float(round(w)) for w in np.geomspace(low_w, top_w, count))
        self.clocks_mhz = _clock_levels(fitted, guard)
        self.levels: FloatArray = np.unique(np.round(np.geomspace(1, guard.launch_sequences, RUNNING_LEVELS)))
        held = [(w, None) for w in self.limits_w] + [(top_w, mhz) for mhz in self.clocks_mhz]
        self._points = [
            OperatingPoint(power_limit_w=w, sm_clock_mhz=mhz, active_sequences=int(n)) for w, mhz in held for n in self.levels
        ]
        self._held = len(held)
        self._figures = lru_cache(TABLES)(self._make_figures)
        self._half = lru_cache(TABLES)(self._make_half)
        self.rows = lru_cache(ROWS)(self._make_rows)

    def _make_figures(self, key: MixKey) -> FloatArray:
        told = self.fitted.told(self._points, Load(mix=key.mix))
        figures = np.exp(told).reshape(len(QUANTITIES), self._held, len(self.levels))
        figures[TOKENS] = np.maximum.accumulate(figures[TOKENS], axis=1)
        return figures

    def _make_half(self, prompt: int, output: int, cached: int) -> FloatArray | None:
        load = Load(mix=MixKey(*(round(x * WIDTH_GRID / MIX_GRID) for x in (prompt, output, cached))).mix)
        try:
            half = self.fitted.half_widths(self._points, load)
        except OutsideProfileError:
            return None
        return np.asarray(half[:-1].reshape(len(QUANTITIES), self._held, len(self.levels)))

    def _make_rows(self, key: MixKey, ceiling_w: float) -> Rows | None:
        """Levers under a ceiling of the power limit, W per board; None where the profile may not speak of the mix."""
        half = self._half(*(round(x * MIX_GRID / WIDTH_GRID) for x in key))
        if half is None:
            return None
        figures, n = self._figures(key), len(self.limits_w)
        ceiling_w = max(self.limits_w[0], ceiling_w)
        lower = [i for i, w in enumerate(self.limits_w) if w < ceiling_w - 0.5]
        at_ceiling, half_there = _at_limit(figures, self.limits_w, ceiling_w), _at_limit(half, self.limits_w, ceiling_w)
        locked, locked_half = figures[:, n:], half[:, n:]
        holds = locked[POWER] > at_ceiling[POWER][None]  # the ceiling holds the clock below the lock
        locked = np.where(holds, at_ceiling[:, None], locked)
        locked_half = np.where(holds, half_there[:, None], locked_half)
        return Rows(
            levers=(FREE, *(Lever(limit_w=self.limits_w[i]) for i in lower), *(Lever(clock_mhz=c) for c in self.clocks_mhz)),
            figures=np.concatenate([at_ceiling[:, None], figures[:, lower], locked], axis=1),
            half=np.concatenate([half_there[:, None], half[:, lower], locked_half], axis=1),
            levels=self.levels,
            ceiling_w=ceiling_w,
        )


def _clock_levels(fitted: Fitted, guard: Guard) -> tuple[int, ...]:
    """Locks that may be chosen, rising: even in the logarithm, from the lowest measured to below the top clock."""
    if fitted.hull is None or fitted.hull.clock_mhz is None or not guard.sm_clocks_mhz:
        return ()
    low, top = max(fitted.hull.clock_mhz.low, guard.sm_clocks_mhz[0]), guard.sm_clocks_mhz[-1]
    if low >= top:
        return ()
    wanted = np.geomspace(low, top, CLOCK_LEVELS + 1)[:-1]
    levels = {guard.supported_clock_mhz(round(float(mhz) + 0.5)) for mhz in wanted}
    return tuple(sorted(mhz for mhz in levels if mhz is not None and low - 1 <= mhz < top))


def _at_limit(figures: FloatArray, limits_w: tuple[float, ...], limit_w: float) -> FloatArray:
    """Figures at a limit between two levels, linear; shape (quantities, levels)."""
    if len(limits_w) == 1:
        return np.asarray(figures[:, 0])
    above = int(np.clip(np.searchsorted(limits_w, limit_w), 1, len(limits_w) - 1))
    low_w, high_w = limits_w[above - 1], limits_w[above]
    share = min(1.0, max(0.0, (limit_w - low_w) / (high_w - low_w)))
    return np.asarray((1.0 - share) * figures[:, above - 1] + share * figures[:, above])


class Found(NamedTuple):
    """Places between two levels, to read many quantities at; arrays of one shape."""

    low: np.ndarray  # index of the level below
    part: FloatArray  # share of the way to the next


def places(levels: FloatArray, running: FloatArray) -> Found:
    """Where these numbers of running sequences lie."""
    if len(levels) == 1:
        return Found(np.zeros(np.shape(running), np.intp), np.zeros(np.shape(running)))
    low = np.minimum(np.maximum(np.searchsorted(levels, running, side="right") - 1, 0), len(levels) - 2)
    below = levels[low]
    part = np.minimum(1.0, np.maximum(0.0, (running - below) / (levels[low + 1] - below)))
    return Found(low, part)


def read(figure: FloatArray, at: Found, lever: np.ndarray) -> FloatArray:
    """One quantity, shape (levers, levels), at places of shape (levers, …); `lever` indexes its first axis."""
    low = figure[lever, at.low]
    return np.asarray(low + at.part * (figure[lever, np.minimum(at.low + 1, figure.shape[1] - 1)] - low))


def running_at(tokens_per_s: FloatArray, levels: FloatArray, asked: float) -> FloatArray:
    """Running sequences at which each lever's output keeps up with what is asked, shape (levers,); infinite: none does."""
    if len(levels) == 1:
        return np.where(tokens_per_s[:, 0] >= asked, levels[0], np.inf)
    below = (tokens_per_s < asked).sum(axis=1)
    lever = np.arange(len(tokens_per_s))
    high = np.minimum(np.maximum(below, 1), len(levels) - 1)
    r0, r1 = tokens_per_s[lever, high - 1], tokens_per_s[lever, high]
    n = levels[high - 1] + (asked - r0) / np.maximum(r1 - r0, 1e-9) * (levels[high] - levels[high - 1])
    n = np.where(below == 0, levels[0] * asked / np.maximum(tokens_per_s[:, 0], 1e-9), n)  # less than one, part of the time
    return np.where(below == len(levels), np.inf, n)
