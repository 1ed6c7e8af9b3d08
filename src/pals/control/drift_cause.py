"""Why a profile may no longer fit, guessed from which quantities moved; a guess is worded as one."""

from __future__ import annotations

from typing import NamedTuple

from pals.control.routing import UNKNOWN, RoutingTrack

MOVED = 1.0  # standard deviations of the prediction
ALONG = 0.6  # the same of what moves along with a step time that has drifted


class Shifts(NamedTuple):
    """How far each quantity has moved lately from where it was, in standard deviations of its prediction."""

    power: float = 0.0
    step: float = 0.0
    clock: float = 0.0


def guess_cause(
    quantity: str, shifts: Shifts, *, experts: bool, temperature_c: float | None, routing: RoutingTrack = UNKNOWN
) -> str:
    """What fits best; `quantity` is the one that drifted: "power" or "step". A drift of routing that was measured is no guess."""
    if quantity == "step" and routing.drift is not None:
        return routing.drift.cause
    experts = experts and not routing.measured
    hot = f", the hottest at {temperature_c:.0f} °C" if temperature_c is not None else ""
    if shifts.step > MOVED and shifts.clock < -MOVED:
        return f"the boards run at a lower clock (heat{hot}; another board; something else that slows them)"
    if abs(shifts.step) > MOVED:
        return _of_step(shifts, experts=experts)
    if quantity == "power" and abs(shifts.clock) > MOVED:
        return f"the boards reach another clock for their power (another board; warmer or colder air{hot})"
    return f"another board, warmer or colder air (boards{hot or ' of unknown temperature'}), or a meter that reads otherwise"


def _of_step(shifts: Shifts, *, experts: bool) -> str:
    """Boards that wait longer for the host draw less, or under a limit run at a higher clock; those that read more do not."""
    slower = shifts.step > 0
    rested = (-shifts.power if slower else shifts.power, shifts.clock if slower else -shifts.clock)
    if max(rested) > ALONG:
        change = "more" if slower else "less"
        return (
            f"the engine spends {change} time on the host per step (another build or flag, or a host with other work)"
        )
    if experts:
        change = "more" if slower else "fewer"
        return f"requests touch {change} distinct experts per step (routing changed), or the engine was updated"
    return "the engine was updated, or a flag of it changed"
