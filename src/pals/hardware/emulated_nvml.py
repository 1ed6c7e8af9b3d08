"""The plant beneath NVML: an object with the C library's function names that nvidia-ml-py calls as if it were one.

nvidia-ml-py's wrappers, structs and error classes run unchanged: pointers arrive as `byref` objects (`._obj`), numbers
as ctypes values, and whatever is missing here becomes its "function not found".
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

from pals.plant.boards import BoardBank, BoardReading
from pals.plant.specs import CLOCK_STEP_MHZ, DRIVER

SUCCESS, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, INSUFFICIENT_SIZE, GPU_IS_LOST = (
    0,
    2,
    3,
    4,
    6,
    7,
    15,
)
CLOCK_GRAPHICS, CLOCK_SM, CLOCK_MEM, CLOCK_VIDEO = range(4)
FIELD_POWER_AVERAGE, FIELD_POWER_INSTANT = 185, 186
VALUE_TYPE_UNSIGNED_INT = 1


class EmulatedNvml:
    """NVML's entry points over a `BoardBank`; one process, any number of threads."""

    def __init__(
        self, bank: BoardBank, clock: Callable[[], float], sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._bank, self._clock, self._sleep = bank, clock, sleep

    # --- library and discovery ---------------------------------------------------------------------------------

    def nvmlInitWithFlags(self, flags: Any) -> int:
        return SUCCESS

    def nvmlInit_v2(self) -> int:
        return SUCCESS

    def nvmlShutdown(self) -> int:
        return SUCCESS

    def nvmlSystemGetDriverVersion(self, text: Any, size: Any) -> int:
        return _text(text, DRIVER)

    def nvmlSystemGetNVMLVersion(self, text: Any, size: Any) -> int:
        return _text(text, f"13.{DRIVER}")

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        return _put(count, self._bank.count)

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        i = _number(index)
        if not 0 <= i < self._bank.count:
            return INVALID_ARGUMENT
        ctypes.memmove(handle, ctypes.byref(ctypes.c_void_p(i + 1)), ctypes.sizeof(ctypes.c_void_p))
        return SUCCESS

    def nvmlDeviceGetHandleByUUID(self, uuid: Any, handle: Any) -> int:
        wanted = uuid.value if hasattr(uuid, "value") else uuid
        for i in range(self._bank.count):
            if self._uuid(i).encode() == wanted:
                return self.nvmlDeviceGetHandleByIndex_v2(i, handle)
        return NOT_FOUND

    def nvmlDeviceGetIndex(self, handle: Any, index: Any) -> int:
        return _put(index, _board(handle))

    def nvmlDeviceGetName(self, handle: Any, text: Any, size: Any) -> int:
        return _text(text, self._bank.spec.nvml_name)

    def nvmlDeviceGetUUID(self, handle: Any, text: Any, size: Any) -> int:
        return _text(text, self._uuid(_board(handle)))

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:
        _put(major, self._bank.spec.capability[0])
        return _put(minor, self._bank.spec.capability[1])

    def nvmlDeviceGetMemoryInfo(self, handle: Any, info: Any) -> int:
        if self._bank.faults(_board(handle))[0]:
            return GPU_IS_LOST
        total = int(self._bank.spec.memory_gb * 1e9)
        info._obj.total, info._obj.free, info._obj.used = total, total // 10, total - total // 10
        return SUCCESS

    def nvmlDeviceGetPersistenceMode(self, handle: Any, mode: Any) -> int:
        return _put(mode, 1)

    # --- sensors -----------------------------------------------------------------------------------------------

    def nvmlDeviceGetPowerUsage(self, handle: Any, milliwatts: Any) -> int:
        return self._sense(handle, milliwatts, lambda r: round(r.power_avg_w * 1000))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, millijoules: Any) -> int:
        return self._sense(handle, millijoules, lambda r: round(r.energy_j * 1000))

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Any, milliwatts: Any) -> int:
        return self._sense(handle, milliwatts, lambda r: round(r.enforced_limit_w * 1000))

    def nvmlDeviceGetPowerManagementLimit(self, handle: Any, milliwatts: Any) -> int:
        return self._sense(handle, milliwatts, lambda r: round(r.requested_limit_w * 1000))

    def nvmlDeviceGetPowerManagementDefaultLimit(self, handle: Any, milliwatts: Any) -> int:
        return self._sense(handle, milliwatts, lambda r: round(self._bank.spec.default_limit_w * 1000))

    def nvmlDeviceGetPowerManagementLimitConstraints(self, handle: Any, low: Any, high: Any) -> int:
        self._sense(handle, low, lambda r: round(self._bank.spec.min_limit_w * 1000))
        return self._sense(handle, high, lambda r: round(self._bank.spec.max_limit_w * 1000))

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: Any, celsius: Any) -> int:
        return self._sense(handle, celsius, lambda r: round(r.temperature_c))

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: Any, mhz: Any) -> int:
        memory = _number(kind) == CLOCK_MEM
        return self._sense(handle, mhz, lambda r: self._bank.spec.memory_clock_mhz if memory else r.sm_clock_mhz)

    def nvmlDeviceGetMaxClockInfo(self, handle: Any, kind: Any, mhz: Any) -> int:
        spec = self._bank.spec
        top = spec.memory_clock_mhz if _number(kind) == CLOCK_MEM else spec.max_sm_clock_mhz
        return self._sense(handle, mhz, lambda r: top)

    def nvmlDeviceGetSupportedMemoryClocks(self, handle: Any, count: Any, clocks: Any) -> int:
        return _list(count, clocks, [self._bank.spec.memory_clock_mhz])

    def nvmlDeviceGetSupportedGraphicsClocks(self, handle: Any, memory_mhz: Any, count: Any, clocks: Any) -> int:
        spec = self._bank.spec
        if _number(memory_mhz) != spec.memory_clock_mhz:
            return INVALID_ARGUMENT
        return _list(count, clocks, range(spec.max_sm_clock_mhz, spec.min_sm_clock_mhz - 1, -CLOCK_STEP_MHZ))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, bits: Any) -> int:
        return self._sense(handle, bits, lambda r: r.throttle)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Any, bits: Any) -> int:
        return self._sense(handle, bits, lambda r: r.throttle)

    def nvmlDeviceGetUtilizationRates(self, handle: Any, rates: Any) -> int:
        busy = 0 if self._bank.reading(_board(handle), self._clock()).throttle & 1 else 100
        rates._obj.gpu, rates._obj.memory = busy, busy // 2
        return SUCCESS

    def nvmlDeviceGetFieldValues(self, handle: Any, count: Any, values: Any) -> int:
        reading = self._bank.reading(_board(handle), self._clock())
        known = {FIELD_POWER_AVERAGE: reading.power_avg_w, FIELD_POWER_INSTANT: reading.power_instant_w}
        for value in values._obj:
            value.nvmlReturn = SUCCESS if value.fieldId in known else NOT_SUPPORTED
            value.valueType = VALUE_TYPE_UNSIGNED_INT
            value.value.uiVal = round(known.get(value.fieldId, 0.0) * 1000)
        return SUCCESS

    # --- setters: root only, slow, and refusing what a board refuses -------------------------------------------

    def nvmlDeviceSetPowerManagementLimit(self, handle: Any, milliwatts: Any) -> int:
        watts, spec = _number(milliwatts) / 1000.0, self._bank.spec
        valid = spec.min_limit_w <= watts <= spec.max_limit_w
        if self._bank.denies_limits(_board(handle)):
            return NO_PERMISSION
        return self._set(handle, valid, lambda i: self._bank.set_limit(i, watts, self._clock()))

    def nvmlDeviceSetGpuLockedClocks(self, handle: Any, low: Any, high: Any) -> int:
        low_mhz, high_mhz = float(_number(low)), float(_number(high))
        valid = 0 < low_mhz <= high_mhz
        if self._bank.refuses_clock_locks(_board(handle)):
            return NOT_SUPPORTED
        return self._set(handle, valid, lambda i: self._bank.set_clock_lock(i, low_mhz, high_mhz, self._clock()))

    def nvmlDeviceResetGpuLockedClocks(self, handle: Any) -> int:
        if self._bank.refuses_clock_locks(_board(handle)):
            return NOT_SUPPORTED
        return self._set(handle, True, lambda i: self._bank.reset_clock_lock(i, self._clock()))

    # --- helpers -----------------------------------------------------------------------------------------------

    def _uuid(self, i: int) -> str:
        return f"GPU-emulated-{self._bank.spec.name}-{i:04d}"

    def _sense(self, handle: Any, out: Any, value: Callable[[BoardReading], int]) -> int:
        i = _board(handle)
        if self._bank.faults(i)[0]:
            return GPU_IS_LOST
        return _put(out, value(self._bank.reading(i, self._clock())))

    def _set(self, handle: Any, valid: bool, write: Callable[[int], None]) -> int:
        i = _board(handle)
        lost, not_supported, denied = self._bank.faults(i)
        if lost:
            return GPU_IS_LOST
        if not_supported:
            return NOT_SUPPORTED
        if denied:
            return NO_PERMISSION
        if not valid:
            return INVALID_ARGUMENT
        self._sleep(self._bank.setter_latency_s)
        write(i)
        return SUCCESS


def _number(value: Any) -> int:
    return int(getattr(value, "value", value))


def _board(handle: Any) -> int:
    return int(ctypes.cast(handle, ctypes.c_void_p).value or 0) - 1


def _put(out: Any, value: int) -> int:
    out._obj.value = value
    return SUCCESS


def _list(count: Any, out: Any, values: Sequence[int]) -> int:
    room = count._obj.value if out is not None else 0
    count._obj.value = len(values)
    if room < len(values):
        return INSUFFICIENT_SIZE
    for i, value in enumerate(values):
        out[i] = value
    return SUCCESS


def _text(out: Any, text: str) -> int:
    out.value = text.encode()
    return SUCCESS
