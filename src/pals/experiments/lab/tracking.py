"""How well power follows a budget that moves: means of one second of true power, against the budget of that second."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pals.experiments.lab.fleet_meter import FleetLedger
from pals.experiments.lab.fleet_truth import MARGIN

FloatArray = NDArray[np.float64]
FAR = 0.3  # of the reserve: the criterion of Acun, Hankendi, … Coskun, e-Energy 2026
WITHIN_S = 1.0


def tracking_of(ledger: FleetLedger, reserve_w: float | None) -> dict[str, Any]:
    """Errors as shares of the budget, in columns of a row.

    `rmse_left` is the error that is left when power is held against the budget less the guard's margin; `most_w` may be far
    below the budget where the boards' natural draw is. `far_share` is the share of seconds that miss by more than `FAR` of the
    reserve.
    """
    _, power_w, budget_w = ledger.windows()
    error = power_w / budget_w - 1.0
    return {
        "rmse": _root_mean(error),
        "rmse_over": _root_mean(np.maximum(0.0, error)),
        "rmse_left": _root_mean(power_w / ((1.0 - MARGIN) * budget_w) - 1.0),
        "bias": float(error.mean()),
        "over_share": float((error > 0.0).mean()),
        "far_share": None if reserve_w is None else float((np.abs(power_w - budget_w) > FAR * reserve_w).mean()),
        "shed_s": longest_shed_s(ledger),
    }


def longest_shed_s(ledger: FleetLedger) -> float | None:
    """The slowest time from a fall of the budget to a second whose mean power lies within; None: the budget never fell.

    A fall that is not reached before the budget moves again counts with the time until then.
    """
    falls = np.flatnonzero(np.diff(ledger.budget_w) < 0) + 1
    moves = [*(np.flatnonzero(np.diff(ledger.budget_w)) + 1), len(ledger.time_s) - 1]
    took = [_shed_s(ledger, int(i), int(min(m for m in moves if m > i))) for i in falls if i < len(ledger.time_s) - 1]
    return max(took) if took else None


def _shed_s(ledger: FleetLedger, fall: int, end: int) -> float:
    energy_j, time_s = ledger.energy_j.sum(axis=1), ledger.time_s
    for i in range(fall + 1, end + 1):
        first = int(np.searchsorted(time_s, time_s[i] - WITHIN_S - 1e-9))
        if (energy_j[i] - energy_j[first]) / (time_s[i] - time_s[first]) <= ledger.budget_w[fall]:
            return float(time_s[i] - time_s[fall])
    return float(time_s[end] - time_s[fall])


def _root_mean(values: FloatArray) -> float:
    return float(np.sqrt(np.mean(values**2)))
