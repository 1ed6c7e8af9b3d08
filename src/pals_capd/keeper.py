"""Does what the ledger decides: record first, then the driver, then what the driver says of it, then the audit log."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pals_capd import __version__
from pals_capd.audit import Audit
from pals_capd.driver import Driver, DriverError, Facts
from pals_capd.ledger import SAME_W, SMALL_RAISE_W, Ask, Board, Ledger, Write, standing
from pals_capd.policy import SHORTEST_TTL_S, Policy
from pals_capd.protocol import OPERATIONS
from pals_capd.record import NOT_KNOWN, Record, State, UnreadableError
from pals_capd.refused import ConfigError, Refused

POLL_S = 1.0
RETRY_S = 0.25
OTHERS_EVERY_S = 30.0


@dataclass(slots=True, kw_only=True)
class Peer:
    """Who asks, as the kernel says, and what this connection was given."""

    uid: int
    pid: int = 0
    epoch: int = -1


@dataclass(slots=True, kw_only=True)
class Keeper:
    """All boards of this node, kept at what the ledger says; tell it the time, requests and turns."""

    driver: Driver
    record: Record
    audit: Audit
    policy: Policy
    dry_run: bool = False
    off: Callable[[], bool] = lambda: False  # whether the kill switch is there
    look_for_others: Callable[[], Sequence[str]] = tuple
    ledger: Ledger = field(init=False)
    counters: Counter[str] = field(default_factory=Counter)
    alarms: dict[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    _epoch: int = 0
    _orphans: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # left on boards that are not here now
    _unusable: dict[str, str] = field(default_factory=dict)  # why, by UUID
    _saved: State | None = None
    _frozen: bool = False
    _polled_s: float = -math.inf
    _looked_s: float = -math.inf
    _durations_s: deque[float] = field(default_factory=lambda: deque(maxlen=512))

    # --- life ---

    def start(self, now_s: float) -> None:
        """Find the boards, take over what an earlier capd left, and bring all to where they should stand.

        Raises:
            ConfigError: no driver, or a standing budget that cannot be kept; nothing was written.
        """
        try:
            found = self.driver.open()
        except DriverError as e:
            raise ConfigError(f"{e}; nothing was changed") from e
        self.ledger = Ledger(self.policy, {})
        self._epoch = int(now_s * 1000)
        self._adopt(found, now_s)
        self._recover()
        self._refuse_budget_below_least(self.policy)
        self._log("start", version=__version__, dry_run=self.dry_run, policy=asdict(self.policy), **self._sums())
        self._polled_s = now_s
        self.turn(now_s)

    def turn(self, now_s: float) -> None:
        """What is due now: leases that ended, a look at the boards, what another hand did, raises that waited."""
        self._heed_kill_switch()
        self.counters["expired"] += self.ledger.expire(now_s)
        if now_s - self._polled_s >= POLL_S:
            self._polled_s = now_s
            self._poll(now_s)
        self.reconcile(now_s)

    def set_policy(self, policy: Policy, now_s: float) -> None:
        """Take another policy while leases live on.

        Raises:
            ConfigError: its budget cannot be kept; the one before holds on.
        """
        self._refuse_budget_below_least(policy)
        self.policy = self.ledger.policy = policy
        for b in self.ledger.boards.values():
            b.refusal = b.refusal if b.mig else self._left_alone(b.uuid)
        self.ledger.cut()
        self._log("policy", policy=asdict(policy))
        self._log("budget", **self._sums())
        self.turn(now_s)

    def _refuse_budget_below_least(self, policy: Policy) -> None:
        least_w = self.ledger.lowest_w(self.ledger.boards)
        if policy.budget_w is not None and policy.budget_w < least_w:
            raise ConfigError(
                f"budget_w = {policy.budget_w:.0f} cannot be kept: the minimum limits of the {len(self.ledger.boards)} boards "
                f"need {least_w:.0f} W, the lowest that can be promised; nothing was changed"
            )

    def stop(self, why: str, now_s: float) -> list[str]:
        """Bring every board to its exit policy; what could not be brought there, and why."""
        self._poll(now_s)  # the driver may have been loaded anew since
        for b in self.ledger.boards.values():
            self.ledger.release(b, why)
            b.retry_s = -math.inf
        failed = [f"{e}" for e in self.reconcile(now_s).values() if isinstance(e, Exception)]
        failed += [f"{u}: the board cannot be used now; what was written to it stays on record" for u in self._orphans]
        self._log("stop", why=why, failed=failed, **self._sums())
        return failed

    def _adopt(self, found: dict[str, Facts | str], now_s: float, *, reset: bool = False) -> None:
        """Take the boards that the driver names; those it names no more are lost."""
        before, self._unusable = self._unusable, {}
        for uuid, facts in found.items():
            try:
                now = self.driver.read(uuid)
            except DriverError as e:
                facts = facts if isinstance(facts, str) else str(e)
            if isinstance(facts, str):
                self._unusable[uuid] = facts
                if uuid not in before:
                    self._log("board-unusable", uuid=uuid, why=facts)
                continue
            if (known := self.ledger.boards.get(uuid)) is None:
                self.ledger.boards[uuid] = Board(
                    uuid=uuid, name=facts.name, min_w=facts.min_w, max_w=facts.max_w, default_w=facts.default_w,
                    clock_range=facts.clock_range, mig=facts.mig, refusal=self._refusal(facts), limit_w=now.limit_w,
                    enforced_w=now.enforced_w, sm_clock_mhz=now.sm_clock_mhz, read_s=now_s, found_w=now.limit_w,
                )  # fmt: skip
            else:
                known.lost, known.mig, known.refusal = None, facts.mig, self._refusal(facts)
                self.ledger.observe(known, **asdict(now), now_s=now_s, reset=reset)
            if uuid in self._orphans:
                self.ledger.recover({uuid: self._orphans.pop(uuid)})

    def _refusal(self, facts: Facts) -> str | None:
        if facts.mig:
            return f"{facts.uuid}: MIG mode is enabled, and one power limit holds for all tenants of the board; capd does not write it"
        return self._left_alone(facts.uuid)

    def _left_alone(self, uuid: str) -> str | None:
        if self.policy.exit_of(uuid).steer:
            return None
        return f"{uuid}: the policy file says that this board is left alone (steer = false)"

    def _recover(self) -> None:
        try:
            state = self.record.load()
            self._refuse_impossible(state)
        except UnreadableError as e:
            self._frozen, self.ledger.stopped, self.alarms["state"] = True, str(e), str(e)
            self._log("alarm", why=str(e))
            return
        self._orphans = {u: left for u, left in state.boards.items() if u not in self.ledger.boards}
        self.ledger.recover(state.boards)
        if state.budget_w is not None:
            self.ledger.restore_budget(state.budget_w, state.budget_of, state.budget_uid or 0)

    def _refuse_impossible(self, state: State) -> None:
        for uuid, left in state.boards.items():
            b = self.ledger.boards.get(uuid)
            if b is not None and not b.min_w - SAME_W <= left["found_w"] <= b.max_w + SAME_W:
                raise UnreadableError(
                    f"the state file says that {uuid} was found at {left['found_w']:.0f} W, outside its {b.min_w:.0f}..{b.max_w:.0f} W, "
                    f"so {NOT_KNOWN}"
                )

    # --- requests ---

    def handle(self, peer: Peer, request: dict[str, Any], now_s: float) -> dict[str, Any]:
        """Answer one request that `parse_request` let through; never raises for what a client can do."""
        op = request["op"]
        try:
            if not self.policy.may(peer.uid, OPERATIONS[op]):
                raise Refused(
                    "rights",
                    f"user {peer.uid} may not {op}: it needs the right {OPERATIONS[op]!r} in capd's policy file. Nothing was changed",
                )
            self.counters["requests"] += 1
            reply: dict[str, Any] = getattr(self, f"_{op}")(peer, request, now_s)
        except Refused as e:
            reply = self._refused(peer, request, e)
        return reply if "id" not in request else {**reply, "id": request["id"]}

    def _refused(self, peer: Peer, request: dict[str, Any], why: Refused) -> dict[str, Any]:
        self.counters["refused"] += 1
        if why.word not in ("rights", "stale") or self.counters["refused"] < 1000:  # a log is no place for a flood
            self._log("refused", op=request["op"], uuid=request.get("uuid"), uid=peer.uid, pid=peer.pid, error=why.word)
        return {"ok": False, "error": why.word, "message": str(why), **why.facts}

    def _hello(self, peer: Peer, request: dict[str, Any], now_s: float) -> dict[str, Any]:
        self._epoch += 1
        peer.epoch = self._epoch
        rights = next(r for r in ("admin", "set", "read") if self.policy.may(peer.uid, r))
        return {
            "ok": True, "version": __version__, "epoch": peer.epoch, "rights": rights, "dry_run": self.dry_run,
            "ttl_s": self.policy.ttl_s, "max_ttl_s": self.policy.max_ttl_s, **self._shown(now_s),
        }  # fmt: skip

    def _read(self, peer: Peer, request: dict[str, Any], now_s: float) -> dict[str, Any]:
        ordered = sorted(self._durations_s)
        took = {f"write_s_p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 99) if ordered}
        return {"ok": True, **self._shown(now_s), "others": list(self.others), "counters": {**self.counters, **took}}

    def _set(self, peer: Peer, request: dict[str, Any], now_s: float) -> dict[str, Any]:
        ask = self._ask(peer, request)
        self._look(self.ledger.leasable(ask.uuid), now_s)
        before = self.ledger.leasable(ask.uuid).lease
        b = self.ledger.grant(ask, uid=peer.uid, admin=self.policy.may(peer.uid, "admin"), now_s=now_s)
        done = self.reconcile(now_s).get(ask.uuid)
        if isinstance(done, Exception):
            b.lease = replace(before, watts=None) if before is not None and b.left_alone else before  # that lives on
            word = done.word if isinstance(done, DriverError | Refused) else "state"
            raise Refused(word, f"{done}. {standing(b)}", **_stands(b, ask))
        return {
            "ok": True,
            "seq": ask.seq,
            "outcome": self._outcome(b, ask, done),
            "ttl_s": ask.ttl_s,
            **_stands(b, ask),
        }

    def _look(self, b: Board, now_s: float) -> None:
        """Read the board: what is answered is as it stands now. Raises `Refused` where it cannot be read."""
        try:
            self.ledger.observe(b, **asdict(self.driver.read(b.uuid)), now_s=now_s)
        except DriverError as e:
            raise Refused(e.word, f"{e}. Its limit is not known") from e

    def _ask(self, peer: Peer, request: dict[str, Any]) -> Ask:
        ttl_s = float(request.get("ttl_s") or self.policy.ttl_s)
        if not SHORTEST_TTL_S <= ttl_s <= self.policy.max_ttl_s:
            raise Refused(
                "range",
                f"ttl_s = {ttl_s:g} lies outside {SHORTEST_TTL_S:g}..{self.policy.max_ttl_s:g}. Nothing was changed",
            )
        _own_epoch(peer, request)
        watts, clocks = request.get("watts"), request.get("sm_clock_mhz")
        return Ask(
            uuid=request["uuid"], watts=None if watts is None else float(watts),
            sm_clock_mhz=None if clocks is None else (clocks[0], clocks[1]), ttl_s=ttl_s,
            epoch=request["epoch"], seq=request["seq"], reason=request["reason"],
        )  # fmt: skip

    def _outcome(self, b: Board, ask: Ask, done: Write | Exception | None) -> str:
        if self.dry_run:
            return "dry-run"
        wish_w = b.limit_w if ask.watts is None else ask.watts
        if wish_w - b.limit_w >= 0.5:
            return "coalesced" if wish_w - b.limit_w < SMALL_RAISE_W else "deferred"
        return "unchanged" if done is None else "written"

    def _release(self, peer: Peer, request: dict[str, Any], now_s: float) -> dict[str, Any]:
        b = self.ledger.leasable(request["uuid"])
        _own_epoch(peer, request)
        self.ledger.fence(b, peer.uid, request["epoch"], request["seq"], admin=self.policy.may(peer.uid, "admin"))
        b.epoch, b.seq = request["epoch"], request["seq"]
        self.ledger.release(b, "released")
        done = self.reconcile(now_s).get(b.uuid)
        if isinstance(done, Exception):
            raise Refused("driver", f"{done}. {standing(b)}; capd tries again", **_stands(b))
        return {"ok": True, "seq": request["seq"], "outcome": "unchanged" if done is None else "written", **_stands(b)}

    def _budget(self, peer: Peer, request: dict[str, Any], now_s: float) -> dict[str, Any]:
        watts, boards = request.get("watts"), request.get("boards", [])
        self.ledger.set_budget(
            None if watts is None else float(watts), boards, uid=peer.uid, admin=self.policy.may(peer.uid, "admin")
        )
        self._log("budget", watts=watts, boards=boards, uid=peer.uid, pid=peer.pid, **self._sums())
        self.reconcile(now_s)
        return {"ok": True, "watts": watts, "lowest_w": self.ledger.lowest_w(boards)}

    def _release_all(self, peer: Peer, request: dict[str, Any], now_s: float) -> dict[str, Any]:
        self.ledger.release_all(f"release all, by user {peer.uid}")
        self._log("budget", watts=None, boards=[], uid=peer.uid, pid=peer.pid, **self._sums())
        failed = [str(e) for e in self.reconcile(now_s).values() if isinstance(e, Exception)]
        return {"ok": not failed, "failed": failed, **self._shown(now_s)}

    # --- boards ---

    def reconcile(self, now_s: float) -> dict[str, Write | Exception]:
        """Write what must be written; by board, what was done or why it could not be."""
        done: dict[str, Write | Exception] = {}
        while not self._frozen and (w := self.ledger.next_write(now_s, set(done))) is not None:
            done[w.uuid] = self._perform(w, now_s)
        self.ledger.settle()
        self._keep()
        self._report()
        return done

    def _perform(self, w: Write, now_s: float) -> Write | Exception:
        b, uuid = self.ledger.boards[w.uuid], w.uuid
        if (changed := self._look_before(b, w, now_s)) is not None:
            return changed
        before, first = (b.limit_w, b.ours_w, b.locked), not b.touched
        self.ledger.about_to_write(w)
        raised = b.lease is not None and w.watts is not None and w.watts > b.limit_w
        if (unsaved := self._save(sure=first)) and (first or raised):
            _, b.ours_w, b.locked = before
            b.retry_s = now_s + RETRY_S
            return (
                unsaved  # what could not be undone after a crash is not done; what lowers a board, or puts it back, is
            )
        began_s = time.perf_counter()
        try:
            if w.watts is not None:
                self.driver.set_limit(uuid, w.watts)
            if w.unlock:
                self.driver.unlock(uuid)
            if w.lock is not None:
                self.driver.lock(uuid, w.lock)
            self._durations_s.append(time.perf_counter() - began_s)
            now = self.driver.read(uuid)
        except DriverError as e:
            self._failed(b, w, e, now_s)
            return e
        self.ledger.wrote(w, **asdict(now), now_s=now_s)
        self.counters["writes"] += 1
        lease = b.lease
        self._tell_events()
        self._log(
            "write", uuid=uuid, why=w.why, uid=lease.uid if lease else None, epoch=lease.epoch if lease else None,
            asked_w=w.watts, before_w=before[0], limit_w=now.limit_w if w.watts is not None else None, enforced_w=now.enforced_w,
            lock=w.lock, unlock=w.unlock, sm_clock_mhz=now.sm_clock_mhz,
        )  # fmt: skip
        return w

    def _look_before(self, b: Board, w: Write, now_s: float) -> Exception | None:
        """Read the board once more: what another hand did since the last look is not written over unseen."""
        limit_w = b.limit_w
        try:
            self.ledger.observe(b, **asdict(self.driver.read(b.uuid)), now_s=now_s)
        except DriverError as e:
            self._failed(b, w, e, now_s)
            return e
        if abs(b.limit_w - limit_w) < SAME_W:
            return None
        return Refused("changed", f"{b.uuid}: another hand set {b.limit_w:.0f} W just now")

    def _failed(self, b: Board, w: Write, error: DriverError, now_s: float) -> None:
        """Take note of what the driver would not do, and of how the board stands all the same."""
        self.counters["failed"] += 1
        b.retry_s = now_s + RETRY_S
        if error.word == "lost":
            b.lost = str(error)
        if error.word == "not_supported" and (w.lock is not None or w.unlock):
            b.clock_range = b.locked = None  # a board without locks holds none
        try:
            now = self.driver.read(b.uuid)
            b.limit_w, b.enforced_w, b.sm_clock_mhz, b.read_s = now.limit_w, now.enforced_w, now.sm_clock_mhz, now_s
        except DriverError:
            pass
        self._log(
            "write-failed",
            uuid=b.uuid,
            why=w.why,
            asked_w=w.watts,
            limit_w=b.limit_w,
            lock=w.lock,
            error=error.word,
            message=str(error),
        )

    def _poll(self, now_s: float) -> None:
        """Look at every board, and at who else may write."""
        for b in self.ledger.boards.values():
            try:
                now = self.driver.read(b.uuid)
            except DriverError as e:
                if e.word == "reloaded":
                    self._reopen(now_s)
                    return
                if b.lost is None:
                    self._log("board-lost", uuid=b.uuid, why=str(e))
                b.lost = str(e)
                continue
            if b.lost is not None:
                self._log("board-back", uuid=b.uuid)
            b.lost = None
            self.ledger.observe(b, **asdict(now), now_s=now_s)
        if now_s - self._looked_s >= OTHERS_EVERY_S:
            if self._unusable:
                self._look_for_missing(now_s)
            self._looked_s, before = now_s, self.others
            self.others = tuple(self.look_for_others())
            if self.others != before:
                self._log("other-writers", who=list(self.others))

    def _look_for_missing(self, now_s: float) -> None:
        """Boards that could not be used may be usable now; what an earlier capd left on them is undone then."""
        try:
            self._adopt(self.driver.enumerate(), now_s)
        except DriverError as e:
            self._log("board-unusable", why=str(e))

    def _reopen(self, now_s: float) -> None:
        """The driver went away: open it anew, by UUID, since indices may have changed."""
        try:
            found = self.driver.open()
        except DriverError as e:
            for b in self.ledger.boards.values():
                b.lost = str(e)
            return
        self._log("driver-reopened")
        for b in self.ledger.boards.values():
            b.lost = None if b.uuid in found else f"{b.uuid}: the board is not in this node any more"
        self._adopt(found, now_s, reset=True)

    def _heed_kill_switch(self) -> None:
        off, word = self.off(), "kill switch"
        if off and self.ledger.stopped is None:
            self.ledger.stopped = f"{word}: the file `off` is in capd's state folder; remove it to lease again"
            self.ledger.release_all(word)
            self._log(word, **self._sums())
        elif not off and (self.ledger.stopped or "").startswith(word):
            self.ledger.stopped = None
            self._log(f"{word} removed")

    # --- record, log, views ---

    def _keep(self) -> None:
        """Bring the record up to date where it is not; a failure is an alarm."""
        if not self._frozen and self._state() != self._saved:
            self._save(sure=False)

    def _save(self, *, sure: bool) -> OSError | None:
        state = self._state()
        if state == self._saved and not sure:
            return None
        try:
            self.record.save(state, sure=sure)
        except OSError as e:
            self.alarms["state"] = f"the state file cannot be written ({e}); no board is raised by a lease until it can"
            return e
        self._saved = state
        self.alarms.pop("state", None)
        return None

    def _state(self) -> State:
        budget = self.ledger.budget
        return State(
            boards={**self._orphans, **self.ledger.mine()}, budget_w=budget.watts if budget else None,
            budget_of=tuple(sorted(budget.uuids)) if budget else (), budget_uid=budget.uid if budget else None,
        )  # fmt: skip

    def _report(self) -> None:
        """Say whether a budget is overdrawn, and what else happened."""
        self._tell_events()
        if self.ledger.overdrawn():
            self.alarms["budget"] = (
                "the limits in force exceed the budget: a board does not follow, or another hand raised it"
            )
        else:
            self.alarms.pop("budget", None)

    def _tell_events(self) -> None:
        """Put the ledger's events into the log, before what is written because of them."""
        events, self.ledger.events = self.ledger.events, []
        for e in events:
            self.counters[str(e["event"]).replace("-", "_")] += 1
            self._log(**e)

    def _log(self, event: str, **facts: object) -> None:
        if self.audit.write(event, **facts):
            self.alarms.pop("audit", None)
        else:
            self.counters["audit_lost"] += 1
            self.alarms["audit"] = "the audit log cannot be written: the disk is full or read-only"

    def _sums(self) -> dict[str, object]:
        budgets = [{"watts": b.watts, "uuids": sorted(b.uuids)} for b in self.ledger.budgets()]
        return {"limits_w": {b.uuid: b.limit_w for b in self.ledger.boards.values()}, "budgets": budgets}

    def _shown(self, now_s: float) -> dict[str, Any]:
        budget = self.ledger.budget
        return {
            "boards": [{**_shown(b, now_s), "exit": self.ledger.exit_kind(b)} for b in self.ledger.boards.values()],
            "budget": {"watts": budget.watts if budget else None, "boards": sorted(budget.uuids) if budget else []},
            "node_budget_w": self.policy.budget_w,
            "off": (self.ledger.stopped or "").startswith("kill switch"),
            "alarm": "; ".join(self.alarms.values()) or self.ledger.stopped,
        }


def _own_epoch(peer: Peer, request: dict[str, Any]) -> None:
    """Refuse an epoch that was made up: boards remember the highest, and would refuse everybody after it."""
    if request["epoch"] != peer.epoch:
        raise Refused(
            "stale",
            f"epoch {request['epoch']} was not given to this connection; say hello again. Nothing was changed",
        )


def _stands(b: Board, ask: Ask | None = None) -> dict[str, Any]:
    """Requested, accepted and in force: the limit can be read back, of a lock only the clock can."""
    return {
        "watts": {"requested": ask and ask.watts, "accepted": b.limit_w, "enforced": b.enforced_w},
        "sm_clock_mhz": {"requested": ask and ask.sm_clock_mhz, "accepted": b.locked, "measured": b.sm_clock_mhz},
        "ceiling_w": b.found_w,
    }


def _shown(b: Board, now_s: float) -> dict[str, Any]:
    lease = b.lease and {
        "uid": b.lease.uid, "epoch": b.lease.epoch, "watts": b.lease.watts, "sm_clock_mhz": b.lease.sm_clock_mhz,
        "expires_s": round(b.lease.expires_s - now_s, 3), "reason": b.lease.reason,
    }  # fmt: skip
    return {
        "uuid": b.uuid, "name": b.name, "min_w": b.min_w, "max_w": b.max_w, "default_w": b.default_w, "found_w": b.found_w,
        "limit_w": b.limit_w, "enforced_w": b.enforced_w, "sm_clock_mhz": b.sm_clock_mhz, "clock_range_mhz": b.clock_range,
        "refusal": b.refusal or b.lost, "lease": lease, "other_hand_w": b.other_hand_w, "suspected_lock": b.suspected,
        "locked_mhz": b.locked, "age_s": round(now_s - b.read_s, 3),
    }  # fmt: skip
