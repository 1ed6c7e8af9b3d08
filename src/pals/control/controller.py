"""The `pals` policy: the operating point with the fewest predicted joules per token that keeps every target, within the budget.

A tick learns from its sample (demand, bias of the profile, margins), forecasts every candidate, and moves only where that is needed
or pays: at once and as far as needed where a target is in danger or the budget fell, slowly where only energy is to be saved.
Equations and constants: docs/controller.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import exp, log
from typing import NamedTuple

import numpy as np

from pals.control.choice import (
    ALL,
    NO_TTFT,
    Excess,
    Pick,
    best,
    excess,
    most_waiting,
    needed_tokens_s,
    rate_room,
    spare_of,
)
from pals.control.correction import Correction
from pals.control.demand import Demand, observe
from pals.control.guard import Guard
from pals.control.lever_table import FREE, POWER, TOKENS, Lever, LeverTables, MixKey, Rows, key_of
from pals.control.margins import NEAR, Margins, learned, spared
from pals.control.outlook import CLOSED, FULL, OPEN, Asked, Bias, Boards, Outlook, outlook
from pals.control.reasons import told_held, told_move, told_sacrifice
from pals.control.trust import Trust, judge
from pals.control.worth import EVERY_S, Worth, worth_of
from pals.core.errors import ConfigError
from pals.core.quantities import Budget, Decision, OperatingPoint, Slo, TelemetrySample
from pals.models.fitted import Fitted
from pals.models.forecast import FloatArray
from pals.models.node_power import FEWEST, MOST
from pals.models.parameters import values_of

OBJECTIVES = ("node", "gpu")
PERIOD_S = 0.5  # a guess at the first tick
LOCK_SLACK_MHZ = 30  # a lock is in force where no board runs faster
BATCHES = 7  # levels of the active-sequence limit


@dataclass(frozen=True, slots=True, kw_only=True)
class PalsSettings:
    """Constants of the policy; a run may change them, a user need not."""

    objective: str = "node"  # whose joules: the node's, estimated, or the boards' alone
    benefit: float = 0.02  # share of the joules per token that a move must save
    dwell_s: float = 8.0  # after a move, before the next one that only saves
    longest_dwell_s: float = 60.0  # a saving that had to be taken back doubles the dwell, up to here
    calm_s: float = 60.0  # a saving that stood for so long was no mistake
    room: float = 0.07  # of a logarithm: so far below its targets a point must stay to be moved to for a saving
    rise: float = 0.12  # the same for a move that targets ask for, where one reaches so far: not step by step
    slowest: float = 0.7  # a move that only saves leaves so much of the clock
    surge_s: float = (
        4.0  # a queue is answered at once by more speed, for at least so long; twice as long where it comes again soon
    )
    longest_surge_s: float = 30.0  # a surge that lasts longer is the load
    settle_s: float = 3.0  # after a move, before its figures teach anything
    bias_window_s: float = 8.0  # one lesson
    bias_memory_s: float = 60.0
    use_clock: bool = True
    use_limit: bool = True
    use_batch: bool = True
    use_bias: bool = True  # correct the profile by what is measured
    use_margins: bool = True  # stay below targets by intervals and experience
    use_queue: bool = True  # look at who waits


class Window(NamedTuple):
    """Figures of the point in force, summed up since they teach."""

    since_s: float
    tokens: int
    busy_s: float
    energy_j: float | None
    running: float = 0.0
    ticks: int = 0


class Surge(NamedTuple):
    """More speed for those who wait now: where to go back to, and since when."""

    lever: Lever
    batch: int | None
    since_s: float


class Move(NamedTuple):
    """Where to, and why: "targets", "queue", "calm", "efficiency"; "hold" where no better point exists."""

    pick: Pick
    reason: str


class State(NamedTuple):
    """What the policy remembers."""

    demand: Demand = Demand()
    margins: Margins = Margins()
    bias: Bias = Bias()
    lessons: int = 0
    key: MixKey | None = None
    lever: Lever = FREE
    batch: int | None = None  # None: the launch batch
    moved_s: float = -1e9  # last move of any kind
    saved_s: float = -1e9  # last move that only saved
    surged_s: float = -1e9  # last move for a queue
    dwell_s: float = 0.0
    surge: Surge | None = None
    surge_hold_s: float = 0.0
    gave_up: bool = False  # whether the point in force misses a target that no other point keeps
    tested: tuple[bool, bool] = (False, False)  # whether TTFT and TPOT of the point in force are near their targets
    window: Window | None = None
    ceiling_w: float = 0.0
    trust: Trust = Trust()
    why: tuple[str, str] = (
        "start",
        "nothing is known of the load yet: the limit found, no clock lock, the launch batch",
    )
    refusing_s: float | None = None  # since when the queue is bounded
    worth: Worth = Worth()


class PalsPolicy:
    """See the module."""

    def __init__(self, fitted: Fitted, guard: Guard, settings: PalsSettings | None = None) -> None:
        """Steer boards that `guard` bounds, by what `fitted` says of them.

        Raises:
            ConfigError: an unknown objective, or no power limit that was measured may be asked.
        """
        self.settings = s = settings or PalsSettings()
        if s.objective not in OBJECTIVES:
            raise ConfigError(f"objective {s.objective!r}: known are {', '.join(OBJECTIVES)}. Nothing was written")
        self._guard, self._launch = guard, guard.launch_sequences
        launch = guard.launch_sequences
        levels = (
            np.unique(np.round(np.geomspace(max(1, launch // 16), launch, BATCHES)))
            if s.use_batch
            else np.array([float(launch)])
        )
        self._batches: FloatArray = levels[::-1].astype(float)  # the launch batch first
        try:
            self._tables = LeverTables(fitted, guard, self._batches)
        except ValueError as e:
            raise ConfigError(f"policy pals cannot use this profile: {e}. Nothing was written") from e
        node = guard.boards / FEWEST if guard.boards < FEWEST else max(1.0, guard.boards / MOST)
        idle_w = float(values_of(fitted.x).static) * fitted.base.static_w * guard.boards
        self._boards = Boards(idle_w, node if s.objective == "node" else 0.0)
        self._prior = fitted.mixes[0]

    def initial(self) -> State:
        """Nothing known: the boards as found."""
        return State()

    def step(
        self, state: State, sample: TelemetrySample, budget: Budget, slo: Slo, now_s: float
    ) -> tuple[Decision, State]:
        """The decision for this tick; see the module."""
        return self.step_corrected(state, sample, budget, slo, now_s, _NOTHING_LEARNT)

    def step_corrected(
        self, state: State, sample: TelemetrySample, budget: Budget, slo: Slo, now_s: float, correction: Correction
    ) -> tuple[Decision, State]:
        """The same, knowing whether the profile has drifted."""
        ceiling_w = max(self._guard.min_limit_w, self._guard.ceiling_w(budget))
        trust = judge(state.trust, sample, self._guard, now_s)
        state = state._replace(trust=trust)
        if trust.broken is not None:
            return self._safe(state, ceiling_w, "telemetry", trust.broken, now_s)
        engine = sample.engine
        assert engine is not None  # for the type checker: it would be broken
        state = self._learn(state, sample, slo, now_s)
        d = state.demand
        if d.in_flight == 0:
            return self._decision(state, ceiling_w, "idle", "no request is inside: the point stays"), state._replace(
                ceiling_w=ceiling_w
            )
        if not d.known:
            return self._safe(
                state,
                ceiling_w,
                "learning",
                f"{int(d.counted.finished)} requests have ended so far: their lengths are not known yet",
                now_s,
            )
        key = key_of(d.prompt_tokens, d.output_tokens, d.cached_tokens, state.key)
        rows = self._tables.rows(key, ceiling_w)
        if rows is None:
            told = (
                f"{d.prompt_tokens:.0f} tokens in and {d.output_tokens:.0f} out lie outside what the profile measured"
            )
            return self._safe(state._replace(key=key), ceiling_w, "outside-profile", told, now_s)
        state = state._replace(key=key)
        wider = 1.5 if correction.told.drift else 1.0
        asked = self._asked(d, rows, state.bias, sample.window_s or PERIOD_S, tail=_has_tail(slo))
        if budget.power_w is not None and now_s - state.worth.at_s >= EVERY_S:
            state = self._weigh(state, asked, slo, wider, now_s)
        return self._choose(state, rows, asked, slo, now_s, wider)

    def worth(self, state: State) -> tuple[tuple[float, float], ...]:
        """What its share of a budget is worth to the engine, see `WorthOfWatts`; known only while there is a budget."""
        return state.worth.points

    def needed_w(self, state: State) -> float | None:
        """The share that its targets need, see `WorthOfWatts`."""
        return state.worth.needed_w

    # ---- learning -------------------------------------------------------------------------------------------------

    def _learn(self, state: State, sample: TelemetrySample, slo: Slo, now_s: float) -> State:
        """Demand, margins and bias with one more sample."""
        engine, before = sample.engine, state.demand.before
        assert engine is not None
        demand = observe(state.demand, engine, now_s, sample.window_s or PERIOD_S)
        in_force, margins = self._in_force(state, sample), state.margins
        windable = not state.gave_up  # where no point is better a margin would only wind up
        if before is not None and engine.steps >= before.steps and self.settings.use_margins:
            tested = (in_force and state.tested[0], in_force and state.tested[1])
            margins = learned(margins, before, engine, slo, tested, windable=windable)
            if in_force and now_s - state.moved_s >= self.settings.settle_s:
                pressed = engine.waiting > 0 or demand.closed(sample.window_s or PERIOD_S)
                wanted = slo.throughput_tokens_s
                rate = spared(margins.rate, demand.tokens_per_s, wanted, pressed=pressed, windable=windable)
                margins = margins._replace(rate=rate)
        state = state._replace(demand=demand, margins=margins)
        return self._learn_bias(state, sample, now_s, in_force) if self.settings.use_bias else state

    def _learn_bias(self, state: State, sample: TelemetrySample, now_s: float, in_force: bool) -> State:
        """Compare what the point in force does with what the profile says of it."""
        s, engine, w = self.settings, sample.engine, state.window
        assert engine is not None
        if not in_force or now_s - state.moved_s < s.settle_s or engine.running == 0 or state.key is None:
            return state._replace(window=None)
        if w is None:
            return state._replace(window=Window(now_s, engine.output_tokens, engine.busy_s, 0.0))
        energy_j = (
            None if w.energy_j is None or sample.power_w is None else w.energy_j + sample.power_w * sample.window_s
        )
        running = min(engine.running, engine.scheduled if engine.scheduled is not None else engine.running)
        w = w._replace(energy_j=energy_j, running=w.running + running, ticks=w.ticks + 1)
        if now_s - w.since_s < s.bias_window_s - 1e-6:
            return state._replace(window=w)
        state = state._replace(window=Window(now_s, engine.output_tokens, engine.busy_s, 0.0))
        rows = self._tables.rows(state.key, state.ceiling_w)
        position = rows.position(state.lever) if rows is not None else None
        busy_s, span_s = engine.busy_s - w.busy_s, now_s - w.since_s
        if rows is None or position is None or busy_s < 0.8 * span_s:
            return state
        expected = rows.of(position, max(1.0, w.running / w.ticks))
        measured, predicted, drawn_w = (engine.output_tokens - w.tokens) / busy_s, expected[TOKENS], expected[POWER]
        gain = max(1.0 / (state.lessons + 2.0), s.bias_window_s / s.bias_memory_s)
        step = _moved(state.bias.step, predicted / max(measured, 1e-9), gain)
        power = (
            state.bias.power if w.energy_j is None else _moved(state.bias.power, w.energy_j / span_s / drawn_w, gain)
        )
        return state._replace(bias=Bias(step, power), lessons=state.lessons + 1)

    def _in_force(self, state: State, sample: TelemetrySample) -> bool:
        """Whether boards and engine do what was decided: a canary's other windows, and other hands, teach nothing."""
        assert sample.engine is not None
        wanted = self._point(state, state.ceiling_w)
        limits = all(abs(b.enforced_limit_w - wanted.power_limit_w) <= 2.0 for b in sample.boards)
        locked = wanted.sm_clock_mhz is None or all(
            b.sm_clock_mhz <= wanted.sm_clock_mhz + LOCK_SLACK_MHZ for b in sample.boards
        )
        return limits and locked and sample.engine.active_limit == wanted.active_sequences

    # ---- deciding -------------------------------------------------------------------------------------------------

    def _asked(self, d: Demand, rows: Rows, bias: Bias, period_s: float, *, tail: bool) -> Asked:
        """The demand, and its kind."""
        asked = d.arrivals_per_s * d.output_tokens
        most = float(rows.rates[0, -1]) / bias.step
        closed = d.closed(period_s)
        kind = CLOSED if closed else FULL if asked > 0.97 * most and d.in_flight >= self._launch else OPEN
        queue = self.settings.use_queue
        return Asked(
            kind, asked, d.output_tokens, d.prompt_tokens, float(d.in_flight), d.running, d.waiting if queue else 0, d.oldest_s if queue else 0.0,
            d.places, tail,
        )  # fmt: skip

    def _weigh(self, state: State, a: Asked, slo: Slo, wider: float, now_s: float) -> State:
        """What watts are worth, were there no budget."""
        rows = self._tables.rows(state.key, self._guard.max_limit_w) if state.key is not None else None
        if rows is None:
            return state._replace(worth=Worth(now_s))
        o = outlook(rows, self._batches[:1], a, state.bias, self._boards)
        return state._replace(
            worth=worth_of(state.worth, rows, o, self._excess(state, rows, o, a, slo, wider), self._guard, now_s)
        )

    def _excess(self, state: State, rows: Rows, o: Outlook, a: Asked, slo: Slo, wider: float) -> Excess:
        """What every candidate misses."""
        found = self._tables.rows(state.key, self._guard.max_limit_w) if state.key is not None else None
        inside = min(float(self._launch), a.inside) if a.kind == CLOSED else float(self._launch)
        most_found, most_now = (r.most_per_s(inside) / state.bias.step for r in (found or rows, rows))
        needed = needed_tokens_s(a, slo, most_found, most_now)
        margins = state.margins if self.settings.use_margins else Margins(0.0, 0.0, 0.0)
        return excess(o, a, slo, needed, margins, wider, spare_of(slo, needed, most_found, margins))

    def _choose(
        self, state: State, rows: Rows, a: Asked, slo: Slo, now_s: float, wider: float
    ) -> tuple[Decision, State]:
        """Hold the point in force, or move."""
        s = self.settings
        o = outlook(rows, self._batches[: 1 if self._launch_suffices(state, a) else None], a, state.bias, self._boards)
        e = self._excess(state, rows, o, a, slo, wider)
        among = self._usable(rows, o)
        if o.cost_j.shape[1] < len(self._batches) and not (e.lasting() & among).any():
            o = outlook(rows, self._batches, a, state.bias, self._boards)
            e, among = self._excess(state, rows, o, a, slo, wider), self._usable(rows, o)
        if state.surge is not None and now_s - state.surge.since_s > s.longest_surge_s:
            state = state._replace(surge=None)  # it is the load
        move = self._decide(state, o, e, a, rows, among, now_s)
        here = self._here(state.lever, state.batch, rows)
        pick = here if move is None else move.pick
        gave_up = pick.given_up != ALL and move is not None and move.reason == "hold"
        state = self._remember(state._replace(ceiling_w=rows.ceiling_w, gave_up=gave_up), e, pick)
        reason = "hold" if move is None else move.reason
        if reason != "hold":
            told = told_move(rows, o, here, pick, a, slo, self._batches, state.lever, reason, self._guard.boards)
            batch = int(self._batches[pick.batch])
            state = self._after_move(
                state, rows.levers[pick.lever], None if batch >= self._launch else batch, now_s, reason
            )
        elif pick.given_up == ALL and state.why[0] == "hold":
            told = state.why[1]  # of the last move: why the engine stands here
        else:
            told = told_held(o, pick, a, slo)
        if pick.given_up != ALL:
            only_queue = pick.given_up == NO_TTFT and bool(e.lasting()[pick.lever, pick.batch])
            reason, told = "queue" if only_queue else "sacrifice", told_sacrifice(told, pick, only_queue=only_queue)
        bound, state = self._bound(state, o, pick, a, slo, now_s)
        state = state._replace(why=("hold" if pick.given_up == ALL else reason, told))
        return replace(self._decision(state, rows.ceiling_w, reason, told), most_waiting=bound), state

    def _launch_suffices(self, state: State, a: Asked) -> bool:
        """Whether smaller batches need no look: where requests arrive by themselves they only make them wait."""
        return a.kind == OPEN and state.batch is None and (state.surge is None or state.surge.batch is None)

    def _usable(self, rows: Rows, o: Outlook) -> np.ndarray:
        """Levers that may be used and that bind: one that does not is left as found."""
        s = self.settings
        ok = np.ones(o.cost_j.shape, dtype=bool)
        if not (s.use_limit and s.use_clock):
            ok[
                [
                    i
                    for i, x in enumerate(rows.levers)
                    if (x.limit_w and not s.use_limit) or (x.clock_mhz and not s.use_clock)
                ]
            ] = False
        limits_w = rows.limits_w[:, None] * self._guard.boards
        ok &= limits_w < np.where(limits_w > 0, o.natural_w, np.inf)
        slack = self._batches[: o.cost_j.shape[1]] >= np.maximum(o.running, 1.0)
        ok[:, 1:] &= ~(slack[:, 1:] & slack[:, :-1])  # of batches that hold nobody back only the largest
        return ok

    def _here(self, lever: Lever, sequences: int | None, rows: Rows) -> Pick:
        """Where a candidate stands; a lever that is gone (a limit above the ceiling) is the ceiling itself."""
        position = rows.position(lever)
        batch = float(sequences or self._launch)
        return Pick(position if position is not None else 0, int(np.argmin(np.abs(self._batches - batch))))

    def _decide(
        self, state: State, o: Outlook, e: Excess, a: Asked, rows: Rows, among: np.ndarray, now_s: float
    ) -> Move | None:
        """Where to move, and why; None: nowhere."""
        s, here = self.settings, self._here(state.lever, state.batch, rows)
        at = (here.lever, here.batch)
        if not e.kept()[at]:
            pick = best(o, e, a, room=s.rise, among=among)
            if (pick.lever, pick.batch) == at or (pick.given_up != ALL and _as_good(o, e, at, pick, a)):
                return Move(here._replace(given_up=pick.given_up), "hold")
            return Move(pick, "queue" if e.lasting()[at] else "targets")
        if state.surge is not None:
            return self._end_of_surge(state, state.surge, e, rows, now_s)
        if now_s - state.moved_s < max(s.dwell_s, state.dwell_s):
            return None
        among = among & e.kept(s.room, rate_room(a, s.room)) & (o.clock_mhz >= s.slowest * o.clock_mhz[at])
        if not among.any():
            return None
        pick = best(o, e, a, room=s.room, among=among)
        saved = 1.0 - float(o.cost_j[pick.lever, pick.batch]) / float(o.cost_j[at])
        return Move(pick, "efficiency") if saved >= s.benefit else None

    def _end_of_surge(self, state: State, surge: Surge, e: Excess, rows: Rows, now_s: float) -> Move | None:
        """Back to where it began, once that would keep everything again."""
        base = self._here(surge.lever, surge.batch, rows)
        over = bool(e.kept(self.settings.rise)[base.lever, base.batch])
        return Move(base, "calm") if over and now_s - surge.since_s >= state.surge_hold_s else None

    def _after_move(self, state: State, lever: Lever, batch: int | None, now_s: float, reason: str) -> State:
        """Remember the move; a saving or a calm that was taken back soon makes the next one wait longer."""
        s, dwell_s, hold_s, surge = self.settings, state.dwell_s, state.surge_hold_s, None
        if reason == "efficiency":
            if now_s - max(state.saved_s, state.moved_s) > s.calm_s:
                dwell_s /= 2.0
            state = state._replace(saved_s=now_s)
        elif reason == "queue":
            again = now_s - state.surged_s < s.calm_s
            hold_s = (
                min(s.longest_surge_s, 2.0 * hold_s) if again and state.surge is None else max(s.surge_s, hold_s / 2.0)
            )
            surge = state.surge or Surge(state.lever, state.batch, now_s)
            state = state._replace(surged_s=now_s)
        elif reason == "targets" and now_s - state.saved_s < s.calm_s:
            dwell_s = min(s.longest_dwell_s, max(s.dwell_s, 2.0 * dwell_s))
        return state._replace(
            lever=lever, batch=batch, moved_s=now_s, dwell_s=dwell_s, window=None, surge=surge, surge_hold_s=hold_s,
        )  # fmt: skip

    def _remember(self, state: State, e: Excess, here: Pick) -> State:
        """Whether the point in force puts its targets to the test."""
        at = (here.lever, here.batch)
        return state._replace(tested=(bool(e.ttft[at] > -NEAR), bool(e.tpot[at] > -NEAR)))

    def _bound(
        self, state: State, o: Outlook, pick: Pick, a: Asked, slo: Slo, now_s: float
    ) -> tuple[int | None, State]:
        """Requests that may wait: bounded only while a budget below the limits found leaves TTFT no other way."""
        squeezed = state.ceiling_w < self._guard.max_limit_w - 0.5
        if not squeezed or pick.given_up != NO_TTFT or a.kind == CLOSED:
            calm = state.refusing_s is not None and squeezed and a.waiting > 0 and now_s - state.refusing_s < 10.0
            if not calm:
                return None, state._replace(refusing_s=None)
        since_s = now_s if pick.given_up == NO_TTFT and state.refusing_s is None else state.refusing_s
        bound = most_waiting(o, pick._replace(given_up=NO_TTFT), a, slo)
        return bound, state._replace(refusing_s=since_s)

    # ---- points ---------------------------------------------------------------------------------------------------

    def _point(self, state: State, ceiling_w: float) -> OperatingPoint:
        lever = state.lever
        limit_w = ceiling_w if lever.limit_w is None else min(lever.limit_w, ceiling_w)
        return OperatingPoint(
            power_limit_w=limit_w, sm_clock_mhz=lever.clock_mhz, active_sequences=state.batch or self._launch
        )

    def _decision(self, state: State, ceiling_w: float, reason: str, detail: str) -> Decision:
        return Decision(point=self._point(state, ceiling_w), reason=reason, detail=detail)

    def _safe(self, state: State, ceiling_w: float, reason: str, detail: str, now_s: float) -> tuple[Decision, State]:
        """The safe static point: the limit found, or what the budget leaves of it, no clock lock, the launch batch."""
        if state.lever != FREE or state.batch is not None:
            state = state._replace(lever=FREE, batch=None, moved_s=now_s, window=None)
        state = state._replace(why=(reason, detail), ceiling_w=ceiling_w, tested=(False, False))
        return self._decision(state, ceiling_w, reason, detail), state


_NOTHING_LEARNT = Correction()


def _has_tail(slo: Slo) -> bool:
    """Whether a 99th percentile has a target."""
    return slo.ttft_p99_s is not None or slo.tpot_p99_s is not None


def _moved(value: float, ratio: float, gain: float) -> float:
    """A factor moved towards a measured ratio, by logarithms; no lesson counts more than a quarter."""
    off = max(-0.25, min(0.25, log(max(ratio, 1e-6)) - log(value)))
    return min(2.0, max(0.5, exp(log(value) + gain * off)))


def _as_good(o: Outlook, e: Excess, at: tuple[int, int], pick: Pick, a: Asked) -> bool:
    """Whether the point in force misses its targets hardly more than the pick does."""
    there = (pick.lever, pick.batch)
    if pick.given_up == NO_TTFT:
        figure = o.most_per_s if a.kind == OPEN else o.tokens_per_s
        return bool(figure[at] >= 0.99 * figure[there])
    return bool(e.rate[at] <= 0 and e.ttft[at] <= 0 and e.tpot[at] <= e.tpot[there] + 0.01)
