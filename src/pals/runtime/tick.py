"""One tick: read, decide, guard, apply, record; the only caller of `apply`.

The power limit is written before the active-sequence limit: a falling budget bites in firmware at once, a rising
target gets its watts first. A board or engine that fails is noted in the record and in the log; nothing is guessed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pals.control.estimator import over_budget_s, remember, violations
from pals.control.guard import Guard
from pals.core.errors import DeviceLostError, NotSupportedError, PermissionDeniedError
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
from pals.runtime.clock_locks import ClockLocks

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
    accepted_clocks_mhz: tuple[int | None, ...] = ()  # locks the driver accepted; measured is each board's sample
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
    lowering: str = "drain"  # how the engine gets under a lowered active-sequence limit
    locks: ClockLocks = field(default_factory=ClockLocks)

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


def tick(rig: Rig, state: TickState, budget: Budget, slo: Slo, now_s: float) -> tuple[TickRecord, TickState]:
    """Run one control period.

    Raises:
        EngineGoneError: the engine has ended; nothing was written in this tick.
    """
    notes: list[str] = []
    sample = read_sample(rig, state.window[-1] if state.window else None, now_s, notes)
    decision, controller = rig.controller.step(state.controller, sample, budget, slo, now_s)
    guarded = rig.guard.check(decision, budget)
    enforced = _apply(rig, guarded.point, sample, now_s, notes)
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
        accepted_clocks_mhz=tuple(rig.locks.in_force_mhz(i) for i in range(len(sample.boards))),
        mode=rig.mode,
        violations=violations(window, slo),
        over_budget_s=over_budget_s(since, budget),
        notes=tuple(notes),
    )
    for note in notes:
        log.warning("%s", note)
    return record, replace(
        state, controller=controller, index=state.index + 1, window=window, budget=budget, under_budget=since
    )


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
    rig: Rig, wanted: OperatingPoint, sample: TelemetrySample, now_s: float, notes: list[str]
) -> tuple[float, ...]:
    enforced: list[float] = [b.enforced_limit_w for b in sample.boards]
    if rig.actuators and len(sample.boards) == len(rig.actuators):
        enforced = []
        for i, actuator in enumerate(rig.actuators):
            accepted = _apply_to_board(
                rig, actuator, wanted, position=i, board=sample.boards[i], now_s=now_s, notes=notes
            )
            enforced.append(accepted)
            if accepted < wanted.power_limit_w - 0.5 and rig.actuators:
                notes.append(
                    f"board {i}: {wanted.power_limit_w:.0f} W asked, {accepted:.0f} W in force: "
                    "something else holds the limit lower (another agent, a BMC or the driver)"
                )
    if rig.setter is not None:
        sequences = wanted.active_sequences or rig.guard.launch_sequences
        rig.setter.apply(sequences, lease_s=LEASE_PERIODS * rig.period_s, lowering=rig.lowering)
    return tuple(enforced)


def _apply_to_board(
    rig: Rig,
    actuator: PowerActuator,
    wanted: OperatingPoint,
    *,
    position: int,
    board: PowerSample,
    now_s: float,
    notes: list[str],
) -> float:
    """Apply to one board; on refusal note it and return the limit that was in force."""
    try:
        return rig.locks.apply(position, actuator, wanted, board, now_s=now_s, notes=notes).power_limit_w
    except PermissionDeniedError as e:
        notes.append(f"{e} From here on PALS only advises: decisions are recorded, no board is written.")
        rig.actuators = ()
    except (NotSupportedError, DeviceLostError) as e:
        notes.append(str(e))
    return board.enforced_limit_w
