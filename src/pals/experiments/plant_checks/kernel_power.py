"""Board power of memory-bound matrix products at default clocks, H200 and B200: no row of these tables was fitted.

The meter is a one-second mean over loops of 0.3 to 1 s, so readings are dragged down by what ran before: each bin of
shares is represented by its upper decile, and only bins near the HBM wall, where kernels are long enough, are compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pals.core.errors import ConfigError
from pals.experiments.plant_checks.measured import read_table
from pals.experiments.plant_checks.row import CheckRow, Residual, error_row
from pals.experiments.plant_checks.silicon import B200, H200, physics_constants
from pals.plant.silicon import board_power_w
from pals.plant.specs import board_specs

FOLDER = "aiconfigurator-silicon"
BOARDS = {"h200": ("h200-sxm5-141gb", H200), "b200": ("b200-sxm-180gb", B200)}
COLUMNS = ("gemm_dtype", "m", "n", "k", "latency", "power")
BINS = 10  # of each share
LEAST_ROWS = 50
LEAST_MEMORY = 0.7
UPPER = 0.9
CAPPED = 0.97  # above this share of the limit the governor decides, not the load
BF16_BYTES = 2.0


def check(folder: Path) -> list[CheckRow]:
    """One row over both boards, or none where no bin of `folder` holds rows enough to have a decile."""
    constants = physics_constants(folder)
    residuals = [r for gpu, (board, key) in BOARDS.items() for r in bins(folder, gpu, board, constants[key])]
    if not residuals:
        return []
    return [
        error_row(
            "power of memory-bound BF16 products at default clocks", f"{FOLDER}; none of these rows was fitted", residuals,
            at_most=10.0, x_axis="HBM share",
            note="upper decile of bins with an HBM share from 0.7 that the limit does not hold; FP8 products, left out, "
            "draw more than their shares say (docs/models/boards.md)",
        )
    ]  # fmt: skip


def bins(folder: Path, gpu: str, board: str, constants: Any) -> list[Residual]:
    """Bins of one board's BF16 products, by tensor and HBM share."""
    spec = board_specs()[board]
    compute, memory, power_w = shares(folder, gpu, spec.hbm_bytes_s, top_flops_s(constants, spec.max_sm_clock_mhz))
    said_w = board_power_w(
        spec.silicon, compute, memory, 1.0, float(spec.max_sm_clock_mhz), spec.silicon.leak_reference_c
    )
    found = []
    cell = np.floor(compute * BINS) * (BINS + 1) + np.floor(memory * BINS)
    for each in np.unique(cell[memory >= LEAST_MEMORY]):
        inside = cell == each
        seen_w = float(np.quantile(power_w[inside], UPPER))
        if inside.sum() >= LEAST_ROWS and seen_w < CAPPED * spec.default_limit_w:
            predicted = min(spec.default_limit_w, float(np.median(said_w[inside])))
            found.append(
                Residual(group=spec.nvml_name, x=float(memory[inside].mean()), measured=seen_w, predicted=predicted)
            )
    return found


def shares(folder: Path, gpu: str, bytes_s: float, flops_s: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tensor share, HBM share and power W of each BF16 product."""
    paths = sorted((folder / FOLDER).glob(f"{gpu}_sxm__gemm__*__gemm_perf.parquet"))
    if not paths:
        raise ConfigError(f"{folder / FOLDER} holds no table of {gpu}'s matrix products")
    table = read_table(paths[-1], COLUMNS)
    used = (table["gemm_dtype"] == "bfloat16") & (table["power"] > 0.0)
    m, n, k, ms, power_w = (table[name][used].astype(np.float64) for name in COLUMNS[1:])
    moved = BF16_BYTES * (m * k + n * k + m * n) / (ms / 1000.0)
    done = 2.0 * m * n * k / (ms / 1000.0)
    return np.minimum(1.0, done / flops_s), np.minimum(1.0, moved / bytes_s), power_w


def top_flops_s(constants: Any, top_mhz: float) -> float:
    """What saturated BF16 products would reach at the top clock: their rate where the limit held them, scaled by clock."""
    gemm = constants["gemm_bf16"]
    return float(np.mean(gemm["tflops"])) * 1e12 * top_mhz / float(np.mean(gemm["sm_mhz"]))
