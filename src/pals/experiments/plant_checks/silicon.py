"""Board power against SM clock: constants fitted to the published sweeps, and what they say of the same rows.

P = static + A·f·v(f)² + HBM. Each sweep has one A; the voltage curve is shared. What idle or awake boards read fixes the
static part, since a sweep alone cannot tell it from the voltage (docs/models/boards.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from pals.core.errors import ConfigError
from pals.experiments.plant_checks.measured import Table, data_folder, read_table
from pals.experiments.plant_checks.row import CheckRow, Residual, error_row
from pals.plant.silicon import Silicon, board_power_w, voltage
from pals.plant.specs import board_specs

FOLDER = "gpu-physics-constants"
RAILS = "h100_rails.csv"
OWNED = "pals plant fit silicon"  # in the source of a group of constants: found here
A100, A100_SXM = "A100-PCIe-80GB", "A100-SXM4-40/80GB"
H100, H200 = "H100-SXM5-80GB", "H200-SXM5-141GB"
B200, B300 = "B200-SXM-180GB", "B300-SXM6"
B200_MEMORY_MHZ = 1597  # where memory-bound kernels of B200 are parked
HBM_J_PER_BYTE = 25e-12  # memory rail of H200 in Triad above that in DGEMM, over the bytes moved
GEMM_MEMORY = 0.2  # memory share of a large matrix product
B300_KNEE_GHZ = 0.9  # stated as at most 0.93; the sweep begins there
FLAT = Silicon(**dict.fromkeys(Silicon._fields, 0.0))


def physics_constants(folder: Path, part: str = "gpus") -> dict[str, Any]:
    """What was derived from public measurements: by board, or of the governor.

    Raises:
        ConfigError: the file is missing or broken.
    """
    path = folder / FOLDER / "constants.json"
    try:
        return dict(json.loads(path.read_text())[part])
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(f"cannot read the measured constants {path}: {e!r}") from e


def h100_rails(folder: Path) -> Table:
    """SM clock, core rail and memory rail of an H100 under some limits; where `folder` has none, the checkout's."""
    path = folder / FOLDER / RAILS
    if not path.exists():
        path = data_folder() / FOLDER / RAILS
    return read_table(path, ("limit_w", "sm_mhz", "core_rail_w", "memory_rail_w"))


def bound_clocks(curve: Mapping[str, float], top_mhz: float) -> tuple[np.ndarray, np.ndarray]:
    """Limits W and clocks GHz of a curve stored by limit, without the limits that left the clock at its top."""
    rows = [(float(w), mhz / 1000.0) for w, mhz in curve.items() if mhz < top_mhz]
    return np.array([w for w, _ in rows]), np.array([ghz for _, ghz in rows])


def by_clock(curve: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Clocks in GHz and values of a curve stored by MHz."""
    return np.array([float(c) for c in curve]) / 1000.0, np.array(list(curve.values()), dtype=np.float64)


def relative_fit(
    power: Callable[[np.ndarray], np.ndarray], measured: np.ndarray, start: Sequence[float], low: Sequence[float],
    high: Sequence[float],
) -> np.ndarray:  # fmt: skip
    """Constants that minimise the squared relative error of `power`."""
    from scipy.optimize import least_squares

    found = least_squares(lambda x: power(x) / measured - 1.0, start, bounds=(low, high))
    return np.asarray(found.x)


def core_factor(ghz: np.ndarray, knee: float, k1: float, k2: float) -> np.ndarray:
    """f·v(f)², GHz."""
    k = FLAT._replace(knee_ghz=knee, voltage_per_ghz=k1, voltage_per_ghz2=k2)
    return np.asarray(ghz * voltage(k, ghz) ** 2)


def factor_at(mhz: float, curve: Mapping[str, float]) -> float:
    """f·v(f)² at one clock, GHz."""
    return float(
        core_factor(np.array(mhz / 1000.0), curve["knee_ghz"], curve["voltage_per_ghz"], curve["voltage_per_ghz2"])
    )


def fit(folder: Path) -> dict[str, Any]:
    """`plant/board_specs.json` with the groups that are this fit's, as their sources say; the rest as it is.

    What `fitted` derives beyond them are first guesses for other fits, which know more: serving power against batch.
    """
    specs = dict(json.loads((files("pals.plant") / "board_specs.json").read_text(encoding="utf-8")))
    for board, groups in fitted(folder).items():
        for name, constants in groups.items():
            group = specs[board]["silicon"][name]
            if OWNED in group["source"]:
                group |= {constant: float(f"{value:.4g}") for constant, value in constants.items()}
    return specs


def fitted(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """What the data say of each board's silicon, by board, group and constant."""
    constants = physics_constants(folder)
    h100, b300 = fit_h100(h100_rails(folder), constants[H100]), fit_b300(constants[B300])
    h200 = fit_h200(constants[H200], h100)
    b200 = fit_b200(constants[B200], b300, h200)
    return {
        **a100_boards(constants[A100], constants[A100_SXM], h200["activity"]),
        "h100-sxm5-80gb": h100 | {"activity": h100_activity(constants[H100], h100, h200["activity"])},
        "h200-sxm5-141gb": h200 | {"voltage": h100["voltage"]},
        "b200-sxm-180gb": b200 | {"voltage": b300["voltage"]},
        "b300-sxm-288gb": with_b200_activity(b300, b200),
    }


def a100_boards(
    pcie: Mapping[str, Any], sxm: Mapping[str, Any], h200: Mapping[str, float]
) -> dict[str, dict[str, dict[str, float]]]:
    """The PCIe board's sweeps for all three; STREAM's activity divided into busy and memory as on H200."""
    curve, stream, hbm_w = fit_a100(pcie)
    idle_w = float(np.mean(sxm["idle_w"]))
    tree = (float(np.mean(sxm["loaded_idle_w"])) - idle_w) / factor_at(sxm["sm_mhz"]["max"], curve)
    busy_part = h200["busy_w_per_ghz"] / (h200["busy_w_per_ghz"] + h200["memory_w_per_ghz"])
    joules_per_byte = hbm_w / (pcie["stream_gb_s"] * 1e9)
    return {
        name: {
            "voltage": dict(curve),
            "static": {"tree_w_per_ghz": tree},
            "activity": {
                "busy_w_per_ghz": (stream - tree) * busy_part,
                "memory_w_per_ghz": (stream - tree) * (1.0 - busy_part),
                "hbm_w": joules_per_byte * spec.hbm_bytes_s,
            },
        }
        for name, spec in board_specs().items()
        if name.startswith("a100-")
    }


def h100_activity(c: Mapping[str, Any], h100: Mapping[str, Any], h200: Mapping[str, float]) -> dict[str, float]:
    """Busy and memory terms of the same die in H200; tensor from the clock that matrix products keep at the limit."""
    curve, static = h100["voltage"], h100["static"]
    terms = {name: h200[name] for name in ("busy_w_per_ghz", "memory_w_per_ghz")}
    hbm_w = HBM_J_PER_BYTE * board_specs()["h100-sxm5-80gb"].hbm_bytes_s
    core_w = c["limit_w"]["max"] - static["static_w"] - GEMM_MEMORY * hbm_w
    others = static["tree_w_per_ghz"] + terms["busy_w_per_ghz"]
    at = factor_at(float(np.mean(c["gemm_bf16_sustained_mhz"])), curve)
    return {**terms, "tensor_w_per_ghz": core_w / at - others, "hbm_w": hbm_w}


def fit_a100(c: Mapping[str, Any]) -> tuple[dict[str, float], float, float]:
    """Voltage curve, activity of STREAM W/GHz, and its HBM W; idle fixes the static part."""
    ghz, compute_w = by_clock(c["compute_uncapped_w"])
    stream_ghz, stream_w = by_clock(c["stream_uncapped_w"])
    static_w = float(np.mean(c["idle_w"]))

    def power(x: np.ndarray) -> np.ndarray:
        knee, k1, k2, compute, stream, hbm_w = x
        return np.concatenate([
            static_w + compute * core_factor(ghz, knee, k1, k2),
            static_w + hbm_w + stream * core_factor(stream_ghz, knee, k1, k2),
        ])  # fmt: skip

    measured = np.concatenate([compute_w, stream_w])
    x = relative_fit(power, measured, [1.0, 0.4, 1.6, 85, 45, 50], [0.9, 0, 0, 20, 10, 0], [1.2, 3, 8, 200, 100, 100])
    curve = {"knee_ghz": float(x[0]), "voltage_per_ghz": float(x[1]), "voltage_per_ghz2": float(x[2])}
    return curve, float(x[4]), float(x[5])


def fit_h100(rails: Table, c: Mapping[str, Any]) -> dict[str, Any]:
    """Core and memory rail of one job at six clocks; an awake board without work fixes the clock tree."""
    ghz = rails["sm_mhz"] / 1000.0
    x = relative_fit(
        lambda x: x[0] + x[1] * core_factor(ghz, x[2], 0.0, x[3]), rails["core_rail_w"],
        [35, 150, 1.2, 0.3], [0, 50, 0.9, 0], [80, 250, 1.7, 5],
    )  # fmt: skip
    static_w = float(x[0] + np.polyfit(ghz, rails["memory_rail_w"], 1)[1])
    curve = {"knee_ghz": float(x[2]), "voltage_per_ghz": 0.0, "voltage_per_ghz2": float(x[3])}
    tree = (np.mean(c["loaded_idle_w"]) - static_w) / factor_at(c["sm_mhz"]["max"], curve)
    return {
        "voltage": curve,
        "static": {"static_w": static_w, "tree_w_per_ghz": float(tree)},
    }


def fit_h200(c: Mapping[str, Any], h100: Mapping[str, Any]) -> dict[str, Any]:
    """The die of the H100: its voltage and clock tree; activities from the regression on hardware counters."""
    curve, tree = h100["voltage"], h100["static"]["tree_w_per_ghz"]
    top = factor_at(c["sm_mhz"]["max"], curve)
    counters, achieved = c["activity_model_w"], min(c["hbm_bw_achieved_tb_s"])
    awake_w = (counters["base"] + c["active_base_w"]["value"]) / 2.0
    static_w, busy = awake_w - tree * top, counters["sm_active"] / top
    hbm_w = HBM_J_PER_BYTE * achieved * 1e12
    dram_w = counters["dram_active"] * achieved / c["hbm_bw_tb_s"]
    gemm = c["gemm_bf16"]
    core_w = gemm["power_w"] - static_w - GEMM_MEMORY * hbm_w
    return {
        "static": {"static_w": static_w, "tree_w_per_ghz": tree},
        "activity": {
            "busy_w_per_ghz": busy,
            "memory_w_per_ghz": (dram_w - hbm_w) / top,
            "tensor_w_per_ghz": core_w / factor_at(gemm["sm_mhz"], curve) - tree - busy,
            "hbm_w": hbm_w,
        },
    }


def fit_b200(c: Mapping[str, Any], b300: Mapping[str, Any], h200: Mapping[str, Any]) -> dict[str, Any]:
    """The voltage curve of B300 and the busy term of H200; levels from idle, awake, memory-bound kernels and GEMM."""
    curve, busy = b300["voltage"], h200["activity"]["busy_w_per_ghz"]
    top = factor_at(c["sm_mhz"]["max"], curve)
    static_w = float(np.mean(c["idle_w"]))
    tree = (c["active_base_w"]["value"] - static_w) / top
    hbm_w = HBM_J_PER_BYTE * float(np.mean(c["hbm_bw_achieved_tb_s"])) * 1e12
    gemm = c["gemm_bf16"]
    core_w = gemm["power_w"] - static_w - GEMM_MEMORY * hbm_w
    memory = (max(c["memory_bound_w"]) - static_w - hbm_w) / factor_at(B200_MEMORY_MHZ, curve) - tree - busy
    return {
        "static": {"static_w": static_w, "tree_w_per_ghz": tree},
        "activity": {
            "busy_w_per_ghz": busy,
            "memory_w_per_ghz": max(0.0, memory),
            "tensor_w_per_ghz": core_w / factor_at(float(np.mean(gemm["sm_mhz"])), curve) - tree - busy,
            "hbm_w": hbm_w,
        },
    }


def fit_b300(c: Mapping[str, Any]) -> dict[str, Any]:
    """Matrix products under the limits that bind; idle fixes the static part."""
    spec = board_specs()["b300-sxm-288gb"]
    watts, ghz = bound_clocks(c["cap_to_sm_mhz_gemm_bf16"], spec.max_sm_clock_mhz)
    static_w, hbm_w = float(np.mean(c["idle_w"])), HBM_J_PER_BYTE * spec.hbm_bytes_s
    rest_w = static_w + GEMM_MEMORY * hbm_w
    x = relative_fit(
        lambda x: rest_w + x[0] * core_factor(ghz, B300_KNEE_GHZ, x[1], 0.0), watts, [290, 0.2], [100, 0], [500, 1]
    )
    return {
        "voltage": {"knee_ghz": B300_KNEE_GHZ, "voltage_per_ghz": float(x[1]), "voltage_per_ghz2": 0.0},
        "static": {"static_w": static_w},
        "activity": {"hbm_w": hbm_w, "tensor_w_per_ghz": float(x[0])},  # with all else that a product sets going
    }


def with_b200_activity(b300: dict[str, Any], b200: Mapping[str, Any]) -> dict[str, Any]:
    """What B300's products draw beyond B200's clock tree, busy and memory terms is its tensor term."""
    terms = {name: b200["activity"][name] for name in ("busy_w_per_ghz", "memory_w_per_ghz")}
    tree = b200["static"]["tree_w_per_ghz"]
    others = tree + terms["busy_w_per_ghz"] + GEMM_MEMORY * terms["memory_w_per_ghz"]
    tensor = b300["activity"]["tensor_w_per_ghz"] - others
    static = {**b300["static"], "tree_w_per_ghz": tree}
    return {**b300, "static": static, "activity": {**terms, **b300["activity"], "tensor_w_per_ghz": tensor}}


def check(folder: Path) -> list[CheckRow]:
    """Board power against clock: the plant's own constants on the rows of the sweeps, one number per job given."""
    constants, rails = physics_constants(folder), h100_rails(folder)
    a100, top_mhz = constants[A100], board_specs()["b300-sxm-288gb"].max_sm_clock_mhz
    b300_w, b300_ghz = bound_clocks(constants[B300]["cap_to_sm_mhz_gemm_bf16"], top_mhz)
    jobs = [
        _job("A100 PCIe compute", "a100-pcie-80gb", *by_clock(a100["compute_uncapped_w"]), memory=0.0),
        _job("A100 PCIe STREAM", "a100-pcie-80gb", *by_clock(a100["stream_uncapped_w"]), memory=1.0),
        _job("B300 BF16 GEMM", "b300-sxm-288gb", b300_ghz, b300_w),
        _h100_job(rails),
    ]  # fmt: skip
    return [
        error_row(
            "board power against SM clock", f"{FOLDER}; voltage curves fitted on these rows", [r for job in jobs for r in job],
            at_most=4.0, x_axis="SM clock, MHz", in_sample=True, note="each job's compute share is its own best, as no source states it",
        )
    ]  # fmt: skip


def _h100_job(rails: Table) -> list[Residual]:
    k = board_specs()["h100-sxm5-80gb"].silicon
    ghz = rails["sm_mhz"] / 1000.0
    memory = np.polyfit(ghz, rails["memory_rail_w"], 1)[0] * ghz / k.hbm_w
    return _job("H100 ViT, both rails", "h100-sxm5-80gb", ghz, rails["core_rail_w"] + rails["memory_rail_w"], memory)


def _job(
    name: str, board: str, ghz: np.ndarray, watts: np.ndarray, memory: float | np.ndarray = GEMM_MEMORY
) -> list[Residual]:
    """Residuals of a kernel that runs all the time, with the compute share that fits it best."""
    k = board_specs()[board].silicon
    mhz = ghz * 1000.0
    rest_w = board_power_w(k, 0.0, memory, 1.0, mhz, k.leak_reference_c)
    per_share_w = board_power_w(k, 1.0, memory, 1.0, mhz, k.leak_reference_c) - rest_w
    weight = 1.0 / watts**2
    share = float(np.sum(weight * per_share_w * (watts - rest_w)) / np.sum(weight * per_share_w**2))
    said_w = rest_w + share * per_share_w
    return [
        Residual(group=name, x=float(x), measured=float(w), predicted=float(p))
        for x, w, p in zip(mhz, watts, said_w, strict=True)
    ]
