"""Answers requests: who may ask what, in which order, and what is told of the board afterwards. The keeper does the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from pals_capd import __version__
from pals_capd.board import SAME_W, SMALL_RAISE_W, Ask, Board, Write, standing
from pals_capd.driver import DriverError
from pals_capd.keeper import Keeper
from pals_capd.permits import fence, leasable, permit
from pals_capd.policy import SHORTEST_TTL_S
from pals_capd.protocol import OPERATIONS
from pals_capd.refused import Refused

Reply = dict[str, Any]
Request = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Peer:
    """Who asks, as the kernel says, and what this connection was given."""

    uid: int
    pid: int = 0
    epoch: int = -1


def answer(keeper: Keeper, peer: Peer, request: Request, now_s: float) -> Reply:
    """Answer one request that `parse_request` let through; never raises for what a client can do."""
    op = request["op"]
    try:
        if not keeper.policy.may(peer.uid, OPERATIONS[op]):
            raise Refused(
                "rights",
                f"user {peer.uid} may not {op}: it needs the right {OPERATIONS[op]!r} in capd's policy file. Nothing was changed",
            )
        keeper.counters["requests"] += 1
        reply = _ANSWERS[op](keeper, peer, request, now_s)
    except Refused as e:
        keeper.log_refusal(now_s, op=op, uuid=request.get("uuid", "")[:64], uid=peer.uid, pid=peer.pid, error=e.word)
        reply = {"ok": False, "error": e.word, "message": str(e), **e.facts}
    return reply if "id" not in request else {**reply, "id": request["id"]}


def _hello(keeper: Keeper, peer: Peer, request: Request, now_s: float) -> Reply:
    keeper.epoch += 1
    peer.epoch, policy = keeper.epoch, keeper.policy
    return {
        "ok": True, "version": __version__, "epoch": peer.epoch, "dry_run": keeper.dry_run,
        "rights": next(r for r in ("admin", "set", "read") if policy.may(peer.uid, r)),
        "ttl_s": policy.ttl_s, "max_ttl_s": policy.max_ttl_s, **_node(keeper, now_s),
    }  # fmt: skip


def _read(keeper: Keeper, peer: Peer, request: Request, now_s: float) -> Reply:
    ordered = sorted(keeper.durations_s)
    took = {f"write_s_p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 99) if ordered}
    return {"ok": True, **_node(keeper, now_s), "others": list(keeper.others), "counters": {**keeper.counters, **took}}


def _set(keeper: Keeper, peer: Peer, request: Request, now_s: float) -> Reply:
    ask, admin = _asked(keeper, peer, request), keeper.policy.may(peer.uid, "admin")
    _look(
        keeper, permit(keeper.ledger, ask, uid=peer.uid, admin=admin), now_s
    )  # which costs time, so not for everybody
    before = leasable(keeper.ledger, ask.uuid).lease
    b = keeper.ledger.grant(ask, uid=peer.uid, admin=admin, now_s=now_s)
    done = keeper.reconcile(now_s).get(ask.uuid)
    if done is None and not _obeyed(b):
        done = b.trouble  # tried a moment ago, for this wish or the same one before
    if isinstance(done, Exception):
        if keeper.ledger.stopped is None:  # the one before lives on
            b.lease = replace(before, watts=None) if before is not None and b.left_alone else before
            keeper.ledger.cut()
        word = done.word if isinstance(done, DriverError | Refused) else "state"
        raise Refused(word, f"{done}. {standing(b)}", **_stands(b, ask))
    outcome = "dry-run" if keeper.dry_run else _outcome(b, ask, done)
    return {"ok": True, "seq": ask.seq, "outcome": outcome, "ttl_s": ask.ttl_s, **_stands(b, ask)}


def _asked(keeper: Keeper, peer: Peer, request: Request) -> Ask:
    ttl_s = float(request.get("ttl_s") or keeper.policy.ttl_s)
    if not SHORTEST_TTL_S <= ttl_s <= keeper.policy.max_ttl_s:
        raise Refused(
            "range",
            f"ttl_s = {ttl_s:g} lies outside {SHORTEST_TTL_S:g}..{keeper.policy.max_ttl_s:g}. Nothing was changed",
        )
    _own_epoch(peer, request)
    watts, clocks = request.get("watts"), request.get("sm_clock_mhz")
    return Ask(
        uuid=request["uuid"], watts=None if watts is None else float(watts),
        sm_clock_mhz=None if clocks is None else (clocks[0], clocks[1]), ttl_s=ttl_s,
        epoch=request["epoch"], seq=request["seq"], reason=request["reason"],
    )  # fmt: skip


def _own_epoch(peer: Peer, request: Request) -> None:
    """Refuse an epoch that was made up: boards remember the highest, and would refuse everybody after it."""
    if request["epoch"] != peer.epoch:
        raise Refused(
            "stale",
            f"epoch {request['epoch']} was not given to this connection; say hello again. Nothing was changed",
        )


def _look(keeper: Keeper, b: Board, now_s: float) -> None:
    """Read the board: what is answered is as it stands now."""
    try:
        keeper.ledger.observe(b, **asdict(keeper.driver.read(b.uuid)), now_s=now_s)
    except DriverError as e:
        raise Refused(e.word, f"{e}. Its limit is not known") from e


def _obeyed(b: Board) -> bool:
    """Whether the board stands where its lease says."""
    lease = b.lease
    if lease is None:
        return True
    return lease.sm_clock_mhz == b.locked and (lease.watts is None or abs(lease.watts - b.limit_w) < SAME_W)


def _outcome(b: Board, ask: Ask, done: Write | Exception | None) -> str:
    wish_w = b.limit_w if ask.watts is None else ask.watts
    if wish_w - b.limit_w >= 0.5:
        return "coalesced" if wish_w - b.limit_w < SMALL_RAISE_W else "deferred"
    return "unchanged" if done is None else "written"


def _release(keeper: Keeper, peer: Peer, request: Request, now_s: float) -> Reply:
    b = leasable(keeper.ledger, request["uuid"])
    _own_epoch(peer, request)
    fence(b, peer.uid, request["epoch"], request["seq"], admin=keeper.policy.may(peer.uid, "admin"))
    b.epoch, b.seq = request["epoch"], request["seq"]
    keeper.ledger.release(b, "released")
    done = keeper.reconcile(now_s).get(b.uuid)
    if isinstance(done, Exception):
        raise Refused("driver", f"{done}. {standing(b)}; capd tries again", **_stands(b))
    return {"ok": True, "seq": request["seq"], "outcome": "unchanged" if done is None else "written", **_stands(b)}


def _budget(keeper: Keeper, peer: Peer, request: Request, now_s: float) -> Reply:
    watts, boards, before = request.get("watts"), request.get("boards", []), keeper.ledger.budget
    keeper.ledger.set_budget(
        None if watts is None else float(watts), boards, uid=peer.uid, admin=keeper.policy.may(peer.uid, "admin")
    )
    if keeper.ledger.budget != before:
        keeper.log("budget", watts=watts, boards=boards, uid=peer.uid, pid=peer.pid, **keeper.sums())
    keeper.reconcile(now_s)
    return {"ok": True, "watts": watts, "lowest_w": keeper.ledger.lowest_w(boards)}


def _release_all(keeper: Keeper, peer: Peer, request: Request, now_s: float) -> Reply:
    keeper.ledger.release_all(f"release all, by user {peer.uid}")
    keeper.log("budget", watts=None, boards=[], uid=peer.uid, pid=peer.pid, **keeper.sums())
    failed = [str(e) for e in keeper.reconcile(now_s).values() if isinstance(e, Exception)]
    return {"ok": not failed, "failed": failed, **_node(keeper, now_s)}


_ANSWERS: dict[str, Callable[[Keeper, Peer, Request, float], Reply]] = {
    "hello": _hello, "read": _read, "set": _set, "release": _release, "budget": _budget, "release_all": _release_all,
}  # fmt: skip


def _stands(b: Board, ask: Ask | None = None) -> Reply:
    """Requested, accepted and in force: the limit can be read back, of a lock only the clock can."""
    return {
        "watts": {"requested": ask and ask.watts, "accepted": b.limit_w, "enforced": b.enforced_w},
        "sm_clock_mhz": {"requested": ask and ask.sm_clock_mhz, "accepted": b.locked, "measured": b.sm_clock_mhz},
        "ceiling_w": b.found_w,
    }


def _node(keeper: Keeper, now_s: float) -> Reply:
    ledger = keeper.ledger
    return {
        "boards": [{**_board(b, now_s), "exit": ledger.exit_kind(b)} for b in ledger.boards.values()],
        "budget": {
            "watts": ledger.budget.watts if ledger.budget else None,
            "boards": sorted(ledger.budget.uuids) if ledger.budget else [],
        },
        "node_budget_w": keeper.policy.budget_w,
        "off": (ledger.stopped or "").startswith("kill switch"),
        "alarm": "; ".join(keeper.alarms.values()) or ledger.stopped,
    }


def _board(b: Board, now_s: float) -> Reply:
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
