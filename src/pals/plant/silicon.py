"""What a board draws at a clock and a load: P = static + core activity·f·v(f)² + HBM traffic.

Plain arithmetic on floats or arrays alike, so that the emulated boards and the compiled simulator run the same lines.
Equation, constants and residuals: docs/models/boards.md, "Board power".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What keeps a board busy, as shares of the time, 0..1."""

    compute: float  # tensor cores saturated
    memory: float  # HBM saturated
    busy: float = 1.0  # any kernel runs

    def __post_init__(self) -> None:
        if not all(0.0 <= share <= 1.0 for share in (self.compute, self.memory, self.busy)):
            raise ValueError(
                f"a load's shares lie in 0..1: compute {self.compute}, memory {self.memory}, busy {self.busy}"
            )


class Silicon(NamedTuple):
    """Power constants of a board type; W, GHz, °C. Core terms are per GHz at the voltage floor."""

    idle_w: float  # no context, clocks low
    static_w: float  # awake, what does not follow the SM clock
    tree_w_per_ghz: float  # awake, nothing issued: the clock tree
    busy_w_per_ghz: float  # any kernel runs
    memory_w_per_ghz: float  # HBM saturated: issue, L1, L2
    tensor_w_per_ghz: float  # tensor cores saturated
    hbm_w: float  # HBM at its achievable bandwidth
    knee_ghz: float  # below it the voltage is at its floor
    voltage_per_ghz: float
    voltage_per_ghz2: float
    leak_per_k: float  # change of the static part per kelvin
    leak_reference_c: float  # temperature at which the static part was measured


def voltage(k: Silicon, clock_ghz: Any) -> Any:
    """Core voltage relative to its floor."""
    above = np.maximum(0.0, clock_ghz - k.knee_ghz)
    return 1.0 + k.voltage_per_ghz * above + k.voltage_per_ghz2 * above * above


def core_power_w(k: Silicon, compute: Any, memory: Any, busy: Any, clock_mhz: Any) -> Any:
    """Power of the SM clock domain of an awake board, W."""
    ghz = clock_mhz / 1000.0
    v = voltage(k, ghz)
    activity = k.tree_w_per_ghz + k.busy_w_per_ghz * busy + k.memory_w_per_ghz * memory + k.tensor_w_per_ghz * compute
    return activity * ghz * v * v


def static_power_w(k: Silicon, temperature_c: Any) -> Any:
    """What an awake board draws whatever its clock, W."""
    return k.static_w * (1.0 + k.leak_per_k * (temperature_c - k.leak_reference_c))


def board_power_w(k: Silicon, compute: Any, memory: Any, busy: Any, clock_mhz: Any, temperature_c: Any) -> Any:
    """Power of an awake nominal board, W."""
    return static_power_w(k, temperature_c) + core_power_w(k, compute, memory, busy, clock_mhz) + k.hbm_w * memory


def load_power_w(k: Silicon, load: Load, clock_mhz: float) -> float:
    """Power of an awake nominal board under `load` at the reference temperature, W."""
    return float(board_power_w(k, load.compute, load.memory, load.busy, clock_mhz, k.leak_reference_c))
