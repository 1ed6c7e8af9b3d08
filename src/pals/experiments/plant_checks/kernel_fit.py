"""Fit of the kernel constants to the measured shapes that are not held out, by log residuals with a soft-L1 loss.

Data-sheet numbers and storage formats come from kernel_constants.json and are not fitted; every fitted constant has a
physical range it may not leave.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from pals.experiments.plant_checks.kernel_cases import Cases, subsample
from pals.experiments.plant_checks.kernel_models import FAMILY, KINDS, MODELS, entry
from pals.experiments.plant_checks.kernel_profiles import read_everything
from pals.plant import kernels

FloatArray = NDArray[np.float64]
Ranges = dict[str, tuple[float, float, float]]  # start, least, most

FIT_CASES = 1500
LEAST_CASES = 30  # seen cases below which nothing is fitted


def fit(folder: Path) -> dict[str, Any]:
    """What kernel_constants.json holds after a fit to the shapes that are not held out.

    Raises:
        ConfigError: the data are missing or broken.
    """
    out = kernels.constants_file()
    formats = out["_formats"]
    groups: dict[tuple[str, str, str], list[Cases]] = {}
    for cases in read_everything(folder):
        if _fitted(cases, formats):
            groups.setdefault((cases.board, FAMILY[cases.op], entry(cases)), []).append(cases)
    for (name, family, kind), group in groups.items():
        given = {**out[name]["given"], **formats.get(group[0].dtype, {})}
        out[name].setdefault(family, {})[kind] = fit_cases(group, given)
    for name, board in out.items():
        if not name.startswith("_"):
            _carry_over(board, formats)
    return out


def _fitted(cases: Cases, formats: dict[str, Any]) -> bool:
    if np.count_nonzero(~cases.held_out) < LEAST_CASES:
        return False
    return (
        cases.dtype == "vllm_graph" if cases.op == "custom_allreduce" else cases.op == "nccl" or cases.dtype in formats
    )


def _carry_over(board: dict[str, Any], formats: dict[str, dict[str, float]]) -> None:
    """Weight-only formats nobody measured on a board: the 16-bit kernel with fewer weight bytes."""
    for family in ("gemm", "moe"):
        base = board.get(family, {}).get("bfloat16")
        for dtype, sizes in formats.items():
            known = board.get(family, {}).get(dtype, {})
            if base and sizes["activation_bytes"] == 2 and known.get("confidence", "C") == "C" and dtype != "bfloat16":
                board[family][dtype] = {**base, "weight_bytes": sizes["weight_bytes"], "confidence": "C"}
                board[family][dtype]["fitted_on"] = "nothing: bfloat16 with fewer weight bytes"


def fit_cases(group: list[Cases], given: dict[str, float]) -> dict[str, Any]:
    """Constants of one kernel family, board and data type by log residuals with a soft-L1 loss; operations weigh alike."""
    op = _OP_OF.get(group[0].op, group[0].op)
    seen = [cases.of(~cases.held_out) for cases in group]
    fixed, ranges = _start(op, given, seen[0])
    if op == "custom_allreduce":
        seen = [s.of(s.number("message_size") * 2.0 < fixed["most_bytes"]) for s in seen]
    if fixed.get("host_s"):
        seen = [s.of(s.seconds > 1.2 * max(fixed["host_s"], fixed["host_large_s"])) for s in seen]
    values = _least_squares(KINDS[FAMILY[op]], [subsample(s, FIT_CASES) for s in seen], fixed, ranges)
    tables = ", ".join(cases.table for cases in group)
    rows = [sum(int(np.sum(~c.held_out)) for c in group), sum(len(c.seconds) for c in group)]
    note = f"{tables}: {rows[0]} of {rows[1]} rows"
    return {k: float(f"{v:.5g}") for k, v in values.items()} | {"confidence": "A", "fitted_on": note}


def _least_squares(kind: Any, seen: list[Cases], fixed: dict[str, float], ranges: Ranges) -> dict[str, float]:
    names = list(ranges)
    start, least, most = np.log(np.array(list(ranges.values())).T)

    def values(x: FloatArray) -> dict[str, float]:
        found = {n: float(v) for n, v in zip(names, np.exp(x), strict=True)}
        if "efficiency" in found:
            found["tile_flops_s"] = fixed["tile_flops_s"] * found.pop("efficiency")
        return {f: {**fixed, **found}[f] for f in kind._fields}

    def residual(x: FloatArray) -> FloatArray:
        c = kind(**values(x))
        parts = [
            (np.log(MODELS[s.op](c, s)) - np.log(s.seconds)) / np.sqrt(len(s.seconds) / len(seen[0].seconds))
            for s in seen
        ]
        return np.concatenate(parts)

    best = least_squares(
        residual, start, bounds=(least - 1e-9, most + 1e-9), loss="soft_l1", f_scale=0.1, diff_step=1e-3, max_nfev=80
    )
    return values(best.x)


def _start(op: str, given: dict[str, float], seen: Cases) -> tuple[dict[str, float], Ranges]:
    """What is given and not fitted, and start and physical range of what is."""
    if op in ("nccl", "custom_allreduce"):
        return {"most_bytes": 8.0 * 2**20, "direct": float(op == "custom_allreduce")}, dict(_COLLECTIVE_RANGES)
    hbm = given["hbm_bytes_s"]
    fixed = {
        "sms": given["sms"],
        "tile_flops_s": given["sm_flops_s"] * given["tensor_speed"],
        "droop": given["droop"],
    }
    ranges = {**_RANGES[op], "hbm_bytes_s": (0.85 * hbm, 0.15 * hbm, 0.97 * hbm)}
    if op in ("moe", "generation_attention", "elementwise"):
        ranges |= {"l2_bytes": (0.6 * given["l2_bytes"], 1e5, given["l2_bytes"])}
    if op == "elementwise":
        return {}, ranges
    if op.endswith("attention"):
        fixed |= {k: given[k] for k in ("packed", "query_tile", "splits", "splits_single")}
        fixed |= {"kv_bytes": given["weight_bytes"], "tile_flops_s": given["sm_flops_s"]}
        if op == "generation_attention":
            ranges |= {"l2_bytes_s": (2.0 * hbm, 0.3 * hbm, 8.0 * hbm)}
        return fixed, ranges
    fixed |= {"weight_bytes": given["weight_bytes"], "activation_bytes": given["activation_bytes"]}
    if op == "moe":
        ranges |= {"l2_bytes_s": (2.0 * hbm, 1.0 * hbm, 6.0 * hbm)}
    if op == "moe" and "tuned_experts" not in given:
        fixed |= {"untuned": ranges.pop("untuned")[1]}
    if op == "gemm":
        fixed |= {"quantise_row_s": 0.0, "quantise_bytes_s": 0.0, **_host_floor(seen, given)}
        if given["activation_bytes"] < 2:
            ranges |= {"quantise_row_s": (1e-9, 1e-12, 1e-7), "quantise_bytes_s": (0.8 * hbm, 0.1 * hbm, 2.0 * hbm)}
    return fixed, ranges


def _host_floor(seen: Cases, given: dict[str, float]) -> dict[str, float]:
    """Median time of products that take a GPU under 10 µs, where it is far above that: the loop was no CUDA graph."""
    n, few = seen.number, seen.number("m") < 64
    gpu_s = 2.0 * n("m") * n("n") * n("k") / (given["sms"] * given["sm_flops_s"])
    gpu_s += n("n") * n("k") * given["weight_bytes"] / given["hbm_bytes_s"]
    floors = {}
    for name, rows in (("host_s", few), ("host_large_s", ~few)):
        small = seen.seconds[rows & (gpu_s < 5e-6)]
        floors[name] = float(np.median(small)) if len(small) and np.median(small) > 3e-5 else 0.0
    return floors


_RANGES: dict[str, Ranges] = {
    "gemm": {
        "efficiency": (0.8, 0.2, 0.98), "feed_bytes_s": (1e11, 1e10, 1e12), "wave_s": (5e-7, 1e-9, 1e-5),
        "split_s": (1e-6, 1e-8, 1e-4), "fixed_s": (2e-6, 5e-7, 2e-5), "overlap_p": (3.0, 1.2, 8.0),
        "binding_share": (0.6, 0.2, 2.0),
    },
    "moe": {
        "efficiency": (0.7, 0.1, 0.98), "feed_bytes_s": (1e11, 1e10, 1e12), "wave_s": (1e-6, 1e-8, 1e-4),
        "fixed_s": (1.5e-5, 2e-6, 2e-4), "sort_s": (5e-6, 1e-7, 1e-4), "masked_s": (5e-6, 1e-7, 1e-4), "pass_bytes_s": (1e12, 1e11, 2e13),
        "overlap_p": (2.0, 1.2, 8.0), "unaligned": (2.0, 1.0, 10.0), "untuned": (1.5, 1.0, 4.0), "binding_share": (0.6, 0.2, 2.0),
    },
    "generation_attention": {
        "efficiency": (0.3, 0.02, 0.98), "item_s": (2e-6, 1e-8, 1e-4), "token_s": (5e-9, 1e-10, 1e-6),
        "combine_s": (2e-6, 1e-9, 1e-4), "fixed_s": (5e-6, 1e-6, 1e-4), "overlap_p": (2.0, 1.2, 8.0),
        },
    "elementwise": {"fixed_s": (2e-6, 5e-7, 1e-5), "l2_bytes_s": (4e12, 1e12, 2e13)},
    "context_attention": {
        "efficiency": (0.7, 0.1, 0.98), "item_s": (3e-6, 1e-8, 1e-4), "diagonal": (64.0, 1.0, 500.0),
        "softmax_s": (1e-11, 1e-13, 2e-10), "tail": (0.2, 0.001, 1.0), "resident": (1.5, 0.5, 8.0),
        "fixed_s": (5e-6, 1e-6, 1e-4), "overlap_p": (2.0, 1.0, 8.0), "binding_share": (0.6, 0.2, 2.0),
    },
}  # fmt: skip
_OP_OF = {"moe_layer": "moe", "mixed_attention": "context_attention"}
_COLLECTIVE_RANGES: Ranges = {
    "low_s": (5e-6, 1e-7, 3e-5), "low_rank_s": (5e-7, 1e-9, 1e-5), "low_bytes_s": (5e10, 5e9, 2e12),
    "high_s": (2e-5, 5e-6, 2e-4), "high_rank_s": (1e-7, 1e-9, 1e-5), "high_bytes_s": (2e11, 1e10, 2e12),
}  # fmt: skip
