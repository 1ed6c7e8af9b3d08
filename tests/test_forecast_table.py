"""The table of forecasts: exact at its nodes, close between them, the same whatever was asked before, and sparing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from pals.control.forecast_table import ForecastTable
from pals.core.errors import OutsideProfileError
from pals.core.load import Load, Mix
from pals.core.quantities import OperatingPoint
from pals.models.forecast import Estimates, Forecast

POINT = OperatingPoint(power_limit_w=600.0, active_sequences=64)
MIX = Mix(name="m", prompt_tokens=900.0, output_tokens=250.0)


def step_s(n: float, ratio: float, context: float) -> float:
    return 0.008 + 1e-4 * n * (1.0 + 2.0 * ratio) + 2e-8 * n * context


class Linear:
    """Step times as they nearly are; refuses limits below 300 W."""

    def __init__(self) -> None:
        self.calls = 0

    def forecast(self, points: Sequence[OperatingPoint], load: Load) -> Forecast:
        self.calls += 1
        if points[0].power_limit_w < 300.0:
            raise OutsideProfileError("below what was measured")
        context = load.context_tokens or 0.0
        value = np.array([step_s(p.active_sequences or 1, load.mix.prefill_per_output, context) for p in points])
        return Forecast(*([Estimates(value, 0.9 * value, 1.1 * value)] * len(Forecast._fields)))


@pytest.mark.parametrize("running", [1.0, 7.3, 40.0, 64.0])
@pytest.mark.parametrize("ratio", [0.3, 3.6])
def test_between_nodes_it_is_close_and_the_interval_too(running: float, ratio: float) -> None:
    told = ForecastTable(Linear(), top_w=700.0).look(POINT, MIX, ratio=ratio, running=running)

    assert told is not None
    value, low, high = told["step"]
    assert value == pytest.approx(step_s(running, ratio, MIX.context_tokens), rel=0.002)
    assert (low, high) == pytest.approx((0.9 * value, 1.1 * value))


def test_nodes_are_forecast_once_and_earlier_questions_change_no_answer() -> None:
    forecaster = Linear()
    table = ForecastTable(forecaster, top_w=700.0)

    first = table.look(POINT, MIX, ratio=3.6, running=20.0)
    made = forecaster.calls
    for running in range(1, 64):
        table.look(POINT, MIX, ratio=2.1 + running / 40, running=float(running))
    assert forecaster.calls == made == 8
    table.look(POINT, MIX, ratio=9.0, running=3.0)
    assert table.look(POINT, MIX, ratio=3.6, running=20.0) == first
    assert ForecastTable(Linear(), top_w=700.0).look(POINT, MIX, ratio=3.6, running=20.0) == first


def test_where_the_profile_does_not_reach_there_is_no_answer_and_it_is_not_asked_again() -> None:
    forecaster = Linear()
    table = ForecastTable(forecaster, top_w=700.0)
    low = OperatingPoint(power_limit_w=200.0, active_sequences=8)

    assert [table.look(low, MIX, ratio=1.0, running=4.0) for _ in range(3)] == [None] * 3
    assert forecaster.calls == 1
