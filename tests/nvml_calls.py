"""One script of NVML calls through nvidia-ml-py, over boards in virtual time; run as a program it takes the C library.

The test runs it once through the Python double in its own process and once as a program, and compares what came back.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pynvml

from pals.plant.boards import BoardBank
from pals.plant.silicon import Load

FIELDS: list[Any] = [83, 91, 185, 186, (186, 0), (186, 1), (185, 2), 187, 188, 189, 190, 192]


def play(bank: BoardBank) -> list[list[Any]]:
    """Run the script on initialised NVML; return (what, value or error code) pairs."""
    told: list[list[Any]] = []

    def ask(what: str, function: Callable[..., Any], *args: Any) -> None:
        try:
            answer = plain(function(*args))
        except pynvml.NVMLError as e:
            answer = f"error {e.value}"
        told.append([what, answer])

    ask("count", pynvml.nvmlDeviceGetCount)
    ask("driver", pynvml.nvmlSystemGetDriverVersion)
    ask("library", pynvml.nvmlSystemGetNVMLVersion)
    for index in (-1, 2):
        ask(f"handle {index}", lambda i=index: pynvml.nvmlDeviceGetHandleByIndex(i) and "a handle")
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(2)]
    ask("by uuid", lambda: pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByUUID(bank.uuid(1))))
    ask("by wrong uuid", pynvml.nvmlDeviceGetHandleByUUID, "GPU-11111111-0000-0000-0000-000000000000")
    for now_s, changes in steps(bank, handles, ask):
        bank.set_virtual_time(now_s)
        for change in changes:
            change()
        for i, handle in enumerate(handles):
            snapshot(f"{now_s} board {i}", handle, ask)
    return told


def steps(
    bank: BoardBank, handles: list[Any], ask: Callable[..., None]
) -> list[tuple[float, list[Callable[[], None]]]]:
    """What happens when, s."""

    def limit(i: int, watts: float) -> None:
        ask(f"limit {i} {watts}", pynvml.nvmlDeviceSetPowerManagementLimit, handles[i], round(watts * 1000))

    def lock(i: int, low: int, high: int) -> None:
        ask(f"lock {i} {low} {high}", pynvml.nvmlDeviceSetGpuLockedClocks, handles[i], low, high)

    def release(i: int) -> None:
        ask(f"release {i}", pynvml.nvmlDeviceResetGpuLockedClocks, handles[i])

    def fault(i: int, name: str, value: float = 1) -> None:
        bank.inject(i, name, value, 0.0)

    def all_setters(i: int) -> list[Callable[[], None]]:
        return [partial(limit, i, 250), partial(lock, i, 300, 900), partial(release, i), partial(limit, i, 20)]

    busy = Load(compute=0.5, memory=0.6)
    return [
        (10.0, [partial(bank.book, [0, 1], 10.0, 60.0, busy, 10.0)]),
        (12.3, [partial(limit, 0, 250), partial(limit, 1, 99.9), partial(limit, 1, 401)]),
        (14.0, [partial(lock, 1, 210, 1007), partial(lock, 0, 0, 900), partial(lock, 0, 900, 800)]),
        (15.0, [partial(lock, 0, 100, 100)]),
        (16.0, [partial(release, 0), partial(limit, 0, 199.5)]),
        (16.05, []),  # on the way up: mean and instant differ
        (18.0, [partial(fault, 0, "external_limit", 150), partial(limit, 0, 300)]),
        (20.0, [partial(fault, 1, "stuck"), partial(release, 1)]),
        (21.0, [partial(fault, 0, "limit_denied"), *all_setters(0), partial(fault, 0, "limit_denied", 0)]),
        (21.5, [partial(fault, 0, "no_clock_lock"), *all_setters(0), partial(fault, 0, "no_clock_lock", 0)]),
        (22.0, [partial(fault, 0, "denied"), *all_setters(0)]),
        (23.0, [partial(fault, 0, "not_supported"), *all_setters(0)]),
        (24.0, [partial(fault, 0, "lost"), *all_setters(0)]),
        (26.0, [partial(fault, 0, "lost", 0), partial(fault, 1, "stuck", 0)]),
        (90.0, []),  # idle again
    ]


def snapshot(where: str, handle: Any, ask: Callable[..., None]) -> None:
    """Everything that can be read."""
    for name in (
        "Index", "Name", "UUID", "CudaComputeCapability", "MemoryInfo", "PersistenceMode", "MigMode", "PowerUsage",
        "TotalEnergyConsumption", "EnforcedPowerLimit", "PowerManagementLimit", "PowerManagementDefaultLimit",
        "PowerManagementLimitConstraints", "CurrentClocksThrottleReasons", "CurrentClocksEventReasons", "UtilizationRates",
    ):  # fmt: skip
        ask(f"{where} {name}", getattr(pynvml, f"nvmlDeviceGet{name}"), handle)
    for sensor in (0, 5):
        ask(f"{where} temperature {sensor}", pynvml.nvmlDeviceGetTemperature, handle, sensor)
    for kind in range(-1, 5):
        ask(f"{where} clock {kind}", pynvml.nvmlDeviceGetClockInfo, handle, kind)
        ask(f"{where} top clock {kind}", pynvml.nvmlDeviceGetMaxClockInfo, handle, kind)
    ask(f"{where} memory clocks", pynvml.nvmlDeviceGetSupportedMemoryClocks, handle)
    for memory_mhz in (1, 1593):
        ask(f"{where} clocks at {memory_mhz}", pynvml.nvmlDeviceGetSupportedGraphicsClocks, handle, memory_mhz)
    ask(f"{where} fields", pynvml.nvmlDeviceGetFieldValues, handle, FIELDS)


def plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, ctypes.Array):
        return [[v.nvmlReturn, v.valueType, v.value.ullVal] for v in value]
    if isinstance(value, ctypes.Structure):
        return [getattr(value, name) for name, *_ in value._fields_]
    return value.decode() if isinstance(value, bytes) else value


if __name__ == "__main__":
    shared = BoardBank.open(Path(sys.argv[1]))
    shared.set_virtual_time(10.0)
    pynvml.nvmlInit()
    print(json.dumps(play(shared)))
