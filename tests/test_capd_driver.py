"""capd over a driver that goes away and comes back, counts its boards otherwise, or refuses: requests find their board by UUID."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pals_capd.answers import Peer, answer
from pals_capd.audit import check_order, read_audit
from tests.capd_loopback import Boards, Capd, Otherwise, capd_over

pytest.importorskip("pynvml")
ROOT = Peer(uid=0)


class Unsteady(Otherwise):
    """NVML whose driver can be loaded anew, with its boards in another order, and whose setters can refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.gone, self.swapped, self.mig = False, False, 0
        self.refusal: int | None = None

    def load_anew(self) -> None:
        self.gone, self.swapped = True, not self.swapped

    def __getattr__(self, name: str) -> Any:
        import pynvml

        known = {
            "nvmlInit": self._init, "nvmlShutdown": lambda: None, "nvmlDeviceGetHandleByIndex": self._handle,
            "nvmlDeviceGetMigMode": lambda handle: (self.mig, self.mig),
        }  # fmt: skip
        if name in known:
            return known[name]
        real = getattr(pynvml, name)
        if not name.startswith("nvmlDevice"):
            return real

        def called(*args: Any) -> Any:
            if self.gone:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
            if self.refusal is not None and name.startswith("nvmlDeviceSet"):
                raise pynvml.NVMLError(self.refusal)
            return real(*args)

        return called

    def _init(self) -> None:
        self.gone = False

    def _handle(self, index: int) -> Any:
        import pynvml

        return pynvml.nvmlDeviceGetHandleByIndex(1 - index if self.swapped else index)


class World:
    """Two boards, capd over them, and its time."""

    def __init__(self, boards: Boards, capd: Capd) -> None:
        self.boards, self.nvml, self.keeper, self.capd = boards, boards.nvml, capd.keeper, capd
        self.uuids = [boards.bank.uuid(i) for i in range(2)]
        self.epoch, self.seq = self.ask(op="hello")["epoch"], 0

    def ask(self, **request: Any) -> dict[str, Any]:
        return answer(self.keeper, ROOT, request, self.boards.now)

    def lease(self, uuid: str, watts: float) -> dict[str, Any]:
        self.seq += 1
        return self.ask(
            op="set",
            uuid=uuid,
            watts=watts,
            sm_clock_mhz=None,
            ttl_s=30.0,
            epoch=self.epoch,
            seq=self.seq,
            reason="a test",
        )

    def later(self, seconds: float = 1.1) -> None:
        """Time passes, and capd has its turn."""
        self.boards.now += seconds
        self.keeper.turn(self.boards.now)

    def limits_w(self) -> list[float]:
        now_s = self.boards.now
        return [self.boards.bank.reading(i, now_s).requested_limit_w for i in range(2)]

    def events(self) -> list[str]:
        return [str(e["event"]) for e in read_audit(self.capd.socket.parent / "audit.jsonl")]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    boards = Boards(tmp_path, nvml=Unsteady())
    with boards.opened(), capd_over(boards) as capd:
        capd.crash()  # its thread: the test has the keeper to itself
        yield World(boards, capd)


def test_after_a_reload_of_the_driver_boards_are_known_by_uuid_and_leases_hold_again(world: World) -> None:
    first, second = world.uuids
    assert world.lease(first, 300.0)["ok"]
    assert world.lease(second, 500.0)["ok"]
    for i in range(2):
        world.boards.bank.set_limit(i, 700.0, world.boards.now)  # what a reload leaves
    world.nvml.load_anew()

    world.later()
    world.later()
    assert world.limits_w() == [300.0, 500.0], "index 0 is the second board now"
    assert "other-hand" not in world.events()
    assert "driver-reopened" in world.events()
    world.ask(op="release_all")
    assert world.limits_w() == [700.0, 700.0]
    assert check_order(read_audit(world.capd.socket.parent / "audit.jsonl")) == []


def test_a_board_that_came_back_in_mig_mode_is_left_alone_with_the_reason(world: World) -> None:
    first, _ = world.uuids
    assert world.lease(first, 300.0)["ok"]
    world.boards.bank.set_limit(0, 700.0, world.boards.now)
    world.nvml.mig = 1
    world.nvml.load_anew()

    world.later()
    told = world.lease(first, 300.0)
    assert (told["error"], "MIG mode is enabled" in told["message"]) == ("board", True)
    assert world.limits_w() == [700.0, 700.0]


@pytest.mark.parametrize(
    ("code", "word"),
    [("NOT_SUPPORTED", "not_supported"), ("NO_PERMISSION", "permission"), ("INVALID_ARGUMENT", "driver"),
     ("GPU_IS_LOST", "lost"), ("UNKNOWN", "driver")],
)  # fmt: skip
def test_what_the_driver_refuses_is_told_leaves_the_board_and_keeps_nobody_else(
    world: World, code: str, word: str
) -> None:
    import pynvml

    first, second = world.uuids
    world.nvml.refusal = getattr(pynvml, f"NVML_ERROR_{code}")
    told = world.lease(first, 300.0)
    assert (told["ok"], told["error"]) == (False, word), told
    assert "700 W is in force" in told["message"]
    world.nvml.refusal = None

    assert world.lease(second, 400.0)["ok"]
    world.later()
    assert world.limits_w() == [700.0, 400.0]
    assert world.lease(first, 300.0)["ok"], "what was refused once may work now"
    assert world.limits_w() == [300.0, 400.0]
