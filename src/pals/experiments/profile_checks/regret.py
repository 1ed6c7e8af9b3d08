"""What a choice costs: the point that a method picks for a load's targets, against exhaustive search over the measured grid.

Search knows every measured figure and takes the most tokens/J among the points that keep the targets. A method takes the most
predicted tokens/J among those that keep them by the pessimistic ends of its intervals (its values, where it has none); where no
point does, the one that is likeliest to keep all: whose least margin, counted in half intervals, is largest. Targets are set so that
search keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pals.experiments.profile_checks.question import (
    POWER,
    THROUGHPUT,
    TPOT,
    TTFT,
    FloatArray,
    Told,
    truth_of,
)
from pals.models.row import ProfileRow

SHARES = (0.65, 0.75, 0.90, 0.95)  # of the largest throughput of the mix
MULTIPLES = (1.25, 2.0)  # of the lowest latency among points that keep the throughput
LEAST_HALF = 1e-6  # an interval of no width is certain
NEEDED = (POWER, THROUGHPUT, TPOT, TTFT)


class Targets(NamedTuple):
    """Of one scenario."""

    tokens_per_s: float  # at least
    tpot_p95_s: float  # at most
    ttft_p95_s: float


class Scenario(NamedTuple):
    """Targets for one mix, and the best that keeps them."""

    mix: int
    share: float
    multiple: float
    targets: Targets
    best_tokens_per_j: float


class Choice(NamedTuple):
    """What a method's pick turned out to be."""

    regret: float  # share of the best tokens/J that is lost; below 0 where targets were broken for it
    excess: float  # by which the worst target is broken, relative; 0: all are kept
    sure: bool = True  # every target was expected to be kept
    declined: bool = False  # the method answered for no point


class Figures(NamedTuple):
    """Of every candidate, shape (candidates,): what decides, with half intervals of the three that have targets, in logarithms."""

    tokens_per_j: FloatArray
    tokens_per_s: FloatArray
    tpot_p95_s: FloatArray
    ttft_p95_s: FloatArray
    half: FloatArray | None = None  # shape (3, candidates), towards the target; None: there are no intervals


def scenarios_of(rows: Sequence[ProfileRow], mix: int) -> list[Scenario]:
    """Scenarios over the rows of one mix; those that no point keeps are left out."""
    truth = measured_figures(rows)
    found = []
    for share in SHARES:
        fast = truth.tokens_per_s >= share * np.nanmax(truth.tokens_per_s)
        for multiple in MULTIPLES:
            targets = Targets(
                tokens_per_s=float(share * np.nanmax(truth.tokens_per_s)),
                tpot_p95_s=float(multiple * np.nanmin(truth.tpot_p95_s[fast])),
                ttft_p95_s=float(multiple * np.nanmin(truth.ttft_p95_s[fast])),
            )
            kept = excess_of(truth, targets) <= 0.0
            if kept.any():
                best = float(truth.tokens_per_j[kept].max())
                found.append(Scenario(mix, share, multiple, targets, best))
    return found


def choose(told: Figures, targets: Targets) -> tuple[int, bool] | None:
    """Position of the pick, and whether it keeps all by the pessimistic ends; None: nothing was answered."""
    margins = np.log(_ratios(told, targets))
    certainty = np.min(margins if told.half is None else margins / np.maximum(told.half, LEAST_HALF), axis=0)
    if not np.isfinite(certainty).any():
        return None
    kept = certainty >= (0.0 if told.half is None else 1.0)
    if kept.any():
        return int(np.argmax(np.where(kept, told.tokens_per_j, -np.inf))), True
    return int(np.nanargmax(certainty)), False


def judge(told: Figures, rows: Sequence[ProfileRow], scenario: Scenario) -> Choice:
    """The pick's measured figures against the scenario's best."""
    picked = choose(told, scenario.targets)
    if picked is None:
        return Choice(1.0, 0.0, sure=False, declined=True)
    pick, sure = picked
    truth = measured_figures(rows)
    excess = float(np.nan_to_num(excess_of(truth, scenario.targets)[pick], nan=np.inf))
    regret = 1.0 - float(truth.tokens_per_j[pick]) / scenario.best_tokens_per_j
    return Choice(regret, max(0.0, excess), sure=sure)


def excess_of(figures: Figures, targets: Targets) -> FloatArray:
    """By how much the worst target is missed, relative; at most 0: all are kept; NaN: a figure is unknown."""
    return np.asarray(np.max(1.0 / _ratios(figures, targets), axis=0) - 1.0)


def _ratios(figures: Figures, targets: Targets) -> FloatArray:
    """Above 1 where a target is kept; shape (3, candidates)."""
    return np.stack(
        [
            figures.tokens_per_s / targets.tokens_per_s,
            targets.tpot_p95_s / figures.tpot_p95_s,
            targets.ttft_p95_s / figures.ttft_p95_s,
        ]
    )


def measured_figures(rows: Sequence[ProfileRow]) -> Figures:
    """The truth of every candidate."""
    tokens_per_s = truth_of(rows, THROUGHPUT)
    return Figures(tokens_per_s / truth_of(rows, POWER), tokens_per_s, truth_of(rows, TPOT), truth_of(rows, TTFT))


def told_figures(told: Mapping[str, Told]) -> Figures:
    """What a method expects of every candidate."""
    rate, tpot, ttft = (told[q] for q in (THROUGHPUT, TPOT, TTFT))
    half = None
    if rate.low is not None and tpot.high is not None and ttft.high is not None:
        half = np.log(np.stack([rate.value / rate.low, tpot.high / tpot.value, ttft.high / ttft.value]))
    return Figures(rate.value / told[POWER].value, rate.value, tpot.value, ttft.value, half)
