"""Emulated boards in one mapped file that several processes share (each opens it; a bank must not cross a fork); physics is integrated lazily, in 10 ms ticks.

Every public call takes `now_s` (CLOCK_MONOTONIC, or a test's own time), locks the file, integrates up to now, then
reads or writes. The energy counter is the integral of power over every tick, published each 50 ms as boards do.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pals.plant.governor import TICK_S, govern
from pals.plant.silicon import Load, core_power_w, hbm_power_w
from pals.plant.specs import CLOCK_STEP_MHZ, BoardSpec, board_specs

THROTTLE_IDLE, THROTTLE_POWER_CAP = 0x1, 0x4
AWAKE_S = 3.0  # clocks stay up this long after the last kernel
PUBLISH_S = 0.05  # refresh of the energy counter
RING = 100  # ticks kept for the windowed mean
SEGMENTS = 256
THERMAL_K_PER_W, THERMAL_TAU_S, AMBIENT_C = 0.055, 40.0, 30.0
NO_LIMIT_W = 1e9
_HEAD = 1024
_BOARD = np.dtype(
    [
        *(
            (name, "f8")
            for name in ["limit_w", "external_w", "lock_lo_mhz", "lock_hi_mhz", "clock_mhz", "filtered_w", "power_w"]
        ),
        *((name, "f8") for name in ["energy_j", "published_j", "temperature_c", "core_factor", "idle_factor"]),
        *((name, "i8") for name in ["throttle", "lost", "not_supported", "denied"]),
        ("ring_w", "f8", RING),
    ]
)
_SEGMENT = np.dtype([("start_s", "f8"), ("end_s", "f8"), ("compute", "f8"), ("memory", "f8"), ("boards", "u8")])
_CLOCKWORK = np.dtype(
    [("time_s", "f8"), ("published_s", "f8"), ("busy_until_s", "f8"), ("ticks", "i8"), ("next", "i8")]
)


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


class BoardBank:
    """All emulated boards of one node; see the module."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread_lock = threading.Lock()
        self._file = path.open("r+b")
        try:
            self._map()
        except (ValueError, KeyError, TypeError) as e:
            self._file.close()
            raise ValueError(f"{path} is no bank of emulated boards ({type(e).__name__}: {e})") from e

    def _map(self) -> None:
        self._mapped = mmap.mmap(self._file.fileno(), 0)
        head = json.loads(self._mapped[:_HEAD].rstrip(b"\0"))
        self.spec: BoardSpec = board_specs()[head["spec"]]
        self.count: int = head["count"]
        self.writable: bool = head["writable"]
        self.setter_latency_s: float = head["setter_latency_s"]
        self._boards = np.ndarray((self.count,), _BOARD, self._mapped, _HEAD)
        at = _HEAD + self._boards.nbytes
        self._segments = np.ndarray((SEGMENTS,), _SEGMENT, self._mapped, at)
        self._clockwork = np.ndarray((1,), _CLOCKWORK, self._mapped, at + self._segments.nbytes)

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
        head = json.dumps(
            {"spec": spec.name, "count": count, "writable": writable, "setter_latency_s": setter_latency_s}
        ).encode()
        size = _HEAD + count * _BOARD.itemsize + SEGMENTS * _SEGMENT.itemsize + _CLOCKWORK.itemsize
        fresh = path.with_suffix(".new")
        fresh.write_bytes(head.ljust(size, b"\0"))
        fresh.replace(path)
        bank = BoardBank(path)
        rng = np.random.default_rng(seed)
        b = bank._boards
        b["limit_w"], b["external_w"] = spec.default_limit_w, NO_LIMIT_W
        b["lock_lo_mhz"], b["lock_hi_mhz"] = 0.0, spec.max_sm_clock_mhz
        b["clock_mhz"] = spec.min_sm_clock_mhz
        b["core_factor"] = np.clip(rng.normal(1.0, 0.03, count), 0.9, 1.1)
        b["idle_factor"] = np.clip(rng.normal(1.0, 0.04, count), 0.85, 1.15)
        b["power_w"] = b["filtered_w"] = spec.idle_w * b["idle_factor"]
        b["ring_w"] = b["power_w"][:, None]
        b["temperature_c"] = AMBIENT_C + THERMAL_K_PER_W * b["power_w"]
        b["throttle"] = THROTTLE_IDLE
        bank._clockwork["time_s"] = -1.0 if now_s is None else now_s
        bank._clockwork["published_s"] = 0.0 if now_s is None else now_s
        return bank

    @staticmethod
    def open(path: Path) -> BoardBank:
        """Open what another process created."""
        return BoardBank(path)

    def close(self) -> None:
        """Unmap; the file stays."""
        del self._boards, self._segments, self._clockwork
        self._mapped.close()
        self._file.close()

    def book(self, boards: Sequence[int], start_s: float, end_s: float, load: Load, now_s: float) -> None:
        """Keep `boards` busy with `load` from `start_s` to `end_s`; of the past, only what is not yet integrated counts."""
        with self._locked(now_s):
            clockwork = self._clockwork[0]
            slot = int(clockwork["next"]) % SEGMENTS
            self._segments[slot] = (start_s, end_s, load.compute, load.memory, sum(1 << i for i in boards))
            clockwork["next"] += 1
            clockwork["busy_until_s"] = max(float(clockwork["busy_until_s"]), end_s)

    def pace_mhz(self, boards: Sequence[int], now_s: float) -> float:
        """Clock of the slowest of `boards`: the rank that sets a tensor-parallel group's pace."""
        with self._locked(now_s):
            idle = now_s > float(self._clockwork["busy_until_s"][0])
            clocks = self._boards["clock_mhz"][list(boards)]
            if idle:  # the first step after idling runs at what the boards rise to within a few ticks
                clocks = np.maximum(
                    clocks, np.minimum(self.spec.max_sm_clock_mhz, self._boards["lock_hi_mhz"][list(boards)])
                )
            return float(clocks.min())

    def reading(self, i: int, now_s: float) -> BoardReading:
        """The sensors of board `i`."""
        with self._locked(now_s):
            b = self._boards[i]
            window = max(1, round(self.spec.power_window_s / TICK_S))
            newest = int(self._clockwork["ticks"][0])
            ring = b["ring_w"][[(newest - k) % RING for k in range(min(window, RING))]]
            return BoardReading(
                power_avg_w=float(ring.mean()),
                power_instant_w=float(b["power_w"]),
                energy_j=float(b["published_j"]),
                enforced_limit_w=float(min(b["limit_w"], b["external_w"])),
                requested_limit_w=float(b["limit_w"]),
                sm_clock_mhz=int(b["clock_mhz"] // CLOCK_STEP_MHZ * CLOCK_STEP_MHZ),
                temperature_c=float(b["temperature_c"]),
                throttle=int(b["throttle"]),
            )

    def energy_integral_j(self, i: int, now_s: float) -> float:
        """The unpublished integral itself, J; for checks of the physics."""
        with self._locked(now_s):
            return float(self._boards["energy_j"][i])

    def faults(self, i: int) -> tuple[bool, bool, bool]:
        """Whether board `i` is lost, supports no setters, or denies them."""
        b = self._boards[i]
        return bool(b["lost"]), bool(b["not_supported"]), bool(b["denied"]) or not self.writable

    def set_limit(self, i: int, watts: float, now_s: float) -> None:
        """Change the limit that NVML set; the range was checked by the caller."""
        with self._locked(now_s):
            self._boards["limit_w"][i] = watts

    def set_clock_lock(self, i: int, low_mhz: float, high_mhz: float, now_s: float) -> None:
        """Lock the SM clock; values are rounded down to the 15 MHz grid and into the board's range."""
        with self._locked(now_s):
            low, high = (
                min(max(v // CLOCK_STEP_MHZ * CLOCK_STEP_MHZ, self.spec.min_sm_clock_mhz), self.spec.max_sm_clock_mhz)
                for v in (low_mhz, high_mhz)
            )
            self._boards["lock_lo_mhz"][i], self._boards["lock_hi_mhz"][i] = low, high

    def reset_clock_lock(self, i: int, now_s: float) -> None:
        """Release the lock."""
        with self._locked(now_s):
            self._boards["lock_lo_mhz"][i], self._boards["lock_hi_mhz"][i] = 0.0, self.spec.max_sm_clock_mhz

    def inject(self, i: int, fault: str, value: float, now_s: float) -> None:
        """Set a fault: "lost", "not_supported", "denied" (1 or 0), or "external_limit" (W; 0 removes it).

        Raises:
            ValueError: unknown fault.
        """
        with self._locked(now_s):
            if fault == "external_limit":
                self._boards["external_w"][i] = value or NO_LIMIT_W
            elif fault in ("lost", "not_supported", "denied"):
                self._boards[fault][i] = int(value)
            else:
                raise ValueError(f"unknown fault {fault!r}; known: lost, not_supported, denied, external_limit")

    @contextmanager
    def _locked(self, now_s: float) -> Iterator[None]:
        with self._thread_lock:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                self._integrate(now_s)
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _integrate(self, now_s: float) -> None:
        clockwork = self._clockwork[0]
        time_s = float(clockwork["time_s"])
        if time_s < 0:
            clockwork["time_s"] = clockwork["published_s"] = now_s
            return
        asleep_s = max(time_s, float(clockwork["busy_until_s"]) + AWAKE_S + 2 * RING * TICK_S)
        ticks = int((min(now_s, asleep_s) - time_s) / TICK_S + 1e-9)
        for first in range(0, ticks, 1000):
            self._run_ticks(time_s + first * TICK_S, min(1000, ticks - first))
        time_s += max(0, ticks) * TICK_S
        if now_s - time_s > 2 * TICK_S:  # nothing changes any more: one long step
            idle_s = int((now_s - time_s) / TICK_S) * TICK_S
            self._boards["energy_j"] += self._boards["power_w"] * idle_s
            time_s += idle_s
        clockwork["time_s"] = time_s
        if time_s - float(clockwork["published_s"]) >= PUBLISH_S:
            clockwork["published_s"] = time_s
            self._boards["published_j"] = self._boards["energy_j"]

    def _run_ticks(self, start_s: float, ticks: int) -> None:
        compute, memory = self._loads(start_s, ticks)
        b, spec, clockwork = self._boards, self.spec, self._clockwork[0]
        limit_w = np.minimum(b["limit_w"], b["external_w"])
        floor = np.clip(b["lock_lo_mhz"], spec.min_sm_clock_mhz, spec.max_sm_clock_mhz)
        ceiling = np.minimum(b["lock_hi_mhz"], spec.max_sm_clock_mhz)
        awake_until_s = float(clockwork["busy_until_s"]) + AWAKE_S
        newest = int(clockwork["ticks"])
        warm = 1.0 - np.exp(-TICK_S / THERMAL_TAU_S)
        for k in range(ticks):
            awake = start_s + k * TICK_S < awake_until_s
            static_w = (spec.awake_w if awake else spec.idle_w) * b["idle_factor"]
            core_w = core_power_w(spec, compute[k], memory[k], b["clock_mhz"]) * b["core_factor"]
            power_w = static_w + core_w + hbm_power_w(spec, memory[k])
            b["energy_j"] += power_w * TICK_S
            b["power_w"] = power_w
            b["temperature_c"] += (AMBIENT_C + THERMAL_K_PER_W * power_w - b["temperature_c"]) * warm
            top = ceiling if awake else np.full(self.count, float(spec.min_sm_clock_mhz))
            b["filtered_w"], b["clock_mhz"], limited = govern(
                filtered_w=b["filtered_w"], power_w=power_w, limit_w=limit_w, core_w=core_w, clock_mhz=b["clock_mhz"],
                floor_mhz=floor, ceiling_mhz=top,
            )  # fmt: skip
            b["throttle"] = np.where(limited & awake, THROTTLE_POWER_CAP, 0 if awake else THROTTLE_IDLE)
            newest += 1
            b["ring_w"][:, newest % RING] = power_w
        clockwork["ticks"] = newest

    def _loads(self, start_s: float, ticks: int) -> tuple[np.ndarray, np.ndarray]:
        """Compute and memory shares, shape (ticks, boards), from the booked segments."""
        s = self._segments
        s = s[(s["end_s"] > start_s) & (s["start_s"] < start_s + ticks * TICK_S)]
        edges = start_s + TICK_S * np.arange(ticks)[:, None]
        overlap = (
            np.clip(np.minimum(s["end_s"], edges + TICK_S) - np.maximum(s["start_s"], edges), 0.0, TICK_S) / TICK_S
        )
        member = (s["boards"][:, None] >> np.arange(self.count, dtype=np.uint64)) & 1
        compute = np.minimum(1.0, (overlap * s["compute"]) @ member)
        memory = np.minimum(1.0, (overlap * s["memory"]) @ member)
        return compute, memory
