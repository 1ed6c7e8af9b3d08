"""Boards of a simulated replica, tick by tick: the load of the last 10 ms becomes power, heat, energy and the next clock.

What happens in a tick is `governor.tick`, as on the emulated boards; here are load, locks, faults and readings around it,
one board after the other. Plain scalar code, compiled by `plant/compiled.py`.
"""

from __future__ import annotations

from pals.plant.governor import TICK_S, Firmware, tick
from pals.plant.replica_state import RING, Memory
from pals.plant.silicon import Silicon


def pace_mhz(m: Memory) -> float:
    """Clock of the slowest board: it sets the pace of the group."""
    slowest = m.boards[0]["clock_mhz"]
    for i in range(1, len(m.boards)):
        slowest = min(slowest, m.boards[i]["clock_mhz"])
    return slowest  # type: ignore[no-any-return]


def highest_mhz(m: Memory, i: int) -> float:
    """The clock that lock and hardware slowdown allow board `i`."""
    b = m.boards[i]
    return b["acting_lock_mhz"] * (0.5 if b["thermal"] > 0.0 else 1.0)  # type: ignore[no-any-return]


def booked_pace_mhz(m: Memory, idle: bool) -> float:
    """The pace an emulated engine books a step at when it is planned: after idling, the one its boards rise to."""
    if not (idle and m.state[0]["now_s"] > m.state[0]["busy_until_s"]):
        return pace_mhz(m)
    slowest = max(m.boards[0]["clock_mhz"], highest_mhz(m, 0))
    for i in range(1, len(m.boards)):
        slowest = min(slowest, max(m.boards[i]["clock_mhz"], highest_mhz(m, i)))
    return slowest  # type: ignore[no-any-return]


def awake(m: Memory, g: Firmware, time_s: float) -> bool:
    """Whether clocks are up although nothing runs: for a while after the last step."""
    return time_s < m.state[0]["busy_until_s"] + g.awake_s  # type: ignore[no-any-return]


def wake(m: Memory, g: Firmware) -> None:
    """Sleeping boards are at their ceiling before the first kernel has run long."""
    if not awake(m, g, m.state[0]["now_s"]):
        for i in range(len(m.boards)):
            m.boards[i]["clock_mhz"] = max(m.boards[i]["clock_mhz"], highest_mhz(m, i))


def tick_boards(m: Memory, k: Silicon, g: Firmware) -> None:
    """End a tick: what ran in it decides its power, and the clock of the next."""
    s = m.state[0]
    time_s = s["ticks"] * TICK_S
    up = s["sum_running"] > 0.0 or awake(m, g, time_s)
    compute, memory = min(1.0, s["sum_compute"] / TICK_S), min(1.0, s["sum_memory"] / TICK_S)
    busy = min(1.0, s["sum_busy"] / TICK_S)
    s["sum_compute"] = s["sum_memory"] = s["sum_busy"] = s["sum_running"] = 0.0
    s["ticks"] += 1
    for i in range(len(m.boards)):
        b = m.boards[i]
        take_effect(m, i, time_s)
        limit_w = min(b["acting_limit_w"], b["external_w"])
        dipping = dips(m, g, i, time_s, up, limit_w)
        ceiling_mhz = b["floor_mhz"]
        if up:
            ceiling_mhz = highest_mhz(m, i) * (1.0 - g.dip_share * dipping)
        power_w, clock_mhz, filtered_w, debt_j, temperature_c, limited = tick(
            k, g, compute, memory, busy, 1.0 if up else 0.0, limit_w, b["floor_mhz"], ceiling_mhz, b["core_factor"],
            b["idle_factor"], b["ambient_c"], b["clock_mhz"], b["filtered_w"], b["debt_j"], b["temperature_c"],
        )  # fmt: skip
        b["power_w"] = power_w
        b["clock_mhz"] = clock_mhz
        b["filtered_w"] = filtered_w
        b["debt_j"] = debt_j
        b["temperature_c"] = temperature_c
        b["limited"] = 1.0 if (limited or dipping > 0.0) and up else 0.0
        b["energy_j"] += power_w * TICK_S
        m.ring[i, s["ticks"] % RING] = power_w
        if s["ticks"] % s["refresh"] == 0:
            b["published_j"] = b["energy_j"] * b["counter_factor"]


def take_effect(m: Memory, i: int, time_s: float) -> None:
    """What setters wrote begins to act when its time has come."""
    b = m.boards[i]
    if b["acts_at_s"] <= time_s + 1e-9:
        b["acting_limit_w"] = b["limit_w"]
        b["acting_lock_mhz"] = b["lock_mhz"]


def dips(m: Memory, g: Firmware, i: int, time_s: float, up: bool, limit_w: float) -> float:
    """1 while current protection holds the board's clock down; begins a dip that is due."""
    b = m.boards[i]
    at = int(b["next_dip"])
    while at < m.dips.shape[1] and m.dips[i, at] <= time_s:
        if up and b["power_w"] > g.dip_power_share * limit_w:
            b["dip_until_s"] = time_s + g.dip_s
        at += 1
    b["next_dip"] = at
    return 1.0 if b["dip_until_s"] > time_s else 0.0


def settled(m: Memory, k: Silicon, g: Firmware) -> bool:
    """Whether nothing but temperatures changes any more."""
    s = m.state[0]
    time_s = s["ticks"] * TICK_S
    if s["sum_running"] > 0.0 or awake(m, g, time_s):
        return False
    for i in range(len(m.boards)):
        b = m.boards[i]
        if b["clock_mhz"] > b["floor_mhz"] or b["power_w"] != k.idle_w * b["idle_factor"]:
            return False
        if b["acting_limit_w"] != b["limit_w"] or b["acting_lock_mhz"] != b["lock_mhz"]:
            return False
    return True


def sleep_through(m: Memory, g: Firmware, until_s: float) -> None:
    """Many idle ticks at once, up to the last whole one before `until_s`."""
    s = m.state[0]
    ticks = int((until_s - s["now_s"]) / TICK_S) - 2
    if ticks < RING:
        return
    s["ticks"] += ticks
    s["now_s"] = s["ticks"] * TICK_S
    cold = (1.0 - g.thermal_share) ** float(ticks)
    for i in range(len(m.boards)):
        b = m.boards[i]
        resting_c = b["ambient_c"] + g.thermal_k_per_w * b["power_w"]
        b["energy_j"] += b["power_w"] * (ticks * TICK_S)
        b["published_j"] = (b["energy_j"] - b["power_w"] * (s["ticks"] % s["refresh"] * TICK_S)) * b["counter_factor"]
        b["temperature_c"] = resting_c + (b["temperature_c"] - resting_c) * cold
        b["filtered_w"] = b["power_w"]
        for j in range(RING):
            m.ring[i, j] = b["power_w"]
