"""What every writer of boards keeps, whoever writes: this process, capd, or zeusd (a fake of it)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pals.core.diagnosis_writing import BoardTrial
from pals.core.errors import DeviceLostError, NotSupportedError, PermissionDeniedError
from pals.hardware.capd_board import CapdBoard
from pals.hardware.capd_client import CapdClient
from pals.hardware.nvml_board import NvmlBoard
from pals.hardware.trial import pin_target_mhz, try_board
from pals.hardware.zeusd_board import Zeusd, zeusd_board
from pals.plant.silicon import Load
from tests.capd_loopback import Boards, Otherwise, capd_over, point
from tests.fake_zeusd import zeusd_over

pytest.importorskip("pynvml")
POLL_S = 1.1  # capd looks at the boards once a second


class Rig:
    """One board as a writer gives it, and the world it is in."""

    def __init__(self, boards: Boards, open_one: Callable[[], NvmlBoard | CapdBoard]) -> None:
        self.boards, self.bank, self.open = boards, boards.bank, open_one

    def later(self, seconds: float = POLL_S) -> None:
        self.boards.now += seconds

    def run_hard(self) -> None:
        """Kernels run from now on, so that the clock stands as high as it may."""
        self.bank.book([0], self.boards.now, self.boards.now + 60.0, Load(compute=0.1, memory=0.4), self.boards.now)


Make = Callable[..., Rig]


@pytest.fixture(params=["direct", "capd", "zeusd"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Makes the rig of one writer; `functions` replace those of NVML."""
    with ExitStack() as exits:

        def made(*, writable: bool = True, **functions: Any) -> Rig:
            boards = Boards(tmp_path, writable=writable, nvml=Otherwise(**functions))
            exits.enter_context(boards.opened())
            if request.param == "direct":
                return Rig(boards, lambda: boards.board(0))
            if request.param == "zeusd":
                zeusd = Zeusd(exits.enter_context(zeusd_over(boards)))
                return Rig(boards, lambda: zeusd_board(boards.board(0, may_write=False), zeusd))
            capd = exits.enter_context(capd_over(boards))
            client = CapdClient(capd.socket, now_s=boards.clock)
            exits.callback(client.close)
            return Rig(boards, lambda: CapdBoard(boards.board(0, may_write=False), client, ttl_s=3.0, reason="a test"))

        yield made


def test_what_is_in_force_is_returned_and_the_limit_found_is_put_back(make: Make) -> None:
    rig = make()
    rig.bank.set_limit(0, 650.0, rig.boards.now)  # somebody's setting
    rig.later()
    board = rig.open()
    assert board.info.found_limit_w == 650.0

    assert board.apply(point(400.0)) == point(400.0)
    assert board.read().enforced_limit_w == 400.0
    board.restore()
    assert board.read().enforced_limit_w == 650.0
    board.restore()  # twice is once
    assert board.other_hand_w is None


def test_where_firmware_holds_less_that_is_what_is_returned(make: Make) -> None:
    rig = make()
    board = rig.open()
    rig.bank.inject(0, "external_limit", 350.0, rig.boards.now)

    assert board.apply(point(500.0)).power_limit_w == 350.0


@pytest.mark.parametrize(
    ("wanted", "match"), [(point(199.0), r"200\.\.700 W"), (point(300.0, 5000), r"345\.\.1980 MHz")]
)
def test_out_of_range_is_refused_and_nothing_is_changed(make: Make, wanted: Any, match: str) -> None:
    rig = make()
    board = rig.open()
    board.apply(point(500.0))

    with pytest.raises(ValueError, match=match):
        board.apply(wanted)
    assert board.read().enforced_limit_w == 500.0


@pytest.mark.parametrize("theirs_w", [250.0, 500.0])
def test_another_hands_limit_is_the_ceiling_and_is_left(make: Make, theirs_w: float) -> None:
    rig = make()
    board = rig.open()
    board.apply(point(300.0))
    rig.bank.set_limit(0, theirs_w, rig.boards.now)
    rig.later()

    assert board.apply(point(300.0)).power_limit_w == min(300.0, theirs_w)
    assert board.other_hand_w == theirs_w
    assert board.apply(point(220.0)).power_limit_w == 220.0  # lower is allowed
    rig.later()
    assert board.apply(point(600.0)).power_limit_w == theirs_w  # above is not
    board.apply(point(220.0))
    board.restore()
    assert board.read().enforced_limit_w == theirs_w


def test_a_clock_lock_holds_and_is_released(make: Make) -> None:
    rig = make()
    board = rig.open()
    rig.run_hard()

    assert board.apply(point(700.0, 1200)).sm_clock_mhz == 1200
    rig.later()
    assert board.read().sm_clock_mhz == 1200
    assert board.apply(point(700.0)).sm_clock_mhz is None
    rig.later()
    assert board.read().sm_clock_mhz > 1800
    board.apply(point(700.0, 1005))
    board.restore()
    rig.later()
    assert board.read().sm_clock_mhz > 1800


def test_where_a_board_takes_no_lock_the_limit_asked_for_with_it_is_in_force(make: Make) -> None:
    rig = make()
    board = rig.open()
    rig.bank.inject(0, "no_clock_lock", 1, rig.boards.now)

    with pytest.raises(NotSupportedError):
        board.apply(point(400.0, 1200))
    assert board.read().enforced_limit_w == 400.0
    assert board.apply(point(300.0)) == point(300.0)


def test_without_permission_nothing_changes_and_it_says_so(make: Make) -> None:
    rig = make(writable=False)
    board = rig.open()

    with pytest.raises(PermissionDeniedError):
        board.apply(point(300.0))
    board.restore()
    assert board.read().enforced_limit_w == 700.0


def test_a_lost_board_is_told_lost_and_the_others_are_not(make: Make) -> None:
    rig = make()
    board = rig.open()
    rig.bank.inject(0, "lost", 1, rig.boards.now)
    rig.later()

    with pytest.raises(DeviceLostError):
        board.apply(point(300.0))
    with pytest.raises(DeviceLostError):
        board.read()
    assert rig.boards.limit_w(1) == 700.0


def test_a_board_in_mig_mode_is_never_written(make: Make) -> None:
    rig = make(nvmlDeviceGetMigMode=lambda handle: (1, 1))
    board = rig.open()

    assert "MIG mode is enabled" in str(board.refusal)
    with pytest.raises(NotSupportedError, match="MIG mode is enabled"):
        board.apply(point(300.0))
    assert board.read().enforced_limit_w == 700.0


def tried(rig: Rig, board: Any) -> BoardTrial:
    """A trial in the boards' own time."""
    limit_w = rig.boards.limit_w(0)
    return try_board(board, limit_w=limit_w, writer="", clock=rig.boards.clock, sleep=rig.boards.sleep)


@pytest.mark.parametrize("hard", [False, True])
def test_a_trial_sees_what_a_board_obeys_and_leaves_it_as_found(make: Make, hard: bool) -> None:
    rig = make()
    rig.bank.set_limit(0, 650.0, rig.boards.now)
    rig.later()
    if hard:
        rig.run_hard()
        rig.later()
    board = rig.open()
    before = board.read()

    done = tried(rig, board)
    board.restore()
    rig.later()

    assert done.error is None
    assert done.clock is not None
    assert done.clock.took_s is not None
    assert (
        abs((done.clock.measured_mhz or 0) - done.clock.target_mhz)
        <= 30
        < abs(before.sm_clock_mhz - done.clock.target_mhz)
    )
    assert done.limit is not None
    assert (done.limit.asked_w, done.limit.enforced_w) == (645.0, 645.0)
    assert done.latency is not None
    assert 0.0 <= done.latency.p50_s <= done.latency.p99_s
    assert rig.boards.limit_w(0) == 650.0
    assert abs(board.read().sm_clock_mhz - before.sm_clock_mhz) <= 60  # no lock of ours holds it


def test_a_trial_of_a_board_that_takes_no_lock_or_stands_at_its_minimum_says_so(make: Make) -> None:
    rig = make()
    rig.bank.inject(0, "no_clock_lock", 1, rig.boards.now)
    rig.bank.set_limit(0, 200.0, rig.boards.now)
    rig.later()
    board = rig.open()

    done = tried(rig, board)

    assert done.clock is not None
    assert done.clock.error is not None
    assert done.limit is not None
    assert done.limit.asked_w is None
    assert rig.boards.limit_w(0) == 200.0


@pytest.mark.parametrize("looks", [0, 2])
def test_a_trial_that_is_interrupted_puts_the_board_back_first(make: Make, looks: int) -> None:
    rig = make()
    board = rig.open()
    left = [None] * looks

    def sleep(seconds: float) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        rig.boards.sleep(0.0)  # the lock never seems to act

    with pytest.raises(KeyboardInterrupt):
        try_board(board, limit_w=700.0, writer="", clock=rig.boards.clock, sleep=sleep)
    assert rig.boards.limit_w(0) == 700.0
    rig.later()
    assert board.read().sm_clock_mhz == 345  # where an idle H100 rests without a lock


def test_without_permission_a_trial_changes_nothing_and_says_so(make: Make) -> None:
    rig = make(writable=False)
    done = tried(rig, rig.open())

    assert done.clock is not None
    assert done.limit is not None
    assert "permission" in (done.clock.error or "").lower()
    assert "permission" in (done.limit.error or "").lower()
    assert rig.boards.limit_w(0) == 700.0


@pytest.mark.parametrize(("present", "target"), [(210, 330), (1410, 1275), (1980, 1785), (345, 465)])
def test_the_clock_of_a_trial_can_be_told_from_the_present_one(present: int, target: int) -> None:
    assert pin_target_mhz(present, range(210, 1981, 15)) == target
