"""The boards of a simulated replica as others see them: what is read, what is written, what can go wrong.

Setters, faults and sensors mean what they mean on the emulated boards (`plant/boards.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from pals.core.errors import DeviceLostError, PermissionDeniedError
from pals.core.quantities import Checked
from pals.plant.bank_layout import BOARD as BANK_BOARD
from pals.plant.bank_physics import SAMPLE_TICKS
from pals.plant.boards import NO_LIMIT_W, draw_specimens
from pals.plant.governor import TICK_S
from pals.plant.replica_state import RING, Memory
from pals.plant.setter_time import effect_delay_s, setter_time_s
from pals.plant.specs import CLOCK_STEP_MHZ, BoardSpec

FLAGS = ("lost", "denied", "stuck", "thermal")  # 1 or 0
FAULTS = (*FLAGS, "external_limit", "ambient", "slow_setter", "dip")
DIPS_AHEAD = 256  # drawn at once
_SHOWN = ["published_j", "clock_mhz", "temperature_c", "limit_w", "external_w", "limited"]


@cache
def _window(ticks: int, sampled_share: float, newest: int) -> tuple[np.ndarray, np.ndarray]:
    """Where in the ring the last `ticks` lie, and how much of each the sensor saw; RING is a multiple of SAMPLE_TICKS."""
    at = newest - np.arange(ticks)
    seen = np.clip(sampled_share * SAMPLE_TICKS - at % SAMPLE_TICKS, 0.0, 1.0)
    return at % RING, seen / seen.sum()


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardView(Checked):
    """What the sensors of one simulated board say."""

    power_w: float  # mean over the driver's own window
    power_instant_w: float
    energy_j: float  # counter: refreshed on a grid of some 50 ms, only differences mean anything
    sm_clock_mhz: int
    temperature_c: float
    enforced_limit_w: float
    requested_limit_w: float
    throttled: bool  # a limit or current protection holds the clock down


class ReplicaBoards:
    """See the module."""

    def __init__(self, memory: Memory, spec: BoardSpec, *, seed: int, setter_latency_s: float) -> None:
        self._m, self._spec, self._seed, self._latency_s = memory, spec, seed, setter_latency_s
        count = len(memory.boards)
        self._writes = [0] * count
        self._flags: list[dict[str, bool]] = [dict.fromkeys(FLAGS, False) for _ in range(count)]
        self._extra_s = [0.0] * count
        self._stuck: dict[int, BoardView] = {}
        self._drawn = [0] * count
        self._begin()

    def _begin(self) -> None:
        """Idle boards at their default limits, the very specimens that a bank of this seed holds."""
        m, spec, b = self._m, self._spec, self._m.boards
        drawn = np.zeros(len(b), BANK_BOARD)
        draw_specimens(drawn, spec, self._seed)
        for name in ("core_factor", "idle_factor", "counter_factor", "top_mhz", "clock_mhz", "power_w", "filtered_w", "temperature_c", "external_w", "limit_w"):  # fmt: skip
            b[name] = drawn[name]
        b["acting_limit_w"] = b["limit_w"]
        b["lock_mhz"] = b["acting_lock_mhz"] = self.ceiling_mhz(spec.max_sm_clock_mhz)
        b["floor_mhz"], b["ambient_c"] = spec.min_sm_clock_mhz, spec.firmware.ambient_c
        m.ring[:] = b["power_w"][:, None]
        m.state["refresh"] = max(1, round(spec.energy_refresh_s / TICK_S))

    def clone(self, memory: Memory) -> ReplicaBoards:
        """The same boards with `memory`, a copy of theirs: same faults, same writes to come, same dips to be drawn."""
        twin = copy(self)
        twin._m = memory
        twin._writes, twin._extra_s, twin._drawn = list(self._writes), list(self._extra_s), list(self._drawn)
        twin._flags, twin._stuck = [dict(f) for f in self._flags], dict(self._stuck)
        return twin

    def ceiling_mhz(self, wanted_mhz: int) -> np.ndarray:
        """The clock that boards locked to `wanted_mhz` run at, MHz, shape (boards,)."""
        stepped = wanted_mhz // CLOCK_STEP_MHZ * CLOCK_STEP_MHZ
        top_mhz = self._m.boards["top_mhz"] // CLOCK_STEP_MHZ * CLOCK_STEP_MHZ
        return np.asarray(np.clip(stepped, self._spec.min_sm_clock_mhz, top_mhz))

    def set_limit_w(self, watts: float, only: int | None = None) -> None:
        """See `Replica.set_limit_w`."""
        spec, in_force_w = self._spec, float(self._m.boards["limit_w"][only or 0])
        if not spec.min_limit_w <= watts <= spec.max_limit_w:
            raise ValueError(
                f"{watts} W lies outside {spec.min_limit_w}..{spec.max_limit_w} W of {spec.nvml_name}; {in_force_w} W stays "
                "in force"
            )
        self._write("limit_w", np.full(len(self._m.boards), round(watts * 1000.0) / 1000.0), only)

    def set_clock_lock(self, mhz: int | None, only: int | None = None) -> None:
        """See `Replica.set_clock_lock`."""
        self._write("lock_mhz", self.ceiling_mhz(self._spec.max_sm_clock_mhz if mhz is None else mhz), only)

    def limit_w(self, i: int) -> float:
        """The limit that board `i` would report as enforced, W."""
        b = self._m.boards
        return float(min(b["limit_w"][i], b["external_w"][i]))

    def _write(self, name: str, values: np.ndarray, only: int | None) -> None:
        """Write board `only`, None: all boards that can be written; then say which could not."""
        chosen = range(len(values)) if only is None else (only,)
        lost = [i for i in chosen if self._flags[i]["lost"]]
        denied = [i for i in chosen if self._flags[i]["denied"] and i not in lost]
        for i in chosen:
            if i not in (*lost, *denied) and self._m.boards[name][i] != values[i]:
                self._m.boards[name][i] = values[i]
                self._m.boards["acts_at_s"][i] = self._acts_at_s(i)
        others = "; the others of its replica were written" * (only is None)
        if lost:
            raise DeviceLostError(f"simulated board {lost[0]} is lost{others}")
        if denied:
            raise PermissionDeniedError(
                f"simulated board {denied[0]}: the driver refused (no permission); {self.limit_w(denied[0]):.0f} W is still in "
                f"force{others}."
            )

    def _acts_at_s(self, i: int) -> float:
        """When a write made now begins to act."""
        self._writes[i] += 1
        now_s, timing = float(self._m.state["now_s"][0]), self._spec.setter
        call_s = setter_time_s(
            self._latency_s, timing.tail_sigma, timing.longest_s, self._extra_s[i], self._seed, i, self._writes[i]
        )
        if self._latency_s <= 0.0:
            return now_s + call_s
        effect = effect_delay_s(timing.effect_from_s, timing.effect_to_s, self._seed, i, self._writes[i])
        return now_s + call_s + effect

    def inject(self, i: int, fault: str, value: float) -> None:
        """See `Replica.inject`."""
        if fault not in FAULTS:
            raise ValueError(f"unknown fault {fault!r}; known: {', '.join(FAULTS)}")
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"fault {fault!r}: {value} is not a number of at least 0")
        b = self._m.boards
        if fault in FLAGS:
            if fault == "stuck" and value:
                self._stuck[i] = self.view(i)
            self._flags[i][fault] = bool(value)
        if fault == "thermal":
            b["thermal"][i] = value
        elif fault == "external_limit":
            b["external_w"][i] = value or NO_LIMIT_W
        elif fault == "ambient":
            b["ambient_c"][i] = value or self._spec.firmware.ambient_c
        elif fault == "slow_setter":
            self._extra_s[i] = value
        elif fault == "dip":
            b["dip_until_s"][i] = float(self._m.state["now_s"][0]) + value

    def view(self, i: int) -> BoardView:
        """The sensors of board `i`.

        Raises:
            DeviceLostError: the board is lost.
        """
        return self.views([i])[0]

    def views(self, chosen: Sequence[int]) -> tuple[BoardView, ...]:
        """The sensors of several boards; raises as `view`."""
        lost = [i for i in chosen if self._flags[i]["lost"]]
        if lost:
            raise DeviceLostError(f"simulated board {lost[0]} is lost: it has no readings")
        spec, rows = self._spec, self._m.boards[_SHOWN].tolist()
        mean_w = self._window_w(spec.power_window_s, spec.sampled_share)
        instant_w = self._window_w(spec.instant_window_s, 1.0)
        return tuple(self._shown(i, mean_w[i], instant_w[i], *rows[i]) for i in chosen)

    def _shown(
        self, i: int, mean_w: float, instant_w: float, energy_j: float, clock_mhz: float, temperature_c: float,
        limit_w: float, external_w: float, limited: float,
    ) -> BoardView:  # fmt: skip
        view = BoardView(
            power_w=mean_w,
            power_instant_w=instant_w,
            energy_j=energy_j,
            sm_clock_mhz=int(max(clock_mhz // CLOCK_STEP_MHZ * CLOCK_STEP_MHZ, self._spec.min_sm_clock_mhz)),
            temperature_c=temperature_c,
            enforced_limit_w=min(limit_w, external_w),
            requested_limit_w=limit_w,
            throttled=limited > 0.0,
        )
        if not self._flags[i]["stuck"]:
            return view
        kept = self._stuck[i]
        return replace(view, power_w=kept.power_w, power_instant_w=kept.power_instant_w, energy_j=kept.energy_j)

    def _window_w(self, window_s: float, sampled_share: float) -> list[float]:
        """Mean power of each board over the last `window_s`, of which the sensor saw `sampled_share`, W."""
        newest = int(self._m.state["ticks"][0])
        at, weights = _window(min(RING, max(1, round(window_s / TICK_S))), sampled_share, newest % RING)
        mean_w: list[float] = (self._m.ring[:, at] @ weights).tolist()
        return mean_w

    def draw_dips(self, from_s: float) -> tuple[np.ndarray, float]:
        """Times at which current protection looks at each board next, and up to when they are known."""
        boards, interval_s = self._m.boards, self._spec.firmware.dip_interval_s
        boards["next_dip"] = 0
        if interval_s <= 0.0:
            return np.zeros((len(boards), 0)), math.inf
        due_s = np.empty((len(boards), DIPS_AHEAD))
        for i in range(len(due_s)):
            time_s = from_s
            for n in range(DIPS_AHEAD):
                self._drawn[i] += 1
                gap_s = float(np.random.default_rng([self._seed, i, self._drawn[i], 1]).exponential(interval_s))
                due_s[i, n] = time_s = math.ceil(time_s / TICK_S) * TICK_S + gap_s
        return due_s, float(due_s[:, -1].min())
