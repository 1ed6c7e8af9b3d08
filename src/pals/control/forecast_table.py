"""What a profile forecasts for an engine at work, looked up: nodes are forecast when they are first needed, and kept.

A forecast costs milliseconds and a window needs one; what is between nodes is interpolated in logarithms. The same question
has the same answer whatever was asked before, so a replay is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, floor, log
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from pals.core.errors import PalsError
from pals.core.load import Load, Mix
from pals.core.quantities import OperatingPoint
from pals.models.forecast import Estimates, FloatArray, Forecast

LIMIT_STEP, RATIO_STEP, LENGTH_STEP, RUNNING_STEP = log(1.1), log(1.5), log(1.2), log(1.25)
_FIELDS = {"power": "power_w", "step": "step_s", "clock": "sm_clock_mhz"}


@runtime_checkable
class PointForecaster(Protocol):
    """Forecasts operating points under a load; a fitted profile."""

    def forecast(self, points: Sequence[OperatingPoint], load: Load) -> Forecast:
        """Every quantity for each point; raises `PalsError` or `ValueError` where it cannot know."""
        ...


class Node(NamedTuple):
    """Where a table stands; steps of the grid."""

    limit: int  # below the top limit
    clock_mhz: int | None
    ratio: int  # prompt tokens computed for each output token
    output: int
    cached: int
    context: int
    sequences: int  # most


class ForecastTable:
    """Power, step time and SM clock of a working engine, each as (value, low, high)."""

    def __init__(self, forecaster: PointForecaster, *, top_w: float) -> None:
        """`top_w`: the limit that the grid of limits hangs from, W per board."""
        self._forecaster, self._top_w = forecaster, top_w
        self._tables: dict[Node, tuple[FloatArray, FloatArray] | None] = {}

    def look(
        self, point: OperatingPoint, mix: Mix, *, ratio: float, running: float
    ) -> dict[str, tuple[float, ...]] | None:
        """The forecast for so many running sequences; None where the profile does not reach.

        Args:
            point: in force, with its active sequences.
            mix: lengths seen over minutes.
            ratio: prompt tokens computed for each output token in this window.
            running: sequences, mean.
        """
        lengths = [
            round(log(max(1.0, x)) / LENGTH_STEP) for x in (mix.output_tokens, mix.cached_tokens, mix.context_tokens)
        ]
        total = 0.0
        logs = np.zeros((len(_FIELDS), 3))
        for limit, by_limit in _corners(log(point.power_limit_w / self._top_w) / LIMIT_STEP):
            for step, by_ratio in _corners(log(max(ratio, 1e-3)) / RATIO_STEP):
                node = Node(limit, point.sm_clock_mhz, step, *lengths, point.active_sequences or 1)
                table = self._table(node)
                if table is None:
                    return None
                total += by_limit * by_ratio
                logs += by_limit * by_ratio * _at(table, log(max(1.0, running)))
        return {name: tuple(row) for name, row in zip(_FIELDS, np.exp(logs / total).tolist(), strict=True)}

    def _table(self, node: Node) -> tuple[FloatArray, FloatArray] | None:
        if node not in self._tables:
            self._tables[node] = self._made(node)
        return self._tables[node]

    def _made(self, node: Node) -> tuple[FloatArray, FloatArray] | None:
        """Logarithms of running sequences, shape (levels,), and of the estimates, shape (levels, quantities, 3)."""
        output, cached, context = (exp(step * LENGTH_STEP) for step in (node.output, node.cached, node.context))
        prompt = max(1.0, output * exp(node.ratio * RATIO_STEP))
        mix = Mix(name="seen", prompt_tokens=prompt, output_tokens=output, cached_tokens=cached if node.cached else 0.0)
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
        return np.log(np.array(levels, dtype=float)), np.log(np.array(estimates).transpose(2, 0, 1))


def _levels(most: int) -> list[int]:
    """1 to `most`, in steps of a quarter."""
    count = max(1, round(log(most) / RUNNING_STEP)) if most > 1 else 0
    return sorted({round(exp(i * log(most) / count)) for i in range(count + 1)} if count else {1})


def _corners(x: float) -> list[tuple[int, float]]:
    """The whole numbers beside `x`, each with its weight; one where `x` is whole."""
    below = floor(x + 1e-6)
    share = x - below
    return [(below, 1.0)] if share < 1e-6 else [(below, 1.0 - share), (below + 1, share)]


def _at(table: tuple[FloatArray, FloatArray], x: float) -> FloatArray:
    """The table at the logarithm `x` of running sequences, shape (quantities, 3)."""
    levels, logs = table
    i = int(np.clip(np.searchsorted(levels, x), 1, max(1, len(levels) - 1)))
    if len(levels) == 1 or x >= levels[-1]:
        return np.asarray(logs[-1])
    share = (x - levels[i - 1]) / (levels[i] - levels[i - 1])
    return np.asarray((1.0 - share) * logs[i - 1] + share * logs[i])
