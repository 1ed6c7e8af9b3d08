"""Brings the boards of a bank up to date: whole ticks of 10 ms, for all boards at once, from what was booked and written.

What happens in a tick is `governor.tick`; here are the load booked for it, registers that begin to act, current-protection
dips, and what the sensors then show. Nothing depends on who looks, nor on when.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pals.plant.bank_layout import REGISTERS, RING, Sections
from pals.plant.governor import TICK_S, tick
from pals.plant.setter_time import effect_delay_s
from pals.plant.specs import CLOCK_STEP_MHZ, BoardSpec

IDLE, POWER_CAP, HARDWARE_SLOWDOWN, SOFTWARE_THERMAL, HARDWARE_THERMAL = 0x1, 0x4, 0x8, 0x20, 0x40
UTILISATION_S = 0.25  # time constant of the utilisation readings
SAMPLE_TICKS = 10  # a sensor that sees a share of the time sees the beginning of each 100 ms
METERS = ("power_avg_w", "power_instant_w", "energy_j")  # what a stuck sensor no longer moves
MOST_TICKS = 1000  # at once; bounds the memory of the loads
_STATE = ("clock_mhz", "filtered_w", "debt_j", "temperature_c", "energy_j", "busy", "memory_busy")


class BankPhysics:
    """Time of one mapped bank; whoever calls holds its lock."""

    def __init__(self, spec: BoardSpec, sections: Sections) -> None:
        self._spec, self._count = spec, len(sections.boards)
        self._all = sections
        head = sections.head[0]
        self._seed = int(head["seed"])
        self._delayed = float(head["setter_latency_s"]) > 0.0

    def integrate(self, now_s: float) -> None:
        """Up to the last whole tick before `now_s`."""
        clockwork, boards = self._all.clockwork[0], self._all.boards
        time_s = float(clockwork["time_s"])
        if time_s < 0:
            clockwork["time_s"] = time_s = now_s
        self._notice_writes(time_s)
        asleep_s = max(time_s, self._asleep_from_s())
        ticks = int((min(now_s, asleep_s) - time_s) / TICK_S + 1e-9)
        for first in range(0, ticks, MOST_TICKS):
            self._run(time_s + first * TICK_S, min(MOST_TICKS, ticks - first))
        time_s += max(0, ticks) * TICK_S
        if now_s - time_s > 2 * TICK_S:
            idle_ticks = int((now_s - time_s) / TICK_S)
            self._sleep(idle_ticks)
            time_s += idle_ticks * TICK_S
        moved = time_s > float(clockwork["time_s"])
        clockwork["time_s"] = time_s
        if moved or math.isnan(self._all.head["refreshed_s"][0]):
            self._show(boards)
        self._all.head["refreshed_s"] = now_s

    def clock_range_mhz(self) -> tuple[np.ndarray, np.ndarray]:
        """Where boards rest, and the highest clock that locks allow, shape (boards,) each."""
        b, spec = self._all.boards, self._spec
        low, high = (
            np.clip(b[name] // CLOCK_STEP_MHZ * CLOCK_STEP_MHZ, spec.min_sm_clock_mhz, b["top_mhz"])
            for name in ("acting_lock_lo_mhz", "acting_lock_hi_mhz")
        )
        return low, high

    def _asleep_from_s(self) -> float:
        """From when nothing changes any more, unless somebody books or writes."""
        b = self._all.boards
        last_s = max(float(self._all.clockwork["busy_until_s"][0]), float(b["dip_until_s"].max()))
        acts_s = b["acts_at_s"][np.isfinite(b["acts_at_s"])]
        awake_s = last_s + self._spec.firmware.awake_s
        return float(max([awake_s, *acts_s.tolist()])) + 2 * RING * TICK_S

    def _sleep(self, ticks: int) -> None:
        """Many ticks at once in which boards do nothing but cool."""
        b, g = self._all.boards, self._spec.firmware
        b["energy_j"] += b["power_w"] * (ticks * TICK_S)
        self._all.clockwork["ticks"] += ticks
        since = int(self._all.clockwork["ticks"][0]) % max(1, round(self._spec.energy_refresh_s / TICK_S))
        if since < ticks:  # on the boards' own grid
            b["published_j"] = (b["energy_j"] - b["power_w"] * (since * TICK_S)) * b["counter_factor"]
        resting_c = self._ambient_c() + g.thermal_k_per_w * b["power_w"]
        b["temperature_c"] = resting_c + (b["temperature_c"] - resting_c) * (1.0 - g.thermal_share) ** ticks

    def _notice_writes(self, time_s: float) -> None:
        """A register that changed begins to act after a while, or at once where setters take no time."""
        b = self._all.boards
        changed = np.any([b[name] != b[f"seen_{name}"] for name in REGISTERS], axis=0)
        for i in np.flatnonzero(changed):
            for name in REGISTERS:
                b[f"seen_{name}"][i] = b[name][i]
            timing, call = self._spec.setter, int(b["writes"][i])
            delay_s = effect_delay_s(timing.effect_from_s, timing.effect_to_s, self._seed, int(i), call)
            b["acts_at_s"][i] = time_s + (delay_s if self._delayed else 0.0)

    def _take_effect(self, time_s: float) -> None:
        b = self._all.boards
        due = b["acts_at_s"] <= time_s + 1e-9
        for name in REGISTERS:
            b[f"acting_{name}"] = np.where(due, b[f"seen_{name}"], b[f"acting_{name}"])
        b["acts_at_s"] = np.where(due, math.inf, b["acts_at_s"])

    def _ambient_c(self) -> np.ndarray:
        injected = self._all.boards["ambient_c"]
        return np.where(injected > 0.0, injected, self._spec.firmware.ambient_c)

    def _run(self, start_s: float, ticks: int) -> None:
        """Ticks one by one; state is held in arrays of its own meanwhile, which are quicker than a mapped record's."""
        compute, memory, kernels, steps = self._loads(start_s, ticks)
        k, g, b, clockwork = self._spec.silicon, self._spec.firmware, self._all.boards, self._all.clockwork[0]
        state = {name: b[name].copy() for name in _STATE}
        awake_until_s = b["busy_until_s"] + g.awake_s  # each board by itself: engines share the bank, not their load
        floor_mhz, ambient_c = float(self._spec.min_sm_clock_mhz), self._ambient_c()
        newest, newer = int(clockwork["ticks"]), 1.0 - math.exp(-TICK_S / UTILISATION_S)
        refresh = max(1, round(self._spec.energy_refresh_s / TICK_S))
        core_factor, idle_factor = b["core_factor"].copy(), b["idle_factor"].copy()
        waiting, limit_w, rest_mhz, top_mhz = True, *self.in_force()
        asleep, dipping = (b["throttle"] & IDLE) != 0, np.zeros(self._count, dtype=bool)
        ring_w, power_w = b["ring_w"], b["power_w"].copy()
        may_dip = g.dip_interval_s > 0.0 or bool((b["dip_until_s"] > start_s).any())
        for n in range(ticks):
            time_s = start_s + n * TICK_S
            if waiting:
                self._take_effect(time_s)
                limit_w, rest_mhz, top_mhz = self.in_force()
                waiting = bool(np.isfinite(b["acts_at_s"]).any())
            awake = time_s < awake_until_s
            ceiling_mhz = np.where(awake, top_mhz, rest_mhz)
            if may_dip:
                dipping = self._dips(time_s, awake, power_w, limit_w)
                ceiling_mhz = ceiling_mhz * (1.0 - g.dip_share * dipping)
            clock_mhz = state["clock_mhz"]
            if (awake & asleep).any():
                clock_mhz = np.where(awake & asleep, np.maximum(clock_mhz, ceiling_mhz), clock_mhz)
            power_w, state["clock_mhz"], state["filtered_w"], state["debt_j"], state["temperature_c"], limited = tick(
                k, g, compute[n], memory[n], kernels[n], awake * 1.0, limit_w, floor_mhz, ceiling_mhz, core_factor,
                idle_factor, ambient_c, clock_mhz, state["filtered_w"], state["debt_j"], state["temperature_c"],
            )  # fmt: skip
            asleep = ~awake
            state["energy_j"] += power_w * TICK_S
            state["busy"] += (steps[n] - state["busy"]) * newer
            state["memory_busy"] += (memory[n] - state["memory_busy"]) * newer
            newest += 1
            ring_w[:, newest % RING] = power_w
            if newest % refresh == 0:  # on the boards' own grid
                b["published_j"] = state["energy_j"] * b["counter_factor"]
        b["power_w"] = power_w
        for name in _STATE:
            b[name] = state[name]
        b["throttle"] = self._reasons(awake, limited | dipping)
        clockwork["ticks"] = newest

    def in_force(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Limit W, resting and highest clock MHz of each board."""
        b = self._all.boards
        rest_mhz, top_mhz = self.clock_range_mhz()
        return (
            np.minimum(b["acting_limit_w"], b["external_w"]),
            rest_mhz,
            top_mhz * np.where(b["thermal"] != 0, 0.5, 1.0),
        )

    def _reasons(self, awake: np.ndarray, limited: np.ndarray) -> np.ndarray:
        """NVML's bits: why each board runs no faster."""
        b, g = self._all.boards, self._spec.firmware
        hardware = (b["temperature_c"] >= g.hardware_slowdown_c) | (b["thermal"] != 0)
        bits = POWER_CAP * limited + SOFTWARE_THERMAL * (b["temperature_c"] > g.slowdown_c)
        bits = bits + (HARDWARE_SLOWDOWN | HARDWARE_THERMAL) * hardware
        return np.where(awake, bits, IDLE)

    def _dips(self, time_s: float, awake: np.ndarray, power_w: np.ndarray, limit_w: np.ndarray) -> np.ndarray:
        """Which boards' current protection holds the clock down; begins those that are due."""
        b, g = self._all.boards, self._spec.firmware
        if g.dip_interval_s > 0.0:
            due = b["next_dip_s"] <= time_s
            for i in np.flatnonzero(due | np.isnan(b["next_dip_s"])):
                if due[i] and awake[i] and power_w[i] > g.dip_power_share * limit_w[i]:
                    b["dip_until_s"][i] = time_s + g.dip_s
                b["dips"][i] += 1
                rng = np.random.default_rng([self._seed, int(i), int(b["dips"][i]), 1])
                b["next_dip_s"][i] = time_s + rng.exponential(g.dip_interval_s)
        return np.asarray(b["dip_until_s"] > time_s)

    def _show(self, b: np.ndarray) -> None:
        """Put on the sensors what they show now; the one place where state becomes a reading."""
        shown, spec = self._all.readings, self._spec
        moving = b["stuck"] == 0
        mean_w = self._window_w(spec.power_window_s, spec.sampled_share)
        instant_w = self._window_w(spec.instant_window_s, 1.0)
        for name, values in zip(METERS, (mean_w, instant_w, b["published_j"]), strict=True):
            shown[name] = np.where(moving, values, shown[name])
        for name in ("temperature_c", "busy", "memory_busy", "throttle"):
            shown[name] = b[name]
        clock_mhz = b["clock_mhz"] // CLOCK_STEP_MHZ * CLOCK_STEP_MHZ
        shown["sm_clock_mhz"] = np.maximum(clock_mhz, spec.min_sm_clock_mhz)  # skipped cycles do not show

    def _window_w(self, window_s: float, sampled_share: float) -> Any:
        """Mean power of the last `window_s`, of which the sensor saw `sampled_share`, W."""
        window = min(RING, max(1, round(window_s / TICK_S)))
        ticks = int(self._all.clockwork["ticks"][0]) - np.arange(window)
        seen = np.clip(sampled_share * SAMPLE_TICKS - ticks % SAMPLE_TICKS, 0.0, 1.0)
        return self._all.boards["ring_w"][:, ticks % RING] @ (seen / seen.sum())

    def _loads(self, start_s: float, ticks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Compute, memory and kernel shares, and the share of time a step runs, shape (ticks, boards), from the segments."""
        s = self._all.segments
        s = s[(s["end_s"] > start_s) & (s["start_s"] < start_s + ticks * TICK_S)]
        edges = start_s + TICK_S * np.arange(ticks)[:, None]
        overlap = (
            np.clip(np.minimum(s["end_s"], edges + TICK_S) - np.maximum(s["start_s"], edges), 0.0, TICK_S) / TICK_S
        )
        member = (s["boards"][:, None] >> np.arange(self._count, dtype=np.uint64)) & 1
        compute = np.minimum(1.0, (overlap * s["compute"]) @ member)
        memory = np.minimum(1.0, (overlap * s["memory"]) @ member)
        kernels = np.minimum(1.0, (overlap * s["kernels"]) @ member)
        return compute, memory, kernels, np.minimum(1.0, overlap @ member)
