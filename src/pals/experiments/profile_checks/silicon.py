"""Public measurements on real boards as rows of profiles: MMBT's and club-3090's caps and locks, ML.ENERGY's batches.

Each row holds what was measured; the rest is stated here. Steps follow from decoding: tokens/s over sequences. Lengths of
prompts are not in the data and are assumed, the same for every method.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pals.core.architecture import ModelShape
from pals.core.load import Mix
from pals.experiments.plant_checks.measured import read_table
from pals.experiments.plant_checks.serving_cases import BOARDS, COLUMNS, TASKS, load
from pals.experiments.plant_checks.sweeps import MMBT, Sweep, read_sweeps
from pals.experiments.profile_checks.case import SILICON, Case
from pals.models.engine_facts import EngineFacts
from pals.models.row import ProfileRow
from pals.plant.specs import BoardSpec, board_specs

MLENERGY = "mlenergy-v3"
LEAST_ROWS = 4
MEASURED_S = {MMBT: 300.0}  # of a row; other sets: some ten seconds
USUAL_S = 10.0
PROMPTS = {"lm-arena-chat": 250.0, "sourcegraph-fim": 850.0, "gpqa": 250.0}  # tokens, assumed as in the plant's check
DECODE = Mix(name="short prompts", prompt_tokens=64, output_tokens=200, spread=0.0)  # prompt assumed
PREFILL = Mix(name="prompts alone", prompt_tokens=2048, output_tokens=1, spread=0.0)  # length assumed
ASSUMED = (
    "prompt lengths are not in the data: 64 tokens (caps, decode), 2048 (caps, prefill), 250 and 850 (chat, code) are assumed; "
    "where the SM clock was not measured it is unknown to every method"
)
BATCH_COLUMNS = (*COLUMNS, "tensor_parallel")


def silicon_cases(folder: Path) -> list[Case]:
    """Every sweep of at least `LEAST_ROWS` rows.

    Raises:
        ConfigError: data that cannot be read.
    """
    return [*cap_cases(folder), *batch_cases(folder)]


def cap_cases(folder: Path) -> list[Case]:
    """Sweeps of a power limit or a clock lock."""
    sweeps = [s for s in read_sweeps(folder) if s.board in board_specs() and len(s.setting) >= LEAST_ROWS]
    return [_cap_case(s) for s in sweeps]


def _cap_case(sweep: Sweep) -> Case:
    spec = board_specs()[sweep.board]
    return Case(
        name=sweep.key.replace("/", ", "),
        group=sweep.data,
        basis=SILICON,
        facts=_facts(spec, boards=1, launch=sweep.streams, shape=None),
        mixes=(PREFILL if sweep.phase == "prefill" else DECODE,),
        rows=tuple(_cap_row(sweep, spec, i) for i in range(len(sweep.setting))),
        seed=0,
        knob="clock" if sweep.lock else "limit",
    )


def _cap_row(sweep: Sweep, spec: BoardSpec, i: int) -> ProfileRow:
    """Prefill sweeps state prompt tokens/s: each prompt is one request of one output token."""
    measured, setting = float(sweep.tokens_s[i]), float(sweep.setting[i])
    mix = PREFILL if sweep.phase == "prefill" else DECODE
    tokens_per_s = measured / mix.prompt_tokens if mix is PREFILL else measured
    return ProfileRow(
        power_limit_w=float(spec.default_limit_w) if sweep.lock else setting,
        sm_clock_lock_mhz=round(setting) if sweep.lock else None,
        active_sequences=sweep.streams,
        mix=0,
        running=float(sweep.streams),
        power_w=float(sweep.draw_w[i]),
        tokens_per_s=tokens_per_s,
        prefill_tokens_per_s=tokens_per_s * mix.prefill_per_output,
        steps_per_s=tokens_per_s / sweep.streams,
        sm_clock_mhz=float(sweep.clock_mhz[i]) if np.isfinite(sweep.clock_mhz[i]) else None,
        window_s=MEASURED_S.get(sweep.data, USUAL_S),
    )


def batch_cases(folder: Path) -> list[Case]:
    """ML.ENERGY's text tasks: one case a model, board, parallelism and task, over its batches."""
    shapes = {case.model: case.shape for case in load(folder)[0]}
    table = read_table(folder / MLENERGY / "serving_batch_sweep.csv", BATCH_COLUMNS)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    keys = (
        "gpu_model",
        "num_gpus",
        "model_id",
        "weight_precision",
        "tensor_parallel",
        "expert_parallel",
        "data_parallel",
    )
    for row in _lines(table):
        if row["task"] in TASKS and row["gpu_model"] in BOARDS:
            groups.setdefault((row["task"], *(row[k] for k in keys)), []).append(row)
    return [_batch_case(rows, shapes) for rows in groups.values() if len(rows) >= LEAST_ROWS]


def _batch_case(rows: Sequence[dict[str, Any]], shapes: dict[str, ModelShape]) -> Case:
    first = rows[0]
    spec, boards = board_specs()[BOARDS[first["gpu_model"]]], int(first["num_gpus"])
    tensor = boards // int(first["data_parallel"])
    rows = sorted(rows, key=lambda r: float(r["max_num_seqs"]))
    output = float(np.mean([r["avg_output_len"] for r in rows]))
    mix = Mix(name=str(first["task"]), prompt_tokens=PROMPTS[first["task"]], output_tokens=output)
    model = str(first["model_id"]).split("/")[-1]
    launch = int(rows[-1]["max_num_seqs"])
    return Case(
        name=f"{MLENERGY}, {first['task']}, {model}, {boards} {first['gpu_model']}, tp{int(first['tensor_parallel'])}",
        group=MLENERGY,
        basis=SILICON,
        facts=_facts(spec, boards=boards, launch=launch, shape=shapes.get(str(first["model_id"])), tensor=tensor),
        mixes=(mix,),
        rows=tuple(_batch_row(r, mix, spec) for r in rows),
        seed=0,
        knob="batch",
    )


def _batch_row(r: dict[str, Any], mix: Mix, spec: BoardSpec) -> ProfileRow:
    tokens_per_s, running = float(r["output_throughput_tokens_per_sec"]), float(r["avg_batch_size"])
    return ProfileRow(
        power_limit_w=float(spec.default_limit_w),
        active_sequences=int(r["max_num_seqs"]),
        mix=0,
        running=running,
        power_w=float(r["avg_power_watts"]),
        tokens_per_s=tokens_per_s,
        prefill_tokens_per_s=tokens_per_s * mix.prefill_per_output,
        steps_per_s=tokens_per_s / running,
        sm_clock_mhz=None,
        window_s=USUAL_S,
    )


def _facts(
    spec: BoardSpec, *, boards: int, launch: int, shape: ModelShape | None, tensor: int = 1
) -> EngineFacts:  # fmt: skip
    """What a driver reports of such boards, and the model's sizes where they are known."""
    return EngineFacts(
        board=spec.nvml_name,
        boards=boards,
        min_limit_w=float(spec.min_limit_w),
        max_limit_w=float(spec.max_limit_w),
        min_sm_clock_mhz=spec.min_sm_clock_mhz,
        max_sm_clock_mhz=spec.max_sm_clock_mhz,
        launch_sequences=launch,
        tensor_parallel=tensor,
        shape=shape,
    )


def _lines(table: Any) -> Iterable[dict[str, Any]]:
    names = list(table)
    return (dict(zip(names, values, strict=True)) for values in zip(*table.values(), strict=True))
