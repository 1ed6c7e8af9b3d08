"""How large an effect is, with an interval that holds at every moment at once, so that looking often costs nothing.

The values are differences between the two members of pairs, and a draw decided which member got the treatment. With an
effect theta that is the same for all, a difference is theta plus or minus what the two members differ by anyway, each with
probability one half whatever came before: its law about theta is symmetric, given the past. No more is assumed: the members
may differ by anything, drift, follow the load of the time before, or have heavy tails.

For a symmetric x and any number l, with y = l·x cut off at +-CUT (which is symmetric too, and keeps one wild pair from
deciding), exp(y)/cosh(y) has mean 1, because (e^y + e^-y)/2 = cosh y. So the product over
pairs is a martingale that begins at 1, and so is a mean of such products over several l; by Ville's inequality it ever
reaches 2/alpha with probability at most alpha/2. The values theta for which neither the mean over positive l nor that over
negative l has reached 2/alpha are an interval, and it covers the true one at all times with probability 1 - alpha.

Sources: V. de la Peña, Ann. Probab. 27(1), 1999 (martingales of conditionally symmetric differences); A. Ramdas, J. Ruf,
M. Larsson, W. Koolen, arXiv:2009.03167 (cosh martingale, why nothing else suffices); S. Howard, A. Ramdas, J. McAuliffe,
J. Sekhon, Ann. Stat. 49(2), 2021 (confidence sequences). Where the effect varies from pair to pair the interval is about its
mean only as far as that variation is symmetric too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cosh, log

import numpy as np
from numpy.typing import NDArray

from pals.core.quantities import Checked

FloatArray = NDArray[np.float64]
#: Values of l, for logarithms of ratios: each serves deviations of about 1/l, from 0.1 % to a factor of many.
RATES: FloatArray = np.exp2(np.arange(-2.0, 11.0))
REACH = 20.0  # beyond the values, in logarithms: no ratio is further off
HALVINGS = 60
CUT = 1.5
MOST = CUT - log(cosh(CUT))  # gain of one pair at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate(Checked):
    """An effect with its interval; None: still without a bound on that side."""

    value: float
    low: float | None
    high: float | None


def estimate_effect(differences: Sequence[float], alpha: float) -> Estimate | None:
    """The effect common to all `differences`, with an interval at level 1 - `alpha`; None where there are no differences.

    The value is the median of the means of all pairs of differences (J. Hodges, E. Lehmann, Ann. Math. Stat. 34(2), 1963): for
    symmetric noise as good as the mean, and no outlier moves it far.
    """
    if not differences:
        return None
    d = np.asarray(differences, float)
    below, above = float(d.min()) - REACH, float(d.max()) + REACH
    value = float(np.median(((d[:, None] + d[None, :]) / 2)[np.triu_indices(len(d))]))
    needed = log(2.0 / alpha)
    if len(d) * MOST <= needed:  # no theta whatever reaches it
        return Estimate(value=value, low=None, high=None)
    low = _crossing(lambda theta: evidence(d - theta) - needed, below, above)
    high = _crossing(lambda theta: needed - evidence(theta - d), below, above)
    return Estimate(value=min(high, max(low, value)), low=low, high=high)


def evidence(x: FloatArray) -> float:
    """Logarithm of the martingale after all of x, shape (n,), against their being symmetric about 0 or less."""
    return float(_mean_of(_gains(x).sum(axis=1)))


def evidence_path(x: FloatArray) -> FloatArray:
    """The same after each of x, shape (n,)."""
    return _mean_of(np.cumsum(_gains(x), axis=1))


def _gains(x: FloatArray) -> FloatArray:
    """Logarithm of exp(y)/cosh(y), shape (rates, n)."""
    y = np.clip(RATES[:, None] * x[None, :], -CUT, CUT)
    gains: FloatArray = y - np.log(np.cosh(y))
    return gains


def _mean_of(logs: FloatArray) -> FloatArray:
    """Logarithm of the mean over the first axis of what `logs` are the logarithms of."""
    top = logs.max(axis=0)
    return np.asarray(top + np.log(np.exp(logs - top).mean(axis=0)))


def _crossing(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function changes its sign."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2
