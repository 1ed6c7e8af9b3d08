"""How far below a target a prediction must stay: as wide as the profile is unsure at first, then what experience asks for.

Adaptive conformal inference: each request that comes late widens the margin, each that does not narrows it, in proportion to the
share that may, so that in the long run that share is what comes late, whatever the profile gets wrong (Gibbs and Candès,
"Adaptive conformal inference under distribution shift", NeurIPS 2021). A margin counts half intervals of the logarithm.
"""

from __future__ import annotations

from typing import NamedTuple

from pals.control.demand import Late, late, targets_of
from pals.core.quantities import EngineSample, Slo

SHORT_SHARE = 0.01  # of periods that may fall short of a throughput target
SHORT_GAIN = 0.01  # of the logarithm of throughput, for a period that does
MOST_SPARE = 0.3
START = 1.0  # the pessimistic end of a 90 % interval
LEAST, MOST = -1.0, 12.0
AIM = 0.25  # of the share that may come late: the rest is for what comes in bursts
GAIN = 0.2  # half intervals, for a request that comes late
NEAR = 0.35  # a margin narrows only where the prediction is so near its target, relative: elsewhere nobody was put to the test


class Margins(NamedTuple):
    """Half intervals below the target, by latency, and what throughput must have to spare."""

    ttft: float = START
    tpot: float = START
    rate: float = 0.006  # of the logarithm of throughput, above its target


def learn(margin: float, seen: Late, share: float, *, tested: bool) -> float:
    """The margin after one period; `share` may come late; `tested`: the point in force was near its target."""
    if seen.counted <= 0:
        return margin
    rare = max(1.0, 0.05 / share) ** 0.5  # what may seldom be late teaches seldom: it weighs more
    step: float = rare * GAIN * (seen.late - AIM * share * seen.counted)
    if step < 0 and not (tested and margin > LEAST):
        return min(margin, max(START, margin + step)) if margin > START else margin
    return min(MOST, max(LEAST, margin + step))


def learned(
    m: Margins, before: EngineSample, now: EngineSample, slo: Slo, tested: tuple[bool, bool], *, windable: bool
) -> Margins:
    """Both margins after one period; `tested`: of TTFT and of TPOT; `windable`: whether they may grow."""
    counts = {"ttft": (before.ttft_counts, now.ttft_counts), "tpot": (before.tpot_counts, now.tpot_counts)}
    values = {"ttft": m.ttft, "tpot": m.tpot}
    for (q, targets), near in zip(targets_of(slo).items(), tested, strict=True):
        for t in targets:
            value = learn(values[q], late(*counts[q], t.target_s), t.share, tested=near)
            values[q] = value if windable else min(value, values[q])
    return m._replace(**values)


def spared(rate: float, tokens_per_s: float | None, wanted: float | None, *, pressed: bool, windable: bool) -> float:
    """What throughput must have to spare after one period; it falls short where less than `wanted` came out though work was there.

    `windable`: whether it may grow; where no point gives more it would only wind up.
    """
    if wanted is None or tokens_per_s is None:
        return rate
    if pressed and tokens_per_s < wanted:
        return min(MOST_SPARE, rate + SHORT_GAIN * (1.0 - SHORT_SHARE)) if windable else rate
    return max(0.0, rate - SHORT_GAIN * SHORT_SHARE)
