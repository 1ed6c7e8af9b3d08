"""What a policy saves against its baseline on one engine under its own load, from pairs of windows; certain or not, it says so.

Load moves all the time, so two halves of an hour cannot be compared, and neither can two arms whose windows an analyst
chose. Here a draw decides which of two neighbouring windows is the policy's (`pals.control.interleaved`): a switchback
design (I. Bojinov, D. Simchi-Levi, J. Zhao, Management Science 69(7), 2023). For each pair the logarithm of the ratio of
energy per output token, on against off, is one difference; what the load did to the two windows enters with a sign that
the draw decided. The interval (`pals.experiments.anytime`) rests on that draw alone: not on the load being steady,
independent or normal, and not on when one looks; so a run may stop as soon as the interval is narrow enough.

What can still mislead: work carried from one window into the next, and a saving that itself depends on the load (then it is
a mean over the load that there was). A slower arm leaves unfinished answers to the windows after it, which makes its
saving look smaller; the first part of each window is left out for that, and it must be longer than a request stays in the
engine. How long that is, is measured and told.

`saving` assumes nothing of the load. At an open load (requests come whether or not earlier ones were answered) an arm cannot
change how much is asked for: differences in tokens/s between the windows of a pair are then load alone, and `same_load`
takes them out by regression as a control variate, with a slope learnt from earlier pairs only, so that each difference stays
symmetric given the past (A. Deng, Y. Xu, R. Kohavi, T. Walker, WSDM 2013, on covariates). In a closed loop that would be wrong:
there the arm itself sets the tokens/s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log

from pals.control.interleaved import OFF, ON, Interleaving
from pals.core.quantities import LATENCY_BOUNDS_S, Checked
from pals.experiments.ab_windows import ArmWindow, WindowTally
from pals.experiments.anytime import Estimate, estimate_effect
from pals.plant.fleet import NODE_OFFSET_W, NODE_SLOPE
from pals.runtime.tick import TickRecord

FEWEST_TOKENS = 100  # in each window of a pair: with fewer, energy per token is about single requests
SLOPE_BEFORE = -0.5  # of log energy per token by log tokens/s, before anything is measured
SLOPE_WEIGHT = 0.02  # how much that counts, in squared logarithms: about four pairs 7 % apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm(Checked):
    """All sound windows of one arm together."""

    windows: int
    seconds: float
    energy_j: float
    output_tokens: int
    ttft_p95_s: float | None  # of requests that got their first token in these windows
    tpot_p95_s: float | None  # of requests that finished in them
    refused_requests: int
    stay_s: float | None  # mean time of a request in the engine, by Little's law

    @property
    def j_per_token(self) -> float | None:
        """GPU energy per output token."""
        return self.energy_j / self.output_tokens if self.output_tokens else None

    @property
    def tokens_per_s(self) -> float | None:
        """Output tokens per second."""
        return self.output_tokens / self.seconds if self.seconds else None

    @property
    def power_w(self) -> float | None:
        """Mean power of all boards."""
        return self.energy_j / self.seconds if self.seconds else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Share(Checked):
    """A relative difference with its interval, 0.1 for 10 %; None: no bound yet on that side."""

    value: float
    low: float | None
    high: float | None

    @property
    def half_width(self) -> float | None:
        """Half the interval's length; None while a bound lacks."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison(Checked):
    """What is known so far; savings are of energy per output token, positive where the policy needs less."""

    on: Arm
    off: Arm
    pairs: int
    left_out: int  # pairs with next to no output
    unsound: int  # windows in which something was unknown
    level: float  # of all intervals, each by itself
    saving: Share | None  # GPU energy; None: no pair yet
    saving_node: Share | None  # with the node's other parts, by the line in docs/models.md
    same_load: Share | None  # GPU energy, if the load is open
    throughput: Share | None  # difference of output tokens/s, on against off


def compare(tally: WindowTally, level: float) -> Comparison:
    """Compare the arms; intervals at `level`, such as 0.95."""
    pairs, left_out = pairs_of(tally.windows, tally.design)
    energy = [_log_ratio(p, lambda w: w.energy_j / w.output_tokens) for p in pairs]
    node = [_log_ratio(p, lambda w: _node_j(w) / w.output_tokens) for p in pairs]
    tokens = [_log_ratio(p, lambda w: w.output_tokens / w.seconds) for p in pairs]

    def effect(differences: Sequence[float]) -> Estimate | None:
        return estimate_effect(differences, 1.0 - level)

    return Comparison(
        on=arm_of([w for w in tally.windows if w.arm == ON]),
        off=arm_of([w for w in tally.windows if w.arm == OFF]),
        pairs=len(pairs),
        left_out=left_out,
        unsound=tally.unsound,
        level=level,
        saving=_saving(effect(energy)),
        saving_node=_saving(effect(node)),
        same_load=_saving(effect(at_same_load(energy, tokens))),
        throughput=_change(effect(tokens)),
    )


def pairs_of(windows: Sequence[ArmWindow], design: Interleaving) -> tuple[list[tuple[ArmWindow, ArmWindow]], int]:
    """The pairs (on, off) of which both windows are sound, in the order of time, and how many had next to no output."""
    known, pairs, idle = {w.index: w for w in windows}, [], 0
    for block in sorted({design.block_of(i) for i in known}):
        on, off = (known.get(i) for i in design.pair(block))
        if on is None or off is None:
            continue
        if min(on.output_tokens, off.output_tokens) < FEWEST_TOKENS or min(on.energy_j, off.energy_j) <= 0:
            idle += 1
        else:
            pairs.append((on, off))
    return pairs, idle


def at_same_load(differences: Sequence[float], loads: Sequence[float]) -> list[float]:
    """`differences` without what differences in load explain, by a slope that each pair takes from those before it."""
    xy, xx, rest = SLOPE_BEFORE * SLOPE_WEIGHT, SLOPE_WEIGHT, []
    for d, x in zip(differences, loads, strict=True):
        rest.append(d - xy / xx * x)
        xy, xx = xy + x * d, xx + x * x
    return rest


def arm_of(windows: Sequence[ArmWindow]) -> Arm:
    """Sums over windows."""
    finished = sum(w.finished_requests for w in windows)
    return Arm(
        windows=len(windows),
        seconds=sum(w.seconds for w in windows),
        energy_j=sum(w.energy_j for w in windows),
        output_tokens=sum(w.output_tokens for w in windows),
        ttft_p95_s=quantile_s([w.ttft_counts for w in windows], 0.95),
        tpot_p95_s=quantile_s([w.tpot_counts for w in windows], 0.95),
        refused_requests=sum(w.refused_requests for w in windows),
        stay_s=sum(w.request_seconds for w in windows) / finished if finished else None,
    )


def quantile_s(histograms: Sequence[Sequence[int]], share: float) -> float | None:
    """A quantile of several histograms together, seconds, evenly (by logarithm) within its bucket; None where all are empty.

    Above the last bound, the last bound.
    """
    counts = [sum(column) for column in zip(*histograms, strict=True)]
    total, seen = sum(counts), 0
    for i, n in enumerate(counts):
        if n and seen + n >= share * total:
            if i >= len(LATENCY_BOUNDS_S):
                return LATENCY_BOUNDS_S[-1]
            low = LATENCY_BOUNDS_S[i - 1] if i else LATENCY_BOUNDS_S[0] / 1.25
            return float(low * (LATENCY_BOUNDS_S[i] / low) ** ((share * total - seen) / n))
        seen += n
    return None


def _log_ratio(pair: tuple[ArmWindow, ArmWindow], of: Callable[[ArmWindow], float]) -> float:
    return log(of(pair[0]) / of(pair[1]))


def _node_j(window: ArmWindow) -> float:
    return NODE_SLOPE * window.energy_j + NODE_OFFSET_W * window.seconds


def _change(effect: Estimate | None) -> Share | None:
    """A ratio's logarithm as a relative difference."""
    if effect is None:
        return None

    def share(value: float | None) -> float | None:
        return None if value is None else exp(value) - 1

    return Share(value=exp(effect.value) - 1, low=share(effect.low), high=share(effect.high))


def _saving(effect: Estimate | None) -> Share | None:
    change = _change(effect)
    if change is None:
        return None
    low, high = change.high, change.low  # more energy is less saving
    return Share(value=-change.value, low=None if low is None else -low, high=None if high is None else -high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending(Checked):
    """When a live comparison ends."""

    level: float  # of the interval
    precision: float  # half its length, as a share
    longest_s: float
    open_load: bool  # judge by `same_load`


class Trial:
    """A comparison as it runs: takes records, and says when there is nothing more to learn."""

    def __init__(self, design: Interleaving, settle_s: float, ending: Ending) -> None:
        self.tally, self.ending = WindowTally(design, settle_s), ending
        self.result = compare(self.tally, ending.level)
        self.over: str | None = None  # why it has ended
        self._start_s: float | None = None

    def observe(self, record: TickRecord) -> bool:
        """Take one record; whether the comparison knows more than before."""
        now_s = record.sample.time_s
        if self._start_s is None:
            self._start_s = now_s
        new = self.tally.observe(record) and self._compare()
        if self.over is None and now_s - self._start_s >= self.ending.longest_s:
            self.over = "the time is over"
        return new

    @property
    def began(self) -> bool:
        """Whether there was any record."""
        return self._start_s is not None

    @property
    def judged(self) -> Share | None:
        """The saving that decides when the run ends."""
        return self.result.same_load if self.ending.open_load else self.result.saving

    def _compare(self) -> bool:
        before, self.result = self.result.pairs, compare(self.tally, self.ending.level)
        width = self.judged.half_width if self.judged is not None else None
        if width is not None and width <= self.ending.precision:
            self.over = f"the saving is known within {100 * self.ending.precision:g} %"
        return self.result.pairs > before
