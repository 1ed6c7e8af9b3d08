"""What the driver refused a moment ago holds up nothing that is asked anew; only renewals wait before it is tried again."""

from __future__ import annotations

from typing import Any

from pals_capd.keeper import RETRY_S, Keeper, Peer
from pals_capd.policy import Policy
from tests.capd_world import FakeDriver, MemoryAudit, MemoryRecord, Silicon

UUID = "GPU-a"


class World:
    """One board and one client."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.board = Silicon()
        self.driver = FakeDriver(boards={UUID: self.board})
        self.audit = MemoryAudit()
        self.keeper = Keeper(driver=self.driver, record=MemoryRecord(), audit=self.audit, policy=policy or Policy())
        self.now_s, self.seq, self.peer = 100.0, 0, Peer(uid=0)
        self.keeper.start(self.now_s)
        self.keeper.handle(self.peer, {"op": "hello"}, self.now_s)

    def set(self, watts: float, clocks: list[int] | None = None) -> dict[str, Any]:
        self.seq += 1
        request = {"op": "set", "uuid": UUID, "watts": watts, "sm_clock_mhz": clocks, "epoch": self.peer.epoch}
        return self.keeper.handle(self.peer, {**request, "seq": self.seq, "reason": "a test"}, self.now_s)

    def refused(self) -> int:
        """How often the driver was asked and would not."""
        return sum(line["event"] == "write-failed" for line in self.audit.lines)


def test_a_lower_limit_right_after_a_refused_lock_is_written_at_once() -> None:
    world = World()
    world.board.no_locks = True

    assert world.set(350.0, [210, 1200])["error"] == "not_supported"
    reply = world.set(300.0)

    assert (reply["ok"], reply["outcome"]) == (True, "written")
    assert reply["watts"]["enforced"] == world.board.limit_w == 300.0


def test_what_was_refused_and_is_asked_again_is_refused_again_and_never_told_unchanged() -> None:
    world = World()
    world.set(350.0)
    world.board.denied = True

    assert [world.set(300.0)["error"] for _ in range(2)] == ["permission", "permission"]
    world.board.denied = False
    assert world.set(300.0)["outcome"] == "written"


def test_renewals_do_not_hammer_a_driver_that_refuses() -> None:
    world = World(Policy(other_hand="reassert"))
    world.set(300.0)
    world.board.limit_w, world.board.denied = 350.0, True  # another hand, and from now on the driver refuses
    for _ in range(6):  # it is seen, and written over a while later
        world.now_s += 0.5
        world.set(300.0)
        world.keeper.turn(world.now_s)
    tried = world.refused()
    assert tried > 0

    for _ in range(5):
        world.set(300.0)
    assert world.refused() == tried
    world.now_s += RETRY_S
    world.set(300.0)
    assert world.refused() == tried + 1
