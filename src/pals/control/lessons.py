"""How far the profile is off at the point in force: throughput and power, measured over predicted, remembered for a minute.

Common to all candidates. A window teaches only while the point stands, the engine works, and the profile speaks of the mix.
"""

from __future__ import annotations

from math import exp, log

from pals.control.lever_table import POWER, TOKENS, LeverTables
from pals.control.outlook import Bias
from pals.control.pals_state import PalsSettings, State, Window
from pals.core.quantities import EngineSample, TelemetrySample

BUSY = 0.8  # share of a window that the engine must spend in steps
MOST_OFF = 0.25  # of a logarithm: no lesson counts more
RANGE = (0.5, 2.0)  # beyond it the profile is useless, not biased


def learn_bias(
    state: State, sample: TelemetrySample, engine: EngineSample, tables: LeverTables, s: PalsSettings, now_s: float
) -> State:
    """Go on with the window, or begin one; at its end, learn. The point in force is the one decided."""
    w = state.window
    if now_s - state.moved_s < s.settle_s or engine.running == 0 or state.key is None:
        return state._replace(window=None)
    if w is None:
        return state._replace(window=Window(now_s, engine.output_tokens, engine.busy_s, 0.0))
    known = w.energy_j is not None and sample.power_w is not None
    energy_j = w.energy_j + sample.power_w * sample.window_s if known else None  # type: ignore[operator]
    running = min(engine.running, engine.scheduled if engine.scheduled is not None else engine.running)
    w = w._replace(energy_j=energy_j, running=w.running + running, ticks=w.ticks + 1)
    if now_s - w.since_s < s.bias_window_s - 1e-6:
        return state._replace(window=w)
    state = state._replace(window=Window(now_s, engine.output_tokens, engine.busy_s, 0.0))
    return _taught(state, w, engine, tables, s, now_s)


def _taught(state: State, w: Window, engine: EngineSample, tables: LeverTables, s: PalsSettings, now_s: float) -> State:
    """What a full window teaches; nothing where the engine lacked work."""
    rows = tables.rows(state.key, state.ceiling_w, state.routing) if state.key is not None else None
    position = rows.position(state.lever) if rows is not None else None
    busy_s, span_s, tokens = engine.busy_s - w.busy_s, now_s - w.since_s, engine.output_tokens - w.tokens
    if rows is None or position is None or busy_s < BUSY * span_s or tokens <= 0:
        return state
    expected = rows.of(position, max(1.0, w.running / w.ticks))
    gain = max(1.0 / (state.lessons + 2.0), s.bias_window_s / s.bias_memory_s)
    step, power = _moved(state.bias.step, expected[TOKENS] * busy_s / tokens, gain), state.bias.power
    if w.energy_j is not None and w.energy_j > 0:
        power = _moved(power, w.energy_j / span_s / expected[POWER], gain)
    return state._replace(bias=Bias(step, power), lessons=state.lessons + 1)


def _moved(value: float, ratio: float, gain: float) -> float:
    """A factor moved towards a measured ratio, by logarithms."""
    off = max(-MOST_OFF, min(MOST_OFF, log(max(ratio, 1e-6)) - log(value)))
    return min(RANGE[1], max(RANGE[0], exp(log(value) + gain * off)))
