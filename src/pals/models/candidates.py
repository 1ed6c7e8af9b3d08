"""Forecasts of one fixed set of points, fast enough for every tick: linear in the logarithms of the load about anchors on a grid.

An anchor belongs to a load, not to what was asked before, so the same load gives the same forecast, and a journal replays.
A new anchor costs milliseconds, any load near a known one less than 0.1 ms. A load given by what arrives, not by what runs, is told
exactly, in a millisecond or two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pals.core.load import Load, Mix
from pals.core.quantities import OperatingPoint
from pals.models.fitted import Fitted
from pals.models.forecast import FloatArray, Forecast

VALUE_GRID = 0.25  # of log2 of each figure of the load: half a step is 9 %
WIDTH_GRID = 1.0  # intervals follow the load slowly
DIFFERENCE = 0.02  # of log2, for slopes
ANCHORS = 256  # kept
UNKNOWN = -1e9  # equal to itself, as a key must be


class _Features(NamedTuple):
    """A load as log2 of its figures; `UNKNOWN` stands for unknown."""

    prompt: float
    output: float
    context: float
    running: float
    arriving: float
    distinct: float


class _Kept(NamedTuple):
    """What of a load is taken as it is."""

    spread: float
    cached_tokens: float
    popularity: tuple[float, ...] | None
    popularity_then: tuple[float, ...] | None


class _Anchor(NamedTuple):
    """Logarithms of the predicted quantities there, shape (quantities, points), and their slopes by feature."""

    here: FloatArray
    slopes: FloatArray  # (features, quantities, points)


@dataclass(frozen=True)
class Candidates:
    """The points that a decision chooses among."""

    fitted: Fitted
    points: tuple[OperatingPoint, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_anchor", lru_cache(ANCHORS)(self._make_anchor))
        object.__setattr__(self, "_half", lru_cache(ANCHORS)(self._make_half))

    def forecast(self, load: Load) -> Forecast:
        """Every quantity of every point with its 90 % interval, as `Fitted.forecast` to first order.

        Raises:
            OutsideProfileError: the load, rounded as intervals take it (half a power of two), lies more than a grid step outside.
        """
        f = _features(load)
        anchor = _rounded(f, VALUE_GRID)
        kept = _Kept(load.mix.spread, load.mix.cached_tokens, load.popularity, load.popularity_then)
        half: FloatArray = self._half(_rounded(f, WIDTH_GRID), kept)  # type: ignore[attr-defined]
        if load.prefill_tokens_per_s is not None:  # how many run bends too much with what arrives
            return self.fitted.assembled(self.fitted.told(self.points, load), half, load)
        near: _Anchor = self._anchor(anchor, kept)  # type: ignore[attr-defined]
        here = near.here
        for distance, slope in zip(
            (a - b for a, b in zip(f, anchor, strict=True) if a != UNKNOWN), near.slopes, strict=True
        ):
            if distance:
                here = here + distance * slope
        return self.fitted.assembled(here, half, load)

    def _make_anchor(self, at: _Features, kept: _Kept) -> _Anchor:
        here = self.fitted.told(self.points, _load(at, kept))
        slopes = []
        for name, value in zip(_Features._fields, at, strict=True):
            if value != UNKNOWN:
                moved = at._replace(**{name: value - DIFFERENCE})  # downwards: `running` is rounded up, and bends there
                slopes.append((here - self.fitted.told(self.points, _load(moved, kept))) / DIFFERENCE)
        return _Anchor(here, np.array(slopes))

    def _make_half(self, at: _Features, kept: _Kept) -> FloatArray:
        return self.fitted.half_widths(self.points, _load(at, kept))


def _features(load: Load) -> _Features:
    mix = load.mix
    return _Features(
        math.log2(mix.prompt_tokens),
        math.log2(mix.output_tokens),
        math.log2(load.context_tokens or mix.context_tokens),
        *(UNKNOWN if v is None else math.log2(max(v, 1e-6)) for v in (
            load.running, load.prefill_tokens_per_s, load.distinct_experts)),
    )  # fmt: skip


def _rounded(f: _Features, grid: float) -> _Features:
    near = _Features._make(UNKNOWN if v == UNKNOWN else grid * round(v / grid) for v in f)
    return near if f.running == UNKNOWN else near._replace(running=grid * math.ceil(f.running / grid))


def _load(f: _Features, kept: _Kept) -> Load:
    mix = Mix(
        name="asked",
        prompt_tokens=max(1.0, 2.0**f.prompt),
        output_tokens=max(1.0, 2.0**f.output),
        spread=kept.spread,
        cached_tokens=kept.cached_tokens,
    )
    running, arriving, distinct = (None if v == UNKNOWN else 2.0**v for v in (f.running, f.arriving, f.distinct))
    return Load(
        mix=mix,
        context_tokens=2.0**f.context,
        running=running,
        prefill_tokens_per_s=arriving,
        distinct_experts=distinct,
        popularity=kept.popularity,
        popularity_then=kept.popularity_then,
    )


def candidates_of(fitted: Fitted, points: Sequence[OperatingPoint], load: Load) -> Candidates:
    """Those of `points` of which the profile may speak under this load."""
    reach = fitted.reach(points, load)
    return Candidates(fitted, tuple(p for p, steps in zip(points, reach, strict=True) if steps <= 1.0))
