"""What anybody may send or leave to capd: it is answered or refused, and no board goes where it must not."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals_capd.audit import FileAudit, check_order, read_audit
from pals_capd.keeper import Keeper, Peer
from pals_capd.ledger import Clocks
from pals_capd.policy import RIGHTS, Policy, load_policy
from pals_capd.protocol import OPERATIONS, parse_request
from pals_capd.record import FileRecord, State
from pals_capd.refused import ConfigError, Refused
from tests.capd_world import MAX_W, MIN_W, FakeDriver, MemoryAudit, MemoryRecord, Silicon
from tests.fuzz_input import NUMBERS, any_bytes, near_json, near_toml

NOW_S = 1000.0
FIRST_EPOCH = 1_000_001  # what the first hello of a keeper started then is given
FOUND_W = {"GPU-a": 400.0, "GPU-b": 350.0, "GPU-c": 400.0}
USERS = {1000: "none", 1001: "read", 1002: "set", 1003: "admin"}


class World(NamedTuple):
    """A keeper over boards that fail the test where they are told anything outside their range."""

    keeper: Keeper
    driver: FakeDriver
    audit: MemoryAudit

    @staticmethod
    def made(policy: Policy | None = None, record: Any = None, found_w: dict[str, float] = FOUND_W) -> World:
        """Not started yet."""
        driver, audit = FakeDriver(boards={u: Silicon(limit_w=w) for u, w in found_w.items()}), MemoryAudit()
        driver.on_limit, driver.on_lock = in_range(found_w), lock_in_range
        policy = policy or Policy(rights=USERS)
        return World(Keeper(driver=driver, record=record or MemoryRecord(), audit=audit, policy=policy), driver, audit)


def in_range(found_w: dict[str, float]) -> Callable[[str, float], None]:
    def told(uuid: str, watts: float) -> None:
        assert MIN_W <= watts <= found_w[uuid], f"{uuid} is told {watts} W"

    return told


def lock_in_range(uuid: str, clocks: Clocks | None) -> None:
    assert clocks is None or 210 <= clocks[0] <= clocks[1] <= 1410, f"{uuid} is locked at {clocks}"


# --- the socket's protocol ---

TAKES = {
    "set": {"op", "uuid", "watts", "sm_clock_mhz", "ttl_s", "epoch", "seq", "reason", "id"},
    "release": {"op", "uuid", "epoch", "seq"},
    "budget": {"op", "watts", "boards"},
}

SET = {
    "op": "set", "uuid": "GPU-a", "watts": 250.0, "sm_clock_mhz": [210, 1200], "ttl_s": 3.0, "epoch": FIRST_EPOCH, "seq": 1,
    "reason": "test", "id": "7",
}  # fmt: skip
REQUESTS: Sequence[dict[str, Any]] = (
    SET, {**SET, "uuid": "GPU-b", "seq": 2, "sm_clock_mhz": None}, {**SET, "uuid": "GPU-c", "watts": None, "seq": 3},
    {"op": "release", "uuid": "GPU-a", "epoch": FIRST_EPOCH, "seq": 9}, {"op": "budget", "watts": 900, "boards": list(FOUND_W)},
    {"op": "budget", "watts": None, "boards": []}, {"op": "hello"}, {"op": "read", "id": 3}, {"op": "release_all"},
)  # fmt: skip
WISHES = st.fixed_dictionaries(
    {
        **{k: st.just(v) for k, v in SET.items()},
        "op": st.sampled_from(("set", "set", "set", "release", "budget")),
        "uuid": st.sampled_from(tuple(FOUND_W)),
        "watts": st.one_of(st.none(), st.floats(90.0, 410.0), NUMBERS),
        "sm_clock_mhz": st.one_of(st.none(), st.lists(st.integers(200, 1420), min_size=2, max_size=2)),
        "ttl_s": st.one_of(st.none(), st.floats(0.05, 70.0)),
        "epoch": st.sampled_from((FIRST_EPOCH, FIRST_EPOCH, FIRST_EPOCH, FIRST_EPOCH + 1, (1 << 63) - 1, 0)),
        "seq": st.one_of(st.integers(1, 1000), st.just((1 << 63) - 1)),
        "boards": st.sets(st.sampled_from(tuple(FOUND_W))).map(sorted),
    }
).map(lambda w: json.dumps({k: v for k, v in w.items() if k in TAKES[str(w["op"])]}).encode())
LINES = any_bytes(near_json(REQUESTS)) | WISHES


def answered(keeper: Keeper, peer: Peer, line: bytes, now_s: float) -> tuple[str | None, dict[str, Any]]:
    """The operation that was asked for, if any was, and the answer: always one object that is JSON on one line."""
    try:
        request = parse_request(line)
    except Refused as e:
        return None, {"ok": False, "error": e.word}
    reply = keeper.handle(peer, request, now_s)
    text = json.dumps(reply, allow_nan=False)
    assert "\n" not in text
    assert reply["ok"] or (reply.get("error") or reply["failed"])
    return request["op"], reply


def no_rights_write_nothing(lines: list[tuple[int, bytes]]) -> None:
    w = World.made()
    w.keeper.start(NOW_S)
    peers = {uid: Peer(uid=uid) for uid in (999, 1000, 1001)}
    w.keeper.handle(peers[1001], {"op": "hello"}, NOW_S)
    for n, (uid, line) in enumerate(lines):
        op, reply = answered(w.keeper, peers[uid], line, NOW_S + 0.1 * n)
        assert not reply["ok"] or (uid == 1001 and op in ("hello", "read"))
    w.keeper.turn(NOW_S + 60.0)
    assert w.driver.writes == 0
    assert w.keeper.ledger.budget is None
    assert w.keeper.record.load() == State()


def set_rights_write_within_range(lines: list[tuple[int, bytes]]) -> None:
    """Whatever was said: afterwards each board can still be leased by whoever says hello, and goes back to what was found."""
    w = World.made()
    w.keeper.start(NOW_S)
    peers = {uid: Peer(uid=uid) for uid in (1001, 1002, 1003)}
    w.keeper.handle(peers[1002], {"op": "hello"}, NOW_S)
    for n, (uid, line) in enumerate(lines):
        now_s = NOW_S + 0.3 * n
        w.keeper.turn(now_s)
        before = w.driver.writes
        op, reply = answered(w.keeper, peers[uid], line, now_s)
        assert w.driver.writes == before or (op is not None and uid != 1001 and OPERATIONS[op] != "read")
    now_s = NOW_S + 700.0
    w.keeper.turn(now_s)
    later = Peer(uid=1002)
    w.keeper.handle(peers[1003], {"op": "release_all"}, now_s)
    epoch = w.keeper.handle(later, {"op": "hello"}, now_s)["epoch"]
    for uuid in FOUND_W:
        reply = w.keeper.handle(later, {**SET, "uuid": uuid, "watts": 150.0, "epoch": epoch}, now_s)
        assert reply["ok"], reply
    w.keeper.turn(now_s + 10.0)
    assert {u: s.limit_w for u, s in w.driver.boards.items()} == FOUND_W
    assert check_order(dict(line) for line in w.audit.lines) == []


# --- the policy file ---

POLICY = """\
[rights]
1000 = "set"
root = "admin"
[node]
budget_w = 900
exit = "safe"
safe_w = 250
other_hand = "yield"
ttl_s = 3.0
max_ttl_s = 60.0
sm_clock_mhz = [210, 1200]
[board."GPU-a"]
exit = "hold"
sm_clock_mhz = [300, 900]
[board.GPU-b]
steer = false
"""
FOLDER = tempfile.TemporaryDirectory(prefix="capd-fuzz-")


def a_policy_is_whole_or_refused(data: bytes) -> None:
    """And a keeper can live with whatever is let through."""
    path = Path(FOLDER.name) / "capd.toml"
    path.write_bytes(data)
    try:
        policy = load_policy(path)
    except ConfigError:
        return
    assert all(right in RIGHTS and uid >= 0 for uid, right in policy.rights.items())
    assert 0 < policy.ttl_s <= policy.max_ttl_s < math.inf
    w = World.made(policy)
    try:
        w.keeper.start(NOW_S)
    except ConfigError:
        assert w.driver.writes == 0
        return
    assert_serves(w.keeper)


def assert_serves(keeper: Keeper) -> None:
    """A lease, its end, and the end of capd: answered, and within range (which the driver asserts)."""
    peer = Peer(uid=0)
    epoch = keeper.handle(peer, {"op": "hello"}, NOW_S)["epoch"]
    answered(keeper, peer, json.dumps({**SET, "epoch": epoch}).encode(), NOW_S)
    for n in range(1, 4):
        keeper.turn(NOW_S + 2.0 * n)
    answered(keeper, peer, b'{"op":"read"}', NOW_S + 9.0)
    keeper.stop("test", NOW_S + 10.0)


# --- the record of what is ours ---

BOOT = "0f3c"
STATE = {
    "format": "pals-capd-state/1", "boot_id": BOOT, "budget_w": 900.0, "budget_of": list(FOUND_W), "budget_uid": 1002,
    "boards": {
        "GPU-a": {"found_w": 400.0, "written_w": [250.0], "locked": True, "owner": 1002},
        "GPU-b": {"found_w": 350.0, "written_w": [300.0, 310.0], "locked": False, "owner": None},
        "GPU-gone": {"found_w": 300.0, "written_w": [], "locked": True, "owner": None},
    },
}  # fmt: skip


def a_record_is_understood_or_nothing_is_written(data: bytes) -> None:
    path = Path(FOLDER.name) / "state.json"
    path.write_bytes(data)
    limits_w = {"GPU-a": 250.0, "GPU-b": 300.0, "GPU-c": 400.0}
    w = World.made(record=FileRecord(path, BOOT), found_w=limits_w)
    w.driver.on_limit = in_range(dict.fromkeys(limits_w, MAX_W))
    w.keeper.start(NOW_S)
    if "state" not in w.keeper.alarms:
        assert_serves(w.keeper)
        return
    assert "no board is written" in w.keeper.alarms["state"]
    assert_serves(w.keeper)
    answered(w.keeper, Peer(uid=0), b'{"op":"release_all"}', NOW_S + 11.0)
    assert w.driver.writes == 0
    assert path.read_bytes() == data, "what could not be understood is left for a person to look at"


# --- the audit log ---

AUDIT = "\n".join(
    json.dumps(line)
    for line in (
        {"seq": 1, "time": 1.0, "event": "start", "limits_w": FOUND_W, "budgets": [{"watts": 900.0, "uuids": ["GPU-a"]}]},
        {"seq": 2, "time": 1.1, "event": "write", "uuid": "GPU-a", "before_w": 400.0, "limit_w": 250.0},
        {"seq": 3, "time": 1.2, "event": "write", "uuid": "GPU-a", "before_w": 250.0, "limit_w": 400.0},
    )
)  # fmt: skip


def a_damaged_log_is_gone_on_with(data: bytes) -> None:
    path = Path(FOLDER.name) / "audit.jsonl"
    path.write_bytes(data)
    log = FileAudit(path)
    assert log.write("test")
    entries = list(read_audit(path))
    assert entries[-1]["event"] == "test"
    assert all(isinstance(told, str) for told in check_order(entries))


# --- what was found so ---

HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    "line", [b'{"op":"budget","watts":%s,"boards":[]}', b'{"op":"budget","watts":-%s,"boards":[]}']
)
def test_a_number_beyond_all_floats_is_malformed(line: bytes) -> None:
    with pytest.raises(Refused, match="watts must be a positive number"):
        parse_request(line % HUGE.encode())


@pytest.mark.parametrize(
    "line",
    [
        f"budget_w = {HUGE}", f"budget_w = {HUGE * 20}", f"safe_w = 0x{HUGE * 20}", f"exit = {'[' * 5000}",
        f"budget_w = 900\n{'exit.' * 2000}x = 1", "budget_w = 900\n#" + "x" * (1 << 20),
    ],
)  # fmt: skip
def test_a_policy_too_large_to_be_told_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "capd.toml"
    path.write_text(f"[node]\n{line}\n")
    with pytest.raises(ConfigError, match="nothing was changed"):
        load_policy(path)


@pytest.mark.parametrize(
    ("key", "value"), [("found_w", 10**400), ("found_w", 1e6), ("found_w", 40.0), ("written_w", ""), ("written_w", {})]
)
def test_a_record_that_no_board_can_have_left_is_not_acted_on(key: str, value: object) -> None:
    board = {"found_w": 400.0, "written_w": [250.0], "locked": True, key: value}
    a_record_is_understood_or_nothing_is_written(json.dumps({**STATE, "boards": {"GPU-a": board}}).encode())
    state = FileRecord(Path(FOLDER.name) / "state.json", BOOT)
    w = World.made(record=state)
    w.keeper.start(NOW_S)
    assert "no board is written" in w.keeper.alarms["state"]


def test_an_epoch_that_was_made_up_takes_a_board_from_nobody() -> None:
    w = World.made()
    w.keeper.start(NOW_S)
    peers = Peer(uid=1002), Peer(uid=1002)
    for peer in peers:
        w.keeper.handle(peer, {"op": "hello"}, NOW_S)
    release = {"op": "release", "uuid": "GPU-a", "epoch": (1 << 63) - 1, "seq": 1}
    assert w.keeper.handle(peers[0], release, NOW_S)["error"] == "stale"
    assert w.keeper.handle(peers[1], {**SET, "epoch": peers[1].epoch}, NOW_S)["ok"]


def test_a_lease_a_fraction_above_what_was_found_is_granted_what_was_found() -> None:
    w = World.made()
    w.keeper.start(NOW_S)
    peer = Peer(uid=1002)
    w.keeper.handle(peer, {"op": "hello"}, NOW_S)
    for seq, watts in enumerate((200.0, 400.4)):
        reply = w.keeper.handle(peer, {**SET, "watts": watts, "seq": seq, "epoch": peer.epoch}, NOW_S + 5.0 * seq)
    assert reply["ok"]
    assert w.driver.boards["GPU-a"].limit_w == 400.0


# --- how often ---

TALKS = st.lists(st.tuples(st.sampled_from((999, 1000, 1001)), LINES), min_size=1, max_size=8)
FULL_TALKS = st.lists(st.tuples(st.sampled_from((1001, 1002, 1002, 1002, 1003)), LINES), min_size=1, max_size=12)
JSON_LINES = st.lists(near_json([json.loads(line) for line in AUDIT.splitlines()]), max_size=4).map("\n".join)
PROMISES: Sequence[tuple[Callable[[Any], None], st.SearchStrategy[Any], int]] = (
    (no_rights_write_nothing, TALKS, 200),
    (set_rights_write_within_range, FULL_TALKS, 300),
    (a_policy_is_whole_or_refused, any_bytes(near_toml(POLICY)), 400),
    (a_record_is_understood_or_nothing_is_written, any_bytes(near_json([STATE])), 400),
    (a_damaged_log_is_gone_on_with, any_bytes(JSON_LINES), 200),
)


@pytest.mark.parametrize(("promise", "inputs", "examples"), PROMISES, ids=lambda p: getattr(p, "__name__", ""))
def test_whatever_comes(promise: Callable[[Any], None], inputs: st.SearchStrategy[Any], examples: int) -> None:
    settings(max_examples=examples, database=None)(given(inputs)(promise))()


@pytest.mark.slow
@pytest.mark.parametrize(("promise", "inputs", "examples"), PROMISES, ids=lambda p: getattr(p, "__name__", ""))
def test_whatever_comes_for_longer(
    promise: Callable[[Any], None], inputs: st.SearchStrategy[Any], examples: int
) -> None:
    settings(max_examples=50 * examples, database=None)(given(inputs)(promise))()
