"""Fit and check of the kernel formulas on NVIDIA's published kernel tables; whole shapes are held out.

`fit` sees only shapes that are not held out (rule: kernel_cases.py) and writes what kernel_constants.json holds; `check`
predicts the held-out ones. Data-sheet numbers and storage formats come from that file and are not fitted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from pals.experiments.plant_checks.kernel_cases import Cases, joined, read_cases, subsample
from pals.experiments.plant_checks.kernel_profiles import read_profiles
from pals.experiments.plant_checks.routing import benchmark_load
from pals.experiments.plant_checks.row import CheckRow, Residual, error_row
from pals.plant import kernels
from pals.plant.experts import BLOCKS, ExpertLoad

FloatArray = NDArray[np.float64]
Model = Callable[[Any, Cases], FloatArray]
Ranges = dict[str, tuple[float, float, float]]  # start, least, most

FIT_CASES = 1500
CHECK_CHUNK = 8000
DECODE_TOKENS = 256
LEAST_CASES = 50  # seen cases below which nothing is fitted


# -- what each table's row is, in the plant's formulas ----------------------------------------------------------------


def gemm_seconds(c: kernels.GemmConstants, cases: Cases) -> FloatArray:
    """As measured: at the default power limit, and not faster than the host launches."""
    m = cases.number("m")
    return kernels.on_the_host(c, m, kernels.in_a_loop(c, kernels.gemm(c, m, cases.number("n"), cases.number("k"))))


def moe_seconds(c: kernels.MoeConstants, cases: Cases) -> FloatArray:
    """As measured, with the experts the collector's routing touches."""
    n = cases.number
    t = kernels.moe(
        c, _loads(cases), tokens=n("num_tokens"), hidden=n("hidden_size"), inter=n("inter_size") / n("moe_tp_size"),
        experts=n("num_experts"), top_k=n("topk"), ranks=n("moe_ep_size"),
    )  # fmt: skip
    return kernels.in_a_loop(c, t)


def _loads(cases: Cases) -> ExpertLoad:
    columns = ("distribution", "num_experts", "topk", "num_tokens", "moe_ep_size")
    rows = zip(*(cases.columns[c] for c in columns), strict=True)
    loads = [benchmark_load(str(d), int(e), int(k), int(t), int(r), cases.old) for d, e, k, t, r in rows]
    return ExpertLoad(*(np.concatenate(field) for field in zip(*loads, strict=True)))


def generation_seconds(c: kernels.GenerationConstants, cases: Cases) -> FloatArray:
    """As measured: the KV of small cases stays in L2 between repetitions."""
    n = cases.number
    return kernels.generation_attention(
        c, batch=n("batch_size"), kv_tokens=n("step") + 1.0, heads=n("num_heads"), kv_heads=n("num_key_value_heads"),
        head_dim=n("head_dim"), window=n("window_size"), resident=True,
    ).total_s  # fmt: skip


def context_seconds(c: kernels.ContextConstants, cases: Cases) -> FloatArray:
    """As measured, at the default power limit."""
    n = cases.number
    t = kernels.context_attention(
        c, batch=n("batch_size"), tokens=n("isl"), heads=n("num_heads"), kv_heads=n("num_key_value_heads"),
        head_dim=n("head_dim"), window=n("window_size"), cached=n("cached") if "cached" in cases.columns else 0.0,
    )  # fmt: skip
    return kernels.in_a_loop(c, t)


def mixed_seconds(c: kernels.ContextConstants, cases: Cases) -> FloatArray:
    """One prefill chunk beside decoding sequences in one launch."""
    n = cases.number
    t = kernels.mixed_attention(
        c, prefill_tokens=n("isl"), cached=n("cached"), decodes=n("batch_size"), kv_tokens=n("step") + 1.0,
        heads=n("num_heads"), kv_heads=n("num_key_value_heads"), head_dim=n("head_dim"),
    )  # fmt: skip
    return kernels.in_a_loop(c, t)


def moe_layer_seconds(c: kernels.MoeConstants, cases: Cases) -> FloatArray:
    """A layer of experts of which `touched` are used evenly."""
    n = cases.number
    pairs, touched = n("num_tokens") * n("topk"), n("touched")
    slots = np.stack([touched * np.ceil(pairs / touched / b) * b for b in BLOCKS], axis=1)
    t = kernels.moe(
        c, ExpertLoad(touched, pairs, slots), tokens=n("num_tokens"), hidden=n("hidden_size"), inter=n("inter_size"),
        experts=n("num_experts"), top_k=n("topk"),
    )  # fmt: skip
    return kernels.in_a_loop(c, t)


def elementwise_seconds(c: kernels.ElementwiseConstants, cases: Cases) -> FloatArray:
    """Norms, activation, rotary embedding, token embedding."""
    return kernels.elementwise(c, cases.number("m") * cases.number("bytes_per_token")).total_s


def collective_seconds(c: kernels.CollectiveConstants, cases: Cases) -> FloatArray:
    """One collective by its own constants alone."""
    n = cases.number("message_size") * _element_bytes(cases)
    kind = "all_reduce" if cases.op == "custom_allreduce" else cases.dtype
    return kernels.two_protocols(c, n, cases.number("num_gpus"), kind)


def _element_bytes(cases: Cases) -> FloatArray:
    if cases.op == "custom_allreduce":
        return np.full(len(cases.seconds), 2.0)
    return np.where(cases.columns["nccl_dtype"] == "int8", 1.0, 2.0)


MODELS: dict[str, Model] = {
    "gemm": gemm_seconds,
    "moe": moe_seconds,
    "generation_attention": generation_seconds,
    "context_attention": context_seconds,
    "mixed_attention": mixed_seconds,
    "moe_layer": moe_layer_seconds,
    "elementwise": elementwise_seconds,
    "nccl": collective_seconds,
    "custom_allreduce": collective_seconds,
}
FAMILY = {
    "gemm": "gemm",
    "moe": "moe",
    "generation_attention": "generation",
    "context_attention": "context",
    "mixed_attention": "context",
    "moe_layer": "moe",
    "elementwise": "elementwise",
    "nccl": "collective",
    "custom_allreduce": "collective",
}
KINDS: dict[str, Any] = {
    "gemm": kernels.GemmConstants,
    "moe": kernels.MoeConstants,
    "generation": kernels.GenerationConstants,
    "context": kernels.ContextConstants,
    "elementwise": kernels.ElementwiseConstants,
    "collective": kernels.CollectiveConstants,
}


# -- fit --------------------------------------------------------------------------------------------------------------


def fit(folder: Path) -> dict[str, Any]:
    """What kernel_constants.json holds after a fit to the shapes that are not held out.

    Raises:
        ConfigError: the data are missing or broken.
    """
    out = kernels.constants_file()
    formats = out["_formats"]
    for cases in _everything(folder):
        if (cases.op == "custom_allreduce" and cases.dtype != "vllm_graph") or cases.dtype not in formats | _COLLECTIVES:
            continue
        if np.count_nonzero(~cases.held_out) < LEAST_CASES:
            continue
        board = out[cases.board]
        given = {**board["given"], **formats.get(cases.dtype, {})}
        fitted = fit_cases(cases, given)
        board.setdefault(FAMILY[cases.op], {})[_entry(cases)] = fitted
    for name, board in out.items():
        if not name.startswith("_"):
            _carry_over(board, formats)
    return out


def _everything(folder: Path) -> list[Cases]:
    """Tables and profiles; context and mixed attention of one board are one set, as they are one kernel."""
    return joined([*read_cases(folder), *read_profiles(folder)])


def _carry_over(board: dict[str, Any], formats: dict[str, dict[str, float]]) -> None:
    """Weight-only formats nobody measured on a board: the 16-bit kernel with fewer weight bytes."""
    for family in ("gemm", "moe"):
        base = board.get(family, {}).get("bfloat16")
        for dtype, sizes in formats.items():
            known = board.get(family, {}).get(dtype, {})
            if base and sizes["activation_bytes"] == 2 and known.get("confidence", "C") == "C" and dtype != "bfloat16":
                board[family][dtype] = {**base, "weight_bytes": sizes["weight_bytes"], "confidence": "C"}
                board[family][dtype]["fitted_on"] = "nothing: bfloat16 with fewer weight bytes"


_COLLECTIVES = {"all_reduce": {}, "all_gather": {}, "reduce_scatter": {}, "alltoall": {}, "vllm_graph": {}}


def _entry(cases: Cases) -> str:
    return "custom_all_reduce" if cases.op == "custom_allreduce" else cases.dtype


def fit_cases(cases: Cases, given: dict[str, float]) -> dict[str, Any]:
    """Constants of one operation, board and data type by log residuals with a soft-L1 loss."""
    seen = cases.of(~cases.held_out)
    fixed, ranges = _start(_OP_OF.get(cases.op, cases.op), given, seen)
    if cases.op == "custom_allreduce":
        seen = seen.of(seen.number("message_size") * 2.0 < fixed["most_bytes"])
    if fixed.get("host_s"):
        seen = seen.of(seen.seconds > 1.2 * max(fixed["host_s"], fixed["host_large_s"]))
    kind, model = KINDS[FAMILY[cases.op]], MODELS[cases.op]
    values = _least_squares(kind, model, subsample(seen, FIT_CASES), fixed, ranges)
    return {k: float(f"{v:.5g}") for k, v in values.items()} | {
        "confidence": "A", "fitted_on": f"{cases.table}, {int((~cases.held_out).sum())} of {len(cases.seconds)} rows"
    }  # fmt: skip


def _least_squares(kind: Any, model: Model, seen: Cases, fixed: dict[str, float], ranges: Ranges) -> dict[str, float]:
    names = list(ranges)
    start, least, most = np.log(np.array(list(ranges.values())).T)

    def values(x: FloatArray) -> dict[str, float]:
        found = {n: float(v) for n, v in zip(names, np.exp(x), strict=True)}
        if "efficiency" in found:
            found["tile_flops_s"] = fixed["tile_flops_s"] * found.pop("efficiency")
        return {f: {**fixed, **found}[f] for f in kind._fields}

    def residual(x: FloatArray) -> FloatArray:
        return np.asarray(np.log(model(kind(**values(x)), seen)) - np.log(seen.seconds))

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
    if op == "elementwise":
        return {}, {**_RANGES[op], "hbm_bytes_s": (0.85 * hbm, 0.15 * hbm, 0.97 * hbm)}
    if op.endswith("attention"):
        fixed |= {"packed": given["packed"], "kv_bytes": given["weight_bytes"], "tile_flops_s": given["sm_flops_s"]}
        if op == "generation_attention":
            ranges |= {"l2_bytes_s": (2.0 * hbm, 0.3 * hbm, 8.0 * hbm)}
        return fixed, ranges
    fixed |= {"weight_bytes": given["weight_bytes"], "activation_bytes": given["activation_bytes"]}
    if op == "gemm":
        fixed |= {"quantise_row_s": 0.0, "quantise_bytes_s": 0.0, **_host_floor(seen, given)}
        if given["activation_bytes"] < 2:
            ranges |= {"quantise_row_s": (1e-9, 1e-12, 1e-7), "quantise_bytes_s": (0.8 * hbm, 0.1 * hbm, 2.0 * hbm)}
    return fixed, ranges


def _host_floor(seen: Cases, given: dict[str, float]) -> dict[str, float]:
    """Median time of small products where it is far above a launch: the loop was no CUDA graph."""
    work = seen.number("m") * seen.number("n") * seen.number("k")
    few, floors = seen.number("m") < 64, {}
    for name, rows in (("host_s", few), ("host_large_s", ~few)):
        small = seen.seconds[rows & (work < 1e10)]
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
        "fixed_s": (1.5e-5, 2e-6, 2e-4), "sort_s": (5e-6, 1e-7, 1e-4), "pass_bytes_s": (1e12, 1e11, 2e13),
        "overlap_p": (2.0, 1.2, 8.0), "unaligned": (2.0, 1.0, 10.0), "binding_share": (0.6, 0.2, 2.0),
    },
    "generation_attention": {
        "efficiency": (0.3, 0.02, 0.98), "item_s": (2e-6, 1e-8, 1e-4), "token_s": (5e-9, 1e-10, 1e-6),
        "combine_s": (2e-6, 1e-9, 1e-4), "fixed_s": (5e-6, 1e-6, 1e-4), "overlap_p": (2.0, 1.2, 8.0),
        "l2_bytes": (2e7, 1e5, 2e8),
    },
    "elementwise": {"fixed_s": (2e-6, 5e-7, 1e-5), "l2_bytes": (2e7, 1e5, 2e8), "l2_bytes_s": (4e12, 1e12, 2e13)},
    "context_attention": {
        "efficiency": (0.7, 0.1, 0.98), "item_s": (3e-6, 1e-8, 1e-4), "diagonal": (64.0, 1.0, 2000.0),
        "fixed_s": (5e-6, 1e-6, 1e-4), "overlap_p": (2.0, 1.0, 8.0), "binding_share": (0.6, 0.2, 2.0),
    },
}  # fmt: skip
_OP_OF = {"moe_layer": "moe", "mixed_attention": "context_attention"}
_COLLECTIVE_RANGES: Ranges = {
    "low_s": (5e-6, 1e-7, 3e-5), "low_rank_s": (5e-7, 1e-9, 1e-5), "low_bytes_s": (5e10, 5e9, 2e12),
    "high_s": (2e-5, 5e-6, 2e-4), "high_rank_s": (1e-7, 1e-9, 1e-5), "high_bytes_s": (2e11, 1e10, 2e12),
}  # fmt: skip


# -- check ------------------------------------------------------------------------------------------------------------


def check(folder: Path) -> list[CheckRow]:
    """Errors on held-out shapes, a row for each operation, board and class of data type.

    Raises:
        ConfigError: the data are missing or broken.
    """
    rows: list[CheckRow] = []
    everything = _everything(folder)
    for op in MODELS:
        for board in dict.fromkeys(c.board for c in everything):
            for narrow in (False, True):
                part = [c for c in everything if (c.op, c.board) == (op, board) and _narrow(c) == narrow and _known(c)]
                rows += _rows(op, board, narrow, [c.of(c.held_out) for c in part])
    return rows


def _narrow(cases: Cases) -> bool:
    return cases.op in ("gemm", "moe", "generation_attention", "context_attention") and cases.dtype != "bfloat16"


def _known(cases: Cases) -> bool:
    return _entry(cases) in getattr(kernels.board_kernels(cases.board), FAMILY[cases.op])


def predicted_seconds(cases: Cases) -> FloatArray:
    """What the plant's constants in force say of each case."""
    c = getattr(kernels.board_kernels(cases.board), FAMILY[cases.op])[_entry(cases)]
    chunks = [
        cases.of(np.arange(i, min(i + CHECK_CHUNK, len(cases.seconds))))
        for i in range(0, len(cases.seconds), CHECK_CHUNK)
    ]
    return np.concatenate([MODELS[cases.op](c, part) for part in chunks]) if chunks else np.zeros(0)


def _rows(op: str, board: str, narrow: bool, parts: list[Cases]) -> list[CheckRow]:
    parts = [p for p in parts if len(p.seconds)]
    if not parts:
        return []
    kinds = ", ".join(sorted({p.dtype for p in parts}))
    split = (
        [("", np.inf)] if op != "moe" else [(f", decode (at most {DECODE_TOKENS} tokens)", DECODE_TOKENS), ("", np.inf)]
    )
    rows = []
    for words, most in split:
        chosen = [p if most == np.inf else p.of(p.number("num_tokens") <= most) for p in parts]
        at_most = 8.0 if words else 20.0 if narrow else 12.0
        rows.append(
            error_row(
                f"{op.replace('_', ' ')} {board}{words}, held-out shapes",
                f"aiconfigurator-silicon, {kinds}; constants fitted on the other shapes",
                [r for p in chosen for r in _residuals(p)], at_most=at_most, x_axis="measured, s",
            )
        )  # fmt: skip
    return rows


def _residuals(cases: Cases) -> list[Residual]:
    predicted = predicted_seconds(cases)
    return [
        Residual(group=cases.dtype, x=float(t), measured=float(t), predicted=float(p))
        for t, p in zip(cases.seconds, predicted, strict=True)
    ]
