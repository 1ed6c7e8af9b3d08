"""Why a profile may no longer fit, guessed from which quantities moved; a guess is worded as one."""

from __future__ import annotations

from typing import NamedTuple

MOVED = 1.0  # standard deviations of the prediction


class Shifts(NamedTuple):
    """How far each quantity has moved lately from where it was, in standard deviations of its prediction."""

    power: float = 0.0
    step: float = 0.0
    clock: float = 0.0


def guess_cause(quantity: str, shifts: Shifts, *, experts: bool, temperature_c: float | None) -> str:
    """What fits best; `quantity` is the one that drifted: "power" or "step"."""
    hot = f", the hottest at {temperature_c:.0f} °C" if temperature_c is not None else ""
    if shifts.step > MOVED and shifts.clock < -MOVED:
        return f"the boards run at a lower clock (heat{hot}; another board; something else that slows them)"
    if abs(shifts.step) > MOVED:
        return _of_step(shifts, experts=experts)
    if quantity == "power" and abs(shifts.clock) > MOVED:
        return f"the boards reach another clock for their power (another board; warmer or colder air{hot})"
    return f"another board, warmer or colder air (boards{hot or ' of unknown temperature'}), or a meter that reads otherwise"


def _of_step(shifts: Shifts, *, experts: bool) -> str:
    """Boards that wait longer for the host draw less; boards that read more weights do not."""
    slower = shifts.step > 0
    if shifts.power * shifts.step < 0 and abs(shifts.power) > MOVED:
        change = "more" if slower else "less"
        return (
            f"the engine spends {change} time on the host per step (another build or flag, or a host with other work)"
        )
    if experts:
        change = "more" if slower else "fewer"
        return f"requests touch {change} distinct experts per step (routing changed), or the engine was updated"
    return "the engine was updated, or a flag of it changed"
