"""The `bandit` policy: learns the SM clock online, with no profile, by LinUCB in the manner of AGFT (arXiv:2508.01744).

Arms are clocks, the context is the load, the cost of a round is its energy-delay product, and more where targets are missed. The arm
with the lowest confidence bound of its cost runs next; arms that are clearly bad are pruned, with all slower ones where they
are slow themselves; a round that misses its targets is followed by one of free clocks. Limit and batch stay as found.

As AGFT's code (github.com/SusCom-Lab/AGFT, config.yaml): LinUCB, exploration that decays, three ways of pruning, search from high clocks
to low, recovery from misses. Ours: ten arms in place of the driver's whole list; four features of the load, which all arms share (its hybrid
form), in place of seven of each arm; logarithms, in which load and clock add up; rounds of two seconds. There is no
randomness: ties go to the higher clock, so a replay is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import log, log1p, sqrt
from typing import NamedTuple

from pals.control.estimator import count_above
from pals.control.guard import Guard
from pals.core.quantities import Budget, Decision, EngineSample, OperatingPoint, Slo, TelemetrySample

Vector = tuple[float, ...]
FEATURES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class BanditSettings:
    """Constants of the policy; those marked AGFT are its own."""

    arms: int = 10
    lowest_share: float = 0.3  # of the top clock
    round_periods: int = 4
    baseline_rounds: int = 10  # of free clocks, before it explores: AGFT
    delay_weight: float = 1.0  # power of the delay in energy × delay: AGFT; 0: energy alone
    miss_weight: float = 4.0  # of the share of requests above a target, beyond what may be
    allowed_missed: float = 0.05
    ridge: float = 1.0  # AGFT
    alpha: float = 2.0  # exploration at first, in logarithms of the reward; AGFT: 10, in its own unit
    alpha_decay: float = 0.02  # per round: AGFT
    least_alpha: float = 0.02
    prune_every: int = 20  # rounds: AGFT
    prune_after: int = 30  # rounds: AGFT
    prune_rounds: int = 6  # that an arm must have run: AGFT
    prune_deviations: float = 4.0  # of its rewards, that its mean lies below the best: AGFT
    extreme_rounds: int = 3  # AGFT
    extreme_until: int = 60  # rounds: AGFT
    extreme_gap: float = 0.7  # below the best mean: twice the energy-delay product
    cascade_share: float = 0.5  # of the top clock; a pruned arm below takes the slower ones with it: AGFT


class Ridge(NamedTuple):
    """A ridge regression so far."""

    inverse: tuple[Vector, ...]  # of its matrix
    moment: Vector

    def at(self, v: Vector) -> tuple[float, float]:
        """What it predicts, and how uncertain that is, in deviations of one observation."""
        seen = _times(self.inverse, v)
        return _dot(seen, self.moment), sqrt(max(0.0, _dot(seen, v)))

    def learnt(self, v: Vector, value: float) -> Ridge:
        """After one more observation (Sherman-Morrison)."""
        seen = _times(self.inverse, v)
        scale = 1.0 + _dot(seen, v)
        inverse = tuple(
            tuple(x - a * b / scale for x, b in zip(row, seen, strict=True))
            for row, a in zip(self.inverse, seen, strict=True)
        )
        return Ridge(inverse, tuple(m + value * x for m, x in zip(self.moment, v, strict=True)))


@dataclass(frozen=True, slots=True)
class Arm:
    """A clock, and what rounds at it saved against free clocks at the same load, as logarithms."""

    mhz: int | None  # None: no lock
    rounds: int = 0
    total: float = 0.0
    squares: float = 0.0
    pruned: bool = False

    @property
    def mean(self) -> float:
        """Mean saving."""
        return self.total / self.rounds if self.rounds else 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation of savings."""
        return sqrt(max(0.0, self.squares / self.rounds - self.mean**2)) if self.rounds else 0.0

    def seen(self, saving: float) -> Arm:
        """After one more round."""
        return replace(self, rounds=self.rounds + 1, total=self.total + saving, squares=self.squares + saving**2)


@dataclass(frozen=True, slots=True, kw_only=True)
class BanditState:
    """What the policy remembers."""

    arms: tuple[Arm, ...]  # the highest clock first
    costs: Ridge  # of a round above `offset`, by load and arm
    offset: float | None = None  # cost of the first round
    chosen: int = 0  # of `arms`
    begun: EngineSample | None = None  # of this round
    energy_j: float = 0.0  # of this round
    known_s: float = 0.0  # of it, with known power
    periods: int = 0  # of this round
    rounds: int = 0
    reason: str = "baseline"


class BanditPolicy:
    """See the module."""

    def __init__(self, guard: Guard, settings: BanditSettings | None = None) -> None:
        """Arms are clocks of `guard`; where it has none, all clocks stay free."""
        self._guard, self._settings = guard, settings or BanditSettings()

    def initial(self) -> BanditState:
        """Nothing learnt."""
        arms = tuple(Arm(mhz) for mhz in self.clocks)
        size = FEATURES + len(arms)
        unit = tuple(tuple((i == j) / self._settings.ridge for j in range(size)) for i in range(size))
        return BanditState(arms=arms, costs=Ridge(unit, (0.0,) * size))

    @cached_property
    def clocks(self) -> tuple[int | None, ...]:
        """The arms: no lock, then evenly down."""
        s, supported = self._settings, self._guard.sm_clocks_mhz
        if not supported:
            return (None,)
        top_mhz = supported[-1]
        step_mhz = top_mhz * (1.0 - s.lowest_share) / max(1, s.arms - 1)
        lower = (self._guard.supported_clock_mhz(round(top_mhz - i * step_mhz)) for i in range(1, s.arms))
        return tuple(dict.fromkeys((None, *lower)))

    def step(
        self, state: BanditState, sample: TelemetrySample, budget: Budget, slo: Slo, now_s: float
    ) -> tuple[Decision, BanditState]:
        """Return the point for this period; see the module for the rule."""
        engine = sample.engine
        if engine is None:
            return self._decision(state, "no telemetry of the engine"), state
        if sample.power_w is not None and state.begun is not None:
            state = replace(
                state,
                energy_j=state.energy_j + sample.power_w * sample.window_s,
                known_s=state.known_s + sample.window_s,
            )
        state = replace(state, periods=state.periods + 1)
        if state.begun is not None and state.periods < self._settings.round_periods:
            return self._decision(state, f"round {state.rounds}"), state
        state = self._next_round(state, engine, slo)
        return self._decision(state, f"round {state.rounds}"), state

    def _decision(self, state: BanditState, detail: str) -> Decision:
        guard, arm = self._guard, state.arms[state.chosen]
        point = OperatingPoint(
            power_limit_w=guard.max_limit_w, sm_clock_mhz=arm.mhz, active_sequences=guard.launch_sequences
        )
        left = sum(not a.pruned for a in state.arms)
        return Decision(point=point, reason=state.reason, detail=f"{detail}, {left} of {len(state.arms)} arms left")

    def _next_round(self, state: BanditState, now: EngineSample, slo: Slo) -> BanditState:
        """Learn from the round that ends, and choose the arm of the next."""
        s, begun = self._settings, state.begun
        fresh = replace(state, begun=now, energy_j=0.0, known_s=0.0, periods=0)
        cost = _cost(state, now, s) if begun is not None else None
        if begun is None or cost is None:  # nothing was answered, or its energy is unknown: nothing to learn
            return fresh
        load = _load(begun, now, self._guard.launch_sequences)
        beyond = max(0.0, _missed(begun, now, slo) - s.allowed_missed)
        offset = state.offset if state.offset is not None else cost
        above = cost - offset + s.miss_weight * beyond
        costs = state.costs.learnt(self._vector(load, state.chosen), above)
        arms = list(state.arms)
        arms[state.chosen] = arms[state.chosen].seen(costs.at(self._vector(load, 0))[0] - above)
        fresh = replace(fresh, costs=costs, offset=offset, rounds=state.rounds + 1)
        if fresh.rounds < s.baseline_rounds:
            return replace(fresh, arms=tuple(arms))
        arms = self._pruned(arms, fresh.rounds)
        fresh = replace(fresh, arms=tuple(arms))
        if beyond > 0.0 and state.chosen > 0:
            return replace(fresh, chosen=0, reason="slo-recovery")
        chosen = self._least(fresh, load)
        return replace(fresh, chosen=chosen, reason="ucb" if arms[chosen].rounds else "explore")

    def _least(self, state: BanditState, load: Vector) -> int:
        """The arm whose cost may be the lowest, of those tried and the next one below them."""
        s = self._settings
        alpha = max(s.least_alpha, s.alpha / (1.0 + s.alpha_decay * (state.rounds - s.baseline_rounds)))

        def bound(i: int) -> float:
            value, deviation = state.costs.at(self._vector(load, i))
            return value - alpha * deviation

        left = [i for i, a in enumerate(state.arms) if not a.pruned]
        untried = [i for i in left if not state.arms[i].rounds]
        return min((i for i in left if i not in untried[1:]), key=lambda i: (bound(i), i))

    def _vector(self, load: Vector, arm: int) -> Vector:
        """What the regression sees: the load, how far the clock is down times how full the engine is, and which arm; free clocks are 0."""
        clocks = self.clocks
        top_mhz = self._guard.sm_clocks_mhz[-1] if arm else 1
        down = 1.0 - (clocks[arm] or top_mhz) / top_mhz if arm else 0.0
        return (*load, down * load[1], *(float(i == arm) for i in range(1, len(clocks))))

    def _pruned(self, arms: Sequence[Arm], rounds: int) -> list[Arm]:
        """Close arms that are clearly worse than the best one; free clocks stay."""
        s = self._settings
        best = max((a.mean for a in arms if a.rounds and not a.pruned), default=0.0)
        top_mhz = self._guard.sm_clocks_mhz[-1] if self._guard.sm_clocks_mhz else 0

        def bad(a: Arm) -> bool:
            extreme = rounds <= s.extreme_until and a.rounds >= s.extreme_rounds and a.mean < best - s.extreme_gap
            due = rounds >= s.prune_after and rounds % s.prune_every == 0 and a.rounds >= s.prune_rounds
            return extreme or (due and a.mean < best - s.prune_deviations * a.deviation)

        found = [i for i, a in enumerate(arms) if i > 0 and not a.pruned and bad(a)]
        slow = [i for i in found if (arms[i].mhz or top_mhz) < s.cascade_share * top_mhz]
        least = min(slow, default=len(arms))
        return [replace(a, pruned=a.pruned or i in found or i >= least) for i, a in enumerate(arms)]


def _cost(state: BanditState, now: EngineSample, s: BanditSettings) -> float | None:
    """Logarithm of energy per token and delay of the round; None where it answered nothing, or its power is unknown."""
    begun = state.begun
    if begun is None or state.known_s <= 0.0 or state.energy_j <= 0.0:
        return None
    tokens, steps, busy_s = (
        now.output_tokens - begun.output_tokens, now.steps - begun.steps, now.busy_s - begun.busy_s,
    )  # fmt: skip
    if tokens <= 0 or steps <= 0 or busy_s <= 0.0:
        return None
    return log(state.energy_j / tokens) + s.delay_weight * log(busy_s / steps)


def _load(begun: EngineSample, now: EngineSample, launch: int) -> Vector:
    """One, how full the engine is, how much waits, and how much of its work were prompts; each 0..1."""
    prefill, decode = now.prefill_tokens - begun.prefill_tokens, now.decode_tokens - begun.decode_tokens
    full = log1p(0.5 * (begun.running + now.running)) / log1p(launch)
    return (1.0, full, min(1.0, now.waiting / launch), prefill / max(1, prefill + decode))


def _missed(begun: EngineSample, now: EngineSample, slo: Slo) -> float:
    """The largest share of the round's requests above a target."""
    targets = (
        (slo.ttft_p95_s, begun.ttft_counts, now.ttft_counts), (slo.tpot_p95_s, begun.tpot_counts, now.tpot_counts),
        (slo.ttft_p99_s, begun.ttft_counts, now.ttft_counts), (slo.tpot_p99_s, begun.tpot_counts, now.tpot_counts),
    )  # fmt: skip
    shares = [count_above(a, b, t) / max(1, sum(b) - sum(a)) for t, a, b in targets if t is not None]
    return max(shares, default=0.0)


def _dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _times(rows: Sequence[Vector], v: Vector) -> Vector:
    return tuple(_dot(row, v) for row in rows)
