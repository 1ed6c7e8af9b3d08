"""Measured kernels as cases: arguments and seconds of one operation, board and data type, and which shapes are held out.

A shape (n and k of a matrix product; heads, KV heads and head size of attention; hidden, inter, experts and top-k of a
layer of experts; message size and ranks of a collective) is held out as a whole where CRC-32 of its numbers, joined by
"x", is divisible by 5.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pals.core.errors import ConfigError
from pals.experiments.plant_checks.measured import Table, read_table
from pals.experiments.plant_checks.routing import benchmark_load

FloatArray = NDArray[np.float64]
BOARDS = {
    "a100_sxm": "a100-sxm4-80gb",
    "h100_sxm": "h100-sxm5-80gb",
    "h200_sxm": "h200-sxm5-141gb",
    "b200_sxm": "b200-sxm-180gb",
}
COLUMNS = {
    "gemm": ("m", "n", "k"),
    "moe": (
        "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size", "distribution",
    ),
    "context_attention": ("batch_size", "isl", "num_heads", "num_key_value_heads"),
    "generation_attention": ("batch_size", "step", "num_heads", "num_key_value_heads"),
    "nccl": ("op_name", "nccl_dtype", "num_gpus", "message_size"),
    "custom_allreduce": ("backend", "num_gpus", "message_size"),
}  # fmt: skip
OPTIONAL = {
    "gemm_dtype": "bfloat16",
    "moe_dtype": "bfloat16",
    "kv_cache_dtype": "bfloat16",
    "head_dim": 128,
    "window_size": 0,
}  # constant columns of a table are named in index.json, else these


@dataclass(frozen=True, slots=True)
class Cases:
    """Measured kernels of one operation, board and data type; columns of shape (cases,)."""

    table: str
    op: str
    board: str
    dtype: str
    old: bool  # measured by the collector of vLLM 0.14
    columns: Table
    seconds: FloatArray
    held_out: NDArray[np.bool_]

    def of(self, chosen: NDArray[Any]) -> Cases:
        """A part of the cases."""
        columns = {k: v[chosen] for k, v in self.columns.items()}
        return Cases(
            self.table, self.op, self.board, self.dtype, self.old, columns, self.seconds[chosen], self.held_out[chosen]
        )

    @property
    def ungated(self) -> NDArray[np.bool_]:
        """Rows whose experts have no gate: Nemotron's, which the collector measures as they are since vLLM 0.24."""
        rows = (self.number("topk") == 22) | (self.number("hidden_size") == 2688)
        return np.asarray(rows & ("vllm0.24" in self.table))

    def number(self, column: str) -> FloatArray:
        """A column as floats."""
        return np.asarray(self.columns[column], dtype=np.float64)


def held_out(columns: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
    """Whether each row's shape is held out; see the module's rule."""
    rows, inverse = np.unique(
        np.stack([np.asarray(c).astype(np.int64) for c in columns], 1), axis=0, return_inverse=True
    )
    chosen = [zlib.crc32("x".join(str(v) for v in row).encode()) % 5 == 0 for row in rows]
    return np.array(chosen, dtype=bool)[inverse.ravel()]


def joined(parts: Sequence[Cases]) -> list[Cases]:
    """Cases of the same operation, board, data type and collector as one set."""
    groups: dict[tuple[str, str, str, bool], list[Cases]] = {}
    for p in parts:
        groups.setdefault((p.op, p.board, p.dtype, p.old), []).append(p)
    return [_one(list(group)) for group in groups.values()]


def _one(group: list[Cases]) -> Cases:
    first = group[0]
    columns = {k: np.concatenate([g.columns[k] for g in group]) for k in first.columns}
    table = ", ".join(dict.fromkeys(g.table for g in group))
    seconds, held = (np.concatenate([getattr(g, f) for g in group]) for f in ("seconds", "held_out"))
    return Cases(table, first.op, first.board, first.dtype, first.old, columns, seconds, held)


def subsample(cases: Cases, most: int) -> Cases:
    """At most `most` cases, evenly over a seeded order: the same ones every time."""
    if len(cases.seconds) <= most:
        return cases
    return cases.of(np.sort(np.random.default_rng(0).permutation(len(cases.seconds))[:most]))


def read_cases(folder: Path) -> list[Cases]:
    """All tables of aiconfigurator-silicon this plant has a formula for; tables of other operations are left out.

    Raises:
        ConfigError: a table is broken or lacks a column.
    """
    source = folder / "aiconfigurator-silicon"
    constants = _constants(source)
    found = []
    for path in sorted(source.glob("*.parquet")):
        gpu, _, framework, table = path.stem.split("__")
        op = table.removesuffix("_perf")
        if gpu in BOARDS and op in COLUMNS:
            found += _cases(path, op, BOARDS[gpu], constants.get(path.name, {}), "vllm0.14" in framework)
    if not found:
        raise ConfigError(f"{source} holds no kernel tables (*.parquet); see the README of the data folder")
    return found


def _constants(source: Path) -> dict[str, Mapping[str, Any]]:
    try:
        return {entry["file"]: entry["constants"] for entry in json.loads((source / "index.json").read_text())}
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as e:
        raise ConfigError(f"cannot read {source / 'index.json'}: {e}") from e


def _cases(path: Path, op: str, board: str, constants: Mapping[str, Any], old: bool) -> list[Cases]:
    import pyarrow.parquet as parquet

    try:
        present = set(parquet.read_schema(path).names)
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot read the measured data {path}: {e}") from e
    known = {**OPTIONAL, **constants}
    names = [*COLUMNS[op], *OPTIONAL] if op in ("gemm", "moe") or op.endswith("attention") else list(COLUMNS[op])
    read = read_table(path, [c for c in names if c in present or c not in known] + ["latency"])
    rows = len(read["latency"])
    table = {c: read[c] if c in read else np.full(rows, known[c]) for c in names}
    if op == "moe":
        table |= _loads(table, old)
    seconds = np.asarray(read["latency"], dtype=np.float64) * 1e-3
    dtype = np.asarray(_dtype(op, table)).astype(str)
    held = held_out(_shape(op, table))
    everything = Cases(path.name, op, board, "", old, table, seconds, held)
    usable = np.isfinite(seconds) & (seconds > 0)
    parts = [everything.of(usable & (dtype == d)) for d in np.unique(dtype)]
    return [
        Cases(p.table, op, board, str(d), old, p.columns, p.seconds, p.held_out)
        for d, p in zip(np.unique(dtype), parts, strict=True)
        if len(p.seconds)
    ]


def _loads(t: Table, old: bool) -> Table:
    """What the measured rank was given in each row."""
    columns = ("distribution", "num_experts", "topk", "num_tokens", "moe_ep_size")
    rows = zip(*(t[c].tolist() for c in columns), strict=True)
    loads = [benchmark_load(law, e, k, n, ranks, old) for law, e, k, n, ranks in rows]
    touched, assignments, slots = (np.concatenate(field) for field in zip(*loads, strict=True))
    return {"touched": touched, "assignments": assignments, "slots": slots}


def _dtype(op: str, t: Table) -> Any:
    if op == "gemm":
        return t["gemm_dtype"]
    if op == "moe":
        return t["moe_dtype"]
    if op == "nccl":
        return t["op_name"]
    return t["backend"] if op == "custom_allreduce" else t["kv_cache_dtype"]


def _shape(op: str, t: Table) -> list[NDArray[Any]]:
    if op == "gemm":
        return [t["n"], t["k"]]
    if op == "moe":
        return [t["hidden_size"], t["inter_size"], t["num_experts"], t["topk"]]
    if op.endswith("attention"):
        return [t["num_heads"], t["num_key_value_heads"], t["head_dim"]]
    return [t["message_size"], t["num_gpus"]]
