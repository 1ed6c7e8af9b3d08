"""What each board may stand at now, and why. It decides and does nothing: no driver, file or clock is touched here.

Three rules. A board stands where it was found, where a live lease asked for it to stand (less after the budget fell),
or at its exit policy. Limits that are lowered go first, and none is raised unless all others leave room for it. What
stands on a board and was not written by us belongs to another hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pals_capd.board import (
    LOCK_MARGIN_MHZ,
    LOCK_SETTLE_S,
    RAISE_GAP_S,
    RETRY_S,
    SAME_W,
    SLOWEST_REASSERT_S,
    SLOWEST_RETRY_S,
    SMALL_RAISE_GAP_S,
    SMALL_RAISE_W,
    UNKNOWN_LOCK,
    Ask,
    Board,
    Budget,
    Clocks,
    Lease,
    Write,
    standing,
)  # fmt: skip
from pals_capd.permits import permit, refuse_others_boards, stop_word
from pals_capd.policy import Policy
from pals_capd.refused import Refused


@dataclass(slots=True)
class Ledger:
    """All boards of the node."""

    policy: Policy
    boards: dict[str, Board]
    budget: Budget | None = None  # set by a client; the node's standing budget is the policy's
    stopped: str | None = None  # why no lease is granted: kill switch, alarm, another hand under `fail`
    events: list[dict[str, Any]] = field(default_factory=list)  # since they were last taken

    # --- requests ---

    def grant(self, ask: Ask, *, uid: int, admin: bool, now_s: float) -> Board:
        """Lease the board as asked, or renew its lease; nothing is clamped.

        Raises:
            Refused: why; the lease that was there lives on.
        """
        b = permit(self, ask, uid=uid, admin=admin)
        if ask.watts is not None and (room := self.headroom_w(b)) < ask.watts - 0.5:
            raise Refused(
                "budget",
                f"{b.name} {b.uuid}: {ask.watts:.0f} W do not fit the budget beside what the other boards hold; at most "
                f"{room:.0f} W do. {standing(b)}",
                headroom_w=room,
            )
        if ask.watts is not None and (b.lease is None or b.lease.asked_w != ask.watts):
            b.reassert_s = min(b.reassert_s, now_s)  # a new wish does not wait out a quarrel over the old one
        if b.lease is None or (b.lease.asked_w, b.lease.sm_clock_mhz) != (ask.watts, ask.sm_clock_mhz):
            b.retry_s, b.trouble = min(b.retry_s, now_s), None  # nor what the driver refused of it: only renewals wait
        granted_w = None if ask.watts is None else min(ask.watts, b.found_w)  # the range is kind to a rounded number
        b.lease = Lease(
            uid=uid, epoch=ask.epoch, watts=granted_w, asked_w=ask.watts, sm_clock_mhz=ask.sm_clock_mhz,
            expires_s=now_s + ask.ttl_s, reason=ask.reason,
        )  # fmt: skip
        b.epoch, b.seq, b.left_alone = ask.epoch, ask.seq, b.left_alone and ask.watts is None
        return b

    def release(self, b: Board, why: str) -> None:
        """End a board's lease, if it has one."""
        if b.lease is not None:
            if b.touched:  # else nothing of it was in force
                self._note("lease-ended", b, why=why, uid=b.lease.uid, epoch=b.lease.epoch)
            b.lease = None

    def release_all(self, why: str) -> None:
        """End every lease and the budget a client set."""
        self.budget = None
        for b in self.boards.values():
            self.release(b, why)

    def expire(self, now_s: float) -> int:
        """End the leases that nobody renewed; how many."""
        over = [b for b in self.boards.values() if b.lease is not None and b.lease.expires_s <= now_s]
        for b in over:
            self.release(b, "not renewed in time")
        return len(over)

    # --- budgets ---

    def set_budget(self, watts: float | None, uuids: Iterable[str], *, uid: int, admin: bool) -> None:
        """Take a client's budget in the place of the one before; leases that no longer fit are cut, in proportion.

        Raises:
            Refused: boards unknown, another user's budget would be raised, or the minimum limits need more; the budget
                before holds on.
        """
        named = frozenset(uuids)
        if unknown := sorted(named - set(self.boards)):
            raise Refused("board", f"there is no board {unknown[0]!r} on this node; the budget is as it was")
        if watts is not None and self.stopped is not None:
            raise Refused(stop_word(self.stopped), f"{self.stopped}. The budget is as it was")
        refuse_others_boards((self.boards[u] for u in named), uid, admin=admin)
        before = self.budget
        looser = before is not None and (watts is None or watts > before.watts or not named >= before.uuids)
        if before is not None and before.uid != uid and looser and not admin:
            raise Refused(
                "rights",
                f"user {before.uid} set the budget of {before.watts:.0f} W; only that user or an admin may raise it",
            )
        if watts is None or not named:
            self.budget = None
            return
        if watts < (lowest_w := self.lowest_w(named)):
            raise Refused(
                "budget",
                f"{watts:.0f} W cannot be kept: the minimum limits of these {len(named)} boards need {lowest_w:.0f} W, the "
                "lowest that can be promised; the budget is as it was",
                lowest_w=lowest_w,
            )
        keeps = before is not None and not admin  # who tightens another's budget does not own it for that
        self.restore_budget(watts, named, before.uid if before is not None and keeps else uid)
        self.cut()

    def restore_budget(self, watts: float, uuids: Iterable[str], uid: int = 0) -> None:
        """Take a budget as it was before a crash, whether or not it can be kept now."""
        self.budget = Budget(watts=watts, uuids=frozenset(uuids), uid=uid)  # also boards that cannot be used just now

    def cut(self) -> None:
        """Bring leases down to what every budget leaves them."""
        for budget in self.budgets():
            free = [b for b in self._of(budget) if self._steerable(b)]
            left_w = budget.watts - sum(b.limit_w for b in self._of(budget) if not self._steerable(b))
            least_w, claimed_w = sum(b.min_w for b in free), sum(self._expected_w(b) for b in free)
            if claimed_w <= left_w:
                continue
            part = max(0.0, (left_w - least_w) / (claimed_w - least_w)) if claimed_w > least_w else 0.0
            for b in free:
                if b.lease is not None and b.lease.watts is not None:
                    cut_w = max(b.min_w, float(math.floor(b.min_w + part * (b.lease.watts - b.min_w))))
                    if cut_w < b.lease.watts:
                        self._note("lease-cut", b, was_w=b.lease.watts, now_w=cut_w)
                        b.lease = replace(b.lease, watts=cut_w)

    def budgets(self) -> list[Budget]:
        """The node's standing budget, then the one a client set."""
        standing_w = self.policy.budget_w
        node = [] if standing_w is None else [Budget(watts=standing_w, uuids=frozenset(self.boards))]
        return [*node, *([self.budget] if self.budget is not None else [])]

    def lowest_w(self, uuids: Iterable[str]) -> float:
        """The lowest budget of these boards that can be kept."""
        boards = [self.boards[u] for u in uuids]
        return sum(b.min_w if self._steerable(b) else b.limit_w for b in boards)

    def headroom_w(self, b: Board) -> float:
        """The highest limit that every budget leaves this board beside what the others are granted, or stand at."""
        return self._room_w(b, self._claim_w)

    def _room_w(self, b: Board, stands_w: Callable[[Board], float]) -> float:
        room_w = math.inf
        for budget in self.budgets():
            if b.uuid in budget.uuids:
                room_w = min(room_w, budget.watts - sum(stands_w(o) for o in self._of(budget) if o is not b))
        return room_w

    def overdrawn(self) -> bool:
        """Whether the limits in force exceed a budget now."""
        return any(sum(b.limit_w for b in self._of(budget)) > budget.watts + SAME_W for budget in self.budgets())

    def _of(self, budget: Budget) -> list[Board]:
        return [self.boards[u] for u in budget.uuids if u in self.boards]

    def _claim_w(self, b: Board) -> float:
        return b.lease.watts if b.lease is not None and b.lease.watts is not None else b.limit_w

    def _steerable(self, b: Board) -> bool:
        return b.refusal is None and b.lost is None and not b.left_alone

    # --- what is to be written ---

    def next_write(self, now_s: float, tried: set[str]) -> Write | None:
        """The next thing to do on a board that was not tried yet, lowering before raising; None: all is as it should be."""
        wanted = [w for b in self.boards.values() if b.uuid not in tried and (w := self._write_of(b, now_s))]
        return min(wanted, key=lambda w: self._rise_w(w), default=None)

    def _rise_w(self, w: Write) -> float:
        return 0.0 if w.watts is None else w.watts - self.boards[w.uuid].limit_w

    def _write_of(self, b: Board, now_s: float) -> Write | None:
        if b.lost is not None or (b.refusal is not None and not b.touched):
            return None
        watts, clocks, why = self.target(b)
        if watts is not None:
            watts = self._allowed_w(b, watts, now_s)
        lock = clocks if clocks is not None and clocks != b.locked else None
        waits = b.lease is not None and now_s - b.written_s < RAISE_GAP_S
        if lock is not None and b.locked is not None and lock[1] > b.locked[1] and waits:
            lock = None  # a clock that rises under a lease waits its turn, as a limit does
        unlock = clocks is None and b.locked is not None
        if watts is None and lock is None and not unlock:
            return None
        w = Write(uuid=b.uuid, watts=watts, lock=lock, unlock=unlock, why=why)
        return None if now_s < b.retry_s and b.missed is not None and w.does_as(b.missed) else w

    def target(self, b: Board) -> tuple[float | None, Clocks | None, str]:
        """Where the board should stand, W and MHz, and why; None: its limit is left."""
        lease, chosen = b.lease, self.policy.exit_of(b.uuid)
        limited = self._limited(b)
        if lease is not None and lease.watts is not None:
            return lease.watts, lease.sm_clock_mhz, lease.reason
        kind = self.exit_kind(b)
        clocks = (
            lease.sm_clock_mhz
            if lease is not None
            else b.locked
            if kind == "hold"
            else b.clocks_within(chosen.sm_clock_mhz)
        )
        if lease is None and not b.touched:
            clocks = None
        why = f"exit policy {kind}" if lease is None else lease.reason
        if b.left_alone or not (b.ours_w or limited):
            return None, clocks, why
        if kind == "hold":
            return (min(b.limit_w, self._fair_w(b)) if self.overdrawn() else None), clocks, why
        return self._fair_w(b), clocks, why

    def exit_kind(self, b: Board) -> str:
        """What the board goes to when nobody leases it: restore, safe or hold."""
        return self.policy.exit_of(b.uuid).exit or ("safe" if self._limited(b) else "restore")

    def _limited(self, b: Board) -> bool:
        return any(b.uuid in budget.uuids for budget in self.budgets())

    def _exit_w(self, b: Board) -> float:
        """Where a board without a lease stands if no budget forbids it."""
        safe_w = self.policy.exit_of(b.uuid).safe_w
        if safe_w is None or self.exit_kind(b) != "safe":
            return b.found_w
        return max(b.min_w, min(b.found_w, safe_w))

    def _fair_w(self, b: Board) -> float:
        """The most this board may stand at with nobody's lease on it: its exit, or its part of each budget, if that is less."""
        fair_w = self._exit_w(b)
        for budget in self.budgets():
            if b.uuid in budget.uuids:
                free = [o for o in self._of(budget) if self._steerable(o)]
                left_w = budget.watts - sum(o.limit_w for o in self._of(budget) if not self._steerable(o))
                least_w, most_w = sum(o.min_w for o in free), sum(self._exit_w(o) for o in free)
                part = min(1.0, max(0.0, (left_w - least_w) / (most_w - least_w))) if most_w > least_w else 1.0
                if part < 1.0:
                    fair_w = min(fair_w, float(math.floor(b.min_w + part * (self._exit_w(b) - b.min_w))))
        return fair_w

    def _allowed_w(self, b: Board, watts: float, now_s: float) -> float | None:
        """The limit to write now on the way to `watts`; None: none. Lowering is never delayed."""
        leased = b.lease is not None and b.lease.watts is not None
        if not leased:  # what leases hold comes first
            watts = max(b.min_w, min(watts, self._room_w(b, self._expected_w)))
        rise_w = watts - b.limit_w
        if rise_w <= -0.5:
            return watts if now_s >= b.reassert_s or self.overdrawn() else None
        if rise_w < 0.5 or now_s < b.reassert_s or watts > self._room_w(b, lambda o: o.limit_w) + 0.5:
            return None  # there already; another hand was here just now; the others have not come down yet
        gap_s = RAISE_GAP_S if rise_w >= SMALL_RAISE_W else SMALL_RAISE_GAP_S
        return None if leased and now_s - b.written_s < gap_s else watts

    def _expected_w(self, o: Board) -> float:
        """Where a board will stand when what can be lowered is."""
        watts, _, _ = self.target(o)
        return o.limit_w if watts is None else watts if o.lease is not None else min(watts, o.limit_w)

    # --- what came of it ---

    def about_to_write(self, w: Write) -> None:
        """Until the driver has answered, the board may stand at either limit, and its clock may be locked."""
        b = self.boards[w.uuid]
        if w.watts is not None:
            before = b.ours_w or (b.limit_w,)
            b.ours_w = before if w.watts in before else (*before, w.watts)
        if w.lock is not None and b.locked is None:
            b.locked = UNKNOWN_LOCK

    def wrote(
        self, w: Write, *, limit_w: float, enforced_w: float, sm_clock_mhz: int, now_s: float, mig: bool = False
    ) -> None:
        """The driver did it, and this is what it says now."""
        b = self.boards[w.uuid]
        b.limit_w, b.enforced_w, b.sm_clock_mhz, b.read_s, b.written_s = limit_w, enforced_w, sm_clock_mhz, now_s, now_s
        if w.watts is not None and abs(limit_w - w.watts) >= 0.5:
            b.ours_w = (limit_w, w.watts)  # perhaps it acts late
            self.missed(
                b, w, Refused("driver", f"{b.uuid} stands at {limit_w:.0f} W though {w.watts:.0f} W were set"), now_s
            )
        else:
            b.trouble, b.missed, b.misses = None, None, 0
            b.ours_w = (limit_w,) if w.watts is not None else b.ours_w
        if w.lock is not None:
            b.locked, b.locked_s, b.suspected = w.lock, now_s, None
        if w.unlock:
            b.locked, b.suspected = None, None

    def missed(self, b: Board, w: Write, why: Exception, now_s: float) -> None:
        """A write did not do what it should; the same one is tried again later, and ever later."""
        b.misses = b.misses + 1 if b.missed is not None and w.does_as(b.missed) else 1
        b.missed, b.trouble = w, why
        b.retry_s = now_s + min(SLOWEST_RETRY_S, RETRY_S * 2.0 ** min(b.misses - 1, 16))

    def consider(self, b: Board) -> None:
        """Whether the board may be written; the lease on one that may no more ends, and what is ours there is undone."""
        before, b.refusal = b.refusal, None
        if b.mig:
            b.refusal = f"{b.uuid}: MIG mode is enabled, and one power limit holds for all tenants of the board; capd does not write it"
        elif not self.policy.exit_of(b.uuid).steer:
            b.refusal = f"{b.uuid}: the policy file says that this board is left alone (steer = false)"
        if b.refusal is not None and before is None:
            self.release(b, "the board may not be written any more")

    def observe(
        self,
        b: Board,
        *,
        limit_w: float,
        enforced_w: float,
        sm_clock_mhz: int,
        now_s: float,
        mig: bool = False,
        reset: bool = False,
    ) -> None:
        """Take a reading; `reset`: the driver was loaded anew, and what it forgot is no other hand's doing."""
        if mig != b.mig:
            b.mig = mig
            self._note("mig", b, enabled=mig)
            self.consider(b)
        leased = b.lease is not None and b.lease.watts is not None
        expected_w = b.ours_w or (
            (b.limit_w,) if leased else ()
        )  # a lease at what was found wrote nothing, and holds it
        b.limit_w, b.enforced_w, b.sm_clock_mhz, b.read_s = limit_w, enforced_w, sm_clock_mhz, now_s
        if reset:
            b.locked = None
        if reset and b.ours_w and abs(limit_w - b.default_w) < SAME_W:
            self._note("driver-reloaded", b, limit_w=limit_w)
            b.ours_w = (limit_w,)
        elif expected_w and not any(abs(limit_w - w) < SAME_W for w in expected_w):
            b.ours_w = expected_w
            self._other_hand(b, limit_w, now_s)
        elif not expected_w and abs(limit_w - b.found_w) >= SAME_W:
            self._note("limit-changed", b, was_w=b.found_w, limit_w=limit_w)
            b.found_w = limit_w
        self._suspect(b, now_s)

    def settle(self) -> None:
        """Forget what needs no undoing: boards without a lease that stand as they were found."""
        for b in self.boards.values():
            if b.lease is None and abs(b.limit_w - b.found_w) < SAME_W:
                b.ours_w = ()

    def _other_hand(self, b: Board, limit_w: float, now_s: float) -> None:
        self._note("other-hand", b, ours_w=b.ours_w[-1], limit_w=limit_w, policy=self.policy.other_hand)
        b.other_hand_w = limit_w
        if self.policy.other_hand == "reassert":
            b.reassert_gap_s = (
                1.0 if now_s - b.reassert_s > SLOWEST_REASSERT_S else min(SLOWEST_REASSERT_S, 2 * b.reassert_gap_s)
            )
            b.reassert_s = now_s + b.reassert_gap_s
            b.ours_w = (*b.ours_w, limit_w)
            return
        b.found_w, b.ours_w, b.left_alone = limit_w, (), True
        if b.lease is not None:
            b.lease = replace(b.lease, watts=None)
        if self.policy.other_hand == "fail":
            self.stopped = f"another hand set {limit_w:.0f} W on {b.uuid}, and the policy is to stop then; restart capd to lease again"
            for other in self.boards.values():  # budgets hold on
                self.release(other, "another hand")
        else:
            self.cut()

    def _suspect(self, b: Board, now_s: float) -> None:
        """A lock has no getter: that somebody else moved it can only be suspected, from a clock above it."""
        if b.locked is None or b.locked == UNKNOWN_LOCK:
            return
        if (
            b.sm_clock_mhz > b.locked[1] + LOCK_MARGIN_MHZ
            and now_s - b.locked_s > LOCK_SETTLE_S
            and b.suspected is None
        ):
            b.suspected = f"locked at {b.locked}, {b.sm_clock_mhz} MHz measured: somebody else may have moved the lock"
            self._note("suspected-lock", b, locked=b.locked, measured_mhz=b.sm_clock_mhz)
            if self.policy.other_hand == "reassert":
                b.locked = UNKNOWN_LOCK  # to be locked again

    def _note(self, event: str, b: Board, **facts: object) -> None:
        self.events.append({"event": event, "uuid": b.uuid, **facts})

    # --- the record of what is ours ---

    def mine(self) -> dict[str, dict[str, object]]:
        """What must be known to undo everything after a crash, by UUID; boards without anything of ours are not in it."""
        return {
            b.uuid: {
                "found_w": b.found_w, "written_w": list(b.ours_w), "locked": b.locked is not None,
                "owner": b.lease.uid if b.lease is not None else None,
            }
            for b in self.boards.values() if b.touched
        }  # fmt: skip

    def recover(self, mine: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what an earlier capd of this boot left; a limit that is not one it wrote was set by another hand since."""
        for uuid, left in mine.items():
            b = self.boards.get(uuid)
            if b is None:
                continue
            if left["locked"]:
                b.locked = UNKNOWN_LOCK
            written = tuple(float(w) for w in left["written_w"])
            if any(abs(b.limit_w - w) < SAME_W for w in written):
                b.found_w, b.ours_w = float(left["found_w"]), (b.limit_w,)
                self._note("recovered", b, found_w=b.found_w, limit_w=b.limit_w)
            elif written and abs(b.limit_w - float(left["found_w"])) >= SAME_W:
                self._note("other-hand", b, ours_w=written[-1], limit_w=b.limit_w, policy="left so after a crash")
                b.other_hand_w = b.limit_w
