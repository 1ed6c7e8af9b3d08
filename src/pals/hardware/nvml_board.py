"""One board behind nvidia-ml-py, as meter and actuator; milliwatts become watts here and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn, Protocol

from pals.core.diagnosis import BoardSettings
from pals.core.errors import (
    DeviceLostError,
    NotSupportedError,
    PalsError,
    PermissionDeniedError,
)
from pals.core.quantities import BoardInfo, BoardWrite, OperatingPoint, PowerSample
from pals.hardware.limit_owner import LimitOwner

log = logging.getLogger("pals")
THROTTLE_POWER_CAP = 0x4
CLOCK_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    THROTTLE_POWER_CAP: "power limit",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "temperature",
    0x40: "hardware temperature",
    0x80: "power brake",
    0x100: "display clocks",
}


class Setters(Protocol):
    """Another process that writes boards for us; errors are those of `PowerActuator.apply`."""

    def check(self, boards: Sequence[BoardInfo]) -> None:
        """See that it can write these boards, and counts them as NVML does here.

        Raises:
            PalsError: it cannot, or does not; nothing was changed.
        """
        ...

    def set_limit(self, index: int, limit_w: float) -> None:
        """Set the power limit of NVML's board `index`."""
        ...

    def lock_clock(self, index: int, low_mhz: int, high_mhz: int) -> None:
        """Lock its SM clock into a range."""
        ...

    def reset_clock(self, index: int) -> None:
        """Release its clock lock."""
        ...


class NvmlBoard:
    """One board: a `PowerMeter` and a `PowerActuator`."""

    def __init__(self, nvml: ModuleType, index: int, *, clock: Callable[[], float], may_write: bool) -> None:
        self._nvml, self._clock, self._may_write = nvml, clock, may_write
        self._label = f"board {index}"
        self._handle = self._call("open it", nvml.nvmlDeviceGetHandleByIndex, index)
        low, high = self._get("read its limit range", nvml.nvmlDeviceGetPowerManagementLimitConstraints)
        self._info = BoardInfo(
            index=index,
            uuid=str(self._get("read its UUID", nvml.nvmlDeviceGetUUID)),
            name=str(self._get("read its name", nvml.nvmlDeviceGetName)),
            driver=str(self._call("read the driver's version", nvml.nvmlSystemGetDriverVersion)),
            min_limit_w=low / 1000.0,
            max_limit_w=high / 1000.0,
            default_limit_w=self._watts("read its default limit", nvml.nvmlDeviceGetPowerManagementDefaultLimit),
            found_limit_w=self._watts("read its limit", nvml.nvmlDeviceGetPowerManagementLimit),
            max_sm_clock_mhz=int(
                self._call("read its top clock", nvml.nvmlDeviceGetMaxClockInfo, self._handle, nvml.NVML_CLOCK_SM)
            ),
            sm_clocks_mhz=self._supported_clocks(),
        )
        self._label = f"board {index} ({self._info.name})"
        self._mig = self._mig_mode() is True
        self._owner = LimitOwner(self._info.uuid, self._info.found_limit_w)
        self._locked_mhz: tuple[int, int] | None = None
        self._write_ahead: Callable[[BoardWrite], None] = lambda write: None
        self._announced = self._owner.told(clock_locked=False)
        self._setters: Setters | None = None

    def write_through(self, setters: Setters) -> None:
        """From now on `setters` write, not this process; what is read back and written down ahead stays the same."""
        self._setters = setters

    @property
    def info(self) -> BoardInfo:
        """What the board is and accepts, and the limit found when it was opened."""
        return self._info

    def can_write(self) -> bool:
        """Whether this process should be able to write; nothing is written to find out."""
        return (self._may_write or self._setters is not None) and self.refusal is None

    @property
    def refusal(self) -> str | None:
        """Why this board must not be written: MIG shares its limit among tenants that PALS does not know."""
        if not self._mig:
            return None
        return (
            f"{self._label}: MIG mode is enabled, and one power limit holds for all instances of the board, whoever uses them; "
            "PALS does not write it. Disable MIG (nvidia-smi -mig 0) to have it steered"
        )

    @property
    def other_hand_w(self) -> float | None:
        """The limit another hand set since this board was opened, noticed by `apply`; None: nobody did."""
        return self._owner.other_hand_w

    def announce_to(self, write_ahead: Callable[[BoardWrite], None]) -> None:
        """Call `write_ahead` before each write from now on; where it raises, nothing is written.

        Also when it is known how the last write ended, with what can still be ours.
        """
        self._write_ahead = write_ahead

    def read(self) -> PowerSample:
        """Return a fresh reading.

        Raises:
            DeviceLostError: the board is gone.
        """
        n = self._nvml
        memory_mhz = self._optional(n.nvmlDeviceGetClockInfo, n.NVML_CLOCK_MEM)
        energy_mj = self._optional(n.nvmlDeviceGetTotalEnergyConsumption)
        return PowerSample(
            time_s=self._clock(),
            power_w=self._watts("read its power", n.nvmlDeviceGetPowerUsage),
            energy_j=None if energy_mj is None else energy_mj / 1000.0,
            enforced_limit_w=self._watts("read its enforced limit", n.nvmlDeviceGetEnforcedPowerLimit),
            sm_clock_mhz=int(self._call("read its clock", n.nvmlDeviceGetClockInfo, self._handle, n.NVML_CLOCK_SM)),
            temperature_c=self._optional(n.nvmlDeviceGetTemperature, n.NVML_TEMPERATURE_GPU),
            throttled_by_power=bool(
                int(self._optional(n.nvmlDeviceGetCurrentClocksThrottleReasons) or 0) & THROTTLE_POWER_CAP
            ),
            memory_clock_mhz=None if memory_mhz is None else int(memory_mhz),
            busy_ratio=self._busy_ratio(),
        )

    def read_meters(self) -> tuple[float, float, float]:
        """Time (s), energy counter (J) and the driver's power (W), in as few calls as can be.

        Raises:
            DeviceLostError, NotSupportedError: as the driver says.
        """
        energy_j = self._get("read its energy counter", self._nvml.nvmlDeviceGetTotalEnergyConsumption) / 1000.0
        return self._clock(), energy_j, self._watts("read its power", self._nvml.nvmlDeviceGetPowerUsage)

    def settings(self) -> BoardSettings:
        """What it is set to beside its limit.

        Raises:
            DeviceLostError: the board is gone.
        """
        n = self._nvml
        persistence = self._optional(n.nvmlDeviceGetPersistenceMode)
        bits = self._optional(n.nvmlDeviceGetCurrentClocksThrottleReasons)
        return BoardSettings(
            persistence_mode=None if persistence is None else bool(persistence),
            mig_mode=self._mig_mode(),
            clock_reasons=None if bits is None else tuple(w for b, w in CLOCK_REASONS.items() if int(bits) & b),
            clock_lock_api=self._has_function("nvmlDeviceSetGpuLockedClocks"),
        )

    def apply(self, wanted: OperatingPoint) -> OperatingPoint:
        """Ask for `wanted`, or for what another hand set where that is lower; return what is then in force.

        The clock ceiling returned is the one asked for: a lock has no getter.

        Raises:
            ValueError: outside the board's range; nothing was changed.
            PermissionDeniedError, NotSupportedError, DeviceLostError: as the driver says; the limit is written first, so
                it is in force where only the clock lock was refused.
        """
        self._check(wanted)
        set_w, clock_mhz = self._limit_now_w(), wanted.sm_clock_mhz
        limit_w = self._owner.capped(wanted.power_limit_w)
        lock = None if clock_mhz is None else (self._info.lockable_clocks_mhz[0], clock_mhz)
        # a lock has no getter: what we asked last is all that can be known
        locks = lock is not None and lock != self._locked_mhz
        if abs(set_w - limit_w) >= 0.5:
            self._write_limit(limit_w, locks=locks)
        elif locks:
            self._announce(locks=True)
        if lock is None:
            self._release_clock()
        elif locks:
            self._lock_clock(*lock)
        return OperatingPoint(power_limit_w=self._enforced_w(), sm_clock_mhz=clock_mhz)

    def pin_clock(self, mhz: int) -> None:
        """Lock the SM clock at this one, until the next `apply` or `restore`; the limit is left. Raises as `apply`."""
        self._check(OperatingPoint(power_limit_w=self._info.found_limit_w, sm_clock_mhz=mhz))
        self._announce(locks=True)
        self._lock_clock(mhz, mhz)

    def write_again(self) -> None:
        """Write the limit that is set once more: nothing changes, but how long it takes can be seen. Raises as `apply`."""
        self._check(OperatingPoint(power_limit_w=self._info.found_limit_w))
        self._write_limit(self._limit_now_w(), locks=False)

    def _check(self, wanted: OperatingPoint) -> None:
        """Refuse what must not be written, before anything is."""
        if self.refusal is not None:
            raise NotSupportedError(f"{self.refusal}. {self._limit_text()}")
        info, low_mhz = self._info, self._info.lockable_clocks_mhz[0]
        if not info.min_limit_w <= wanted.power_limit_w <= info.max_limit_w:
            raise ValueError(
                f"{self._label}: {wanted.power_limit_w:.0f} W lies outside {info.min_limit_w:.0f}..{info.max_limit_w:.0f} W; "
                f"nothing was written, {self._enforced_w():.0f} W is in force"
            )
        clock_mhz = wanted.sm_clock_mhz
        if clock_mhz is not None and not low_mhz <= clock_mhz <= info.max_sm_clock_mhz:
            raise ValueError(
                f"{self._label}: an SM clock of {clock_mhz} MHz lies outside {low_mhz}..{info.max_sm_clock_mhz} MHz; "
                "nothing was written"
            )

    def _limit_now_w(self) -> float:
        """The limit set now; one that is not ours is from here on the ceiling and what is put back."""
        set_w = self._watts("read its limit", self._nvml.nvmlDeviceGetPowerManagementLimit)
        self._owner.seen(set_w)
        self._announce(locks=False)  # after our own write too: from now on the board can stand at nothing else
        return set_w

    def _write_limit(self, limit_w: float, *, locks: bool) -> None:
        self._owner.about_to_write(limit_w)
        self._announce(locks=locks)
        self._set_limit(f"set its power limit to {limit_w:.0f} W", limit_w)
        self._owner.wrote(limit_w)

    def _announce(self, *, locks: bool) -> None:
        write = self._owner.told(clock_locked=locks or self._locked_mhz is not None)
        if write != self._announced:
            self._write_ahead(write)
            self._announced = write

    def restore(self) -> None:
        """Put the limit back where it is still ours, and release our clock lock; both are tried.

        A limit that another hand set since our last write is left, and the log says so.

        Raises:
            PalsError: the driver refused; the message says what is in force.
        """
        unlock = self._locked_mhz is not None
        try:
            limit_w = self._limit_to_put_back()
        except (PalsError, ValueError):
            self.put_back(None, unlock=unlock)
            raise
        self.put_back(limit_w, unlock=unlock)

    def _limit_to_put_back(self) -> float | None:
        """None: nothing of ours is in force."""
        if not self._owner.written:
            return None
        set_w = self._watts("read its limit", self._nvml.nvmlDeviceGetPowerManagementLimit)
        if self._owner.seen(set_w):
            log.warning("%s: somebody else set %.0f W since PALS wrote it; left so", self._label, set_w)
            return None
        return None if abs(set_w - self._owner.restore_w) < 0.5 else self._owner.restore_w

    def put_back(self, limit_w: float | None, *, unlock: bool) -> None:
        """Set the limit (None: leave it) and, if `unlock`, release the clock lock whoever set it; both are tried.

        Raises:
            PalsError: the driver refused one or both; the message says what is in force.
        """
        refused = []
        try:
            if limit_w is not None:
                self._set_limit(f"put its power limit back to {limit_w:.0f} W", limit_w)
                self._owner.was_put_back(limit_w)
        except (PalsError, ValueError) as e:
            refused.append(str(e))
        try:
            if unlock:
                self._reset_clock()
                self._locked_mhz = None
        except NotSupportedError:
            self._locked_mhz = None  # a board without locks holds none
        except (PalsError, ValueError) as e:
            refused.append(str(e))
        if refused:
            raise PalsError("; ".join(refused))

    def _supported_clocks(self) -> tuple[int, ...]:
        """SM clocks at the top memory clock, rising; empty where the driver does not list them."""
        n = self._nvml
        try:
            memory_mhz = max(self._get("list its memory clocks", n.nvmlDeviceGetSupportedMemoryClocks), default=0)
            listed = self._call("list its clocks", n.nvmlDeviceGetSupportedGraphicsClocks, self._handle, memory_mhz)
        except (NotSupportedError, PermissionDeniedError, ValueError):
            return ()
        return tuple(sorted(int(mhz) for mhz in listed))

    def _release_clock(self) -> None:
        if self._locked_mhz is not None:
            self._reset_clock()
            self._locked_mhz = None

    def _set_limit(self, doing: str, limit_w: float) -> None:
        if self._setters is not None:
            self._setters.set_limit(self._info.index, limit_w)
        else:
            self._call(doing, self._nvml.nvmlDeviceSetPowerManagementLimit, self._handle, round(limit_w * 1000))

    def _lock_clock(self, low_mhz: int, high_mhz: int) -> None:
        if self._setters is not None:
            self._setters.lock_clock(self._info.index, low_mhz, high_mhz)
        else:
            doing = f"lock its SM clock at {high_mhz} MHz"
            self._call(doing, self._nvml.nvmlDeviceSetGpuLockedClocks, self._handle, low_mhz, high_mhz)
        self._locked_mhz = (low_mhz, high_mhz)

    def _reset_clock(self) -> None:
        if self._setters is not None:
            self._setters.reset_clock(self._info.index)
        else:
            self._get("release its clock lock", self._nvml.nvmlDeviceResetGpuLockedClocks)

    def _enforced_w(self) -> float:
        return self._watts("read its enforced limit", self._nvml.nvmlDeviceGetEnforcedPowerLimit)

    def _watts(self, doing: str, function: Callable[..., Any]) -> float:
        return float(self._get(doing, function)) / 1000.0

    def _get(self, doing: str, function: Callable[..., Any]) -> Any:
        return self._call(doing, function, self._handle)

    def _optional(self, function: Callable[..., Any], *args: Any) -> float | None:
        try:
            return float(self._call("give a reading", function, self._handle, *args))
        except NotSupportedError:
            return None

    def _mig_mode(self) -> bool | None:
        try:
            current, _ = self._get("read its MIG mode", self._nvml.nvmlDeviceGetMigMode)
        except DeviceLostError:
            raise
        except (PalsError, ValueError):
            return None
        return bool(current)

    def _has_function(self, name: str) -> bool:
        try:
            self._nvml._nvmlGetFunctionPointer(name)
        except self._nvml.NVMLError:
            return False
        return True

    def _busy_ratio(self) -> float | None:
        """Nobody steers by it: whatever keeps it from being read (MIG, for one) must not cost the whole reading."""
        try:
            return float(self._get("read its utilization", self._nvml.nvmlDeviceGetUtilizationRates).gpu) / 100.0
        except DeviceLostError:
            raise
        except (PalsError, ValueError):
            return None

    def _call(self, doing: str, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except self._nvml.NVMLError as e:
            self._refused(doing, e)

    def _refused(self, doing: str, error: Any) -> NoReturn:
        n = self._nvml
        told = f"{self._label}: the driver would not {doing}"
        if error.value == n.NVML_ERROR_NO_PERMISSION:
            raise PermissionDeniedError(
                f"{told} (no permission); {self._limit_text()} Run as root, or in advise mode (--mode advise)."
            ) from error
        if error.value in (n.NVML_ERROR_NOT_SUPPORTED, n.NVML_ERROR_FUNCTION_NOT_FOUND):
            raise NotSupportedError(f"{told} (not supported here); {self._limit_text()}") from error
        if error.value in (n.NVML_ERROR_GPU_IS_LOST, n.NVML_ERROR_RESET_REQUIRED):
            raise DeviceLostError(
                f"{told}: the board is lost. Its limit is unknown; reset the board or restart the node"
            ) from error
        if error.value == n.NVML_ERROR_INVALID_ARGUMENT:
            raise ValueError(f"{told} (invalid argument); {self._limit_text()}") from error
        raise PalsError(f"{told} ({error}); {self._limit_text()}") from error

    def _limit_text(self) -> str:
        try:
            in_force_w = self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1000.0
        except (self._nvml.NVMLError, AttributeError):
            return "what is in force could not be read."
        return f"{in_force_w:.0f} W is still in force."
