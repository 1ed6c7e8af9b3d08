"""Request timelines of real vLLM 0.19 (LLMServingSim's ground truth) against the simulated replica: same arrivals, same lengths.

What the runs do not state is read off their own time series, never off their latencies: the most sequences that ran while others
waited, and the KV capacity from its usage. The token budget of 2,048 a step shows in all of them: 10,200 and 22,300 prompt tokens/s
come in steps of 0.20 and 0.092 s.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pals.core.errors import ConfigError
from pals.experiments.plant_checks.measured import read_table
from pals.experiments.plant_checks.row import CheckRow, Residual, error_row
from pals.plant.architecture import ModelShape, row_for
from pals.plant.llm_step import StepModel
from pals.plant.replica import Replica
from pals.plant.specs import board_specs
from pals.plant.workload import Workload

FOLDER = "llmservingsim-vllm-ground-truth"
BATCHED_TOKENS, DEFAULT_SEQS, BLOCK = 2048, 256, 16
BOARDS = {"RTX4090": "rtx-4090", "RTXPRO6000": "rtx-pro-6000"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One measured run: its requests as arrays of shape (requests,), and its engine's settings."""

    board: str  # as the files spell it
    model: str
    requests: dict[str, Any]
    max_num_seqs: int
    kv_blocks: int | None  # None: it never mattered, memory decides

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.model} on {self.board}"


def read_runs(folder: Path) -> list[Run]:
    """Every run whose requests are there."""
    names = ("arrival_s", "input_tokens", "output_tokens", "scheduled_s", "first_token_s", "last_token_s")
    runs = []
    for path in sorted((folder / FOLDER).glob("*__requests.csv.gz")):
        board, model = path.name.split("__")[:2]
        requests = read_table(path, names)
        order = np.argsort(requests["arrival_s"], kind="stable")
        requests = {k: v[order] for k, v in requests.items()}
        series = read_table(
            path.with_name(f"{board}__{model}__timeseries.csv"), ("t", "running", "waiting", "kv_cache_pct")
        )
        runs.append(
            Run(
                board=board,
                model=model,
                requests=requests,
                max_num_seqs=most_sequences(series),
                kv_blocks=kv_blocks(series, requests),
            )
        )
    return runs


def most_sequences(series: dict[str, Any]) -> int:
    """The launch limit: the most that ran while others waited and memory was free; vLLM's default where that never was."""
    held_back = (series["waiting"] > 0) & (series["kv_cache_pct"] < 90.0)
    most = int(series["running"].max())
    full = held_back & (series["running"] == most)
    return most if full.sum() > 2 else DEFAULT_SEQS


def kv_blocks(series: dict[str, Any], requests: dict[str, Any]) -> int | None:
    """KV blocks, from usage while memory filled for the first time; None where usage is not told.

    With R sequences running, the first R to be planned hold at most their whole prompts and what they have put out: that, over
    the usage told, bounds the capacity from above. The least bound of the seconds up to the first full one is taken.
    """
    used = series["kv_cache_pct"]
    if used.max() < 97.0:
        return None
    first = np.lexsort((requests["arrival_s"], requests["scheduled_s"]))
    r = {k: v[first] for k, v in requests.items()}
    span_s = np.maximum(1e-9, r["last_token_s"] - r["first_token_s"])
    bounds = []
    for n in range(int(np.flatnonzero(used > 97.0)[0]) + 1):
        running = int(series["running"][n])
        if running < 1 or used[n] < 10.0:
            continue
        done = np.clip((r["scheduled_s"][running - 1] - r["first_token_s"]) / span_s, 0.0, 1.0)
        held = np.ceil((r["input_tokens"] + done * r["output_tokens"]) / BLOCK)
        bounds.append(float(held[:running].sum()) / (used[n] / 100.0))
    return int(min(bounds)) if bounds else None


def step_model(folder: Path, run: Run) -> StepModel:
    """The plant's step times of the run's model on its board.

    Raises:
        ConfigError: a board or model the plant does not know.
    """
    path = folder / "model-architectures" / "models.csv"
    import csv

    with path.open(encoding="utf-8", newline="") as f:
        rows = {row["model"]: row for row in csv.DictReader(f)}
    found = row_for(run.model, rows)
    spec = board_specs().get(BOARDS.get(run.board, run.board.lower()))
    if found is None or spec is None:
        raise ConfigError(f"{run.name}: the plant knows no such {'model' if found is None else 'board'}; add it to {path}")
    return StepModel(ModelShape.from_row(rows[found]), spec, tensor_parallel=1)


def simulate(folder: Path, run: Run) -> dict[str, Any]:
    """First and last token of every request in the simulator, s."""
    model = step_model(folder, run)
    replica = Replica(
        model, model.spec, boards=1, max_num_seqs=run.max_num_seqs, max_num_batched_tokens=BATCHED_TOKENS,
        kv_blocks=run.kv_blocks, gpu_memory_utilization=0.9,
    )  # fmt: skip
    r = run.requests
    replica.submit(
        Workload(
            name=run.name,
            arrival_s=r["arrival_s"].astype(float),
            prompt_tokens=r["input_tokens"].astype(np.int32),
            output_tokens=r["output_tokens"].astype(np.int32),
            prefix_tokens=np.zeros(len(r["arrival_s"]), np.int32),
        )
    )
    replica.run()
    times = replica.results()
    return {**r, "first_token_s": times.first_token_s, "last_token_s": times.last_token_s}


def latencies(r: dict[str, Any]) -> dict[str, float]:
    """What is compared, s."""
    ttft_s = r["first_token_s"] - r["arrival_s"]
    several = r["output_tokens"] > 1
    tpot_s = ((r["last_token_s"] - r["first_token_s"])[several]) / (r["output_tokens"][several] - 1)
    return {
        "TPOT mean": float(tpot_s.mean()),
        "TPOT p99": float(np.percentile(tpot_s, 99)),
        "TTFT mean": float(ttft_s.mean()),
        "TTFT p90": float(np.percentile(ttft_s, 90)),
        "end-to-end mean": float((r["last_token_s"] - r["arrival_s"]).mean()),
    }


AT_MOST = {"TPOT mean": 3.0, "TPOT p99": 3.0, "TTFT mean": 12.0, "TTFT p90": 12.0, "end-to-end mean": 4.0}


def timeline_rows(folder: Path) -> list[CheckRow]:
    """One row a latency, one residual a run."""
    runs = read_runs(folder)
    pairs = [(run, latencies(run.requests), latencies(simulate(folder, run))) for run in runs]
    settings = "; ".join(f"{r.name}: {r.max_num_seqs} sequences, KV blocks {r.kv_blocks or 'from memory'}" for r in runs)
    return [
        error_row(
            f"request timelines of vLLM 0.19, {name}",
            f"{FOLDER}; nothing fitted on these runs",
            [Residual(group=run.name, x=float(i), measured=a[name], predicted=b[name]) for i, (run, a, b) in enumerate(pairs)],
            at_most=at_most,
            x_axis="run",
            note=f"read off the time series: {settings}",
        )
        for name, at_most in AT_MOST.items()
    ]
