"""What a board draws at a clock and a load: P = static + core·f·v(f)² + HBM energy; pure functions of arrays.

Equation and constants: docs/plant.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pals.plant.specs import BoardSpec

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What keeps a board busy, as shares of the time, 0..1."""

    compute: float  # tensor cores saturated
    memory: float  # HBM saturated

    def __post_init__(self) -> None:
        if not (0.0 <= self.compute <= 1.0 and 0.0 <= self.memory <= 1.0):
            raise ValueError(f"a load's shares lie in 0..1: compute {self.compute}, memory {self.memory}")


def voltage(spec: BoardSpec, sm_clock_mhz: FloatArray | float) -> FloatArray:
    """Core voltage relative to its floor at this clock."""
    return np.asarray(np.interp(sm_clock_mhz, spec.voltage_mhz, spec.voltage))


def core_power_w(spec: BoardSpec, compute: FloatArray, memory: FloatArray, sm_clock_mhz: FloatArray) -> FloatArray:
    """Dynamic power of the SM clock domain, W."""
    per_ghz = spec.core_compute_w_per_ghz * compute + spec.core_memory_w_per_ghz * memory
    return np.asarray(per_ghz * (sm_clock_mhz / 1000.0) * voltage(spec, sm_clock_mhz) ** 2)


def hbm_power_w(spec: BoardSpec, memory: FloatArray | float) -> FloatArray:
    """Power of the HBM traffic, W."""
    return np.asarray(spec.hbm_pj_per_byte * 1e-12 * spec.hbm_bytes_s * np.asarray(memory))


def board_power_w(spec: BoardSpec, load: Load, sm_clock_mhz: float, *, awake: bool = True) -> float:
    """Power of a nominal board, W."""
    core = core_power_w(spec, np.array(load.compute), np.array(load.memory), np.array(sm_clock_mhz))
    return float((spec.awake_w if awake else spec.idle_w) + core + hbm_power_w(spec, load.memory))
