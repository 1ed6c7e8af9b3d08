"""What each lever does to an engine at work, as arrays by number of running sequences: made once a mix of lengths, then looked up.

A lever is one way to hold the SM clock: a power limit, a clock lock, or neither. Where a limit and a lock hold together, the one
that draws less is in effect. Figures are a profile's, so a mix it may not speak of has no table.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import log
from typing import NamedTuple

import numpy as np

from pals.control.guard import Guard
from pals.control.routing import Routing
from pals.core.errors import OutsideProfileError
from pals.core.load import Load, Mix
from pals.core.quantities import OperatingPoint
from pals.models.fitted import Fitted
from pals.models.forecast import FloatArray
from pals.models.observed import OBSERVED, UNSEEN

LIMIT_LEVELS, CLOCK_LEVELS, RUNNING_LEVELS = 10, 22, 11
MIX_GRID = 0.125  # of log2 of each length: half a step is 4 %
WIDTH_GRID = 1.0  # intervals follow the mix slowly, and cost most
LEAST_HALF = 0.05  # of an interval: a load is known by its means only, whatever the profile is sure of
MOST_HALF = 0.5  # beyond it an interval says that nothing is known, and experience must
LONGEST = (
    24.0  # log2 of a length, 16 million tokens: no request is so long, and a profile without rows has no hull to say so
)
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
PROFILED = Routing()  # as the profile has it


#: Further columns of a table: half 90 % intervals of logarithms, and how TPOT follows the running sequences, d ln / d ln.
TPOT_HALF, TTFT_HALF, ELASTIC = len(QUANTITIES), len(QUANTITIES) + 1, len(QUANTITIES) + 2
_WIDE = (TPOT95, TTFT95)  # whose they are


class Rows(NamedTuple):
    """Levers that may be chosen under one ceiling, and what they do."""

    levers: tuple[Lever, ...]
    table: FloatArray  # a line for each lever and level, in that order; a column for each quantity and half interval
    levels: FloatArray  # running sequences, shape (levels,)
    ceiling_w: float
    limits_w: FloatArray  # of each lever, 0: none of its own, shape (levers,)
    rates: FloatArray  # tokens per second, shape (levers, levels)
    full: FloatArray  # every column where every place of a batch is taken, shape (levers, batches, columns)

    def most_per_s(self, running: float) -> float:
        """Tokens per second with no lever, so many running."""
        return float(np.interp(running, self.levels, self.rates[0]))

    def position(self, lever: Lever) -> int | None:
        """Where a lever stands; None: it is not among them."""
        return self.levers.index(lever) if lever in self.levers else None

    def at(self, running: FloatArray) -> FloatArray:
        """Every column of every lever at so many running sequences, shape (levers, batches); columns are the last axis."""
        return self._read(np.arange(len(self.levers))[:, None], running)

    def of(self, lever: int, running: float) -> list[float]:
        """Every column of one lever there."""
        return list(self._read(np.array(lever), np.array(running)).tolist())

    def _read(self, lever: np.ndarray, running: FloatArray) -> FloatArray:
        """Linear between two levels."""
        count = len(self.levels)
        if count == 1:
            return self.table.take(lever + np.zeros(np.shape(running), np.intp), axis=0)
        low = np.minimum(self.levels.searchsorted(running, side="right"), count - 1)
        low = np.maximum(low, 1) - 1
        below = self.levels.take(low)
        part = (running - below) / (self.levels.take(low + 1) - below)
        part = np.minimum(1.0, np.maximum(0.0, part))[..., None]
        line = lever * count + low
        here = self.table.take(line, axis=0)
        return np.asarray(here + part * (self.table.take(line + 1, axis=0) - here))


class LeverTables:
    """Tables of one profile on one group of boards."""

    def __init__(self, fitted: Fitted, guard: Guard, batches: FloatArray) -> None:
        """Tables for the active-sequence limits `batches`. Levels of each lever are even in its logarithm, between what was measured and what may be asked.

        Raises:
            ValueError: no power limit that was measured may be asked of these boards, or the profile does not reach their levels.
        """
        self.fitted, self._guard, self._batches = fitted, guard, batches
        top_w = guard.max_limit_w
        low_w = max(guard.min_limit_w, fitted.hull.limit_w.low if fitted.hull is not None else 0.0)
        if low_w > top_w:
            raise ValueError(
                f"the profile's lowest limit, {low_w:.0f} W, lies above {top_w:.0f} W, the most that may be asked"
            )
        count = LIMIT_LEVELS if low_w < top_w else 1
        self.limits_w: tuple[float, ...] = tuple(float(round(w)) for w in np.geomspace(low_w, top_w, count))
        self.clocks_mhz = _clock_levels(fitted, guard)
        self.levels: FloatArray = _running_levels(fitted, guard.launch_sequences)
        held = [(w, None) for w in self.limits_w] + [(top_w, mhz) for mhz in self.clocks_mhz]
        self._points = [
            OperatingPoint(power_limit_w=w, sm_clock_mhz=mhz, active_sequences=int(n))
            for w, mhz in held
            for n in self.levels
        ]
        _check_reach(fitted, self._points)
        self._held = len(held)
        self._figures = lru_cache(TABLES)(self._make_figures)
        self._half = lru_cache(TABLES)(self._make_half)
        self._rows = lru_cache(ROWS)(self._make_rows)

    def _make_figures(self, key: MixKey, routing: Routing) -> FloatArray:
        told = self.fitted.told(self._points, routing.of(Load(mix=key.mix)))
        figures = np.exp(told).reshape(len(QUANTITIES), self._held, len(self.levels))
        figures[TOKENS] = np.maximum.accumulate(figures[TOKENS], axis=1)
        return figures

    def _make_half(self, prompt: int, output: int, cached: int) -> FloatArray | None:
        if max(prompt, output, cached) * WIDTH_GRID > LONGEST:
            return None
        load = Load(mix=MixKey(*(round(x * WIDTH_GRID / MIX_GRID) for x in (prompt, output, cached))).mix)
        try:
            half = self.fitted.half_widths(self._points, load)
        except OutsideProfileError:
            return None
        return np.asarray(half[:-1].reshape(len(QUANTITIES), self._held, len(self.levels)))

    def rows(self, key: MixKey, ceiling_w: float, routing: Routing = PROFILED) -> Rows | None:
        """Levers under a ceiling of the power limit, W per board; None where the profile may not speak of the mix."""
        return self._rows(key, ceiling_w, routing.bare)

    def _make_rows(self, key: MixKey, ceiling_w: float, routing: Routing) -> Rows | None:
        half = self._half(*(round(x * MIX_GRID / WIDTH_GRID) for x in key))
        if half is None:
            return None
        told = self._figures(key, routing)
        elastic = (
            np.gradient(np.log(told[TPOT]), np.log(self.levels), axis=1) if len(self.levels) > 1 else 0.0 * told[TPOT]
        )
        every = np.concatenate([told, np.clip(half[list(_WIDE)], LEAST_HALF, MOST_HALF), elastic[None]])
        n = len(self.limits_w)
        lower = [i for i, w in enumerate(self.limits_w) if w < ceiling_w - 0.5]
        at_ceiling, locked = _at_limit(every, self.limits_w, ceiling_w), every[:, n:]
        holds = locked[POWER] > at_ceiling[POWER]  # the ceiling holds the clock below the lock
        locked = np.where(holds, at_ceiling[:, None], locked)
        figures = np.concatenate([at_ceiling[:, None], every[:, lower], locked], axis=1)
        own_w = [self.limits_w[i] for i in lower]
        rows = Rows(
            levers=(FREE, *(Lever(limit_w=w) for w in own_w), *(Lever(clock_mhz=c) for c in self.clocks_mhz)),
            table=np.ascontiguousarray(np.moveaxis(figures, 0, -1).reshape(-1, len(figures))),
            levels=self.levels,
            ceiling_w=ceiling_w,
            limits_w=np.array([0.0, *own_w, *(0.0 for _ in self.clocks_mhz)]),
            rates=figures[TOKENS],
            full=figures[:0],
        )
        slots = np.broadcast_to(self._batches, (len(rows.levers), len(self._batches)))
        return rows._replace(full=rows.at(slots))


def _check_reach(fitted: Fitted, points: Sequence[OperatingPoint]) -> None:
    """Refuse a profile that can speak of no load here, since its limits or sequences end too early.

    Raises:
        ValueError: even under a mix that was measured some point lies too far outside what was measured.
    """
    if fitted.hull is None:
        return
    mixes = [fitted.mixes[i] for i in sorted({r.mix for r in fitted.rows})]
    steps = np.min([fitted.reach(points, Load(mix=m)) for m in mixes], axis=0)
    if steps.max() <= 1.0 + 1e-9:
        return
    h, worst = fitted.hull, points[int(np.argmax(steps))]
    raise ValueError(
        f"it was measured at {h.limit_w.low:.0f}..{h.limit_w.high:.0f} W per board and {2**h.sequences.low:.0f}.."
        f"{2**h.sequences.high:.0f} active sequences, and {worst.power_limit_w:.0f} W with {worst.active_sequences} lie "
        f"{steps.max():.1f} grid steps outside; profile again at the limits and the launch batch of now"
    )


def _running_levels(fitted: Fitted, launch: int) -> FloatArray:
    """Numbers of running sequences, from the fewest that the profile may speak of; fewer count as those."""
    sequences = fitted.hull.sequences if fitted.hull is not None else None
    fewest = max(1.0, np.ceil(2.0 ** (sequences.low - sequences.step))) if sequences is not None else 1.0
    return np.unique(np.round(np.geomspace(min(fewest, launch), launch, RUNNING_LEVELS)))


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
    """Figures at a limit between two levels, linear, outside those of the nearest level; shape (quantities, levels)."""
    if len(limits_w) == 1:
        return np.asarray(figures[:, 0])
    above = int(np.clip(np.searchsorted(limits_w, limit_w), 1, len(limits_w) - 1))
    low_w, high_w = limits_w[above - 1], limits_w[above]
    share = min(1.0, max(0.0, (limit_w - low_w) / (high_w - low_w)))
    return np.asarray((1.0 - share) * figures[:, above - 1] + share * figures[:, above])


def running_at(tokens_per_s: FloatArray, levels: FloatArray, asked: float) -> FloatArray:
    """Running sequences at which each lever's output keeps up with what is asked, shape (levers,); infinite: none does."""
    if len(levels) == 1:
        return np.where(tokens_per_s[:, 0] >= asked, levels[0], np.inf)
    below = (tokens_per_s < asked).sum(axis=1)
    lever = np.arange(len(tokens_per_s))
    high = np.minimum(np.maximum(below, 1), len(levels) - 1)
    r0, r1 = tokens_per_s[lever, high - 1], tokens_per_s[lever, high]
    n = levels[high - 1] + (asked - r0) / np.maximum(r1 - r0, 1e-9) * (levels[high] - levels[high - 1])
    n = np.where(
        below == 0, levels[0] * asked / np.maximum(tokens_per_s[:, 0], 1e-9), n
    )  # less than one, part of the time
    return np.where(below == len(levels), np.inf, n)
