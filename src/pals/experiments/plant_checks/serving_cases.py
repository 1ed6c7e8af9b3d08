"""Rows of ML.ENERGY's serving sweep as cases, and what the plant says of an engine in steady state.

A step computes `batch` sequences, of which a Poisson number are new (batch / output length a step); so the mean step time is
batch / throughput, prefill included. Assumptions: docs/models/step.md.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pals.core.architecture import ModelShape, format_name, row_for
from pals.experiments.plant_checks.measured import read_table
from pals.plant.llm_step import step_cost, step_tables
from pals.plant.silicon import Silicon, board_power_w
from pals.plant.specs import BoardSpec
from pals.plant.step_constants import StepConstants
from pals.plant.step_kernels import ParallelGroup

FloatArray = NDArray[np.float64]

BOARDS = {"H100": "h100-sxm5-80gb", "B200": "b200-sxm-180gb"}
TASKS = ("lm-arena-chat", "gpqa", "sourcegraph-fim")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the sweep, and what of the model and the task decides it."""

    model: str
    base: str  # row of models.csv
    task: str
    board: str  # H100 | B200
    shape: ModelShape
    group: ParallelGroup
    boards: int
    batch: float
    output: float  # mean tokens
    spread: float  # coefficient of variation of the output length
    tpot_s: float  # batch / throughput
    median_itl_s: float
    power_w: float  # of one board


COLUMNS = (
    "task", "gpu_model", "num_gpus", "model_id", "weight_precision", "expert_parallel", "data_parallel", "max_num_seqs",
    "avg_batch_size", "avg_power_watts", "output_throughput_tokens_per_sec", "median_itl_ms", "avg_output_len",
)  # fmt: skip
SHAPE_COLUMNS = (
    "model", "layers", "hidden", "heads", "kv_heads", "head_dim", "dense_inter", "moe_layers", "experts", "top_k",
    "expert_inter", "shared_inter", "vocab", "params_total_B", "params_read_dense_B", "kv_bytes_per_token_bf16",
    "native_dtype",
)  # fmt: skip


def load(folder: Path) -> tuple[list[Case], Counter[str]]:
    """Cases of the text tasks, and how many rows of what kind were left out."""
    shapes = _rows(read_table(folder / "model-architectures" / "models.csv", SHAPE_COLUMNS))
    by_name = {str(row["model"]): row for row in shapes}
    spreads = _spreads(folder / "mlenergy-v3" / "output_length_histograms.json")
    cases, left = [], Counter[str]()
    for row in _rows(read_table(folder / "mlenergy-v3" / "serving_batch_sweep.csv", COLUMNS)):
        base = row_for(row["model_id"], by_name)
        if row["task"] not in TASKS:
            continue
        if row["gpu_model"] not in BOARDS:
            left[f"{row['gpu_model']}: no constants of the board"] += 1
        elif base is None:
            left[f"{row['model_id']}: no row in models.csv"] += 1
        elif row["gpu_model"] == "B200" and row["task"] == "gpqa" and row["max_num_seqs"] <= 8:
            left[f"{row['model_id']}, B200, thinking at batch 8: called odd by the data's README"] += 1
        else:
            cases.append(_case(row, by_name[base], spreads))
    return cases, left


def _rows(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = list(table)
    return [dict(zip(names, values, strict=True)) for values in zip(*table.values(), strict=True)]


def _case(row: Mapping[str, Any], architecture: Mapping[str, Any], spreads: Mapping[str, float]) -> Case:
    shape, model = ModelShape.from_row(architecture), str(row["model_id"])
    if shape.expert_format != "mxfp4":
        shape = _stored(shape, model, format_name(row["weight_precision"]))
    boards, data = int(row["num_gpus"]), int(row["data_parallel"])
    group = ParallelGroup(boards // data, 1, data, bool(row["expert_parallel"] > 1))
    return Case(
        model=model,
        base=str(architecture["model"]),
        task=str(row["task"]),
        board=str(row["gpu_model"]),
        shape=shape,
        group=group,
        boards=boards,
        batch=float(row["avg_batch_size"]),
        output=float(row["avg_output_len"]),
        spread=spreads.get(f"{model}|{row['task']}", spreads[str(row["task"])]),
        tpot_s=float(row["avg_batch_size"] / row["output_throughput_tokens_per_sec"]),
        median_itl_s=float(row["median_itl_ms"]) / 1000,
        power_w=float(row["avg_power_watts"]) / boards,
    )


def _stored(shape: ModelShape, model: str, weights: str) -> ModelShape:
    """Releases in 8 bits: those of meta-llama scale rows and keep attention at 16 bits, all others scale blocks."""
    if weights != "fp8":
        return shape.stored_as(weights)
    return shape.stored_as("fp8", attention="bf16") if model.startswith("meta-llama/") else shape.stored_as("fp8_block")


def _spreads(path: Path) -> dict[str, float]:
    """Coefficient of variation of output lengths by "model|task", and the mean over models by task."""
    spreads: dict[str, float] = {}
    for key, histogram in json.loads(path.read_text()).items():
        edges, counts = np.array(histogram["bins"]), np.array(histogram["counts"])
        middles = (edges[1:] + edges[:-1]) / 2
        mean = np.average(middles, weights=counts)
        spreads[key] = float(np.sqrt(np.average((middles - mean) ** 2, weights=counts)) / mean)
    for task in TASKS:
        of_task = [v for k, v in spreads.items() if k.endswith(f"|{task}")]
        spreads[task] = float(np.mean(of_task)) if of_task else 1.0
    return spreads


class Steps(NamedTuple):
    """States of all cases of one engine: how many new requests a step holds, and how often; arrays of shape (cases, states)."""

    often: FloatArray
    new: FloatArray
    decode: FloatArray
    context: FloatArray  # KV tokens of one sequence, shape (cases, 1)


def steps_of(cases: Sequence[Case], prompt: float) -> Steps:
    """Steady state: new requests of a step are Poisson; data-parallel ranks wait for the one with the most."""
    ranks = cases[0].group.data
    batch = np.array([[c.batch / ranks] for c in cases])
    output = np.array([[c.output] for c in cases])
    residual = output * (1 + np.array([[c.spread] for c in cases]) ** 2) / 2
    rate = batch / output
    most = int(np.ceil(rate.max() + 6.0 * np.sqrt(rate.max()))) + 4
    new = np.arange(most, dtype=np.float64)[None, :] * np.ones_like(rate)
    log_often = new * np.log(rate) - rate - np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, most)))])
    below = np.cumsum(np.exp(log_often), axis=1)
    often = np.diff(np.minimum(1.0, below) ** ranks, axis=1, prepend=0.0)
    return Steps(often / often.sum(axis=1, keepdims=True), new, np.maximum(0.0, batch - new), prompt + residual)


class Prediction(NamedTuple):
    """What the plant says of cases; arrays of shape (cases,)."""

    tpot_s: FloatArray
    median_itl_s: FloatArray
    power_w: FloatArray


def predict(cases: Sequence[Case], spec: BoardSpec, k: StepConstants, silicon: Silicon, prompt: float) -> Prediction:
    """Steps of one engine (all `cases` share model and boards) at the highest clock that keeps mean power under the limit."""
    first, states = cases[0], steps_of(cases, prompt)
    new, prefill = states.new.astype(np.int64), np.round(states.new * prompt).astype(np.int64)
    decode = np.round(states.decode).astype(np.int64)
    tables = step_tables(first.shape, spec, first.group, k, 1 << int(prefill.max() + decode.max()).bit_length())

    def at(clock: FloatArray) -> tuple[FloatArray, FloatArray]:
        seconds, compute, memory, busy = step_cost(
            tables, prefill, new, decode, decode * states.context, new * prompt**2 / 2, clock[:, None]
        )
        watts = board_power_w(silicon, compute, memory, busy, clock[:, None], silicon.leak_reference_c)
        return seconds, np.sum(states.often * seconds * watts, axis=1) / np.sum(states.often * seconds, axis=1)

    clock = _clock_under(at, spec, len(cases))
    seconds, power = at(clock)
    middle = np.argmax(np.cumsum(states.often, axis=1) >= 0.5, axis=1)
    return Prediction(np.sum(states.often * seconds, axis=1), seconds[np.arange(len(cases)), middle], power)


def _clock_under(at: Any, spec: BoardSpec, cases: int) -> FloatArray:
    """Highest clock at which mean power stays under the default limit, by bisection."""
    low, high = np.full(cases, float(spec.min_sm_clock_mhz)), np.full(cases, float(spec.max_sm_clock_mhz))
    free = at(high)[1] <= spec.default_limit_w
    low = np.where(free, high, low)
    for _ in range(0 if free.all() else 9):
        middle = (low + high) / 2
        fits = at(middle)[1] <= spec.default_limit_w
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return low


def engines(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases of one model on one group of boards under one task together."""
    groups: dict[Any, list[Case]] = {}
    for c in cases:
        groups.setdefault((c.model, c.board, c.group, c.task), []).append(c)
    return list(groups.values())
