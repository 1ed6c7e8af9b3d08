"""The NVML adapter over emulated boards, through the real nvidia-ml-py: reads, refuses, restores, and says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pals.core.errors import ConfigError, DeviceLostError, NotSupportedError, PalsError, PermissionDeniedError
from pals.core.quantities import BoardWrite, OperatingPoint
from pals.hardware.nvml import Nvml, open_boards
from pals.hardware.nvml_board import NvmlBoard
from pals.plant.boards import BoardBank
from pals.plant.silicon import Load
from pals.plant.specs import board_specs

pytest.importorskip("pynvml")
H100 = board_specs()["h100-sxm5-80gb"]


@dataclass
class World:
    """Two H100 with a time of their own; setters' latency passes in it."""

    path: Path
    writable: bool = True
    now: float = 10.0
    slept: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bank = BoardBank.create(self.path, H100, 2, writable=self.writable, now_s=self.now)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def open(self) -> Nvml:
        return open_boards(emulated=self.path, clock=self.clock, sleep=self.sleep)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "bank")
    yield made
    made.bank.close()


def point(limit_w: float, clock_mhz: int | None = None) -> OperatingPoint:
    return OperatingPoint(power_limit_w=limit_w, sm_clock_mhz=clock_mhz)


def test_boards_say_what_they_are(world: World) -> None:
    with world.open() as nvml:
        info = nvml.boards[1].info

    assert (info.name, info.index, info.min_limit_w, info.max_limit_w, info.found_limit_w) == (
        "NVIDIA H100 80GB HBM3", 1, 200.0, 700.0, 700.0,
    )  # fmt: skip
    assert info.max_sm_clock_mhz == 1980
    assert info.uuid.startswith("GPU-")


def test_energy_differences_give_the_power_that_the_mean_shows_late(world: World) -> None:
    with world.open() as nvml:
        world.bank.book([0, 1], 10.0, 20.0, Load(compute=0.1, memory=0.6), world.now)
        world.now = 12.0
        before = nvml.boards[0].read()
        world.now = 14.0
        after = nvml.boards[0].read()

    assert before.energy_j is not None
    assert after.energy_j is not None
    power_w = (after.energy_j - before.energy_j) / (after.time_s - before.time_s)
    assert power_w == pytest.approx(after.power_w, rel=0.02)
    assert after.sm_clock_mhz is not None
    assert 1980 - 45 <= after.sm_clock_mhz <= 1980  # specimens differ by up to three steps


def test_a_limit_is_set_read_back_and_restored_as_found(world: World) -> None:
    world.bank.set_limit(0, 650.0, world.now)  # somebody's setting
    with world.open() as nvml:
        board = nvml.boards[0]
        assert board.apply(point(400.0)).power_limit_w == 400.0
        assert board.read().enforced_limit_w == 400.0
        assert len(world.slept) == 1
        assert world.bank.setter_latency_s <= world.slept[0] <= world.bank.spec.setter.longest_s
        board.apply(point(400.0))
        assert len(world.slept) == 1  # already there: nothing is written
        board.restore()
        assert board.read().enforced_limit_w == 650.0


@pytest.mark.parametrize(
    ("wanted", "match"), [(point(199.0), r"200\.\.700 W"), (point(300.0, 5000), r"345\.\.1980 MHz")]
)
def test_what_lies_outside_the_range_is_refused_before_anything_is_written(
    world: World, wanted: OperatingPoint, match: str
) -> None:
    with world.open() as nvml:
        with pytest.raises(ValueError, match=match):
            nvml.boards[0].apply(wanted)
        assert nvml.boards[0].read().enforced_limit_w == 700.0
    assert world.slept == []


def test_a_clock_lock_holds_and_is_released(world: World) -> None:
    with world.open() as nvml:
        world.bank.book([0], 10.0, 30.0, Load(compute=0.1, memory=0.5), world.now)
        nvml.boards[0].apply(point(700.0, 1200))
        nvml.boards[0].apply(point(700.0, 1200))
        assert len(world.slept) == 1
        world.now += 1.0
        assert nvml.boards[0].read().sm_clock_mhz == 1200
        nvml.boards[0].restore()
        world.now += 1.0
        assert (nvml.boards[0].read().sm_clock_mhz or 0) >= 1980 - 45


def test_without_permission_nothing_changes_and_the_error_says_what_is_in_force(tmp_path: Path) -> None:
    world = World(tmp_path / "bank", writable=False)
    with world.open() as nvml:
        assert not nvml.boards[0].can_write()
        with pytest.raises(PermissionDeniedError, match="700 W is still in force"):
            nvml.boards[0].apply(point(300.0))
        nvml.boards[0].restore()
        assert nvml.boards[0].read().enforced_limit_w == 700.0
    world.bank.close()


def test_faults_arrive_as_the_errors_they_are(world: World) -> None:
    with world.open() as nvml:
        world.bank.inject(0, "not_supported", 1, world.now)
        with pytest.raises(NotSupportedError, match="not supported"):
            nvml.boards[0].apply(point(300.0))
        world.bank.inject(0, "lost", 1, world.now)
        with pytest.raises(DeviceLostError, match="lost"):
            nvml.boards[0].read()
        assert nvml.boards[1].read().enforced_limit_w == 700.0
        world.bank.inject(1, "external_limit", 350.0, world.now)
        assert nvml.boards[1].apply(point(500.0)).power_limit_w == 350.0


@pytest.mark.parametrize("theirs_w", [250.0, 500.0])
def test_a_limit_set_by_another_hand_becomes_the_ceiling_and_is_put_back(world: World, theirs_w: float) -> None:
    writes: list[BoardWrite] = []
    with world.open() as nvml:
        board = nvml.boards[0]
        board.announce_to(writes.append)
        board.apply(point(300.0))
        world.bank.set_limit(0, theirs_w, world.now)

        assert board.apply(point(300.0)).power_limit_w == min(300.0, theirs_w)
        assert board.other_hand_w == theirs_w
        assert board.apply(point(220.0)).power_limit_w == 220.0  # lower is allowed
        assert board.apply(point(600.0)).power_limit_w == theirs_w  # above is not
        board.apply(point(220.0))
        board.restore()
        assert board.read().enforced_limit_w == theirs_w

    assert [w.found_limit_w for w in writes] == [700.0] + [theirs_w] * (len(writes) - 1)
    assert writes[0].written_w == (700.0, 300.0)  # said before the driver was asked: it may stand at either


def test_a_limit_set_by_another_hand_since_our_last_write_is_left_and_said(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    with world.open() as nvml:
        nvml.boards[0].apply(point(300.0, 1200))
        world.bank.set_limit(0, 250.0, world.now)
        nvml.boards[0].restore()
        assert nvml.boards[0].read().enforced_limit_w == 250.0
        world.bank.book([0], world.now, world.now + 30.0, Load(compute=0.1, memory=0.2, busy=0.3), world.now)
        world.now += 1.0
        assert nvml.boards[0].read().sm_clock_mhz > 1200  # our lock is released all the same

    assert "somebody else set 250 W" in caplog.text


def test_where_the_record_cannot_be_written_the_driver_is_not_asked(world: World) -> None:
    def full(write: BoardWrite) -> None:
        raise PalsError("no space left")

    with world.open() as nvml:
        nvml.boards[0].announce_to(full)
        with pytest.raises(PalsError, match="no space"):
            nvml.boards[0].apply(point(300.0))
        assert nvml.boards[0].read().enforced_limit_w == 700.0
        nvml.boards[0].announce_to(lambda write: None)
        nvml.boards[0].apply(point(300.0))
        nvml.boards[0].restore()
        assert nvml.boards[0].read().enforced_limit_w == 700.0


class Otherwise:
    """pynvml with some functions of another board's driver."""

    def __init__(self, **functions: Any) -> None:
        self._functions = functions

    def __getattr__(self, name: str) -> Any:
        import pynvml

        return self._functions.get(name, getattr(pynvml, name))


def other_board(world: World, **functions: Any) -> NvmlBoard:
    nvml: Any = Otherwise(**functions)
    return NvmlBoard(nvml, 0, clock=world.clock, may_write=True)


def test_a_board_in_mig_mode_is_read_and_never_written(world: World) -> None:
    with world.open():
        board = other_board(world, nvmlDeviceGetMigMode=lambda handle: (1, 1))

        assert not board.can_write()
        assert "MIG mode is enabled" in str(board.refusal)
        with pytest.raises(NotSupportedError, match=r"MIG mode is enabled.*700 W is still in force"):
            board.apply(point(300.0))
        assert board.read().enforced_limit_w == 700.0
    assert world.slept == []


def test_a_board_without_an_energy_counter_is_read_all_the_same(world: World) -> None:
    def missing(handle: Any) -> int:
        import pynvml

        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    with world.open():
        sample = other_board(world, nvmlDeviceGetTotalEnergyConsumption=missing).read()

    assert sample.energy_j is None
    assert sample.power_w > 0


def test_of_all_boards_those_that_open_are_opened_and_the_others_are_named(world: World) -> None:
    world.bank.inject(0, "lost", 1, world.now)
    with world.open() as nvml:
        assert [b.info.index for b in nvml.boards] == [1]
        assert list(nvml.failed) == [0]
        assert "lost" in nvml.failed[0]
        with pytest.raises(DeviceLostError):
            nvml.open([0])
    world.bank.inject(1, "lost", 1, world.now)
    with pytest.raises(ConfigError, match="no board can be opened"):
        world.open()


def test_an_unknown_board_and_a_missing_driver_say_what_to_do(world: World) -> None:
    with pytest.raises(ConfigError, match="NVML lists 2 boards"):
        open_boards(emulated=world.path, indices=[2], clock=world.clock)
    with pytest.raises(ConfigError, match="are gone"):
        open_boards(emulated=world.path.with_name("nothing"), clock=world.clock)
    for content in (b"", b"garbage", b'{"spec": "none"}'.ljust(2000, b"\0"), world.path.read_bytes()[:1500]):
        damaged = world.path.with_name("damaged")
        damaged.write_bytes(content)
        with pytest.raises(ConfigError, match="file of emulated boards"):
            open_boards(emulated=damaged, clock=world.clock)
    with pytest.raises(ConfigError, match="--emulate"):
        open_boards()


def test_stock_nvidia_ml_py_reads_the_emulated_boards(world: World) -> None:
    import pynvml

    with world.open():
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        assert pynvml.nvmlDeviceGetCount() == 2
        assert pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByUUID(pynvml.nvmlDeviceGetUUID(handle))) == 0
        assert pynvml.nvmlDeviceGetCudaComputeCapability(handle) == (9, 0)
        instant = pynvml.nvmlDeviceGetFieldValues(handle, [186])[0]
        assert instant.value.uiVal / 1000 == pytest.approx(pynvml.nvmlDeviceGetPowerUsage(handle) / 1000, rel=0.05)
        with pytest.raises(pynvml.NVMLError_FunctionNotFound):
            pynvml.nvmlDeviceGetFanSpeed(handle)


def test_supported_clocks_are_listed_and_a_board_without_locks_keeps_its_limit_lever(world: World) -> None:
    with world.open() as nvml:
        info = nvml.boards[0].info
        assert info.sm_clocks_mhz == tuple(range(345, 1981, 15))
        world.bank.inject(0, "no_clock_lock", 1, world.now)
        with pytest.raises(NotSupportedError, match="400 W is still in force"):
            nvml.boards[0].apply(point(400.0, 1200))
        assert nvml.boards[0].apply(point(300.0)) == point(300.0)
        nvml.boards[0].put_back(700.0, unlock=True)  # no lock to release is no failure
        assert nvml.boards[0].read().enforced_limit_w == 700.0
