"""Layer profiles of workstation boards (llmservingsim-vllm-ground-truth) as the same cases as NVIDIA's kernel tables.

One model of each board that has several (`HELD_OUT_MODEL`) is held out as a whole; of the others, each point whose CRC-32
is divisible by 5 (numbers joined by "x": m, n, k; queries, cached, sequences, KV tokens; tokens, experts).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pals.core.errors import ConfigError
from pals.experiments.plant_checks.kernel_cases import Cases, held_out, joined, read_cases
from pals.experiments.plant_checks.measured import Table, read_table

BOARDS = {"RTX4090": "rtx-4090", "RTXPRO6000": "rtx-pro-6000"}
HELD_OUT_MODEL = "Qwen3-32B"
PROFILES = ("attention", "dense", "per_sequence", "moe")


def read_everything(folder: Path) -> list[Cases]:
    """Kernel tables and layer profiles, one set for each operation, board and data type.

    Raises:
        ConfigError: the data are missing or broken.
    """
    return joined([*read_cases(folder), *read_profiles(folder)])


def read_profiles(folder: Path) -> list[Cases]:
    """All profiles of known boards.

    Raises:
        ConfigError: a file is broken, or names a model whose shape models.csv lacks.
    """
    source = folder / "llmservingsim-vllm-ground-truth"
    found: list[Cases] = []
    for path in sorted(source.glob("*__profile_*.csv.gz")):
        gpu, model, kind = path.name.removesuffix(".csv.gz").split("__")
        profile = kind.removeprefix("profile_")
        if gpu in BOARDS and profile in PROFILES:
            found += _READERS[profile](path, BOARDS[gpu], model, _shape(folder, model))
    return found


def _shape(folder: Path, model: str) -> dict[str, float]:
    names = ("hidden", "heads", "kv_heads", "head_dim", "dense_inter", "experts", "top_k", "expert_inter", "vocab")
    table = read_table(folder / "model-architectures" / "models.csv", ["model", *names])
    for i, name in enumerate(table["model"]):
        short = str(name).rsplit("/", 1)[1]
        if short in model or model in short:
            return {n: float(table[n][i] or 0) for n in names}
    raise ConfigError(f"{folder}/model-architectures/models.csv lacks the shape of {model}; add its row")


def _case(path: Path, op: str, board: str, model: str, columns: Table, time_us: Any) -> Cases:
    numbers = [np.asarray(v) for k, v in columns.items() if k in _POINT[op]]
    held = held_out(numbers) | (model == HELD_OUT_MODEL)
    columns = {**columns, "model": np.full(len(time_us), model)}
    return Cases(path.name, op, board, "bfloat16", False, columns, np.asarray(time_us, dtype=np.float64) * 1e-6, held)


_POINT = {
    "gemm": ("m", "n", "k"),
    "elementwise": ("m", "bytes_per_token"),
    "moe_layer": ("num_tokens", "touched"),
    "generation_attention": ("batch_size", "step"),
    "context_attention": ("isl", "cached"),
    "mixed_attention": ("isl", "cached", "batch_size", "step"),
}


def _dense(path: Path, board: str, model: str, s: dict[str, float]) -> list[Cases]:
    t = read_table(path, ["layer", "tokens", "time_us"])
    q, kv, h, inter = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"], s["hidden"], s["dense_inter"]
    products = {"qkv_proj": (q + 2 * kv, h), "o_proj": (h, q), "gate_up_proj": (2 * inter, h), "down_proj": (h, inter)}
    passes = {
        "act_fn": 6 * inter, "layernorm": 8 * h, "final_layernorm": 8 * h, "rotary_emb": 4 * (q + kv),
        "embedding": 4 * h, "qk_norm": 4 * (q + kv),
    }  # fmt: skip
    return [
        _products(path, board, model, t["layer"], t["tokens"], t["time_us"], products),
        _passes(path, board, model, t["layer"], t["tokens"], t["time_us"], passes),
    ]


def _products(path: Path, board: str, model: str, layer: Any, m: Any, us: Any, sizes: dict[str, Any]) -> Cases:
    rows = np.isin(layer, list(sizes))
    n, k = (np.array([sizes[name][i] for name in layer[rows]], dtype=np.float64) for i in (0, 1))
    return _case(path, "gemm", board, model, {"m": m[rows], "n": n, "k": k}, us[rows])


def _passes(path: Path, board: str, model: str, layer: Any, m: Any, us: Any, sizes: dict[str, float]) -> Cases:
    rows = np.isin(layer, list(sizes))
    per_token = np.array([sizes[name] for name in layer[rows]], dtype=np.float64)
    return _case(path, "elementwise", board, model, {"m": m[rows], "bytes_per_token": per_token}, us[rows])


def _per_sequence(path: Path, board: str, model: str, s: dict[str, float]) -> list[Cases]:
    t = read_table(path, ["layer", "sequences", "time_us"])
    return [
        _products(path, board, model, t["layer"], t["sequences"], t["time_us"], {"lm_head": (s["vocab"], s["hidden"])})
    ]


def _moe(path: Path, board: str, model: str, s: dict[str, float]) -> list[Cases]:
    t = read_table(path, ["tokens", "activated_experts", "time_us"])
    columns = {"num_tokens": t["tokens"], "touched": t["activated_experts"]}
    sizes = {
        "hidden_size": s["hidden"],
        "inter_size": s["expert_inter"],
        "topk": s["top_k"],
        "num_experts": s["experts"],
    }
    columns |= {k: np.full(len(t["tokens"]), v) for k, v in sizes.items()}
    return [_case(path, "moe_layer", board, model, columns, t["time_us"])]


def _attention(path: Path, board: str, model: str, s: dict[str, float]) -> list[Cases]:
    names = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    t = read_table(path, [*names, "time_us"])
    queries, sequences = t["prefill_chunk"], t["n_decode"]
    heads = {
        "num_heads": s["heads"],
        "num_key_value_heads": s["kv_heads"],
        "head_dim": s["head_dim"],
        "window_size": 0.0,
    }
    columns = {"isl": queries, "cached": t["kv_prefill"], "batch_size": sequences, "step": t["kv_decode"] - 1}
    columns |= {k: np.full(len(queries), v) for k, v in heads.items()}
    decode, prefill = (queries == 0) & (sequences > 0), (sequences == 0) & (queries > 0)
    found = []
    for op, rows in (
        ("generation_attention", decode), ("context_attention", prefill),
        ("mixed_attention", (queries > 0) & (sequences > 0)),
    ):  # fmt: skip
        part = {k: v[rows] for k, v in columns.items()}
        if op == "context_attention":
            part["batch_size"] = np.ones(int(rows.sum()))
        found.append(_case(path, op, board, model, part, t["time_us"][rows]))
    return found


_READERS: dict[str, Any] = {"attention": _attention, "dense": _dense, "per_sequence": _per_sequence, "moe": _moe}
