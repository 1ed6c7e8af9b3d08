"""A policy that acts in a share of all windows of time, while a baseline acts in the others: how a policy is tried in earnest.

Which windows is decided by permuted blocks: each block holds one window of the rarer arm, beside a window of the other
arm that is its partner; which pair of neighbours that is, and which of the two is which, is drawn by a hash of seed and
block. So the two windows of a pair change places with probability one half, whatever the load does, and a comparison of
the pair rests on the draw alone (`pals.experiments.ab`). The draw depends on nothing that happens: a replay is exact.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, floor
from typing import Any, NamedTuple

from pals.control.correction import Correction
from pals.control.watched import CorrectedPolicy
from pals.core.protocols import AnyController
from pals.core.quantities import Budget, Checked, Decision, OperatingPoint, Slo, TelemetrySample

ON, OFF = "on", "off"  # the policy acts; the baseline does
ARMS = (ON, OFF)
SMALLEST_SHARE = 0.01  # of either arm
EDGE_S = 1e-6  # a tick so little before a window's begin is in it: times are sums of floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Interleaving(Checked):
    """Which arm acts in which window; window 0 begins with the first tick."""

    share: float  # of windows in which the policy acts
    window_s: float = 30.0
    seed: int = 0
    baseline: str = "static"  # the policy of the other windows; static: boards as found, the launch batch

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        if not SMALLEST_SHARE <= self.share <= 1 - SMALLEST_SHARE:
            raise ValueError(f"a share of {self.share:g} must lie in {SMALLEST_SHARE:g}..{1 - SMALLEST_SHARE:g}")
        if self.window_s <= 0:
            raise ValueError(f"windows of {self.window_s:g} s must be longer than 0")

    @property
    def rarer(self) -> str:
        """The arm with fewer windows; the policy's where both have as many."""
        return ON if self.share <= 0.5 else OFF

    @property
    def _rate(self) -> Fraction:
        """Windows of the rarer arm per window, exactly."""
        return Fraction(min(self.share, 1 - self.share)).limit_denominator(1000)

    def window_at(self, elapsed_s: float) -> int:
        """The window that holds the moment so long after the first tick."""
        return floor((elapsed_s + EDGE_S) / self.window_s)

    def block_of(self, window: int) -> int:
        """The block that holds `window`."""
        return floor(window * self._rate)

    def pair(self, block: int) -> tuple[int, int]:
        """The windows of a block that are compared: one in which the policy acts, one in which the baseline does."""
        first, end = ceil(block / self._rate), ceil((block + 1) / self._rate)
        drawn = int.from_bytes(hashlib.blake2b(f"{self.seed}:{block}".encode(), digest_size=8).digest(), "big")
        place, swapped = first + (drawn >> 1) % (end - first - 1), drawn & 1
        rarer, other = (place + 1, place) if swapped else (place, place + 1)
        return (rarer, other) if self.rarer == ON else (other, rarer)

    def arm(self, window: int) -> str:
        """Which arm acts in `window`."""
        on, off = self.pair(self.block_of(window))
        if self.rarer == ON:
            return ON if window == on else OFF
        return OFF if window == off else ON


class InterleavedState(NamedTuple):
    """What both policies remember, and when window 0 began."""

    inner: Any
    baseline: Any
    start_s: float | None = None


class Interleaved:
    """See the module; a `Controller` around two others.

    A watch of the profile goes around this, not inside: it must see the points that were really asked for.
    """

    def __init__(self, policy: AnyController, baseline: AnyController, design: Interleaving) -> None:
        """Let `policy` act in the windows that `design` says, `baseline` in the others."""
        self.policy, self.baseline, self.design = policy, baseline, design

    def initial(self) -> InterleavedState:
        """Window 0 begins with the first step."""
        return InterleavedState(self.policy.initial(), self.baseline.initial())

    def step(
        self, state: InterleavedState, sample: TelemetrySample, budget: Budget, slo: Slo, now_s: float
    ) -> tuple[Decision, InterleavedState]:
        """The decision of the arm whose window it is; both policies are stepped, so that neither has to warm up."""
        return self._step(state, sample, budget, slo, now_s, None)

    def step_corrected(
        self,
        state: InterleavedState,
        sample: TelemetrySample,
        budget: Budget,
        slo: Slo,
        now_s: float,
        correction: Correction,
    ) -> tuple[Decision, InterleavedState]:
        """As `step`; whichever of the two policies wants to know how far the profile is off is told."""
        return self._step(state, sample, budget, slo, now_s, correction)

    def _step(
        self,
        state: InterleavedState,
        sample: TelemetrySample,
        budget: Budget,
        slo: Slo,
        now_s: float,
        correction: Correction | None,
    ) -> tuple[Decision, InterleavedState]:
        def stepped(policy: AnyController, remembered: Any) -> tuple[Decision, Any]:
            if correction is not None and isinstance(policy, CorrectedPolicy):
                return policy.step_corrected(remembered, sample, budget, slo, now_s, correction)
            return policy.step(remembered, sample, budget, slo, now_s)

        start_s = now_s if state.start_s is None else state.start_s
        advice, inner = stepped(self.policy, state.inner)
        usual, baseline = stepped(self.baseline, state.baseline)
        arm = self.design.arm(self.design.window_at(now_s - start_s))
        decision = replace(advice, arm=ON) if arm == ON else replace(usual, arm=OFF, detail=_told(usual, advice))
        return decision, InterleavedState(inner, baseline, start_s)


def _told(usual: Decision, advice: Decision) -> str:
    """The baseline's detail, and what the policy would have asked for."""
    return f"{usual.detail}; the policy would ask for {_point(advice.point)} ({advice.reason})".lstrip("; ")


def _point(point: OperatingPoint) -> str:
    clock = "no clock lock" if point.sm_clock_mhz is None else f"{point.sm_clock_mhz} MHz"
    batch = "launch" if point.active_sequences is None else str(point.active_sequences)
    return f"{point.power_limit_w:.0f} W, {clock}, {batch} sequences"
