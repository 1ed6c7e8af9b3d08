"""capd where users, policy files, drivers and boards do not go together: each is one way in which a cap could outlive or pass its due."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from pals_capd.answers import Peer, answer
from pals_capd.driver import Reading
from pals_capd.keeper import Keeper
from pals_capd.policy import Exit, Policy
from pals_capd.refused import ConfigError
from tests.capd_world import FakeDriver, MemoryAudit, MemoryRecord, Silicon

A, B = 1000, 1001
RIGHTS = {A: "set", B: "set"}


@dataclass
class Odd(FakeDriver):
    """A driver whose setters do what the test says."""

    sets: Callable[[Silicon, float], None] | None = None

    def set_limit(self, uuid: str, watts: float) -> None:
        if self.sets is None:
            super().set_limit(uuid, watts)
        else:
            self.writes += 1
            self.sets(self.boards[uuid], watts)


@dataclass
class World:
    """Three boards at 400 W, capd over them, and two users."""

    policy: Policy = field(default_factory=lambda: Policy(rights=RIGHTS))
    now_s: float = 1000.0

    def __post_init__(self) -> None:
        self.boards = {u: Silicon() for u in ("GPU-a", "GPU-b", "GPU-c")}
        self.driver = Odd(boards=self.boards)
        self.record, self.audit = MemoryRecord(), MemoryAudit()
        self.peers = {uid: Peer(uid=uid) for uid in (A, B, 0)}
        self.seq = 0
        self.begin(self.policy)

    def begin(self, policy: Policy, *, strict: bool = True) -> None:
        """Start, or start again after a crash."""
        self.keeper = Keeper(driver=self.driver, record=self.record, audit=self.audit, policy=policy)
        self.keeper.start(self.now_s, strict=strict)

    def ask(self, uid: int, **request: Any) -> dict[str, Any]:
        return answer(self.keeper, self.peers[uid], request, self.now_s)

    def lease(self, uid: int, uuid: str, watts: float | None, lock: list[int] | None = None) -> dict[str, Any]:
        if self.peers[uid].epoch < 0:
            self.ask(uid, op="hello")
        self.seq += 1
        return self.ask(
            uid, op="set", uuid=uuid, watts=watts, sm_clock_mhz=lock, ttl_s=30.0, epoch=self.peers[uid].epoch,
            seq=self.seq, reason="a test",
        )  # fmt: skip

    def later(self, seconds: float = 1.1) -> None:
        self.now_s += seconds
        self.keeper.turn(self.now_s)

    def limits_w(self) -> list[float]:
        return [s.limit_w for s in self.boards.values()]

    def sum_w(self) -> float:
        return sum(self.limits_w())


def test_who_tightens_another_users_budget_cannot_lift_it() -> None:
    w = World()
    assert w.ask(A, op="budget", watts=600.0, boards=list(w.boards))["ok"]
    assert w.ask(B, op="budget", watts=600.0, boards=list(w.boards))["ok"]
    assert w.ask(B, op="budget", watts=500.0, boards=list(w.boards))["ok"]

    for looser in (None, 700.0):
        assert w.ask(B, op="budget", watts=looser, boards=list(w.boards))["error"] == "rights"
    assert w.sum_w() <= 500.0
    assert w.ask(A, op="budget", watts=None, boards=[])["ok"]
    assert w.sum_w() == 1200.0


def test_a_budget_over_boards_that_another_user_leases_needs_an_admin() -> None:
    w = World()
    assert w.lease(A, "GPU-a", 390.0)["ok"]
    told = w.ask(B, op="budget", watts=300.0, boards=list(w.boards))
    assert (told["error"], w.limits_w()[0]) == ("leased", 390.0)
    assert w.ask(0, op="budget", watts=600.0, boards=list(w.boards))["ok"]
    assert w.sum_w() <= 600.0


def test_the_budget_and_leases_of_a_user_who_lost_the_right_end_with_it() -> None:
    w = World()
    assert w.ask(A, op="budget", watts=600.0, boards=list(w.boards))["ok"]
    assert w.lease(A, "GPU-a", 120.0)["ok"]
    w.keeper.set_policy(Policy(rights={B: "set"}), w.now_s)
    assert w.limits_w() == [400.0] * 3


def test_a_budget_that_cannot_be_kept_refuses_a_start_but_no_release() -> None:
    w = World()
    assert w.lease(A, "GPU-a", 120.0, [210, 1005])["ok"]
    wrong = Policy(rights=RIGHTS, budget_w=250.0)
    with pytest.raises(ConfigError, match="300 W"):
        w.begin(wrong)
    assert w.boards["GPU-a"].lock is not None

    w.begin(wrong, strict=False)
    assert w.limits_w() == [100.0] * 3, "as low as they go"
    assert w.boards["GPU-a"].lock is None, "and what outlived its owner is undone"


def test_a_client_s_budget_holds_for_boards_that_were_away_at_a_start() -> None:
    w = World()
    assert w.ask(A, op="budget", watts=600.0, boards=list(w.boards))["ok"]
    w.boards["GPU-c"].lost, w.boards["GPU-c"].limit_w = True, 400.0
    w.begin(w.policy)
    w.boards["GPU-c"].lost = False
    w.later(31.0)
    w.later()
    assert w.sum_w() <= 600.0


def test_a_board_that_comes_while_others_are_leased_is_made_room_for() -> None:
    w = World(Policy(rights=RIGHTS, budget_w=700.0))
    w.boards["GPU-c"].lost = True
    w.begin(w.policy)
    for uuid in ("GPU-a", "GPU-b"):
        w.ask(A, op="hello")
        w.lease(A, uuid, 340.0)
    w.boards["GPU-c"].lost, w.boards["GPU-c"].limit_w = False, 400.0
    w.now_s += 0.1
    w.later(29.0)
    w.later(2.0)
    assert w.sum_w() <= 700.0


def test_a_limit_that_reads_back_late_is_not_taken_for_another_hand() -> None:
    w = World()
    late: list[float] = []
    w.driver.sets = lambda s, watts: late.append(watts)
    w.lease(A, "GPU-a", 250.0)
    w.driver.sets, w.boards["GPU-a"].limit_w = None, late[0]
    w.later()
    assert "other-hand" not in {e["event"] for e in w.audit.lines}
    w.later(31.0)
    assert w.limits_w()[0] == 400.0


@pytest.mark.parametrize(
    "does", [lambda s, w: setattr(s, "limit_w", max(w, 275.0)), lambda s, w: setattr(s, "limit_w", float(round(w + 0.5)))],
    ids=["it holds more", "it rounds up"],
)  # fmt: skip
def test_a_driver_that_does_otherwise_than_it_says_is_not_written_for_ever(
    does: Callable[[Silicon, float], None],
) -> None:
    w = World()
    w.driver.sets = does
    w.lease(A, "GPU-a", 250.4)
    before = w.driver.writes
    for _ in range(200):
        w.later(0.05)
    assert w.driver.writes - before <= 8
    assert w.lease(A, "GPU-a", 240.4)["watts"]["accepted"] == w.limits_w()[0]


def test_a_write_that_keeps_failing_is_tried_ever_later_and_its_record_stays_small() -> None:
    w = World()
    assert w.lease(A, "GPU-a", 200.0)["ok"]
    w.boards["GPU-a"].denied = True
    before = len(w.audit.lines)
    for _ in range(2400):
        w.later(0.25)
    assert len(w.record.state.boards["GPU-a"]["written_w"]) <= 2
    assert len(w.audit.lines) - before < 60
    w.boards["GPU-a"].denied = False
    w.later(31.0)
    assert w.limits_w()[0] == 400.0


def test_mig_mode_switched_on_ends_the_lease_and_is_told() -> None:
    w = World()
    assert w.lease(A, "GPU-a", 200.0)["ok"]
    w.boards["GPU-a"].mig = True
    w.later()
    assert w.limits_w()[0] == 400.0
    assert w.lease(A, "GPU-a", 150.0)["error"] == "board"
    assert w.limits_w()[0] == 400.0


def test_a_board_that_is_to_be_left_alone_is_put_back_first() -> None:
    w = World()
    assert w.lease(A, "GPU-a", 120.0, [210, 300])["ok"]
    w.keeper.set_policy(Policy(rights=RIGHTS, boards={"GPU-a": Exit(steer=False)}), w.now_s)
    assert (w.limits_w()[0], w.boards["GPU-a"].lock) == (400.0, None)
    assert w.lease(A, "GPU-a", 300.0)["error"] == "board"


def test_an_end_tells_of_boards_that_could_not_be_put_back() -> None:
    w = World()
    assert w.lease(A, "GPU-a", 120.0)["ok"]
    w.boards["GPU-a"].lost = True
    assert any("GPU-a" in told for told in w.keeper.stop("a test", w.now_s))


def test_under_fail_a_refused_wish_brings_no_lease_back() -> None:
    w = World(Policy(rights=RIGHTS, other_hand="fail"))
    assert w.lease(A, "GPU-a", 200.0, [210, 1005])["ok"]
    reads = w.driver.read

    def then_another_hand(uuid: str) -> Reading:
        now = reads(uuid)
        w.driver.read = reads  # type: ignore[method-assign]
        w.boards["GPU-a"].limit_w = 333.0
        return now

    w.driver.read = then_another_hand  # type: ignore[method-assign]
    assert not w.lease(A, "GPU-a", 150.0, [210, 1005])["ok"]
    w.later()
    assert all(b.lease is None for b in w.keeper.ledger.boards.values())
    assert w.boards["GPU-a"].lock is None


def test_a_kill_switch_that_cannot_be_seen_stays_as_it_was() -> None:
    w = World()
    w.lease(A, "GPU-a", 200.0)

    def unseen() -> bool:
        raise OSError(5, "Input/output error")

    w.keeper.off = unseen
    w.later()
    assert w.limits_w()[0] == 200.0
    assert "kill switch" in str(w.ask(A, op="read")["alarm"])
