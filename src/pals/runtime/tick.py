"""One tick: read, decide, guard, apply, record; the only caller of `apply`.

The power limit is written before the active-sequence limit: a falling budget bites in firmware at once, a rising
target gets its watts first. A board or engine that fails is noted in the record and in the log; nothing is guessed.

The boards of an engine move together, because the slowest sets the pace of all: where one does not follow, the others
go to the lowest limit in force, and below it where the budget demands it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pals.control.estimator import over_budget_s, remember, violations
from pals.control.guard import Guard
from pals.core.errors import DeviceLostError, PalsError, PermissionDeniedError
from pals.core.protocols import AnyController, EngineActuator, EngineMeter, PowerActuator, PowerMeter
from pals.core.quantities import (
    Budget,
    Checked,
    Decision,
    OperatingPoint,
    PowerSample,
    Slo,
    TelemetrySample,
)

log = logging.getLogger("pals")
VIOLATION_PERIODS = 4
LEASE_PERIODS = 6  # the engine forgets a setpoint after this many periods without a new one


@dataclass(frozen=True, slots=True, kw_only=True)
class TickRecord(Checked):
    """Everything one tick saw, wanted and got; one line of the journal."""

    index: int
    sample: TelemetrySample
    budget: Budget
    slo: Slo
    decision: Decision  # the policy's
    guarded: Decision  # what was asked for
    enforced_limits_w: tuple[float, ...]  # read back after applying
    mode: str  # "auto" or "advise"
    violations: dict[str, int] = field(default_factory=dict)
    over_budget_s: float = 0.0  # this period, if the mean power since the budget last changed, at most 2 s, exceeds it
    notes: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class Rig:
    """The parts of one engine and its boards; `actuators` and `setter` are empty in advise mode."""

    meters: Sequence[PowerMeter]
    actuators: Sequence[PowerActuator]
    engine: EngineMeter
    setter: EngineActuator | None
    controller: AnyController
    guard: Guard
    period_s: float
    stuck: frozenset[int] = frozenset()  # positions of boards that did not follow last time; they are asked first

    @property
    def mode(self) -> str:
        """ "auto" while something may be written, else "advise"."""
        return "auto" if self.actuators or self.setter else "advise"


@dataclass(frozen=True, slots=True, kw_only=True)
class TickState:
    """What the next tick needs of this one."""

    controller: Any
    index: int = 0
    window: tuple[TelemetrySample, ...] = ()
    budget: Budget = field(default_factory=Budget)
    under_budget: tuple[TelemetrySample, ...] = ()  # samples since the budget last changed, at most the window's length
    notes: tuple[str, ...] = ()  # logged already; repeated only in the records


def tick(rig: Rig, state: TickState, budget: Budget, slo: Slo, now_s: float) -> tuple[TickRecord, TickState]:
    """Run one control period.

    Raises:
        EngineGoneError: the engine has ended; nothing was written in this tick.
    """
    notes: list[str] = []
    sample = read_sample(rig, state.window[-1] if state.window else None, now_s, notes)
    decision, controller = rig.controller.step(state.controller, sample, budget, slo, now_s)
    guarded = rig.guard.check(decision, budget)
    enforced = _apply(rig, guarded.point, budget, sample, notes)
    window = remember(state.window, sample, VIOLATION_PERIODS)
    since = () if budget != state.budget else remember(state.under_budget, sample, VIOLATION_PERIODS - 1)
    record = TickRecord(
        index=state.index,
        sample=sample,
        budget=budget,
        slo=slo,
        decision=decision,
        guarded=guarded,
        enforced_limits_w=enforced,
        mode=rig.mode,
        violations=violations(window, slo),
        over_budget_s=over_budget_s(since, budget),
        notes=tuple(notes),
    )
    for note in notes:
        if note not in state.notes:
            log.warning("%s", note)
    return record, replace(
        state, controller=controller, index=state.index + 1, window=window, budget=budget, under_budget=since,
        notes=tuple(notes),
    )  # fmt: skip


def read_sample(rig: Rig, previous: TelemetrySample | None, now_s: float, notes: list[str]) -> TelemetrySample:
    """Read boards and engine; a lost board is left out and noted."""
    boards: list[PowerSample] = []
    for meter in rig.meters:
        try:
            boards.append(meter.read())
        except DeviceLostError as e:
            notes.append(str(e))
    power_w = mean_power_w(previous.boards, boards) if previous is not None else None
    return TelemetrySample(
        time_s=now_s,
        window_s=now_s - previous.time_s if previous is not None else 0.0,
        boards=tuple(boards),
        power_w=power_w,
        engine=rig.engine.read(),
    )


def mean_power_w(before: Sequence[PowerSample], after: Sequence[PowerSample]) -> float | None:
    """Mean power of all boards between two readings, from the energy counters, W; None where a counter stood still."""
    if not after or len(before) != len(after):
        return None
    total_w = 0.0
    for a, b in zip(before, after, strict=True):
        if b.time_s <= a.time_s or b.energy_j <= a.energy_j:
            return None
        total_w += (b.energy_j - a.energy_j) / (b.time_s - a.time_s)
    return total_w


def _apply(
    rig: Rig, wanted: OperatingPoint, budget: Budget, sample: TelemetrySample, notes: list[str]
) -> tuple[float, ...]:
    enforced_w = [b.enforced_limit_w for b in sample.boards]
    if rig.actuators and len(sample.boards) == len(rig.actuators):
        try:
            _apply_together(rig, wanted, budget, enforced_w, notes)
        except PermissionDeniedError as e:
            notes.append(f"{e} From here on PALS only advises: decisions are recorded, no board is written.")
            _give_up(rig, enforced_w, notes)
    if rig.setter is not None:
        sequences = wanted.active_sequences or rig.guard.launch_sequences
        rig.setter.apply(sequences, lease_s=LEASE_PERIODS * rig.period_s)
    return tuple(enforced_w)


def _apply_together(
    rig: Rig, wanted: OperatingPoint, budget: Budget, enforced_w: list[float], notes: list[str]
) -> None:
    """Bring all boards to one limit; `enforced_w` is updated with what is read back.

    Raises:
        PermissionDeniedError: some boards may have been written.
    """
    common, stuck_w = wanted, dict[int, float]()
    for i in sorted(range(len(enforced_w)), key=lambda i: i not in rig.stuck):
        enforced_w[i] = _apply_to_board(rig.actuators[i], common, enforced_w[i], notes)
        if abs(enforced_w[i] - common.power_limit_w) > 0.5:
            stuck_w[i] = enforced_w[i]
            limit_w = rig.guard.limit_beside(tuple(stuck_w.values()), common.power_limit_w, budget)
            notes.append(_told_stuck(rig, i, common.power_limit_w, enforced_w[i], limit_w))
            common = replace(common, power_limit_w=limit_w)
    for i, limit_w in enumerate(enforced_w):
        if i not in stuck_w and limit_w > common.power_limit_w + 0.5:
            enforced_w[i] = _apply_to_board(rig.actuators[i], common, limit_w, notes)
    rig.stuck = frozenset(stuck_w)


def _told_stuck(rig: Rig, position: int, asked_w: float, in_force_w: float, others_w: float) -> str:
    index = rig.meters[position].info.index
    why = "something else holds the limit lower (another agent, a BMC or the driver)" if in_force_w < asked_w else ""
    beside = f"the engine's other boards go to {others_w:.0f} W" if len(rig.meters) > 1 else ""
    told = "; ".join(t for t in (why, beside) if t)
    return f"board {index}: {asked_w:.0f} W asked, {in_force_w:.0f} W in force{f': {told}' if told else ''}"


def _apply_to_board(actuator: PowerActuator, wanted: OperatingPoint, in_force_w: float, notes: list[str]) -> float:
    """Apply to one board; on refusal note it and return the limit that was in force."""
    try:
        return actuator.apply(wanted).power_limit_w
    except PermissionDeniedError:
        raise
    except (PalsError, ValueError) as e:
        notes.append(str(e))
    return in_force_w


def _give_up(rig: Rig, enforced_w: list[float], notes: list[str]) -> None:
    """Write no board from here on; those already written are put back, so that the boards do not stand apart."""
    for i, actuator in enumerate(rig.actuators):
        try:
            actuator.restore()
            enforced_w[i] = rig.meters[i].read().enforced_limit_w
        except (PalsError, ValueError) as e:
            notes.append(str(e))
    rig.actuators = ()
