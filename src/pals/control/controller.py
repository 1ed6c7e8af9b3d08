"""The `pals` policy: the operating point with the fewest predicted joules per token that keeps every target, within the budget.

A tick learns from its sample (demand, bias of the profile, margins), forecasts every candidate, and moves only where that is needed
or pays: at once and as far as needed where a target is in danger or the budget fell, slowly where only energy is to be saved.
Equations and constants: docs/controller.md.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pals.control.choice import (
    ALL,
    NO_TTFT,
    BoolArray,
    Excess,
    Pick,
    excess,
    most_waiting,
    needed_tokens_s,
    spare_of,
)
from pals.control.correction import Correction
from pals.control.demand import Demand, observe
from pals.control.guard import Guard
from pals.control.lessons import learn_bias
from pals.control.lever_table import FREE, STEP, LeverTables, Rows, key_of
from pals.control.margins import NEAR, Margins, learned, spared
from pals.control.moves import Scene, decide, moved
from pals.control.outlook import CLOSED, FULL, OPEN, Asked, Bias, Boards, Outlook, outlook
from pals.control.pals_state import OBJECTIVES, PalsSettings, State
from pals.control.reasons import told_held, told_move, told_sacrifice
from pals.control.routing import experts_told, followed
from pals.control.trust import judge
from pals.control.worth import EVERY_S, Worth, worth_of
from pals.core.errors import ConfigError
from pals.core.quantities import Budget, Decision, EngineSample, OperatingPoint, Slo, TelemetrySample
from pals.models.fitted import Fitted
from pals.models.forecast import FloatArray
from pals.models.node_power import share_of_nodes
from pals.models.parameters import values_of

PERIOD_S = 0.5  # a guess at the first tick
SAME_LIMIT_W = 2.0  # a limit in force may differ by so much from the one decided
LOCK_SLACK_MHZ = 30  # a lock is in force where no board runs faster
BATCHES = 7  # levels of the active-sequence limit
DRIFTED = 1.5  # factor on the margins while the profile has drifted
NEARLY = 0.97  # of the most output: so much asked, with every slot taken, is more than is answered
MATTERS = 0.03  # of a step's time, by which the measured routing must change it to be told of
STILL_BOUND_S = 10.0  # a queue stays bounded so long after that was last needed
SQUEEZED_S = 20.0  # requests that were inside while targets could not be kept still end for so long: no lesson


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
        idle_w = float(values_of(fitted.x).static) * fitted.base.static_w * guard.boards
        self._boards = Boards(idle_w, share_of_nodes(guard.boards) if s.objective == "node" else 0.0)

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
        if sample.engine is None:
            return self._safe(state, ceiling_w, "telemetry", "the engine tells nothing", now_s)
        state = self._learn(self._routed(state, sample), sample, sample.engine, slo, now_s)
        d = state.demand
        if d.in_flight == 0:
            idle = self._decision(state, ceiling_w, "idle", "no request is inside: the point stays")
            return idle, state._replace(ceiling_w=ceiling_w)
        if not d.known:
            told = f"{int(d.counted.finished)} requests have ended so far: their lengths are not known yet"
            return self._safe(state, ceiling_w, "learning", told, now_s)
        key = key_of(d.prompt_tokens, d.output_tokens, d.cached_tokens, state.key)
        rows = self._tables.rows(key, ceiling_w, state.routing)
        if rows is None:
            told = f"{d.prompt_tokens:.0f} tokens in, {d.output_tokens:.0f} out lie outside what the profile measured"
            return self._safe(state._replace(key=key), ceiling_w, "outside-profile", told, now_s)
        state = state._replace(key=key)
        wider = DRIFTED if correction.drifted else 1.0
        asked = self._asked(d, rows, state.bias, slo, sample.window_s or PERIOD_S)
        if budget.power_w is None:
            state = state._replace(worth=Worth())
        elif now_s - state.worth.at_s >= EVERY_S:
            state = self._weigh(state, asked, slo, wider, now_s)
        return self._choose(state, rows, asked, slo, now_s, wider)

    def worth(self, state: State) -> tuple[tuple[float, float], ...]:
        """What its share of a budget is worth to the engine, see `WorthOfWatts`; known only while there is a budget."""
        return state.worth.points

    def needed_w(self, state: State) -> float | None:
        """The share that its targets need, see `WorthOfWatts`."""
        return state.worth.needed_w

    def step_time_s(self, state: State, running: float) -> float | None:
        """Mean time of a step of so many running sequences at the point decided, by profile and routing alone; None where they do not say."""
        rows = self._tables.rows(state.key, state.ceiling_w, state.routing) if state.key is not None else None
        position = rows.position(state.lever) if rows is not None else None
        return None if rows is None or position is None else rows.of(position, max(1.0, running))[STEP]

    # ---- learning -------------------------------------------------------------------------------------------------

    def _learn(self, state: State, sample: TelemetrySample, engine: EngineSample, slo: Slo, now_s: float) -> State:
        """Demand, margins and bias with one more sample."""
        s, before, period_s = self.settings, state.demand.before, sample.window_s or PERIOD_S
        demand, in_force = observe(state.demand, engine, now_s, period_s), self._in_force(state, sample, engine)
        state = state._replace(demand=demand)
        seen = state.why[0] != "telemetry"  # what came late unseen, at the safe point, is no lesson
        if before is not None and engine.steps >= before.steps and s.use_margins and seen:
            tested = (in_force and state.tested[0], in_force and state.tested[1])
            windable = now_s - state.squeezed_s >= SQUEEZED_S  # where no point is better a margin would only wind up
            margins = learned(state.margins, before, engine, slo, tested, windable=windable)
            if in_force and now_s - state.moved_s >= s.settle_s:
                pressed = engine.waiting > 0 or demand.closed(period_s)
                wanted = slo.throughput_tokens_s
                rate = spared(margins.rate, demand.tokens_per_s, wanted, pressed=pressed, windable=windable)
                margins = margins._replace(rate=rate)
            state = state._replace(margins=margins)
        if not s.use_bias:
            return state
        return learn_bias(state, sample, engine, self._tables, s, now_s) if in_force else state._replace(window=None)

    def _routed(self, state: State, sample: TelemetrySample) -> State:
        """With the routing that is measured; where another comes into force, what it would mean is said anew."""
        if not self.settings.use_experts or self._tables.fitted.base.experts == 0:
            return state
        routing = followed(state.routing, sample, self._tables.fitted.base)
        if routing.now == state.routing.now:
            return state._replace(routing=routing)
        return state._replace(
            routing=routing, window=None, why=("", state.why[1]) if state.why[0] == "hold" else state.why
        )

    def _in_force(self, state: State, sample: TelemetrySample, engine: EngineSample) -> bool:
        """Whether boards and engine do what was decided: a canary's other windows, and other hands, teach nothing."""
        wanted = self._point(state, state.ceiling_w)
        limits = all(abs(b.enforced_limit_w - wanted.power_limit_w) <= SAME_LIMIT_W for b in sample.boards)
        most_mhz = None if wanted.sm_clock_mhz is None else wanted.sm_clock_mhz + LOCK_SLACK_MHZ
        locked = most_mhz is None or all(b.sm_clock_mhz <= most_mhz for b in sample.boards)
        return limits and locked and engine.active_limit == wanted.active_sequences

    # ---- deciding -------------------------------------------------------------------------------------------------

    def _asked(self, d: Demand, rows: Rows, bias: Bias, slo: Slo, period_s: float) -> Asked:
        """The demand, and its kind."""
        asked, full = d.arrivals_per_s * d.output_tokens, d.in_flight >= self._launch
        kind = CLOSED if d.closed(period_s) else OPEN
        if kind == OPEN and full and asked > NEARLY * float(rows.rates[0, -1]) / bias.step:
            kind = FULL
        queue = self.settings.use_queue
        return Asked(
            kind=kind,
            tokens_per_s=asked,
            output_tokens=d.output_tokens,
            prompt_tokens=d.prompt_tokens,
            inside=float(d.in_flight),
            running=d.running,
            waiting=d.waiting if queue else 0,
            oldest_s=d.oldest_s if queue else 0.0,
            places=d.places,
            tail=slo.ttft_p99_s is not None or slo.tpot_p99_s is not None,
        )

    def _weigh(self, state: State, a: Asked, slo: Slo, wider: float, now_s: float) -> State:
        """What watts are worth, were there no budget."""
        rows = self._tables.rows(state.key, self._guard.max_limit_w, state.routing) if state.key is not None else None
        if rows is None:
            return state._replace(worth=Worth(now_s))
        o = outlook(rows, self._batches[:1], a, state.bias, self._boards)
        e = self._excess(state, rows, o, a, slo, wider)
        return state._replace(worth=worth_of(state.worth, rows, o, e, self._guard, now_s))

    def _excess(self, state: State, rows: Rows, o: Outlook, a: Asked, slo: Slo, wider: float) -> Excess:
        """What every candidate misses."""
        found = self._tables.rows(state.key, self._guard.max_limit_w, state.routing) if state.key is not None else None
        inside = min(float(self._launch), a.inside) if a.kind == CLOSED else float(self._launch)
        most_found, most_now = (r.most_per_s(inside) / state.bias.step for r in (found or rows, rows))
        needed = needed_tokens_s(a, slo, most_found, most_now)
        margins = state.margins if self.settings.use_margins else Margins(0.0, 0.0, 0.0)
        return excess(o, a, slo, needed, margins, wider, spare_of(slo, needed, most_found, margins))

    def _scene(self, state: State, rows: Rows, a: Asked, slo: Slo, wider: float, now_s: float) -> Scene:
        """Every candidate; smaller batches only where they may help: arrivals they only make wait."""
        alone = a.kind == OPEN and state.batch is None and (state.surge is None or state.surge.batch is None)
        for batches in (self._batches[:1], self._batches) if alone else (self._batches,):
            o = outlook(rows, batches, a, state.bias, self._boards)
            e = self._excess(state, rows, o, a, slo, wider)
            scene = Scene(rows, batches, a, o, e, usable(rows, o, batches, self._guard.boards, self.settings), now_s)
            if (e.lasting() & scene.among).any():
                break
        return scene

    def _choose(
        self, state: State, rows: Rows, a: Asked, slo: Slo, now_s: float, wider: float
    ) -> tuple[Decision, State]:
        """Hold the point in force, or move."""
        if state.surge is not None and now_s - state.surge.since_s > self.settings.longest_surge_s:
            state = state._replace(surge=None)  # it is the load
        scene = self._scene(state, rows, a, slo, wider, now_s)
        move, here, e = decide(state, scene, self.settings), scene.where(state.lever, state.batch), scene.excess
        pick, reason = (here, "hold") if move is None else move
        at = (pick.lever, pick.batch)
        state = state._replace(
            ceiling_w=rows.ceiling_w,
            squeezed_s=now_s if pick.given_up != ALL and reason == "hold" else state.squeezed_s,
            tested=(bool(e.ttft[at] > -NEAR), bool(e.tpot[at] > -NEAR)),
        )
        told = self._told(state, scene, here, pick, reason, slo)
        if state.routing.now is not None and told != state.why[1]:
            told += self._told_experts(state, scene, pick, slo, now_s, wider)
        if move is not None and reason != "hold":
            batch = int(scene.batches[pick.batch])
            state = moved(state, scene, move, None if batch >= self._launch else batch, self.settings)
        if pick.given_up != ALL:
            only_queue = pick.given_up == NO_TTFT and bool(e.lasting()[at])
            reason, told = "queue" if only_queue else "sacrifice", told_sacrifice(told, pick, only_queue=only_queue)
        bound, state = self._bound(state, scene, pick, slo)
        state = state._replace(why=("hold" if pick.given_up == ALL else reason, told))
        return replace(self._decision(state, rows.ceiling_w, reason, told), most_waiting=bound), state

    def _told(self, state: State, scene: Scene, here: Pick, pick: Pick, reason: str, slo: Slo) -> str:
        """The sentence for people; one that holds repeats why it came here."""
        if reason != "hold":
            return told_move(
                scene.rows, scene.outlook, here, pick, scene.asked, slo, scene.batches, state.lever, reason, self._guard.boards
            )  # fmt: skip
        repeated = pick.given_up == ALL and state.why[0] == "hold"
        return state.why[1] if repeated else told_held(scene.outlook, pick, scene.asked, slo)

    def _told_experts(self, state: State, scene: Scene, pick: Pick, slo: Slo, now_s: float, wider: float) -> str:
        """What the measured routing says, where it matters: another choice without it, or steps that differ by `MATTERS`."""
        plain = self._tables.rows(state.key, scene.rows.ceiling_w) if state.key is not None else None
        if plain is None:
            return ""
        running = float(scene.outlook.running[pick.lever, pick.batch])
        here, there = (r.of(pick.lever, running)[STEP] for r in (scene.rows, plain))
        if abs(here / there - 1.0) <= MATTERS:
            if pick.given_up != ALL:  # said anew each tick: a second look at every candidate would be too much
                return ""
            without = self._scene(state, plain, scene.asked, slo, wider, now_s)
            move = decide(state, without, self.settings)
            at = move.pick if move is not None else without.where(state.lever, state.batch)
            if (at.lever, at.batch) == (pick.lever, pick.batch):
                return ""
        told = experts_told(state.routing, self._tables.fitted.base, running)
        return f"; {told}" if told else ""

    def _bound(self, state: State, scene: Scene, pick: Pick, slo: Slo) -> tuple[int | None, State]:
        """Requests that may wait: bounded only while a budget that binds leaves TTFT no other way."""
        a, natural_w = scene.asked, float(scene.outlook.natural_w[0, 0]) / self._guard.boards
        squeezed = state.ceiling_w < min(self._guard.max_limit_w - 0.5, natural_w)
        lost = squeezed and pick.given_up == NO_TTFT and a.kind != CLOSED
        since_s = scene.now_s if lost else state.refusing_s  # when it was last needed
        if since_s is None or not squeezed or scene.now_s - since_s >= STILL_BOUND_S:
            return None, state._replace(refusing_s=None)
        bound = most_waiting(scene.outlook, pick._replace(given_up=NO_TTFT), a, slo)
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
            state = state._replace(lever=FREE, batch=None, moved_s=now_s)
        state = state._replace(
            why=(reason, detail), ceiling_w=ceiling_w, tested=(False, False), window=None, surge=None
        )
        return self._decision(state, ceiling_w, reason, detail), state


_NOTHING_LEARNT = Correction()


def usable(rows: Rows, o: Outlook, batches: FloatArray, boards: int, s: PalsSettings) -> BoolArray:
    """Candidates that may be taken and that bind: a lever that does not is left as found."""
    ok = np.ones(o.cost_j.shape, dtype=bool)
    if not (s.use_limit and s.use_clock):
        for i, lever in enumerate(rows.levers):
            ok[i] = (s.use_limit or lever.limit_w is None) and (s.use_clock or lever.clock_mhz is None)
    limits_w = rows.limits_w[:, None] * boards
    ok &= limits_w < np.where(limits_w > 0, o.natural_w, np.inf)
    slack = batches >= np.maximum(o.running, 1.0)
    ok[:, 1:] &= ~(slack[:, 1:] & slack[:, :-1])  # of batches that hold nobody back only the largest
    return ok
