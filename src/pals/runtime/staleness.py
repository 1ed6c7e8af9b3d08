"""Whether an engine that has work still tells what it does; an idle engine takes no step and is not stale."""

from __future__ import annotations

from pals.core.quantities import EngineSample

STALE_AFTER_S = 5.0  # longer than a step of a full prefill chunk takes


def stale_notes(engine: EngineSample, now_s: float) -> list[str]:
    """One note where requests run and the newest step is older than `STALE_AFTER_S`; both times are of one clock.

    The text does not change while the engine stands still, so that it is logged once.
    """
    if engine.running == 0 or now_s - engine.time_s <= STALE_AFTER_S:
        return []
    return [
        f"engine telemetry stands still: {engine.running} requests run, and no step has ended for more than "
        f"{STALE_AFTER_S:g} s (after step {engine.steps}). The limits in force stay, and decisions rest on old counters; the "
        "engine hangs, is paused, or its step is very long: see vLLM's log"
    ]
