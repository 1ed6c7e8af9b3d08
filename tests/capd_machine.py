"""Everything that can happen to capd, in any order, and the promises that must hold at each write and after each turn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pals_capd.audit import check_order
from pals_capd.keeper import POLL_S, Keeper, Peer
from pals_capd.ledger import Clocks, Ledger
from pals_capd.policy import Exit, Policy
from pals_capd.refused import ConfigError
from tests.capd_world import MAX_W, MIN_W, Crash, FakeDriver, Fuse, MemoryAudit, MemoryRecord, Silicon

UUIDS = ("GPU-a", "GPU-b", "GPU-c")
POLICIES = (
    Policy(),
    Policy(budget_w=900.0),
    Policy(node=Exit(exit="safe", safe_w=250.0)),
    Policy(budget_w=1000.0, node=Exit(exit="safe", safe_w=250.0), other_hand="reassert"),
    Policy(node=Exit(exit="hold")),
    Policy(other_hand="reassert"),
    Policy(other_hand="fail"),
    Policy(node=Exit(exit="restore", sm_clock_mhz=(210, 1200))),
)
boards = st.sampled_from(UUIDS)
#: Requests lie on a grid of 10 W and other hands beside it, so that the two can be told apart, as capd must.
watts = st.one_of(st.none(), st.integers(9, 41).map(lambda n: 10.0 * n), st.sampled_from([302.0, 304.0]))
foreign_watts = st.integers(10, 38).map(lambda n: 10.0 * n + 5.3)
clocks = st.sampled_from([None, (210, 1005), (210, 1200), (210, 1410)])


@dataclass(slots=True)
class Promise:
    """What the outside world knows of one board's lease."""

    watts: set[float]  # asked for and granted under it
    locks: set[Clocks | None]
    expires_s: float
    uid: int


class CapdMachine(RuleBasedStateMachine):
    """capd as a whole, its boards, two users, other hands, and a world that breaks."""

    steps = 0  # of all machines so far

    @initialize(
        policy=st.sampled_from(POLICIES), found=st.lists(st.sampled_from([400.0, 350.0]), min_size=3, max_size=3)
    )
    def begin(self, policy: Policy, found: list[float]) -> None:
        self.now_s, self.policy, self.fuse = 1000.0, policy, Fuse()
        self.silicon = {u: Silicon(limit_w=w) for u, w in zip(UUIDS, found, strict=True)}
        self.driver = FakeDriver(
            boards=self.silicon, fuse=self.fuse, on_limit=self.check_limit, on_lock=self.check_lock
        )
        self.record, self.audit = MemoryRecord(fuse=self.fuse), MemoryAudit()
        self.found = {u: {w} for u, w in zip(UUIDS, found, strict=True)}  # what may be put back
        self.leases: dict[str, Promise] = {}
        self.asking: dict[str, tuple[float | None, Clocks | None]] = {}  # in the request being handled
        self.budget: tuple[float, frozenset[str]] | None = None
        self.budget_asked: tuple[float, frozenset[str]] | None = None
        self.budget_before: tuple[float, frozenset[str]] | None = None
        self.unsaved: dict[str, set[float]] = {u: set() for u in UUIDS}  # written since the record could not be
        self.changed_s: dict[str, float] = {}  # when another hand came last, or the board went or came
        self.quarrel = set[str]()  # boards that another hand set since, and that nobody asked for
        self.seq, self.off = 0, False
        self.keeper: Keeper | None = None
        self.peers = {uid: Peer(uid=uid) for uid in (1000, 1001)}
        self.restart()

    # --- what happens ---

    def alive(self) -> bool:
        return self.keeper is not None

    def survive(self, do: Any) -> Any:
        """Do it; a crash in the middle leaves no keeper."""
        CapdMachine.steps += 1
        try:
            return do()
        except Crash:
            self.crash_now()
            return None

    @precondition(lambda self: not self.alive())
    @rule()
    def restart(self) -> None:
        left = self.record.state
        self.budget = None if left.budget_w is None or self.off else (left.budget_w, frozenset(left.budget_of))
        self.leases = {}

        def start() -> None:
            keeper = Keeper(
                driver=self.driver, record=self.record, audit=self.audit,
                policy=Policy(
                    rights={1000: "set", 1001: "set"}, budget_w=self.policy.budget_w, other_hand=self.policy.other_hand,
                    node=self.policy.node,
                ),
                off=lambda: self.off,
            )  # fmt: skip
            try:
                keeper.start(self.now_s)
            except ConfigError:  # a standing budget that another hand's limits leave no room for
                return
            self.keeper, self.leases = keeper, {}
            self.sync_budget()

        self.survive(start)

    @precondition(lambda self: not self.alive())
    @rule()
    def release_tool(self) -> None:
        """The service manager runs capd-release after a crash: it is capd that starts and stops."""
        self.restart()
        if self.keeper is not None:
            self.survive(lambda: self.keeper is not None and self.keeper.stop("capd-release", self.now_s))
            self.crash_now()

    @precondition(lambda self: self.alive())
    @rule()
    def stop(self) -> None:
        self.leases = {}
        self.survive(lambda: self.keeper is not None and self.keeper.stop("stopped", self.now_s))
        self.crash_now()

    @precondition(lambda self: self.alive())
    @rule(uid=st.sampled_from([1000, 1001]))
    def hello(self, uid: int) -> None:
        self.peers[uid] = Peer(uid=uid)
        self.ask(uid, op="hello")

    @precondition(lambda self: self.alive())
    @rule(
        uid=st.sampled_from([1000, 1000, 1001]),
        uuid=boards,
        w=watts,
        lock=clocks,
        ttl_s=st.sampled_from([0.5, 3.0]),
        late=st.booleans(),
    )
    def request(self, uid: int, uuid: str, w: float | None, lock: Clocks | None, ttl_s: float, late: bool) -> None:
        peer = self.peers[uid]
        if peer.epoch < 0:
            self.ask(uid, op="hello")
        if self.keeper is None:
            return
        self.seq += 1
        seq = max(0, self.seq - 2) if late else self.seq
        self.asking = {uuid: (w, lock)}
        reply = self.ask(
            uid, op="set", uuid=uuid, watts=w, sm_clock_mhz=None if lock is None else list(lock), ttl_s=ttl_s,
            epoch=peer.epoch, seq=seq, reason="test",
        )  # fmt: skip
        self.asking = {}
        if reply is None or not reply["ok"]:
            return
        assert w is None or MIN_W <= w <= max(self.found[uuid]) + 0.5, "granted outside the range"
        before = self.leases.get(uuid)
        assert before is None or before.uid == uid or before.expires_s <= self.now_s, "another user's lease was taken"
        live = before if before is not None and before.expires_s > self.now_s else Promise(set(), set(), 0.0, uid)
        self.leases[uuid] = Promise(
            {*live.watts, *([] if w is None else [w])}, {*live.locks, lock}, self.now_s + ttl_s, uid
        )
        if w is None:
            self.leases[uuid].watts = set()
        else:
            self.quarrel.discard(uuid)

    @precondition(lambda self: self.alive())
    @rule(uid=st.sampled_from([1000, 1001]), uuid=boards)
    def release(self, uid: int, uuid: str) -> None:
        self.seq += 1
        before = self.leases.pop(uuid, None)
        reply = self.ask(uid, op="release", uuid=uuid, epoch=max(0, self.peers[uid].epoch), seq=self.seq)
        if before is not None and reply is not None and not reply["ok"] and reply["error"] not in ("driver",):
            self.leases[uuid] = before

    @precondition(lambda self: self.alive())
    @rule(
        uid=st.sampled_from([1000, 1001]),
        w=st.one_of(st.none(), st.integers(20, 120).map(lambda n: 10.0 * n)),
        scope=st.sets(boards),
    )
    def set_budget(self, uid: int, w: float | None, scope: set[str]) -> None:
        self.budget_asked = None if w is None or not scope else (w, frozenset(scope))
        before, self.budget = self.budget, self.budget_asked  # either may hold while it is handled
        self.budget_before = before
        try:
            reply = self.ask(uid, op="budget", watts=w, boards=sorted(scope))
        finally:
            self.budget_asked = self.budget_before = None
        if self.keeper is None:
            self.budget = None  # not known which one holds; taken from the record at the restart
        else:
            assert reply is not None
            self.sync_budget()
            if reply["ok"] and w is not None and scope:
                assert self.budget == (w, frozenset(scope))

    @precondition(lambda self: self.alive())
    @rule()
    def release_all(self) -> None:
        if self.after_a_turn() is None:
            return
        self.leases, self.budget = {}, None
        self.ask(0, op="release_all")
        self.sync_budget()

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.1, 2.0, 5.0, 3600.0]))
    def time_passes(self, seconds: float) -> None:
        """Also an hour at once: a machine that was suspended."""
        self.now_s += seconds
        self.turn()

    def turn(self) -> None:
        self.leases = {u: p for u, p in self.leases.items() if p.expires_s > self.now_s}
        if self.keeper is not None:
            keeper = self.keeper
            self.survive(lambda: keeper.turn(self.now_s))
            self.sync_budget()
            self.sync_failure()
        if self.keeper is not None and not self.record.full:
            self.unsaved = {u: set() for u in UUIDS}

    def after_a_turn(self) -> Ledger | None:
        self.turn()
        return None if self.keeper is None else self.keeper.ledger

    @rule(uuid=boards, w=foreign_watts)
    def other_hand(self, uuid: str, w: float) -> None:
        s = self.silicon[uuid]
        known = [x for x in (*self.found[uuid], *self.written(uuid)) if abs(x - w) < 1.5]
        if s.lost or known:
            return
        s.limit_w, self.changed_s[uuid] = w, self.now_s
        touched = self.touched(uuid)
        if touched and self.keeper is not None and self.policy.other_hand == "reassert":
            return
        self.found[uuid] = {w} if self.keeper is not None or not touched else {w, *self.found[uuid]}
        if touched or self.keeper is None:
            self.quarrel.add(uuid)
            if uuid in self.leases:
                self.leases[uuid].watts = set()

    @rule(uuid=boards)
    def foreign_unlock(self, uuid: str) -> None:
        self.silicon[uuid].lock = None

    @rule(uuid=boards)
    def lose_or_find_board(self, uuid: str) -> None:
        self.silicon[uuid].lost = not self.silicon[uuid].lost
        self.changed_s[uuid] = self.now_s

    @rule(uuid=boards)
    def deny_or_allow_writes(self, uuid: str) -> None:
        self.silicon[uuid].denied = not self.silicon[uuid].denied

    @rule(uuid=boards)
    def no_locks(self, uuid: str) -> None:
        self.silicon[uuid].no_locks, self.silicon[uuid].lock = True, None

    @rule()
    def driver_reload(self) -> None:
        """The driver forgets limits and locks; NVML must be opened anew."""
        for u, s in self.silicon.items():
            known = (
                self.keeper.ledger.boards.get(u) if self.keeper is not None else None
            )  # may miss the last other hand
            kept = {*self.found[u], *([known.found_w] if known is not None else [])}
            self.found[u] = {*kept, MAX_W} if self.touched(u) else {MAX_W}  # capd may die before it sees why
            s.limit_w, s.lock = MAX_W, None
        self.driver.reloaded = True

    @rule(full=st.booleans())
    def disk_full(self, full: bool) -> None:
        self.record.full = full

    @rule(effects=st.integers(1, 6))
    def crash_soon(self, effects: int) -> None:
        self.fuse.left = effects

    @rule()
    def crash_now(self) -> None:
        self.keeper, self.leases = None, {}
        self.forget()

    def forget(self) -> None:
        """What capd wrote while the disk was full is known to nobody now and may stay, and so may what another hand set."""
        for u, unsaved in self.unsaved.items():
            limit_w = self.silicon[u].limit_w
            foreign = self.policy.other_hand == "reassert" and all(abs(limit_w - w) >= 1.0 for w in self.written(u))
            self.found[u] |= unsaved | ({limit_w} if foreign else set())

    @rule(off=st.booleans())
    def kill_switch(self, off: bool) -> None:
        self.off = off
        if off:
            self.leases, self.budget = {}, None
        self.turn()

    @precondition(lambda self: not self.alive())
    @rule()
    def reboot(self) -> None:
        """Limits are the defaults again, and the record is of another boot."""
        for u, s in self.silicon.items():
            s.limit_w, s.lock, s.lost, self.found[u] = MAX_W, None, False, {MAX_W}
        self.record.state, self.quarrel = type(self.record.state)(), set()

    # --- what is known outside ---

    def ask(self, uid: int, **request: Any) -> dict[str, Any] | None:
        keeper = self.keeper
        assert keeper is not None
        peer = self.peers.get(uid) or Peer(uid=uid)
        self.leases = {u: p for u, p in self.leases.items() if p.expires_s > self.now_s}

        def answer() -> dict[str, Any]:
            keeper.turn(self.now_s)
            return keeper.handle(peer, request, self.now_s)

        reply: dict[str, Any] | None = self.survive(answer)
        self.sync_failure()
        return reply

    def sync_failure(self) -> None:
        """Under `fail` every lease ends when capd sees another hand on a board that is leased or not as found."""
        stopped = self.keeper is not None and self.keeper.ledger.stopped is not None
        if stopped and not self.off:
            assert self.policy.other_hand == "fail", "stopped for no reason"
            assert self.changed_s, "stopped though nobody else wrote"
            self.leases = {}

    def sync_budget(self) -> None:
        """Which client budget holds is told by capd; that it keeps it is checked here."""
        if self.keeper is not None:
            held = self.keeper.ledger.budget
            self.budget = None if held is None else (held.watts, held.uuids)

    def touched(self, uuid: str) -> bool:
        if self.keeper is not None:
            b = self.keeper.ledger.boards.get(uuid)
            return b is not None and (bool(b.ours_w) or (b.lease is not None and b.lease.watts is not None))
        return bool(self.record.state.boards.get(uuid, {}).get("written_w"))

    def written(self, uuid: str) -> list[float]:
        ours = list(self.record.state.boards.get(uuid, {}).get("written_w", []))
        if self.keeper is not None and uuid in self.keeper.ledger.boards:
            ours += self.keeper.ledger.boards[uuid].ours_w
        return ours

    def seen_w(self, uuid: str) -> float:
        """A board's limit as capd can know it: it looks once a second, and for boards that were unusable every half minute."""
        unseen = self.keeper is not None and self.now_s - self.changed_s.get(uuid, -math.inf) < POLL_S
        known = self.keeper.ledger.boards.get(uuid) if self.keeper is not None and unseen else None
        if self.keeper is not None and uuid not in self.keeper.ledger.boards:
            return 0.0
        return self.silicon[uuid].limit_w if known is None else min(known.limit_w, self.silicon[uuid].limit_w)

    def budgets(self) -> list[tuple[float, frozenset[str]]]:
        standing = [] if self.policy.budget_w is None else [(self.policy.budget_w, frozenset(UUIDS))]
        return [*standing, *([] if self.budget is None else [self.budget])]

    # --- promises ---

    def check_limit(self, uuid: str, w: float) -> None:
        """No board is told anything but what was found, what a live lease asked for, or its exit policy."""
        if self.record.full:
            self.unsaved[uuid].add(w)
        lease, asked, found_w = self.leases.get(uuid), self.asking.get(uuid), max(self.found[uuid])
        limited = [b for b in self.budgets() if uuid in b[1]]
        before = self.budget_before
        if self.budget is None and self.budget_asked is None and self.keeper is None:
            limited = [(0.0, frozenset())]  # the budget of before the crash, from the record
        granted = {
            *(lease.watts if lease is not None else ()),
            *([asked[0]] if asked is not None and asked[0] is not None else []),
        }
        allowed = {*granted, *self.found[uuid]}
        if self.policy.node.exit == "safe" and self.policy.node.safe_w is not None:
            allowed |= {min(self.policy.node.safe_w, f) for f in self.found[uuid]}
        most_w = max(granted, default=found_w) if lease is not None else found_w
        cut = bool(limited or (before is not None and uuid in before[1])) and MIN_W <= w <= max(most_w, found_w)
        assert MIN_W <= w <= MAX_W, f"{uuid} is told {w} W"
        assert any(abs(w - a) < 1.0 for a in allowed) or cut, f"{uuid} is told {w} W, allowed {allowed}, limited {limited}"
        if w > self.silicon[uuid].limit_w and self.budget_before is None:
            for budget_w, scope in limited:
                total_w = w + sum(self.seen_w(u) for u in scope if u != uuid and not self.silicon[u].lost)
                others_lost = any(self.silicon[u].lost for u in scope)
                assert not scope or others_lost or total_w <= budget_w + 1.0, (
                    f"{uuid} raised to {w}: {total_w} of {budget_w} W"
                )

    def check_lock(self, uuid: str, lock: Clocks | None) -> None:
        lease, asked = self.leases.get(uuid), self.asking.get(uuid)
        allowed = {
            None,
            self.policy.node.sm_clock_mhz,
            *(lease.locks if lease is not None else ()),
            *([asked[1]] if asked else []),
        }
        assert lock in allowed, f"{uuid} is locked at {lock}, allowed {allowed}"

    @invariant()
    def granted_watts_fit_every_budget(self) -> None:
        if self.keeper is None:
            return
        ledger = self.keeper.ledger
        for budget in ledger.budgets():
            of = [ledger.boards[u] for u in budget.uuids if u in ledger.boards]
            if any(b.left_alone or b.lost or self.silicon[b.uuid].denied or self.silicon[b.uuid].lost for b in of):
                continue  # what does not follow cannot be promised; it is an alarm
            granted_w = sum(b.lease.watts for b in of if b.lease is not None and b.lease.watts is not None)
            assert granted_w <= budget.watts + 1.0

    @invariant()
    def boards_stand_where_promised(self) -> None:
        """After a turn in a world that works, with time for what waits: boards without a lease are at their exit policy."""
        if self.keeper is None or self.fuse.left is not None or self.record.full or self.driver.reloaded:
            return
        if any(s.lost or s.denied for s in self.silicon.values()) or set(self.keeper.ledger.boards) != set(UUIDS):
            return
        ledger = self.after_a_turn()
        if ledger is None:
            return
        now_s = self.now_s
        for u, s in self.silicon.items():
            b = ledger.boards[u]
            quiet = abs(b.limit_w - s.limit_w) < 1.0 and now_s >= max(b.retry_s, b.reassert_s)
            leased = u in self.leases and bool(self.leases[u].watts)
            assert (b.lease is not None) == (u in self.leases), f"{u}: lease {b.lease}, promised {self.leases.get(u)}"
            unseen = b.lost is not None and self.now_s - self.changed_s.get(u, -math.inf) < POLL_S
            if unseen or not quiet or leased or u in self.quarrel or b.left_alone:
                continue
            limited = any(u in scope for _, scope in self.budgets())
            exits = (
                {*self.found[u]}
                if self.policy.node.exit != "safe"
                else {min(250.0, f) for f in self.found[u]} | {*self.found[u]}
            )
            assert limited or self.policy.node.exit == "hold" or any(abs(s.limit_w - w) < 1.0 for w in exits), (
                f"{u} stands at {s.limit_w}, exit {exits}"
            )
            assert s.limit_w <= max(self.found[u]) + 1.0
            assert (
                b.lease is not None
                or s.lock in (None, self.policy.node.sm_clock_mhz)
                or self.policy.node.exit == "hold"
            )
        quarrelling = any(
            b.left_alone or b.reassert_s > now_s or b.retry_s > now_s or abs(b.limit_w - self.silicon[u].limit_w) >= 1.0
            for u, b in ledger.boards.items()
        )
        for budget_w, scope in self.budgets():
            total_w = sum(self.silicon[u].limit_w for u in scope)
            assert quarrelling or total_w <= budget_w + 1.0, f"{total_w} W stand in a budget of {budget_w} W"

    def teardown(self) -> None:
        if hasattr(self, "audit"):
            assert check_order(dict(line) for line in self.audit.lines) == []
