"""The boards behind nvidia-ml-py, by UUID and never by index; milliwatts become watts here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NoReturn, Protocol

from pals_capd.ledger import Clocks
from pals_capd.refused import ConfigError


class DriverError(Exception):
    """The driver would not; `word`: permission, not_supported, lost, reloaded (NVML must be opened anew) or driver."""

    def __init__(self, word: str, message: str) -> None:
        super().__init__(message)
        self.word = word


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a board is."""

    uuid: str
    name: str
    min_w: float
    max_w: float
    default_w: float
    clock_range: Clocks | None
    mig: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a board stands."""

    limit_w: float
    enforced_w: float
    sm_clock_mhz: int


class Driver(Protocol):
    """All that capd does to boards."""

    def open(self) -> dict[str, Facts | str]:
        """Open anew; facts of each board by UUID, or why it cannot be used."""
        ...

    def enumerate(self) -> dict[str, Facts | str]:
        """The same without opening anew: a board that could not be used may be usable now."""
        ...

    def read(self, uuid: str) -> Reading:
        """Read one board."""
        ...

    def set_limit(self, uuid: str, watts: float) -> None:
        """Set its power limit."""
        ...

    def lock(self, uuid: str, clocks: Clocks) -> None:
        """Lock its SM clock."""
        ...

    def unlock(self, uuid: str) -> None:
        """Reset its clock lock, whoever set it."""
        ...


class NvmlDriver:
    """NVML."""

    def __init__(self, nvml: ModuleType) -> None:
        self._nvml, self._handles, self._opened = nvml, dict[str, Any](), False

    def open(self) -> dict[str, Facts | str]:
        """Open NVML anew: handles do not outlive a reload of the driver, and indices mean nothing after one.

        Raises:
            DriverError: no driver.
        """
        n = self._nvml
        if self._opened:
            self._quietly(n.nvmlShutdown)
            self._opened = False
        self._handles = {}
        try:
            n.nvmlInit()
        except n.NVMLError as e:
            raise DriverError("reloaded", f"no NVIDIA driver answers ({e})") from e
        self._opened = True
        return self.enumerate()

    def enumerate(self) -> dict[str, Facts | str]:
        """The boards that NVML names now."""
        n, found = self._nvml, dict[str, Facts | str]()
        for index in range(self._call("NVML", "count its boards", n.nvmlDeviceGetCount)):
            uuid = f"index {index}"
            try:
                handle = n.nvmlDeviceGetHandleByIndex(index)
                uuid = _text(n.nvmlDeviceGetUUID(handle))
                found[uuid] = self._facts(uuid, handle)
                self._handles[uuid] = handle
            except (n.NVMLError, DriverError) as e:
                found[uuid] = f"{uuid}: {e}"
        return found

    def _facts(self, uuid: str, handle: Any) -> Facts:
        n = self._nvml
        low, high = self._call(uuid, "read its limit range", n.nvmlDeviceGetPowerManagementLimitConstraints, handle)
        return Facts(
            uuid=uuid,
            name=_text(n.nvmlDeviceGetName(handle)),
            min_w=low / 1000.0,
            max_w=high / 1000.0,
            default_w=self._call(uuid, "read its default limit", n.nvmlDeviceGetPowerManagementDefaultLimit, handle)
            / 1000.0,
            clock_range=self._clock_range(handle),
            mig=self._mig(handle),
        )

    def _clock_range(self, handle: Any) -> Clocks | None:
        n = self._nvml
        try:
            n._nvmlGetFunctionPointer("nvmlDeviceSetGpuLockedClocks")
            top_mhz = int(n.nvmlDeviceGetMaxClockInfo(handle, n.NVML_CLOCK_SM))
            memory_mhz = max(n.nvmlDeviceGetSupportedMemoryClocks(handle))
            listed = n.nvmlDeviceGetSupportedGraphicsClocks(handle, memory_mhz)
            return int(min(listed)), max(top_mhz, int(max(listed)))
        except (n.NVMLError, ValueError, AttributeError):
            return None

    def _mig(self, handle: Any) -> bool:
        try:
            return bool(self._nvml.nvmlDeviceGetMigMode(handle)[0])
        except self._nvml.NVMLError:
            return False

    def read(self, uuid: str) -> Reading:
        """The limit set, the one enforced, and the SM clock measured: a lock has no getter."""
        n, handle = self._nvml, self._handle(uuid)
        return Reading(
            limit_w=self._call(uuid, "read its limit", n.nvmlDeviceGetPowerManagementLimit, handle) / 1000.0,
            enforced_w=self._call(uuid, "read its enforced limit", n.nvmlDeviceGetEnforcedPowerLimit, handle) / 1000.0,
            sm_clock_mhz=int(self._call(uuid, "read its clock", n.nvmlDeviceGetClockInfo, handle, n.NVML_CLOCK_SM)),
        )

    def set_limit(self, uuid: str, watts: float) -> None:
        """Set the power limit."""
        set_limit = self._nvml.nvmlDeviceSetPowerManagementLimit
        self._call(uuid, f"set its power limit to {watts:.0f} W", set_limit, self._handle(uuid), round(watts * 1000))

    def lock(self, uuid: str, clocks: Clocks) -> None:
        """Lock the SM clock into a range."""
        lock = self._nvml.nvmlDeviceSetGpuLockedClocks
        self._call(uuid, f"lock its SM clock at {clocks[0]}..{clocks[1]} MHz", lock, self._handle(uuid), *clocks)

    def unlock(self, uuid: str) -> None:
        """Reset the clock lock."""
        self._call(uuid, "reset its clock lock", self._nvml.nvmlDeviceResetGpuLockedClocks, self._handle(uuid))

    def _handle(self, uuid: str) -> Any:
        if uuid not in self._handles:
            raise DriverError("lost", f"{uuid}: the board is not in this node any more")
        return self._handles[uuid]

    def _call(self, uuid: str, doing: str, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except self._nvml.NVMLError as e:
            self._refused(f"{uuid}: the driver would not {doing}", e)

    def _refused(self, told: str, error: Any) -> NoReturn:
        n = self._nvml
        words = {
            n.NVML_ERROR_NO_PERMISSION: (
                "permission",
                "no permission: run capd as root, in a container with CAP_SYS_ADMIN",
            ),
            n.NVML_ERROR_NOT_SUPPORTED: ("not_supported", "not supported here"),
            n.NVML_ERROR_FUNCTION_NOT_FOUND: ("not_supported", "this driver has no such call"),
            n.NVML_ERROR_GPU_IS_LOST: ("lost", "the board is lost"),
            n.NVML_ERROR_RESET_REQUIRED: ("lost", "the board must be reset"),
            n.NVML_ERROR_UNINITIALIZED: ("reloaded", "NVML was shut down"),
            n.NVML_ERROR_DRIVER_NOT_LOADED: ("reloaded", "the driver is not loaded"),
        }
        word, why = words.get(error.value, ("driver", str(error)))
        raise DriverError(word, f"{told} ({why})") from error

    def _quietly(self, function: Callable[[], Any]) -> None:
        try:
            function()
        except self._nvml.NVMLError:
            return


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)  # old bindings give bytes


class DryDriver:
    """Does everything but the write, and answers as if it had been made."""

    def __init__(self, real: Driver) -> None:
        self._real, self._limits_w, self._locks = real, dict[str, float](), dict[str, Clocks]()
        self.open, self.enumerate = real.open, real.enumerate

    def read(self, uuid: str) -> Reading:
        """As the real one, with what was not written."""
        now = self._real.read(uuid)
        limit_w, highest_mhz = self._limits_w.get(uuid, now.limit_w), self._locks.get(uuid, (0, now.sm_clock_mhz))[1]
        return replace(now, limit_w=limit_w, sm_clock_mhz=min(now.sm_clock_mhz, highest_mhz))

    def set_limit(self, uuid: str, watts: float) -> None:
        """Remember it."""
        self._limits_w[uuid] = watts

    def lock(self, uuid: str, clocks: Clocks) -> None:
        """Remember it."""
        self._locks[uuid] = clocks

    def unlock(self, uuid: str) -> None:
        """Forget the lock."""
        self._locks.pop(uuid, None)


def import_nvml() -> ModuleType:
    """nvidia-ml-py.

    Raises:
        ConfigError: not installed.
    """
    try:
        import pynvml
    except ImportError as e:
        raise ConfigError(
            "nvidia-ml-py is not installed for this Python: pip install nvidia-ml-py; nothing was changed"
        ) from e
    nvml: ModuleType = pynvml
    return nvml
