"""One tick: read, decide, guard, apply, record; the only caller of `apply`.

The power limit is written before the active-sequence limit: a falling budget bites in firmware at once, a rising
target gets its watts first. A board or engine that fails is noted in the record and in the log; nothing is guessed: a board
that cannot be read is absent from the sample, and what it may draw is kept for it out of the budget.

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
from pals.core.errors import PalsError, PermissionDeniedError
from pals.core.protocols import (
    AnyController,
    EngineActuator,
    EngineMeter,
    ExpertMeter,
    FollowsLater,
    PowerActuator,
    PowerMeter,
    WatchesProfile,
)
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
from pals.runtime.staleness import stale_notes

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
    mode: str  # one of MODES
    violations: dict[str, int] = field(default_factory=dict)
    over_budget_s: float = 0.0  # this period, if the mean power since the budget last changed, at most 2 s, exceeds it
    notes: tuple[str, ...] = ()
    correction: dict[str, float] = field(default_factory=dict)  # measured over the profile's prediction, learnt slowly
    drift: dict[str, float] = field(default_factory=dict)  # the same when a drift was found, while it lasts


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
    experts: ExpertMeter | None = None  # None: routing is not measured, or not to be used
    lowering: str = "drain"  # how the engine gets under a lowered active-sequence limit
    acting: str = "auto"  # the mode while something may be written: "auto" or "canary"
    locks: ClockLocks = field(default_factory=ClockLocks)
    stuck: frozenset[int] = frozenset()  # positions of boards that did not follow last time; they are asked first
    limits_w: dict[int, float] = field(default_factory=dict)  # last known in force, by position
    said: set[str] = field(default_factory=set)  # notes that are made once
    watch: WatchesProfile | None = field(init=False)  # the controller, where it watches its profile

    def __post_init__(self) -> None:
        self.watch = self.controller if isinstance(self.controller, WatchesProfile) else None

    @property
    def mode(self) -> str:
        """The mode asked for while something may be written, else "advise"."""
        return self.acting if self.actuators or self.setter else "advise"

    def reserve_w(self, position: int) -> float:
        """What a board that cannot be read may draw: the limit last known in force, else the highest allowed."""
        return self.limits_w.get(position, self.guard.max_limit_w)

    def once(self, note: str) -> list[str]:
        """`note`, unless it was made before."""
        if note in self.said:
            return []
        self.said.add(note)
        return [note]


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
    news = rig.watch.tell(controller) if rig.watch is not None else None
    guarded = rig.guard.check(decision, budget)
    enforced = _apply(rig, guarded, budget, sample, now_s, notes)
    if news is not None:
        notes += news.notes
    window = remember(state.window, sample, VIOLATION_PERIODS)
    since = () if budget != state.budget else remember(state.under_budget, sample, VIOLATION_PERIODS - 1)
    record = TickRecord(
        index=state.index,
        sample=sample,
        budget=budget,
        slo=slo,
        decision=decision,
        guarded=guarded,
        enforced_limits_w=tuple(p.power_limit_w for p in enforced),
        accepted_clocks_mhz=tuple(p.sm_clock_mhz for p in enforced),
        mode=rig.mode,
        violations=violations(window, slo),
        over_budget_s=over_budget_s(since, budget),
        notes=tuple(notes),
        correction=news.bias if news is not None else {},
        drift=news.drift if news is not None else {},
    )
    for note in notes:
        if note not in state.notes:
            log.warning("%s", note)
    return record, replace(
        state, controller=controller, index=state.index + 1, window=window, budget=budget, under_budget=since,
        notes=tuple(notes),
    )  # fmt: skip


def read_sample(rig: Rig, previous: TelemetrySample | None, now_s: float, notes: list[str]) -> TelemetrySample:
    """Read boards and engine; a board that cannot be read is absent and noted, an engine that stands still is noted.

    Raises:
        EngineGoneError: the engine has ended.
    """
    boards, absent = list[PowerSample](), list[int]()
    for i, meter in enumerate(rig.meters):
        try:
            board = meter.read()
        except (PalsError, ValueError) as e:  # whatever it is, one board must not end what steers the others
            notes.append(str(e))
            absent.append(i)
            continue
        boards.append(board)
        rig.limits_w[i] = board.enforced_limit_w
        if board.energy_j is None:
            told = (
                "has no energy counter; its power is the mean of the driver's own readings, which may lag by a second"
            )
            notes += rig.once(f"board {meter.info.index} {told}")
    for i in previous.absent if previous is not None else ():
        if i not in absent:
            notes.append(f"board {rig.meters[i].info.index} can be read again")
    whole = previous is not None and not previous.absent and not absent
    engine = rig.engine.read()
    notes += stale_notes(engine, now_s)
    experts = rig.experts.read() if rig.experts is not None else None
    if rig.experts is not None and rig.experts.note is not None:
        notes += rig.once(rig.experts.note)
    return TelemetrySample(
        time_s=now_s,
        window_s=now_s - previous.time_s if previous is not None else 0.0,
        boards=tuple(boards),
        power_w=mean_power_w(previous.boards, boards) if previous is not None and whole else None,
        engine=engine,
        absent=tuple(absent),
        experts=experts,
    )


def mean_power_w(before: Sequence[PowerSample], after: Sequence[PowerSample]) -> float | None:
    """Mean power of all boards between two readings of the same ones, W; None where a counter stood still.

    From the energy counters; of a board without one, the mean of the driver's two power readings.
    """
    if not after or len(before) != len(after):
        return None
    total_w = 0.0
    for a, b in zip(before, after, strict=True):
        if b.time_s <= a.time_s:
            return None
        if a.energy_j is None or b.energy_j is None:
            total_w += (a.power_w + b.power_w) / 2
        elif b.energy_j > a.energy_j:
            total_w += (b.energy_j - a.energy_j) / (b.time_s - a.time_s)
        else:
            return None
    return total_w


def _apply(
    rig: Rig, guarded: Decision, budget: Budget, sample: TelemetrySample, now_s: float, notes: list[str]
) -> tuple[OperatingPoint, ...]:
    """Write boards, then engine; return what each board of the sample then has in force."""
    wanted = guarded.point
    boards = dict(zip(sample.positions, sample.boards, strict=True))
    in_force = {
        i: OperatingPoint(power_limit_w=b.enforced_limit_w, sm_clock_mhz=rig.locks.in_force_mhz(i))
        for i, b in boards.items()
    }
    if rig.actuators:
        try:
            _apply_together(rig, wanted, budget, boards, in_force, now_s, notes)
        except PermissionDeniedError as e:
            notes.append(
                f"{e} From here on PALS only advises: decisions are recorded, no board is written, and the engine returns to "
                "its launch limit."
            )
            _give_up(rig, in_force, notes)
    rig.limits_w |= {i: p.power_limit_w for i, p in in_force.items()}
    if rig.setter is not None:
        sequences = wanted.active_sequences or rig.guard.launch_sequences
        rig.setter.apply(
            sequences, lease_s=LEASE_PERIODS * rig.period_s, lowering=rig.lowering, most_waiting=guarded.most_waiting
        )
        if guarded.most_waiting is not None:
            notes += _cannot_refuse(rig)
    return tuple(in_force.values())


def _cannot_refuse(rig: Rig) -> list[str]:
    """A note, made once, where nobody refuses requests for this engine."""
    if rig.engine.info.capabilities.get("refuse", False):
        return []
    return rig.once(
        "admission control is not available: no API server of this engine refuses requests, and the queue grows as it may. "
        "Start vLLM with `pals serve`, or with --middleware pals.engines.admission_middleware.AdmissionMiddleware"
    )


def _apply_together(
    rig: Rig,
    wanted: OperatingPoint,
    budget: Budget,
    boards: dict[int, PowerSample],
    in_force: dict[int, OperatingPoint],
    now_s: float,
    notes: list[str],
) -> None:
    """Bring all boards that could be read to one point; `in_force` is updated with what is read back.

    Raises:
        PermissionDeniedError: some boards may have been written.
    """
    absent_w = {i: rig.reserve_w(i) for i in range(len(rig.meters)) if i not in boards}
    common, stuck_w = _beside_absent(rig, wanted, budget, absent_w, notes), dict[int, float]()
    for i in sorted(boards, key=lambda i: i not in rig.stuck):
        in_force[i] = _write(rig, i, common, boards[i], in_force[i], now_s, notes)
        notes += _other_hand(rig, i)
        limit_w = in_force[i].power_limit_w
        if abs(limit_w - common.power_limit_w) > 0.5 and not _follows(rig, i, common.power_limit_w):
            stuck_w[i] = limit_w
            beside_w = rig.guard.limit_beside(
                tuple(stuck_w.values()), common.power_limit_w, budget, tuple(absent_w.values())
            )
            notes.append(_told_stuck(rig, i, common.power_limit_w, limit_w, beside_w))
            common = replace(common, power_limit_w=beside_w)
    for i, point in in_force.items():
        if i not in stuck_w and point.power_limit_w > common.power_limit_w + 0.5:
            in_force[i] = _write(rig, i, common, boards[i], point, now_s, notes)
    rig.stuck = frozenset(stuck_w)


def _follows(rig: Rig, position: int, limit_w: float) -> bool:
    """Whether a board that stands lower now will come to `limit_w` by itself."""
    actuator = rig.actuators[position]
    follows_w = actuator.follows_w if isinstance(actuator, FollowsLater) else None
    return follows_w is not None and abs(follows_w - limit_w) <= 0.5


def _beside_absent(
    rig: Rig, wanted: OperatingPoint, budget: Budget, absent_w: dict[int, float], notes: list[str]
) -> OperatingPoint:
    """`wanted`, less where boards that cannot be read may draw their part of the budget."""
    if not absent_w:
        return wanted
    limit_w = rig.guard.limit_beside((), wanted.power_limit_w, budget, tuple(absent_w.values()))
    if limit_w < wanted.power_limit_w:
        names = ", ".join(f"board {rig.meters[i].info.index} may draw {w:.0f} W unseen" for i, w in absent_w.items())
        notes.append(
            f"{names}: the engine's other boards go to {limit_w:.0f} W instead of {wanted.power_limit_w:.0f} W"
        )
    return replace(wanted, power_limit_w=limit_w)


def _other_hand(rig: Rig, position: int) -> list[str]:
    """A note, made once, where somebody else set this board's limit."""
    limit_w = rig.actuators[position].other_hand_w
    if limit_w is None:
        return []
    index = rig.meters[position].info.index
    return rig.once(
        f"board {index}: somebody else set {limit_w:.0f} W; PALS stays at or below it and leaves it so on exit"
    )


def _told_stuck(rig: Rig, position: int, asked_w: float, in_force_w: float, others_w: float) -> str:
    index = rig.meters[position].info.index
    why = "something else holds the limit lower (another agent, a BMC or the driver)" if in_force_w < asked_w else ""
    beside = f"the engine's other boards go to {others_w:.0f} W" if len(rig.meters) > 1 else ""
    told = "; ".join(t for t in (why, beside) if t)
    return f"board {index}: {asked_w:.0f} W asked, {in_force_w:.0f} W in force{f': {told}' if told else ''}"


def _write(
    rig: Rig,
    i: int,
    wanted: OperatingPoint,
    board: PowerSample,
    in_force: OperatingPoint,
    now_s: float,
    notes: list[str],
) -> OperatingPoint:
    """Write one board; on refusal note it and return what was in force.

    Raises:
        PermissionDeniedError: this process may not write.
    """
    try:
        return rig.locks.apply(i, rig.actuators[i], wanted, board, now_s=now_s, notes=notes)
    except PermissionDeniedError:
        raise
    except (PalsError, ValueError) as e:
        notes.append(str(e))
    return in_force


def _give_up(rig: Rig, in_force: dict[int, OperatingPoint], notes: list[str]) -> None:
    """Write nothing from here on; boards already written are put back, so that they do not stand apart."""
    for i, actuator in enumerate(rig.actuators):
        try:
            actuator.restore()
            rig.locks.released(i)
            if i in in_force:
                in_force[i] = OperatingPoint(power_limit_w=rig.meters[i].read().enforced_limit_w)
        except (PalsError, ValueError) as e:
            notes.append(str(e))
    if rig.setter is not None:
        rig.setter.release()
    rig.actuators, rig.setter = (), None
