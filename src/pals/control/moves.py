"""When to move, and where: at once where a target is in danger, slowly where only energy is to be saved, and back when a queue is gone."""

from __future__ import annotations

from typing import NamedTuple

from pals.control.choice import ALL, NO_TTFT, BoolArray, Excess, Pick, best, rate_room
from pals.control.lever_table import Lever, Rows
from pals.control.outlook import CLOSED, OPEN, Asked, Outlook
from pals.control.pals_state import Floor, Move, PalsSettings, State, Surge
from pals.models.forecast import FloatArray

AS_MUCH = 0.99  # of the most output: no move is worth the rest
AS_GOOD = 0.01  # of a logarithm, of TPOT
ABOVE = 1.02  # of the clock that was too slow


class Scene(NamedTuple):
    """One moment: every candidate's figures, and which may be taken."""

    rows: Rows
    batches: FloatArray  # the launch batch first
    asked: Asked
    outlook: Outlook
    excess: Excess
    among: BoolArray
    now_s: float

    @property
    def size(self) -> float:
        """Of the demand: what is asked for, or who is inside a closed loop."""
        return self.asked.inside if self.asked.kind == CLOSED else self.asked.tokens_per_s

    def where(self, lever: Lever, sequences: int | None) -> Pick:
        """Where a candidate stands; a lever that is gone (a limit above the ceiling) is the ceiling itself."""
        position = self.rows.position(lever)
        batch = 0 if sequences is None else int(abs(self.batches - sequences).argmin())
        return Pick(position if position is not None else 0, batch)


def decide(state: State, scene: Scene, s: PalsSettings) -> Move | None:
    """Where to move, and why; None: nowhere."""
    o, e, a = scene.outlook, scene.excess, scene.asked
    here = scene.where(state.lever, state.batch)
    at = (here.lever, here.batch)
    if not e.kept()[at]:
        pick = best(o, e, a, room=s.rise, among=scene.among)
        if (pick.lever, pick.batch) == at or (pick.given_up != ALL and _as_good(scene, at, pick)):
            return Move(here._replace(given_up=pick.given_up), "hold")
        return Move(pick, "queue" if e.lasting()[at] else "targets")
    if state.surge is not None:
        base = scene.where(state.surge.lever, state.surge.batch)
        over = bool(e.kept(s.rise)[base.lever, base.batch]) and scene.now_s - state.surge.since_s >= state.surge_hold_s
        return Move(base, "calm") if over else None
    if scene.now_s - state.moved_s < max(s.dwell_s, state.dwell_s):
        return None
    slowest_mhz = max(s.slowest * float(o.clock_mhz[at]), _floor_mhz(state, scene, s))
    among = scene.among & e.kept(s.room, rate_room(a, s.room)) & (o.clock_mhz >= slowest_mhz)
    if not among.any():
        return None
    pick = best(o, e, a, room=s.room, among=among)
    saved = 1.0 - float(o.cost_j[pick.lever, pick.batch]) / float(o.cost_j[at])
    return Move(pick, "efficiency") if saved >= s.benefit else None


def _as_good(scene: Scene, at: tuple[int, int], pick: Pick) -> bool:
    """Whether the point in force misses its targets hardly more than the pick does."""
    o, e, there = scene.outlook, scene.excess, (pick.lever, pick.batch)
    if pick.given_up == NO_TTFT:
        figure = o.most_per_s if scene.asked.kind == OPEN else o.tokens_per_s
        return bool(figure[at] >= AS_MUCH * figure[there])
    return bool(e.rate[at] <= 0 and e.ttft[at] <= 0 and e.tpot[at] <= e.tpot[there] + AS_GOOD)


def _floor_mhz(state: State, scene: Scene, s: PalsSettings) -> float:
    """The slowest clock that may be tried: what failed lately at such a demand is not tried again."""
    f = state.floor
    if (
        f is None
        or scene.now_s >= f.until_s
        or f.closed != (scene.asked.kind == CLOSED)
        or scene.size < s.less * f.size
    ):
        return 0.0
    return f.clock_mhz


def moved(state: State, scene: Scene, move: Move, batch: int | None, s: PalsSettings) -> State:
    """Remember a move; a saving or a calm that was taken back soon makes the next one wait longer, and its clock is left alone."""
    now_s, dwell_s, hold_s, surge = scene.now_s, state.dwell_s, state.surge_hold_s, None
    if move.reason == "efficiency":
        if now_s - max(state.saved_s, state.moved_s) > s.calm_s:
            dwell_s /= 2.0
        state = state._replace(saved_s=now_s)
    elif move.reason == "queue":
        again = now_s - state.surged_s < s.calm_s and state.surge is None
        hold_s = min(s.longest_surge_s, 2.0 * hold_s) if again else max(s.surge_s, hold_s / 2.0)
        surge = state.surge or Surge(state.lever, state.batch, now_s)
        state = state._replace(surged_s=now_s)
    elif move.reason == "targets" and now_s - state.saved_s < s.calm_s:
        dwell_s = min(s.longest_dwell_s, max(s.dwell_s, 2.0 * dwell_s))
        state = state._replace(floor=_floor(state, scene, s))
    return state._replace(
        lever=scene.rows.levers[move.pick.lever], batch=batch, moved_s=now_s, dwell_s=dwell_s, window=None, surge=surge,
        surge_hold_s=hold_s,
    )  # fmt: skip


def _floor(state: State, scene: Scene, s: PalsSettings) -> Floor:
    """The point in force was too slow for this demand."""
    here, before = scene.where(state.lever, state.batch), state.floor
    clock_mhz = ABOVE * float(scene.outlook.clock_mhz[here.lever, here.batch])
    lasts_s = s.floor_s
    if before is not None and scene.now_s < before.until_s + before.lasts_s:
        lasts_s = min(s.longest_floor_s, 2.0 * before.lasts_s)
        if (
            scene.now_s < before.until_s
            and before.closed == (scene.asked.kind == CLOSED)
            and before.size <= scene.size / s.less
        ):
            clock_mhz = max(clock_mhz, before.clock_mhz)
    return Floor(clock_mhz, scene.asked.kind == CLOSED, scene.size, scene.now_s + lasts_s, lasts_s)
