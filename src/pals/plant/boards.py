"""Emulated boards in one mapped file that several processes share (each opens it; a bank must not cross a fork); physics is integrated lazily, in 10 ms ticks.

Every public call takes `now_s` (CLOCK_MONOTONIC, or a test's own time), locks the file, integrates up to now, then
reads or writes. The energy counter is the integral of power over every tick, published on a grid of some 50 ms as boards do. Where a
simulator has set the bank's virtual time, that is the boards' clock, whatever `now_s` says.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pals.core.errors import ConfigError
from pals.plant.bank_layout import (
    FAULTS,
    HEAD,
    RING,
    SEGMENTS,
    bank_size,
    board_uuid,
    make_head,
    map_sections,
    read_head,
)
from pals.plant.governor import TICK_S, govern
from pals.plant.silicon import Load, core_power_w, static_power_w
from pals.plant.specs import CLOCK_STEP_MHZ, BoardSpec, board_specs

THROTTLE_IDLE, THROTTLE_POWER_CAP = 0x1, 0x4
AWAKE_S = 3.0  # clocks stay up this long after the last kernel
PUBLISH_S = 0.05  # refresh of the energy counter
UTILISATION_S = 0.25  # time constant of the utilisation readings
THERMAL_K_PER_W, THERMAL_TAU_S, AMBIENT_C = 0.055, 40.0, 30.0
NO_LIMIT_W = 1e9
_METERS = ("power_avg_w", "power_instant_w", "energy_j")  # what a stuck sensor no longer moves


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardReading:
    """What the sensors of one emulated board say."""

    power_avg_w: float
    power_instant_w: float
    energy_j: float
    enforced_limit_w: float
    requested_limit_w: float
    sm_clock_mhz: int
    temperature_c: float
    throttle: int
    busy: float  # share of the last quarter second in which a kernel ran, 0..1
    memory_busy: float  # share in which HBM was read or written, 0..1


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardProcess:
    """A process that said it uses a board."""

    pid: int
    memory_bytes: int  # on each of its boards


class BoardBank:
    """All emulated boards of one node; see the module."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread_lock = threading.Lock()
        self._file = path.open("r+b")
        try:
            self._map()
        except ConfigError:
            self._file.close()
            raise
        except (ValueError, KeyError, TypeError) as e:
            self._file.close()
            raise ConfigError(f"{path} is not a whole file of emulated boards ({e}); nothing was changed") from e

    def _map(self) -> None:
        head = read_head(os.pread(self._file.fileno(), HEAD.itemsize, 0), str(self.path))
        self._mapped = mmap.mmap(self._file.fileno(), 0)
        self.spec: BoardSpec = board_specs()[head["spec"].decode()]
        self.count = int(head["count"])
        self.writable = bool(head["writable"])
        self.memory_bytes = int(head["memory_bytes"])
        self.setter_latency_s = float(head["setter_latency_s"])
        self._sections = map_sections(self._mapped, self.count)
        self._boards, self._segments = self._sections.boards, self._sections.segments
        self._clockwork = self._sections.clockwork

    @staticmethod
    def create(
        path: Path,
        spec: BoardSpec,
        count: int,
        *,
        seed: int = 0,
        writable: bool = True,
        setter_latency_s: float = 0.004,
        now_s: float | None = None,
    ) -> BoardBank:
        """Make the file, boards idle at their default limits; each board varies a little, by `seed`.

        `writable` False makes every setter answer "no permission". `now_s` is when time starts (None: at the first call).
        """
        fresh = path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        with fresh.open("xb") as f:  # never into what somebody else put there, nor through a link
            f.write(make_head(spec, count, writable=writable, setter_latency_s=setter_latency_s).tobytes())
            f.truncate(bank_size(count))
        fresh.replace(path)
        bank = BoardBank(path)
        rng = np.random.default_rng(seed)
        b = bank._boards
        b["uuid"] = [board_uuid(spec.name, i) for i in range(count)]
        b["limit_w"], b["external_w"] = spec.default_limit_w, NO_LIMIT_W
        b["lock_lo_mhz"], b["lock_hi_mhz"] = 0.0, spec.max_sm_clock_mhz
        b["clock_mhz"] = spec.min_sm_clock_mhz
        b["core_factor"] = np.clip(rng.normal(1.0, 0.03, count), 0.9, 1.1)
        b["idle_factor"] = np.clip(rng.normal(1.0, 0.04, count), 0.85, 1.15)
        b["power_w"] = b["filtered_w"] = spec.silicon.idle_w * b["idle_factor"]
        b["ring_w"] = b["power_w"][:, None]
        b["temperature_c"] = AMBIENT_C + THERMAL_K_PER_W * b["power_w"]
        b["throttle"] = THROTTLE_IDLE
        bank._clockwork["time_s"] = -1.0 if now_s is None else now_s
        return bank

    @staticmethod
    def open(path: Path) -> BoardBank:
        """Open what another process created."""
        return BoardBank(path)

    def close(self) -> None:
        """Unmap; the file stays."""
        del self._boards, self._segments, self._clockwork, self._sections
        self._mapped.close()
        self._file.close()

    def refresh(self, now_s: float) -> None:
        """Bring the readings up to date for those who only read the file; see `plant/keeper.py`."""
        with self._locked(now_s):
            pass

    def age_s(self, now_s: float) -> float:
        """How long ago the readings were refreshed, s; infinite where they never were."""
        refreshed_s = float(self._sections.head["refreshed_s"][0])
        return math.inf if math.isnan(refreshed_s) else now_s - refreshed_s

    def virtual_time_s(self) -> float | None:
        """The boards' clock where a simulator drives it, else None."""
        virtual_s = float(self._sections.head["virtual_s"][0])
        return None if math.isnan(virtual_s) else virtual_s

    def set_virtual_time(self, now_s: float) -> None:
        """From now on the boards' clock is what the last call here said, for every process that uses the file.

        Raises:
            ValueError: time would run backwards; nothing was changed.
        """
        with self._locked(now_s):
            head = self._sections.head
            if now_s < float(self._clockwork["time_s"][0]):
                raise ValueError(
                    f"virtual time {now_s} s lies before the boards' {float(self._clockwork['time_s'][0])} s"
                )
            head["virtual_s"], head["keeper_pid"] = now_s, os.getpid()
            self._integrate(now_s)

    def book(self, boards: Sequence[int], start_s: float, end_s: float, load: Load, now_s: float) -> None:
        """Keep `boards` busy with `load` from `start_s` to `end_s`; of the past, only what is not yet integrated counts."""
        with self._locked(now_s):
            clockwork = self._clockwork[0]
            slot = int(clockwork["next"]) % SEGMENTS
            self._segments[slot] = (start_s, end_s, load.compute, load.memory, load.busy, sum(1 << i for i in boards))
            clockwork["next"] += 1
            clockwork["busy_until_s"] = max(float(clockwork["busy_until_s"]), end_s)
            used = list(boards)
            self._boards["busy_until_s"][used] = np.maximum(self._boards["busy_until_s"][used], end_s)

    def pace_mhz(self, boards: Sequence[int], now_s: float) -> float:
        """Clock of the slowest of `boards`: the rank that sets a tensor-parallel group's pace."""
        with self._locked(now_s) as now_s:
            used = list(boards)
            idle = now_s > float(self._boards["busy_until_s"][used].max())
            clocks = self._boards["clock_mhz"][used]
            if idle:  # the first step after idling runs at what the boards rise to within a few ticks
                clocks = np.maximum(clocks, self._clock_range_mhz()[1][used])
            return float(clocks.min())

    def reading(self, i: int, now_s: float) -> BoardReading:
        """The sensors of board `i`, and its limits."""
        with self._locked(now_s):
            r, b = self._sections.readings[i], self._boards[i]
            return BoardReading(
                power_avg_w=float(r["power_avg_w"]),
                power_instant_w=float(r["power_instant_w"]),
                energy_j=float(r["energy_j"]),
                enforced_limit_w=float(min(b["limit_w"], b["external_w"])),
                requested_limit_w=float(b["limit_w"]),
                sm_clock_mhz=int(r["sm_clock_mhz"]),
                temperature_c=float(r["temperature_c"]),
                throttle=int(r["throttle"]),
                busy=float(r["busy"]),
                memory_busy=float(r["memory_busy"]),
            )

    def uuid(self, i: int) -> str:
        """The name of board `i` that stays; begins with GPU-00000000 on emulated boards."""
        return str(self._boards["uuid"][i].decode())

    def register_process(self, pid: int, boards: Sequence[int], memory_bytes: int) -> None:
        """Say that `pid` uses `boards`, with `memory_bytes` on each; replaces what it said before, or the oldest entry."""
        with self._held():
            table = self._sections.processes
            slot = int(np.argmin(np.where(table["pid"] == pid, -1, table["order"])))
            table[slot] = (pid, sum(1 << i for i in boards), memory_bytes, int(table["order"].max()) + 1)

    def forget_process(self, pid: int) -> None:
        """Take `pid` off the list."""
        with self._held():
            table = self._sections.processes
            table[table["pid"] == pid] = (0, 0, 0, 0)

    def processes(self, i: int) -> list[BoardProcess]:
        """Who said it uses board `i`; whether it still lives is for the caller to see."""
        return [
            BoardProcess(pid=int(p["pid"]), memory_bytes=int(p["memory_bytes"]))
            for p in self._sections.processes
            if p["pid"] and (int(p["boards"]) >> i) & 1
        ]

    def energy_integral_j(self, i: int, now_s: float) -> float:
        """The unpublished integral itself, J; for checks of the physics."""
        with self._locked(now_s):
            return float(self._boards["energy_j"][i])

    def faults(self, i: int) -> tuple[bool, bool, bool]:
        """Whether board `i` is lost, supports no setters, or denies them."""
        b = self._boards[i]
        return bool(b["lost"]), bool(b["not_supported"]), bool(b["denied"]) or not self.writable

    def refuses_clock_locks(self, i: int) -> bool:
        """Whether board `i` supports limits but no clock locks."""
        return bool(self._boards["no_clock_lock"][i])

    def denies_limits(self, i: int) -> bool:
        """Whether board `i` lets its clock be locked and denies power limits."""
        return bool(self._boards["limit_denied"][i])

    def set_limit(self, i: int, watts: float, now_s: float) -> None:
        """Change the limit that NVML set; the range was checked by the caller."""
        with self._locked(now_s):
            self._boards["limit_w"][i] = watts

    def set_clock_lock(self, i: int, low_mhz: float, high_mhz: float, now_s: float) -> None:
        """Lock the SM clock; it runs at the nearest clocks at or below, within the board's range."""
        with self._locked(now_s):
            self._boards["lock_lo_mhz"][i], self._boards["lock_hi_mhz"][i] = low_mhz, high_mhz

    def reset_clock_lock(self, i: int, now_s: float) -> None:
        """Release the lock."""
        with self._locked(now_s):
            self._boards["lock_lo_mhz"][i], self._boards["lock_hi_mhz"][i] = 0.0, self.spec.max_sm_clock_mhz

    def inject(self, i: int, fault: str, value: float, now_s: float) -> None:
        """Set a fault: "lost", "not_supported", "denied", "limit_denied", "no_clock_lock", "stuck" (1 or 0), or
        "external_limit" (W; 0 removes it).

        A stuck sensor shows the power and the energy it showed last; the board itself goes on.

        Raises:
            ValueError: unknown fault.
        """
        with self._locked(now_s):
            if fault == "external_limit":
                self._boards["external_w"][i] = value or NO_LIMIT_W
            elif fault in FAULTS:
                self._boards[fault][i] = int(value)
            else:
                raise ValueError(f"unknown fault {fault!r}; known: {', '.join(FAULTS)}, external_limit")

    @contextmanager
    def _locked(self, now_s: float) -> Iterator[float]:
        """Hold the file, everything up to date; yields the boards' time, s."""
        with self._held():
            virtual_s = self.virtual_time_s()
            now_s = now_s if virtual_s is None else virtual_s
            self._integrate(now_s)
            yield now_s

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the file as it is."""
        with self._thread_lock:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            sequence = int(self._sections.head["sequence"][0]) | 1  # odd already: its writer was killed
            self._sections.head["sequence"] = sequence
            try:
                yield
            finally:
                self._sections.head["sequence"] = sequence + 1
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _integrate(self, now_s: float) -> None:
        clockwork = self._clockwork[0]
        time_s = float(clockwork["time_s"])
        if time_s < 0:
            clockwork["time_s"] = time_s = now_s
        asleep_s = max(time_s, float(clockwork["busy_until_s"]) + AWAKE_S + 2 * RING * TICK_S)
        ticks = int((min(now_s, asleep_s) - time_s) / TICK_S + 1e-9)
        for first in range(0, ticks, 1000):
            self._run_ticks(time_s + first * TICK_S, min(1000, ticks - first))
        time_s += max(0, ticks) * TICK_S
        if now_s - time_s > 2 * TICK_S:  # nothing changes any more: one long step
            idle_ticks = int((now_s - time_s) / TICK_S)
            self._boards["energy_j"] += self._boards["power_w"] * (idle_ticks * TICK_S)
            self._boards["published_j"] = self._boards["energy_j"]
            clockwork["ticks"] += idle_ticks
            time_s += idle_ticks * TICK_S
        moved = time_s > float(clockwork["time_s"])
        clockwork["time_s"] = time_s
        if moved or math.isnan(self._sections.head["refreshed_s"][0]):
            self._show()
        self._sections.head["refreshed_s"] = now_s

    def _show(self) -> None:
        """Put on the sensors what they show now; the one place where state becomes a reading."""
        b, shown = self._boards, self._sections.readings
        window = min(RING, max(1, round(self.spec.power_window_s / TICK_S)))
        newest = int(self._clockwork["ticks"][0])
        recent = slice(None) if window == RING else (newest - np.arange(window)) % RING
        mean_w = b["ring_w"][:, recent].mean(axis=1)
        moving = b["stuck"] == 0
        for name, values in zip(_METERS, (mean_w, b["power_w"], b["published_j"]), strict=True):
            shown[name] = np.where(moving, values, shown[name])
        for name in ("temperature_c", "busy", "memory_busy", "throttle"):
            shown[name] = b[name]
        shown["sm_clock_mhz"] = b["clock_mhz"] // CLOCK_STEP_MHZ * CLOCK_STEP_MHZ

    def _clock_range_mhz(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest clock the locks allow, shape (boards,) each."""
        low, high = (
            np.clip(
                self._boards[name] // CLOCK_STEP_MHZ * CLOCK_STEP_MHZ,
                self.spec.min_sm_clock_mhz,
                self.spec.max_sm_clock_mhz,
            )
            for name in ("lock_lo_mhz", "lock_hi_mhz")
        )
        return low, high

    def _run_ticks(self, start_s: float, ticks: int) -> None:
        compute, memory, kernels, busy = self._loads(start_s, ticks)
        silicon = self.spec.silicon
        b, spec, clockwork = self._boards, self.spec, self._clockwork[0]
        limit_w = np.minimum(b["limit_w"], b["external_w"])
        floor, ceiling = self._clock_range_mhz()
        awake_until_s = b["busy_until_s"] + AWAKE_S  # each board by itself: engines share the bank, not their load
        newest = int(clockwork["ticks"])
        warm = 1.0 - np.exp(-TICK_S / THERMAL_TAU_S)
        newer = 1.0 - np.exp(-TICK_S / UTILISATION_S)
        refresh = max(1, round(spec.energy_refresh_s / TICK_S))
        for k in range(ticks):
            awake = start_s + k * TICK_S < awake_until_s
            warm_w = static_power_w(silicon, b["temperature_c"])
            static_w = np.where(awake, warm_w, silicon.idle_w) * b["idle_factor"]
            core_w = core_power_w(silicon, compute[k], memory[k], kernels[k], b["clock_mhz"]) * b["core_factor"]
            core_w = np.where(awake, core_w, 0.0)
            power_w = static_w + core_w + silicon.hbm_w * memory[k]
            b["energy_j"] += power_w * TICK_S
            b["power_w"] = power_w
            b["temperature_c"] += (AMBIENT_C + THERMAL_K_PER_W * power_w - b["temperature_c"]) * warm
            b["busy"] += (busy[k] - b["busy"]) * newer
            b["memory_busy"] += (memory[k] - b["memory_busy"]) * newer
            top = np.where(awake, ceiling, float(spec.min_sm_clock_mhz))
            b["filtered_w"], b["clock_mhz"], limited = govern(
                filtered_w=b["filtered_w"], power_w=power_w, limit_w=limit_w, core_w=core_w, clock_mhz=b["clock_mhz"],
                floor_mhz=floor, ceiling_mhz=top,
            )  # fmt: skip
            b["throttle"] = np.where(limited & awake, THROTTLE_POWER_CAP, np.where(awake, 0, THROTTLE_IDLE))
            newest += 1
            b["ring_w"][:, newest % RING] = power_w
            if newest % refresh == 0:  # on the boards' own grid, whoever looks and when
                b["published_j"] = b["energy_j"]
        clockwork["ticks"] = newest

    def _loads(self, start_s: float, ticks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Compute, memory and kernel shares, and the share of time a step runs, shape (ticks, boards), from the segments."""
        s = self._segments
        s = s[(s["end_s"] > start_s) & (s["start_s"] < start_s + ticks * TICK_S)]
        edges = start_s + TICK_S * np.arange(ticks)[:, None]
        overlap = (
            np.clip(np.minimum(s["end_s"], edges + TICK_S) - np.maximum(s["start_s"], edges), 0.0, TICK_S) / TICK_S
        )
        member = (s["boards"][:, None] >> np.arange(self.count, dtype=np.uint64)) & 1
        compute = np.minimum(1.0, (overlap * s["compute"]) @ member)
        memory = np.minimum(1.0, (overlap * s["memory"]) @ member)
        kernels = np.minimum(1.0, (overlap * s["kernels"]) @ member)
        return compute, memory, kernels, np.minimum(1.0, overlap @ member)
