"""Boards of a simulated replica, tick by tick: the load of the last 10 ms becomes power, heat, energy and the next clock.

The same equations as the emulated boards (`plant/boards.py`), one board after the other. Plain scalar code, compiled by
`plant/compiled.py`.
"""

from __future__ import annotations

import math

from pals.plant.boards import AMBIENT_C, AWAKE_S, PUBLISH_S, THERMAL_K_PER_W, THERMAL_TAU_S
from pals.plant.governor import TICK_S, govern
from pals.plant.replica_state import RING, Memory
from pals.plant.silicon import Silicon, core_power_w, static_power_w

WARM = 1.0 - math.exp(-TICK_S / THERMAL_TAU_S)
PUBLISH_TICKS = round(PUBLISH_S / TICK_S)


def pace_mhz(m: Memory) -> float:
    """Clock of the slowest board: it sets the pace of the group."""
    slowest = m.boards[0]["clock_mhz"]
    for b in range(1, len(m.boards)):
        slowest = min(slowest, m.boards[b]["clock_mhz"])
    return slowest  # type: ignore[no-any-return]


def booked_pace_mhz(m: Memory, idle: bool) -> float:
    """The pace an emulated engine books a step at when it is planned: after idling, the one its boards rise to."""
    pace = pace_mhz(m)
    if idle and m.state[0]["now_s"] > m.state[0]["busy_until_s"]:
        pace = max(pace, max(m.boards[0]["floor_mhz"], m.boards[0]["ceiling_mhz"]))
    return pace


def awake(m: Memory, time_s: float) -> bool:
    """Whether clocks are up although nothing runs: for a while after the last step."""
    return time_s < m.state[0]["busy_until_s"] + AWAKE_S  # type: ignore[no-any-return]


def wake(m: Memory) -> None:
    """Sleeping boards are at their ceiling before the first kernel has run long."""
    if not awake(m, m.state[0]["now_s"]):
        for b in range(len(m.boards)):
            m.boards[b]["clock_mhz"] = max(m.boards[b]["floor_mhz"], m.boards[b]["ceiling_mhz"])


def tick(m: Memory, k: Silicon, running: bool) -> None:
    """End a tick: what ran in it decides its power, and the clock of the next."""
    s = m.state[0]
    up = running or s["sum_running"] > 0.0 or awake(m, s["ticks"] * TICK_S)
    compute, memory = min(1.0, s["sum_compute"] / TICK_S), min(1.0, s["sum_memory"] / TICK_S)
    busy = min(1.0, s["sum_busy"] / TICK_S)
    s["sum_compute"] = s["sum_memory"] = s["sum_busy"] = s["sum_running"] = 0.0
    s["ticks"] += 1
    for i in range(len(m.boards)):
        b = m.boards[i]
        if up:
            static_w = static_power_w(k, b["temperature_c"]) * b["idle_factor"]
            core_w = core_power_w(k, compute, memory, busy, b["clock_mhz"]) * b["core_factor"]
        else:
            static_w = k.idle_w * b["idle_factor"]
            core_w = 0.0
        power_w = static_w + core_w + k.hbm_w * memory
        b["power_w"] = power_w
        b["energy_j"] += power_w * TICK_S
        b["temperature_c"] += (AMBIENT_C + THERMAL_K_PER_W * power_w - b["temperature_c"]) * WARM
        m.ring[i, s["ticks"] % RING] = power_w
        top_mhz = b["ceiling_mhz"] if up else b["floor_mhz"]
        filtered_w, clock_mhz, limited = govern(
            b["filtered_w"],
            power_w,
            min(b["limit_w"], b["external_w"]),
            core_w,
            b["clock_mhz"],
            b["floor_mhz"],
            top_mhz,
        )
        b["filtered_w"] = filtered_w
        b["clock_mhz"] = clock_mhz
        b["limited"] = 1.0 if limited and up else 0.0
        if s["ticks"] % PUBLISH_TICKS == 0:
            b["published_j"] = b["energy_j"]


def settled(m: Memory, k: Silicon) -> bool:
    """Whether nothing but temperatures changes any more."""
    s = m.state[0]
    if s["sum_running"] > 0.0 or awake(m, s["ticks"] * TICK_S):
        return False
    for i in range(len(m.boards)):
        b = m.boards[i]
        if b["clock_mhz"] > b["floor_mhz"] or b["power_w"] != k.idle_w * b["idle_factor"]:
            return False
    return True


def sleep_through(m: Memory, k: Silicon, until_s: float) -> None:
    """Many idle ticks at once, up to the last whole one before `until_s`."""
    s = m.state[0]
    ticks = int((until_s - s["now_s"]) / TICK_S) - 2
    if ticks < RING:
        return
    s["ticks"] += ticks
    s["now_s"] = s["ticks"] * TICK_S
    cold = math.exp(-TICK_S * ticks / THERMAL_TAU_S)
    for i in range(len(m.boards)):
        b = m.boards[i]
        resting_c = AMBIENT_C + THERMAL_K_PER_W * b["power_w"]
        b["energy_j"] += b["power_w"] * TICK_S * ticks
        b["published_j"] = b["energy_j"]
        b["temperature_c"] = resting_c + (b["temperature_c"] - resting_c) * cold
        b["filtered_w"] = b["power_w"]
        for j in range(RING):
            m.ring[i, j] = b["power_w"]
