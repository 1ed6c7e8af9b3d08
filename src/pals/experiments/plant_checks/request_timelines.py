"""Request timelines of real vLLM 0.19 (LLMServingSim's ground truth) against the simulated replica: same arrivals, same lengths.

What the runs do not state is read off their own time series: the most sequences that ran while others waited, and the KV capacity from
its usage. A MoE run is judged with the routing of the board's own constants, and shown beside that, in sample, with the spread of popularity
that its step times tell in the seconds in which it drains (nothing waits, no prompt is computed). The token budget of 2,048 a step shows in all of them: 10,200 and 22,300
prompt tokens/s come in steps of 0.20 and 0.092 s. Host time is fitted on one run (`FITTED_ON`) and judged on the others.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares, minimize_scalar

from pals.core.architecture import ModelShape, row_for
from pals.core.errors import ConfigError
from pals.experiments.plant_checks.measured import read_table
from pals.experiments.plant_checks.row import CheckRow, Residual, error_row
from pals.plant.llm_step import StepBatch, StepModel
from pals.plant.replica import Replica
from pals.plant.specs import board_specs
from pals.plant.step_constants import StepConstants, fitted_constants, step_constants
from pals.plant.workload import Workload

FOLDER = "llmservingsim-vllm-ground-truth"
BATCHED_TOKENS, DEFAULT_SEQS, BLOCK = 2048, 256, 16
FITTED_ON = ("RTXPRO6000", "Llama-3.1-8B")
LEAST_RUNNING = 4  # of a second that tells the step time: fewer, and tokens a second are too few to count
BOARDS = {"RTX4090": "rtx-4090", "RTXPRO6000": "rtx-pro-6000"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One measured run: its requests as arrays of shape (requests,), and its engine's settings."""

    board: str  # as the files spell it
    model: str
    requests: dict[str, Any]
    series: dict[str, Any]  # by second
    max_num_seqs: int
    kv_blocks: int | None  # None: it never mattered, memory decides

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.model} on {self.board}"

    @property
    def fitted(self) -> bool:
        """Whether host time was fitted on this run."""
        return (self.board, self.model) == FITTED_ON


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
            path.with_name(f"{board}__{model}__timeseries.csv"),
            ("t", "prompt_throughput", "gen_throughput", "running", "waiting", "kv_cache_pct"),
        )
        runs.append(
            Run(
                board=board,
                model=model,
                requests=requests,
                series=series,
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
    """The plant's step times of the run's model on its board, experts used as unevenly as this text uses them.

    Raises:
        ConfigError: a board or model the plant does not know.
    """
    path = folder / "model-architectures" / "models.csv"
    with path.open(encoding="utf-8", newline="") as f:
        rows = {row["model"]: row for row in csv.DictReader(f)}
    found = row_for(run.model, rows)
    spec = board_specs().get(BOARDS.get(run.board, run.board.lower()))
    if found is None or spec is None:
        unknown = f"model {run.model}; add it to {path}" if found is None else f"board {run.board}"
        raise ConfigError(f"a measured run names a {unknown}: the plant does not know it")
    return StepModel(ModelShape.from_row(rows[found]), spec, tensor_parallel=1, max_tokens=BATCHED_TOKENS)


def routed(model: StepModel, run: Run) -> StepModel:
    """The model with the popularity spread of experts that the run's draining seconds tell."""
    sequences, context, step_s = draining(run)
    if len(step_s) < 3:
        return model

    def error(cv: float) -> float:
        tried = model.changed(replace(model.constants, popularity_cv=float(cv)))
        batches = [
            StepBatch(decode_sequences=int(n), context_tokens=int(c)) for n, c in zip(sequences, context, strict=True)
        ]
        said_s = np.array([tried.step(b, float(model.spec.max_sm_clock_mhz)).seconds for b in batches])
        return float(np.mean(np.abs(np.log(said_s / step_s))))

    best = minimize_scalar(error, bounds=(0.1, 5.0), method="bounded", options={"xatol": 0.02})
    return model.changed(replace(model.constants, popularity_cv=round(float(best.x), 2)))


def draining(run: Run) -> tuple[Any, Any, Any]:
    """Running sequences, KV tokens they hold, and seconds of a step, of each second after the last prompt."""
    s, r = run.series, run.requests
    last_prompt_s = float(r["first_token_s"].max())
    chosen = (s["t"] > last_prompt_s + 1.0) & (s["waiting"] == 0) & (s["prompt_throughput"] == 0)
    chosen &= (s["running"] >= LEAST_RUNNING) & (s["gen_throughput"] > 0)
    middle_s = s["t"][chosen] - 0.5
    sequences = np.array([((r["first_token_s"] <= t) & (t < r["last_token_s"])).sum() for t in middle_s])
    context = []
    for t in middle_s:
        done = np.clip((t - r["first_token_s"]) / np.maximum(1e-9, r["last_token_s"] - r["first_token_s"]), 0.0, 1.0)
        here = (r["first_token_s"] <= t) & (t < r["last_token_s"])
        context.append(float((r["input_tokens"] + done * r["output_tokens"])[here].sum()))
    return sequences, np.array(context), sequences / s["gen_throughput"][chosen]


def simulate(run: Run, model: StepModel) -> dict[str, Any]:
    """The run's requests with the simulator's first and last tokens, s."""
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
    """One row a latency of the runs that nothing was fitted on, and one of the MoE runs with the popularity their own draining seconds tell."""
    runs = read_runs(folder)
    models = [step_model(folder, run) for run in runs]
    judged = [(run, model) for run, model in zip(runs, models, strict=True) if not run.fitted]
    fitted = "; ".join(
        f"on the fitted run {told(run, model)}" for run, model in zip(runs, models, strict=True) if run.fitted
    )
    dense, moe = ([case for case in judged if bool(case[1].shape.experts) == experts] for experts in (False, True))
    routing = [(run, routed(model, run)) for run, model in moe]
    data = f"{FOLDER}; host time fitted on {' '.join(FITTED_ON)} alone"
    return [
        *_rows(", dense", data, dense, fitted, in_sample=False),
        *_rows(", MoE", f"{data}, routing as on the default board", moe, SPREAD, in_sample=False),
        *_rows(
            ", MoE with its own routing", f"{FOLDER}; popularity of experts fitted to the step times in which this run drains",
            routing, "", in_sample=True,
        ),
    ]  # fmt: skip


def told(run: Run, model: StepModel) -> str:
    """The signed errors of a run, in words."""
    measured, said = latencies(run.requests), latencies(simulate(run, model))
    return ", ".join(f"{name} {100.0 * (said[name] / measured[name] - 1.0):+.1f} %" for name in AT_MOST)


def _rows(
    which: str, data: str, cases: Sequence[tuple[Run, StepModel]], note: str, *, in_sample: bool
) -> list[CheckRow]:
    """One row a latency, one residual a run; none where there is no run."""
    if not cases:
        return []
    settings = "; ".join(described(run, model) for run, model in cases)
    pairs = [(run, latencies(run.requests), latencies(simulate(run, model))) for run, model in cases]
    return [
        error_row(
            f"request timelines of vLLM 0.19{which}, {name}",
            data,
            [
                Residual(group=run.name, x=float(i), measured=measured[name], predicted=said[name])
                for i, (run, measured, said) in enumerate(pairs)
            ],
            at_most=at_most,
            x_axis="run",
            note=f"{EDGE if name == 'TTFT p90' else ''}{f'{note}; ' if note else ''}read off the time series: {settings}",
            in_sample=in_sample,
        )
        for name, at_most in AT_MOST.items()
    ]


def described(run: Run, model: StepModel) -> str:
    """The settings that were read off a run's time series."""
    blocks = f"{run.kv_blocks} KV blocks" if run.kv_blocks else "KV blocks from memory"
    spread = f", popularity spread {model.constants.popularity_cv:.2f}" if model.shape.experts else ""
    return f"{run.name}: {run.max_num_seqs} sequences, {blocks}{spread}"


def fit(folder: Path) -> dict[str, dict[str, Any]]:
    """Host time of a step on the workstation boards, from the requests' TPOT of the run `FITTED_ON`, for `step_constants.json`.

    Kernels were profiled in this very engine, layer by layer, so nothing is between a kernel and what the engine makes of it.

    Raises:
        ConfigError: the run is not in `folder`.
    """
    run = next((r for r in read_runs(folder) if r.fitted), None)
    if run is None:
        raise ConfigError(
            f"the run {' on '.join(FITTED_ON[::-1])} is not in {folder / FOLDER}; host time cannot be fitted"
        )
    plain, base = step_model(folder, run), asdict(step_constants(board_specs()[fitted_constants()["_default"]]))
    tokens = np.maximum(1, run.requests["output_tokens"] - 1)
    measured_s = (run.requests["last_token_s"] - run.requests["first_token_s"]) / tokens

    def errors(x: Any) -> Any:
        host = {"host_s": x[0] * 1e-3, "host_per_sequence_s": x[1] * 1e-5}
        model = plain.changed(StepConstants(**{**base, **IN_ENGINE, **host}))
        served = simulate(run, model)
        return np.log((served["last_token_s"] - served["first_token_s"]) / tokens / measured_s)

    found = least_squares(errors, [0.8, 1.0], bounds=([0.0, 0.0], [5.0, 5.0]), diff_step=0.05)
    host = {"host_s": float(f"{found.x[0] * 1e-3:.4g}"), "host_per_sequence_s": float(f"{found.x[1] * 1e-5:.4g}")}
    values = {**base, **IN_ENGINE, **host}
    return {
        BOARDS[board]: {
            "source": f"vLLM 0.19, host time of {' '.join(FITTED_ON)}; kernels profiled in the engine; experts as the default board",
            "confidence": confidence,
            "values": values,
        }
        for board, confidence in (("RTXPRO6000", "B"), ("RTX4090", "C"))
    }


#: Why a MoE run misses as long as nobody tells how its text is routed.
SPREAD = (
    "how unevenly this text uses the experts decides the step time, and nothing but the run tells it: forced output lengths make the model "
    "repeat itself"
)
#: Why the p90 can miss where mean and end-to-end are met.
EDGE = (
    "where about a tenth of the requests wait for a slot, p90 lies on the edge between a step's wait and a queue of seconds, and a "
    "percent of decode speed moves it by a second; "
)

#: Of kernels profiled in the engine.
IN_ENGINE = {
    "layer_gap_s": 0.0, "moe_gap_s": 0.0, "expert_factor": 1.0, "attention_factor": 1.0,
}  # fmt: skip
