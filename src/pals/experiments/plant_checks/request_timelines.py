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
    """KV blocks, from usage between 10 and 95 % before memory was first full, and what was then held; None: usage is not told.

    A request holds its prompt from its first token on and its outputs in proportion to the time since; one whose prompt is
    under way at that moment is counted by half.
    """
    used = series["kv_cache_pct"]
    if used.max() < 10.0:
        return None
    full = np.flatnonzero(used > 97.0)
    before = np.arange(len(used)) < (full[0] if len(full) else len(used))
    found = []
    for t, share in zip(series["t"][before], used[before] / 100.0, strict=True):
        if not 0.1 < share < 0.95:
            continue
        done = np.clip((t - requests["first_token_s"]) / _span_s(requests), 0.0, 1.0)
        here = (requests["scheduled_s"] <= t) & (t < requests["last_token_s"])
        started = requests["first_token_s"] <= t
        held = requests["input_tokens"] * np.where(started, 1.0, 0.5) + started * done * requests["output_tokens"]
        found.append(float(held[here].sum()) / share)
    if not found:
        return None
    return int(np.median(found) / BLOCK)


def _span_s(requests: dict[str, Any]) -> Any:
    return np.maximum(1e-9, requests["last_token_s"] - requests["first_token_s"])


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
