"""The plant beneath NVML: an object with the C library's function names that nvidia-ml-py calls as if it were one.

nvidia-ml-py's wrappers, structs and error classes run unchanged: pointers arrive as `byref` objects (`._obj`), numbers
as ctypes values, and whatever is missing here becomes its "function not found". The C library in `nvml_double` answers
the same for other processes; a test compares the two call by call.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

from pals.plant.boards import BoardBank, BoardReading
from pals.plant.specs import CLOCK_STEP_MHZ, DRIVER
from pals.runtime.processes import process_alive

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
FIELD_TOTAL_ENERGY, FIELD_POWER_AVERAGE, FIELD_POWER_INSTANT = 83, 185, 186
FIELD_POWER_MIN_LIMIT, FIELD_POWER_MAX_LIMIT, FIELD_POWER_DEFAULT_LIMIT = 187, 188, 189
FIELD_POWER_CURRENT_LIMIT, FIELD_POWER_REQUESTED_LIMIT = 190, 192
VALUE_TYPE_UNSIGNED_INT, VALUE_TYPE_UNSIGNED_LONG_LONG = 1, 3
SENSOR_GPU = SCOPE_GPU = 0


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
            if self._bank.uuid(i).encode() == wanted:
                return self.nvmlDeviceGetHandleByIndex_v2(i, handle)
        return NOT_FOUND

    def nvmlDeviceGetIndex(self, handle: Any, index: Any) -> int:
        return self._lost(handle) or _put(index, _board(handle))

    def nvmlDeviceGetName(self, handle: Any, text: Any, size: Any) -> int:
        return self._lost(handle) or _text(text, self._bank.spec.nvml_name)

    def nvmlDeviceGetUUID(self, handle: Any, text: Any, size: Any) -> int:
        return self._lost(handle) or _text(text, self._bank.uuid(_board(handle)))

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:
        _put(major, self._bank.spec.capability[0])
        return self._lost(handle) or _put(minor, self._bank.spec.capability[1])

    def nvmlDeviceGetMemoryInfo(self, handle: Any, info: Any) -> int:
        total = self._bank.memory_bytes
        used = min(total, sum(p.memory_bytes for p in self._bank.processes(_board(handle)) if process_alive(p.pid)))
        info._obj.total, info._obj.free, info._obj.used = total, total - used, used
        return self._lost(handle)

    def nvmlDeviceGetPersistenceMode(self, handle: Any, mode: Any) -> int:
        return self._lost(handle) or _put(mode, 1)

    def nvmlDeviceGetMigMode(self, handle: Any, current: Any, pending: Any) -> int:
        _put(pending, 0)
        return self._lost(handle) or _put(current, 0)

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
        if _number(sensor) != SENSOR_GPU:
            return INVALID_ARGUMENT
        return self._sense(handle, celsius, lambda r: round(r.temperature_c))

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: Any, mhz: Any) -> int:
        return self._clock_of(handle, kind, mhz, lambda r: r.sm_clock_mhz)

    def nvmlDeviceGetMaxClockInfo(self, handle: Any, kind: Any, mhz: Any) -> int:
        return self._clock_of(handle, kind, mhz, lambda r: self._bank.spec.max_sm_clock_mhz)

    def nvmlDeviceGetSupportedMemoryClocks(self, handle: Any, count: Any, clocks: Any) -> int:
        return self._lost(handle) or _list(count, clocks, [self._bank.spec.memory_clock_mhz])

    def nvmlDeviceGetSupportedGraphicsClocks(self, handle: Any, memory_mhz: Any, count: Any, clocks: Any) -> int:
        spec = self._bank.spec
        if _number(memory_mhz) != spec.memory_clock_mhz:
            return self._lost(handle) or NOT_FOUND
        return self._lost(handle) or _list(
            count, clocks, range(spec.max_sm_clock_mhz, spec.min_sm_clock_mhz - 1, -CLOCK_STEP_MHZ)
        )

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, bits: Any) -> int:
        return self._sense(handle, bits, lambda r: r.throttle)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Any, bits: Any) -> int:
        return self._sense(handle, bits, lambda r: r.throttle)

    def nvmlDeviceGetUtilizationRates(self, handle: Any, rates: Any) -> int:
        reading = self._bank.reading(_board(handle), self._clock())
        rates._obj.gpu, rates._obj.memory = round(reading.busy * 100), round(reading.memory_busy * 100)
        return self._lost(handle)

    def nvmlDeviceGetFieldValues(self, handle: Any, count: Any, values: Any) -> int:
        reading, spec = self._bank.reading(_board(handle), self._clock()), self._bank.spec
        known = {
            FIELD_TOTAL_ENERGY: reading.energy_j,
            FIELD_POWER_AVERAGE: reading.power_avg_w,
            FIELD_POWER_INSTANT: reading.power_instant_w,
            FIELD_POWER_MIN_LIMIT: spec.min_limit_w,
            FIELD_POWER_MAX_LIMIT: spec.max_limit_w,
            FIELD_POWER_DEFAULT_LIMIT: spec.default_limit_w,
            FIELD_POWER_CURRENT_LIMIT: reading.enforced_limit_w,
            FIELD_POWER_REQUESTED_LIMIT: reading.requested_limit_w,
        }
        for value in values._obj:
            metered = value.fieldId in known and value.scopeId == SCOPE_GPU
            wide = metered and value.fieldId == FIELD_TOTAL_ENERGY
            value.nvmlReturn = SUCCESS if metered else NOT_SUPPORTED
            value.valueType = VALUE_TYPE_UNSIGNED_LONG_LONG if wide else VALUE_TYPE_UNSIGNED_INT
            value.value.ullVal = round(known[value.fieldId] * 1000) if metered else 0
        return self._lost(handle)

    # --- setters: root only, slow, and refusing what a board refuses -------------------------------------------

    def nvmlDeviceSetPowerManagementLimit(self, handle: Any, milliwatts: Any) -> int:
        watts, spec = _number(milliwatts) / 1000.0, self._bank.spec
        valid = spec.min_limit_w <= watts <= spec.max_limit_w
        refusal = NO_PERMISSION if self._bank.denies_limits(_board(handle)) else SUCCESS
        return self._set(handle, valid, lambda i: self._bank.set_limit(i, watts, self._clock()), refusal)

    def nvmlDeviceSetGpuLockedClocks(self, handle: Any, low: Any, high: Any) -> int:
        low_mhz, high_mhz = float(_number(low)), float(_number(high))
        valid = 0 < low_mhz <= high_mhz
        refusal = self._no_clock_lock(handle)
        return self._set(
            handle, valid, lambda i: self._bank.set_clock_lock(i, low_mhz, high_mhz, self._clock()), refusal
        )

    def nvmlDeviceResetGpuLockedClocks(self, handle: Any) -> int:
        refusal = self._no_clock_lock(handle)
        return self._set(handle, True, lambda i: self._bank.reset_clock_lock(i, self._clock()), refusal)

    # --- helpers -----------------------------------------------------------------------------------------------

    def _lost(self, handle: Any) -> int:
        return GPU_IS_LOST if self._bank.faults(_board(handle))[0] else SUCCESS

    def _sense(self, handle: Any, out: Any, value: Callable[[BoardReading], int]) -> int:
        return self._lost(handle) or _put(out, value(self._bank.reading(_board(handle), self._clock())))

    def _clock_of(self, handle: Any, kind: Any, mhz: Any, sm_clock: Callable[[BoardReading], int]) -> int:
        if _number(kind) == CLOCK_VIDEO:  # not modelled
            return self._lost(handle) or NOT_SUPPORTED
        if _number(kind) == CLOCK_MEM:
            return self._sense(handle, mhz, lambda r: self._bank.spec.memory_clock_mhz)
        if _number(kind) not in (CLOCK_GRAPHICS, CLOCK_SM):
            return INVALID_ARGUMENT
        return self._sense(handle, mhz, sm_clock)

    def _no_clock_lock(self, handle: Any) -> int:
        return NOT_SUPPORTED if self._bank.refuses_clock_locks(_board(handle)) else SUCCESS

    def _set(self, handle: Any, valid: bool, write: Callable[[int], None], refusal: int = SUCCESS) -> int:
        """Write as a board would; `refusal` is what this one setter answers where a fault was injected for it alone."""
        i = _board(handle)
        lost, not_supported, denied = self._bank.faults(i)
        if lost:
            return GPU_IS_LOST
        if not_supported:
            return NOT_SUPPORTED
        if denied:
            return NO_PERMISSION
        if refusal != SUCCESS:
            return refusal
        if not valid:
            return INVALID_ARGUMENT
        if self._bank.virtual_time_s() is None:  # in virtual time only the simulator waits
            self._sleep(self._bank.setter_time_s(i))
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
