"""Visiting a point: set it, load the engine, let it settle, read it for a window; the sweep's only writer.

All boards of the engine are written in the same way as by the agent (`ClockLocks`), its active-sequence limit under a lease.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pals.core.errors import EngineGoneError, PalsError, PermissionDeniedError
from pals.core.load import Mix
from pals.core.protocols import EngineActuator
from pals.core.quantities import SAME_LIMIT_W, EngineSample, OperatingPoint, TelemetrySample
from pals.models.engine_facts import EngineFacts
from pals.models.observed import sequences_of
from pals.models.row import ProfileRow
from pals.profiler.costs import ENOUGH_REQUESTS, ENOUGH_TOKENS, generation_steps
from pals.profiler.design import Candidate
from pals.profiler.load import LoadDriver
from pals.profiler.plan import SweepPlan
from pals.profiler.window import Window, fault_of, row_of
from pals.runtime.loop import GridClock
from pals.runtime.tick import Rig, read_sample

TRIES = 3  # a window that does not count is measured again at most twice
LEASE_S = 15.0  # renewed at every reading
SETTLE_READ_S = 0.25
HURRY_AFTER_S = 8.0  # a change of load that takes longer at a slow point is made at full speed
SILENT_S = 10.0  # without a step while settling: no request reaches the engine, or it hangs
SILENT = f"the engine took no step for {SILENT_S:g} s; does the load reach it?"
POWER_SETTLED, POWER_WAIT_S = 0.05, 3.0  # two means of a second differ by less, or so long was waited for it
CROWDED, CROWDED_READS = (
    0.1,
    4,
)  # more wait than this share of the running, several readings in a row: they find no room
BALANCED = 0.04  # a window whose prompt tokens per output token are this near to the mix's is long enough


class Interrupted(Exception):
    """The sweep was told to stop; the rows so far are in the partial file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visited:
    """What came of a visit; `row` None: every window had a fault."""

    row: ProfileRow | None
    notes: tuple[str, ...]
    lock_refused: bool = False


class Since(NamedTuple):
    """A moment, and what the engine had done by then."""

    time_s: float
    engine: EngineSample


class Visitor:
    """Measures one point after the other; remembers which load runs."""

    def __init__(
        self, rig: Rig, setter: EngineActuator, plan: SweepPlan, *, load: LoadDriver, facts: EngineFacts, clock: GridClock,
        begun_s: float, known: Sequence[ProfileRow] = (),
    ) -> None:  # fmt: skip
        """`begun_s`: when the sweep began, by the clock; rows tell their time from there. `known`: rows of this sweep before."""
        self._rig, self._setter, self._plan, self._load = rig, setter, plan, load
        self._facts, self._clock, self._begun_s = facts, clock, begun_s
        self._full = OperatingPoint(power_limit_w=max(plan.limits_w))
        self._mix: Mix | None = None
        self._in_flight = 0
        crowded = [r for r in known if sequences_of(r, plan.mixes[r.mix], facts.step_tokens) < r.active_sequences]
        #: Requests that run at once, where that was found to be fewer than wanted.
        self._room = {plan.mixes[r.mix]: max(1, round(r.running)) for r in crowded}
        self._notes: list[str] = []
        ranks = re.search(r"dp(\d+)", rig.engine.info.parallelism)
        self._ranks = int(ranks[1]) if ranks else 1

    def measure(self, wanted: Candidate, *, until_s: float) -> Visited:
        """Measure `wanted`; a window with a fault again, unless it is past `until_s` of the clock.

        Raises:
            Interrupted: the clock said stop.
            EngineGoneError, PermissionDeniedError: as the parts raise them.
        """
        told = list[str]()
        for _ in range(TRIES):
            self._notes = []
            outcome = self._once(wanted)
            told += self._notes
            if isinstance(outcome, ProfileRow):
                return Visited(row=outcome, notes=tuple(told))
            told.append(outcome)
            refused = wanted.point.sm_clock_mhz is not None and self._rig.locks.in_force_mhz(0) is None
            if refused or self._clock.now_s() > until_s:
                return Visited(row=None, notes=tuple(told), lock_refused=refused)
        return Visited(row=None, notes=tuple(told))

    def _once(self, wanted: Candidate) -> ProfileRow | str:
        """A row, or why there is none."""
        mix, sequences = self._plan.mixes[wanted.mix], wanted.sequences
        try:
            self._setter.apply(sequences, lease_s=LEASE_S)
            if self._in_flight and mix != self._mix and not self._drain(mix, sequences):
                return SILENT
            accepted = self._write(wanted.point)
            if accepted.sm_clock_mhz != wanted.point.sm_clock_mhz:
                return f"no clock lock at {wanted.point.sm_clock_mhz} MHz is possible here"
            since = self._fill(wanted)
            if since is None:
                return SILENT
            settled = self._settle(mix, sequences, since)
            since_s = self._clock.now_s()
            samples = self._read_window(mix, sequences)
        except (EngineGoneError, PermissionDeniedError):
            raise
        except (PalsError, ValueError) as e:  # one point that cannot be set or read must not end the sweep
            return str(e)
        window = Window(
            point=replace(accepted, active_sequences=sequences), mix=wanted.mix, samples=samples,
            latencies=self._load.latencies(since_s), whole_requests=settled, ranks=self._ranks,
            at_s=self._clock.now_s() - self._begun_s,
        )  # fmt: skip
        if (fault := fault_of(window)) is not None:
            return fault
        row = row_of(window)
        self._note_room(samples, row)
        return row

    def _write(self, point: OperatingPoint) -> OperatingPoint:
        """Bring all boards to `point`; the lowest limit in force, and the lock where all accepted it."""
        now_s, boards = self._clock.now_s(), [meter.read() for meter in self._rig.meters]
        accepted = [
            self._rig.locks.apply(i, actuator, point, boards[i], now_s=now_s, notes=self._notes)
            for i, actuator in enumerate(self._rig.actuators)
        ]
        limit_w = min(p.power_limit_w for p in accepted)
        if max(p.power_limit_w for p in accepted) > limit_w:  # one board is held lower: the others go with it
            for i, actuator in enumerate(self._rig.actuators):
                lower = replace(point, power_limit_w=limit_w)
                self._rig.locks.apply(i, actuator, lower, boards[i], now_s=now_s, notes=self._notes)
        if limit_w < point.power_limit_w - SAME_LIMIT_W:
            self._notes.append(f"{point.power_limit_w:.0f} W asked, {limit_w:.0f} W in force: something holds it lower")
        locked = all(p.sm_clock_mhz == point.sm_clock_mhz for p in accepted)
        return OperatingPoint(power_limit_w=limit_w, sm_clock_mhz=point.sm_clock_mhz if locked else None)

    def _drain(self, mix: Mix, sequences: int) -> bool:
        """Let the requests of another mix end, at full speed, before those of `mix` are sent; False: the engine took no step."""
        self._write(self._full)
        since = self._now()
        old = since.engine.running + since.engine.waiting
        self._keep(mix, 1)  # the first of them goes when the last of the others has ended
        while True:
            self._wait(SETTLE_READ_S, sequences)
            now = self._now()
            elapsed_s = now.time_s - since.time_s
            ended = now.engine.finished_requests + now.engine.aborted_requests
            if ended - since.engine.finished_requests - since.engine.aborted_requests >= old:
                return True
            if elapsed_s > SILENT_S and now.engine.steps == since.engine.steps:
                return False
            if elapsed_s > self._plan.longest_turnover_s:
                return True

    def _fill(self, wanted: Candidate) -> Since | None:
        """Bring the engine to the point's batch; since when it is at the point. None: it took no step.

        A larger batch is filled over one generation, so that requests of all ages run. What lasts is done at full speed.
        """
        mix, sequences = self._plan.mixes[wanted.mix], wanted.sequences
        from_n, since = min(self._in_flight, sequences), self._now()
        filling, crowded, hurried = generation_steps(mix, sequences, self._facts), 0, False
        while True:
            now = self._now()
            elapsed_s, steps = now.time_s - since.time_s, (now.engine.steps - since.engine.steps) / self._ranks
            filled = 1.0 if from_n == sequences else min(1.0, steps / mix.output_tokens)
            self._keep(mix, round(from_n + (sequences - from_n) * filled))
            queue = now.engine.waiting > 2 + CROWDED * now.engine.running
            room = now.engine.running >= sequences  # a queue then is what a larger batch left behind; it ends by itself
            crowded = crowded + 1 if steps >= filling and queue and not room else 0
            if crowded == CROWDED_READS:
                self._take_back(mix, now.engine)
            if steps == 0 and elapsed_s > SILENT_S:
                return None
            done = steps > 0 and filled == 1.0 and now.engine.running <= sequences and not queue
            if done or elapsed_s > self._plan.longest_turnover_s:
                break
            if elapsed_s > HURRY_AFTER_S and not hurried:
                hurried = True
                self._write(self._full)
            self._wait(SETTLE_READ_S, sequences)
        if hurried:
            self._write(wanted.point)
        return self._now() if hurried else since

    def _settle(self, mix: Mix, sequences: int, since: Since) -> bool:
        """Wait until power is steady and a generation of requests has run at the point, or long enough.

        Returns whether requests that end from now on ran wholly at the point.
        """
        plan, power = self._plan, PowerTrend()
        needed = generation_steps(mix, sequences, self._facts)
        while True:
            sample = self._read()
            steps = (self._engine(sample).steps - since.engine.steps) / self._ranks
            elapsed_s = sample.time_s - since.time_s
            power.add(sample)
            calm = power.settled or elapsed_s >= plan.settle_s + POWER_WAIT_S
            if elapsed_s >= plan.settle_s and steps >= needed and calm:
                return True
            too_slow = steps * plan.longest_settle_s < mix.output_tokens * elapsed_s  # no generation ends in time
            if elapsed_s >= (plan.settle_s + POWER_WAIT_S if too_slow else plan.longest_settle_s):
                return steps >= mix.output_tokens
            self._wait(SETTLE_READ_S, sequences)

    def _take_back(self, mix: Mix, engine: EngineSample) -> None:
        """Keep no more requests in flight than find room: a queue would only delay first tokens and the next point."""
        self._room[mix] = max(1, engine.running)
        self._notes.append(f"{engine.running} requests run and {engine.waiting} find no room: fewer are kept in flight")

    def _keep(self, mix: Mix, in_flight: int) -> None:
        in_flight = max(1, min(in_flight, self._room.get(mix, in_flight)))
        if (mix, in_flight) != (self._mix, self._in_flight):
            self._load.set_load(mix, in_flight)
            self._mix, self._in_flight = mix, in_flight

    def _read_window(self, mix: Mix, sequences: int) -> list[TelemetrySample]:
        """Read until there are tokens and requests enough, in the mix's proportion, or the longest window is over."""
        plan, samples = self._plan, [self._read()]
        self._keep(mix, sequences)
        while True:
            self._wait(plan.read_s, sequences)
            samples.append(self._read())
            span_s = samples[-1].time_s - samples[0].time_s + 1e-6
            if span_s >= plan.longest_window_s or samples[-1].absent:
                return samples
            if span_s >= plan.window_s and enough(samples[0].engine, samples[-1].engine, mix):
                return samples

    def _note_room(self, samples: list[TelemetrySample], row: ProfileRow) -> None:
        preempted = self._engine(samples[-1]).preemptions - self._engine(samples[0]).preemptions
        if preempted > 0:
            self._notes.append(
                f"{preempted} requests were preempted for lack of KV cache: {row.running:.1f} of {row.active_sequences} ran"
            )

    def _now(self) -> Since:
        return Since(self._clock.now_s(), self._rig.engine.read())

    def _read(self) -> TelemetrySample:
        return read_sample(self._rig, None, self._clock.now_s(), [])

    @staticmethod
    def _engine(sample: TelemetrySample) -> EngineSample:
        if sample.engine is None:
            raise PalsError("the engine told nothing of itself; the boards stay as they are until they are put back")
        return sample.engine

    def _wait(self, seconds: float, sequences: int) -> None:
        """Wait, and renew the engine's lease."""
        if self._clock.wait(seconds):
            raise Interrupted
        self._setter.apply(sequences, lease_s=LEASE_S + seconds)


class PowerTrend:
    """Whether the mean power of the last second is that of the second before."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, float]] = []  # time, energy of all boards

    def add(self, sample: TelemetrySample) -> None:
        """Take a reading; boards without a counter are left out."""
        self._seen.append((sample.time_s, sum(b.energy_j for b in sample.boards if b.energy_j is not None)))

    @property
    def settled(self) -> bool:
        """See the class; True on boards without counters."""
        n = round(1.0 / SETTLE_READ_S)
        if len(self._seen) <= 2 * n:
            return False
        (t0, e0), (t1, e1), (t2, e2) = (self._seen[-1 - k * n] for k in (2, 1, 0))
        if e2 == e0 or min(t1 - t0, t2 - t1) <= 0:
            return True
        before_w, now_w = (e1 - e0) / (t1 - t0), (e2 - e1) / (t2 - t1)
        return abs(now_w - before_w) <= POWER_SETTLED * max(now_w, before_w)


def enough(first: EngineSample | None, last: EngineSample | None, mix: Mix) -> bool:
    """Whether a window holds enough requests and tokens, prompts and outputs in about the mix's proportion."""
    if first is None or last is None:
        return False
    tokens = last.output_tokens - first.output_tokens
    requests = last.finished_requests - first.finished_requests
    if tokens < ENOUGH_TOKENS or requests < ENOUGH_REQUESTS:
        return False
    proportion = (last.prefill_tokens - first.prefill_tokens) / tokens / mix.prefill_per_output
    return abs(proportion - 1.0) <= BALANCED
