"""Whether telemetry can be believed: what makes a sample useless, for how long, and when it may be believed again."""

from __future__ import annotations

from typing import NamedTuple

from pals.control.guard import Guard
from pals.core.quantities import TelemetrySample

BLIND_S = 3.0  # without power, or with impossible power, for so long: the safe point
TRUSTED_S = 10.0  # sound for so long before it is believed again
IMPOSSIBLE = 1.35  # of the sum of the limits: more than firmware lets through for a second


class Trust(NamedTuple):
    """What is remembered of the telemetry."""

    sound_s: float | None = None  # when power was last known and possible
    since_s: float | None = None  # when it was first sound again after a failure
    same_s: float | None = None  # since when every board says the same
    said: tuple[tuple[float, float | None], ...] = ()  # what they say
    steps: int = -1  # of the engine, when that began
    broken: str | None = None  # why the telemetry is not believed; None: it is


def judge(t: Trust, sample: TelemetrySample, guard: Guard, now_s: float) -> Trust:
    """With one more sample."""
    if sample.engine is None:
        return t._replace(broken="the engine tells nothing", since_s=None)
    t = _stuck(t, sample, now_s)
    why = _fault(t, sample, guard, now_s)
    sound_s = now_s if t.sound_s is None or why is None else t.sound_s
    t = t._replace(sound_s=sound_s)
    if why is not None:
        late = now_s - sound_s >= BLIND_S or t.broken is not None
        return t._replace(broken=why if late else None, since_s=None)
    if t.broken is None:
        return t
    since_s = now_s if t.since_s is None else t.since_s
    return t._replace(since_s=since_s, broken=t.broken if now_s - since_s < TRUSTED_S else None)


def _stuck(t: Trust, sample: TelemetrySample, now_s: float) -> Trust:
    """Follow whether the boards' readings move."""
    assert sample.engine is not None
    said = tuple((b.power_w, b.energy_j) for b in sample.boards)
    idle = sample.engine.running == 0  # its boards may say the same for long
    if said != t.said or idle or sample.engine.steps == t.steps:
        return t._replace(said=said, same_s=now_s, steps=sample.engine.steps)
    return t


def _fault(t: Trust, sample: TelemetrySample, guard: Guard, now_s: float) -> str | None:
    """What is wrong with this sample; None: nothing."""
    if sample.absent:
        return f"{len(sample.absent)} of {guard.boards} boards cannot be read"
    if t.same_s is not None and now_s - t.same_s >= BLIND_S and len(sample.boards) > 0:
        return f"the boards' meters stand still for {now_s - t.same_s:.0f} s while the engine works"
    if sample.power_w is None:
        return "the boards' power is not known"
    most_w = sum(b.enforced_limit_w for b in sample.boards)
    if sample.power_w > IMPOSSIBLE * max(most_w, 1.0):
        return f"{sample.power_w:.0f} W are told under limits of {most_w:.0f} W"
    return None
