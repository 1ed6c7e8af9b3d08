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
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pals.core.errors import ConfigError
from pals.plant.bank_layout import (
    FAULTS,
    HEAD,
    REGISTERS,
    SEGMENTS,
    bank_size,
    board_uuid,
    make_head,
    map_sections,
    read_head,
)
from pals.plant.bank_physics import IDLE, BankPhysics
from pals.plant.governor import Firmware
from pals.plant.setter_time import setter_time_s
from pals.plant.silicon import Load, Silicon
from pals.plant.specs import CLOCK_STEP_MHZ, BoardSpec, board_specs

NO_LIMIT_W = 1e9
WIDEST = 3.0  # standard deviations by which a specimen may differ
VALUE_FAULTS = {
    "slow_setter": "setter_extra_s",
    "ambient": "ambient_c",
}  # faults with a value of their own, and its register


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
        kind = board_specs()[head["spec"].decode()]
        self.spec: BoardSpec = replace(
            kind, silicon=Silicon(*head["silicon"].tolist()), firmware=Firmware(*head["firmware"].tolist())
        )
        self.count = int(head["count"])
        self.writable = bool(head["writable"])
        self.memory_bytes = int(head["memory_bytes"])
        self.setter_latency_s = float(head["setter_latency_s"])
        self._sections = map_sections(self._mapped, self.count)
        self._boards, self._segments = self._sections.boards, self._sections.segments
        self._clockwork = self._sections.clockwork
        self._physics = BankPhysics(self.spec, self._sections)

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
        apart: str = "",
    ) -> BoardBank:
        """Make the file, boards idle at their default limits; each board varies a little, by `seed`.

        `apart` makes their UUIDs others than those of the same boards in another bank. `writable` False makes every setter answer "no permission". `now_s` is when time starts (None: at the first call).
        """
        fresh = path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        with fresh.open("xb") as f:  # never into what somebody else put there, nor through a link
            f.write(make_head(spec, count, seed=seed, writable=writable, setter_latency_s=setter_latency_s).tobytes())
            f.truncate(bank_size(count))
        fresh.replace(path)
        bank = BoardBank(path)
        draw_specimens(bank._boards, spec, seed, apart)
        bank._clockwork["time_s"] = -1.0 if now_s is None else now_s
        return bank

    @staticmethod
    def open(path: Path) -> BoardBank:
        """Open what another process created."""
        return BoardBank(path)

    def close(self) -> None:
        """Unmap; the file stays."""
        del self._boards, self._segments, self._clockwork, self._sections, self._physics
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
            self._physics.integrate(now_s)

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
            asleep = now_s > self._boards["busy_until_s"][used] + self.spec.firmware.awake_s
            clocks = self._boards["clock_mhz"][used]
            # the first step after sleep runs at what the boards rise to at once
            clocks = np.where(asleep, np.maximum(clocks, self._physics.in_force()[2][used]), clocks)
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
        """Change the limit that NVML set, to the milliwatt; the range was checked by the caller."""
        self._write(i, now_s, limit_w=round(watts * 1000.0) / 1000.0)

    def set_clock_lock(self, i: int, low_mhz: float, high_mhz: float, now_s: float) -> None:
        """Lock the SM clock; it runs at the nearest clocks at or below, within the board's range."""
        self._write(i, now_s, lock_lo_mhz=low_mhz, lock_hi_mhz=high_mhz)

    def reset_clock_lock(self, i: int, now_s: float) -> None:
        """Release the lock."""
        self._write(i, now_s, lock_lo_mhz=0.0, lock_hi_mhz=float(self.spec.max_sm_clock_mhz))

    def setter_time_s(self, i: int) -> float:
        """How long the next setter call on board `i` takes; a tail above the bank's latency, drawn from its seed."""
        head = self._sections.head[0]
        return setter_time_s(
            float(head["setter_latency_s"]), float(head["setter_tail_sigma"]), float(head["setter_longest_s"]),
            float(self._boards["setter_extra_s"][i]), int(head["seed"]), i, int(self._boards["writes"][i]),
        )  # fmt: skip

    def inject(self, i: int, fault: str, value: float, now_s: float) -> None:
        """Set a fault of board `i`; 0 removes it.

        "lost", "not_supported", "denied", "limit_denied", "no_clock_lock", "stuck" (a sensor shows the power and the energy
        it showed last; the board itself goes on) and "thermal" (hardware slowdown) are 1 or 0; "external_limit" W; "ambient"
        °C of the air at the board; "slow_setter" s that each call takes longer; "dip" s that current protection holds the
        clock down from now on.

        Raises:
            ValueError: unknown fault, or a value it cannot have; nothing was changed.
        """
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"fault {fault!r}: {value} is not a number of at least 0")
        with self._locked(now_s) as now_s:
            if fault in FAULTS:
                self._boards[fault][i] = int(value)
            elif fault == "external_limit":
                self._boards["external_w"][i] = value or NO_LIMIT_W
            elif fault == "dip":
                self._boards["dip_until_s"][i] = now_s + value
            elif fault in VALUE_FAULTS:
                self._boards[VALUE_FAULTS[fault]][i] = value
            else:
                raise ValueError(f"unknown fault {fault!r}; known: {', '.join(known_faults())}")

    def _write(self, i: int, now_s: float, **registers: float) -> None:
        with self._locked(now_s):
            for name, value in registers.items():
                self._boards[name][i] = value
            self._boards["writes"][i] += 1

    @contextmanager
    def _locked(self, now_s: float) -> Iterator[float]:
        """Hold the file, everything up to date; yields the boards' time, s."""
        with self._held():
            virtual_s = self.virtual_time_s()
            now_s = now_s if virtual_s is None else virtual_s
            self._physics.integrate(now_s)
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


def known_faults() -> tuple[str, ...]:
    """Names that `BoardBank.inject` takes."""
    return (*FAULTS, "external_limit", "dip", *VALUE_FAULTS)


def draw_specimens(b: np.ndarray, spec: BoardSpec, seed: int, apart: str = "") -> None:
    """Idle boards at their default limits; each differs a little from its type."""
    rng, count, v, firmware = np.random.default_rng(seed), len(b), spec.variation, spec.firmware
    b["uuid"] = [board_uuid(spec.name, i, apart) for i in range(count)]
    for name, sd in (("core_factor", v.core_sd), ("idle_factor", v.idle_sd), ("counter_factor", v.counter_sd)):
        b[name] = 1.0 + sd * np.clip(rng.standard_normal(count), -WIDEST, WIDEST)
    b["top_mhz"] = spec.max_sm_clock_mhz - CLOCK_STEP_MHZ * rng.integers(
        0, int(v.top_clock_steps), count, endpoint=True
    )
    b["external_w"], b["acts_at_s"], b["next_dip_s"] = NO_LIMIT_W, math.inf, math.nan
    for name, value in zip(REGISTERS, (spec.default_limit_w, 0.0, spec.max_sm_clock_mhz), strict=True):
        b[name] = b[f"seen_{name}"] = b[f"acting_{name}"] = value
    b["clock_mhz"] = spec.min_sm_clock_mhz
    b["power_w"] = b["filtered_w"] = spec.silicon.idle_w * b["idle_factor"]
    b["ring_w"] = b["power_w"][:, None]
    b["temperature_c"] = firmware.ambient_c + firmware.thermal_k_per_w * b["power_w"]
    b["throttle"] = IDLE
