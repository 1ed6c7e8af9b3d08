"""What a profile forecasts for an engine at work, looked up: nodes are forecast when they are first needed, and kept.

A forecast costs milliseconds and a window needs one. Nodes stand at powers of each lever; between them all is taken as linear, as
step times nearly are in what a step computes. The same question has the same answer whatever was asked before: a replay is exact.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import exp, floor, log
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from pals.core.errors import PalsError
from pals.core.load import Load, Mix
from pals.core.quantities import OperatingPoint
from pals.models.forecast import Estimates, FloatArray, Forecast

LIMIT_STEP, RATIO_STEP, CONTEXT_STEP, OUTPUT_STEP, RUNNING_STEP = log(1.15), log(2.0), log(1.5), log(2.0), log(1.25)
_FIELDS = {"power": "power_w", "step": "step_s", "clock": "sm_clock_mhz"}


@runtime_checkable
class PointForecaster(Protocol):
    """Forecasts operating points under a load; a fitted profile."""

    def forecast(self, points: Sequence[OperatingPoint], load: Load) -> Forecast:
        """Every quantity for each point; raises `PalsError` or `ValueError` where it cannot know."""
        ...


#: Running sequences, rising, and the estimates at each, shape (quantities, 3).
Table = tuple[list[float], list[FloatArray]]


class Figures(NamedTuple):
    """A forecast and its 90 % interval."""

    value: float
    low: float
    high: float


class Node(NamedTuple):
    """Where a table stands; steps of the grid."""

    limit: int  # below the top limit
    clock_mhz: int | None
    ratio: int  # prompt tokens computed for each output token
    context: int  # KV tokens of a sequence
    output: int  # the nearest: at one ratio and context it hardly matters
    sequences: int  # most


class ForecastTable:
    """Power, step time and SM clock of a working engine."""

    def __init__(self, forecaster: PointForecaster, *, top_w: float) -> None:
        """`top_w`: the limit that the grid of limits hangs from, W per board."""
        self._forecaster, self._top_w = forecaster, top_w
        self._tables: dict[Node, Table | None] = {}

    def look(self, point: OperatingPoint, mix: Mix, *, ratio: float, running: float) -> dict[str, Figures] | None:
        """The forecast for so many running sequences; None where the profile does not reach.

        Args:
            point: in force, with its active sequences.
            mix: lengths seen over minutes.
            ratio: prompt tokens computed for each output token in this window.
            running: sequences, mean.
        """
        output, total = round(log(mix.output_tokens) / OUTPUT_STEP), 0.0
        sums = np.zeros((len(_FIELDS), 3))
        for limit, by_limit in _corners(point.power_limit_w / self._top_w, LIMIT_STEP):
            for step, by_ratio in _corners(max(ratio, 1e-3), RATIO_STEP):
                for context, by_context in _corners(mix.context_tokens, CONTEXT_STEP):
                    weight = by_limit * by_ratio * by_context
                    sequences = point.active_sequences or 1
                    table = self._table(Node(limit, point.sm_clock_mhz, step, context, output, sequences))
                    if table is None:
                        return None
                    total += weight
                    sums += weight * _at(table, max(1.0, running))
        return {name: Figures(*row) for name, row in zip(_FIELDS, (sums / total).tolist(), strict=True)}

    def _table(self, node: Node) -> Table | None:
        if node not in self._tables:
            self._tables[node] = self._made(node)
        return self._tables[node]

    def _made(self, node: Node) -> Table | None:
        """The table of a node; None where the profile does not reach."""
        output, context = exp(node.output * OUTPUT_STEP), exp(node.context * CONTEXT_STEP)
        prompt = max(1.0, output * exp(node.ratio * RATIO_STEP))
        mix = Mix(name="seen", prompt_tokens=prompt, output_tokens=max(1.0, output))
        levels = _levels(node.sequences)
        limit_w = self._top_w * exp(node.limit * LIMIT_STEP)
        points = [
            OperatingPoint(power_limit_w=limit_w, sm_clock_mhz=node.clock_mhz, active_sequences=n) for n in levels
        ]
        try:
            told = self._forecaster.forecast(points, Load(mix=mix, context_tokens=context))
        except (PalsError, ValueError, ArithmeticError):
            return None
        estimates: list[Estimates] = [getattr(told, name) for name in _FIELDS.values()]
        return [float(n) for n in levels], list(np.array(estimates).transpose(2, 0, 1))


def _levels(most: int) -> list[int]:
    """1 to `most`, in steps of a quarter."""
    count = max(1, round(log(most) / RUNNING_STEP)) if most > 1 else 0
    return sorted({round(exp(i * log(most) / count)) for i in range(count + 1)} if count else {1})


def _corners(x: float, step: float) -> list[tuple[int, float]]:
    """The powers of exp(`step`) beside `x`, each with its weight; one where `x` is a power."""
    below = floor(log(x) / step + 1e-6)
    low = exp(below * step)
    share = (x - low) / (low * (exp(step) - 1.0))
    return [(below, 1.0)] if share < 1e-5 else [(below, 1.0 - share), (below + 1, share)]


def _at(table: Table, x: float) -> FloatArray:
    """The table at `x` running sequences, shape (quantities, 3)."""
    levels, known = table
    i = bisect_left(levels, x)
    if i == 0 or i == len(levels):
        return known[min(i, len(levels) - 1)]
    share = (x - levels[i - 1]) / (levels[i] - levels[i - 1])
    return (1.0 - share) * known[i - 1] + share * known[i]
