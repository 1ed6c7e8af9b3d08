"""Runs of real vLLM over emulated boards in virtual time, recorded once: what the discrete-event simulator is compared with.

A run takes up to half a minute, so its figures are kept in `experiments/data/`, with a digest of the plant's constants they
belong to. `python -m pals.experiments.plant_checks.discrete_events --record` makes the file anew.
"""

from __future__ import annotations

import csv
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from pals.core.architecture import ModelShape
from pals.core.errors import ConfigError
from pals.core.quantities import Checked
from pals.engines.emulated_world import emulating
from pals.engines.model_zoo import full_name, local_folder, shipped_config
from pals.engines.openai_client import RequestSpec
from pals.experiments.trace import load_slice
from pals.plant.llm_step import StepModel
from pals.plant.specs import BoardSpec, parse_boards
from pals.plant.workload import Workload

FILE = "discrete-events-emulated.csv"
BOARD_SEED, PROMPT_SEED = 7, 7
LEAD_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run: a model on boards at a fixed operating point under a slice of the Azure 2023 conversation trace."""

    model: str
    boards: str
    max_num_seqs: int
    max_num_batched_tokens: int
    seconds: float  # of the slice
    time_scale: float  # of its arrivals: 0.5 doubles the rate
    power_limit_w: float
    sm_clock_mhz: int | None = None

    @property
    def name(self) -> str:
        """What the table calls it."""
        lock = f", {self.sm_clock_mhz} MHz" if self.sm_clock_mhz else ""
        return f"{self.model} on {self.boards}, {self.power_limit_w:.0f} W{lock}, rate x{1 / self.time_scale:.3g}"

    @property
    def specs(self) -> list[RequestSpec]:
        """The requests, times from the start of the run."""
        return [replace(s, at_s=LEAD_S + s.at_s) for s in load_slice(self.seconds, time_scale=self.time_scale)]


CASES: tuple[Case, ...] = (
    Case(model="Mixtral-8x7B-v0.1", boards="4xa100-sxm4-80gb", max_num_seqs=128, max_num_batched_tokens=8192,
         seconds=60.0, time_scale=1.0, power_limit_w=400.0),
    Case(model="Mixtral-8x7B-v0.1", boards="4xa100-sxm4-80gb", max_num_seqs=128, max_num_batched_tokens=8192,
         seconds=120.0, time_scale=0.5, power_limit_w=250.0),
    Case(model="Qwen3-30B-A3B", boards="h100-sxm5-80gb", max_num_seqs=256, max_num_batched_tokens=8192,
         seconds=60.0, time_scale=1.0, power_limit_w=700.0, sm_clock_mhz=1410),
    Case(model="Qwen3-30B-A3B", boards="h100-sxm5-80gb", max_num_seqs=256, max_num_batched_tokens=8192,
         seconds=120.0, time_scale=1 / 3, power_limit_w=700.0),
    Case(model="DeepSeek-V3", boards="8xh200-sxm5-141gb", max_num_seqs=256, max_num_batched_tokens=8192,
         seconds=60.0, time_scale=1.0, power_limit_w=700.0),
    Case(model="DeepSeek-V3", boards="8xh200-sxm5-141gb", max_num_seqs=256, max_num_batched_tokens=8192,
         seconds=120.0, time_scale=0.5, power_limit_w=500.0),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures(Checked):
    """What a run came to; seconds, joules, watts of all boards."""

    requests: int
    output_tokens: int
    preemptions: int
    last_token_s: float
    ttft_mean_s: float
    ttft_p95_s: float
    tpot_mean_s: float
    tpot_p95_s: float
    tokens_per_j: float
    mean_power_w: float


def figures(specs: Sequence[RequestSpec], first_s: Any, last_s: Any, *, energy_j: float, preemptions: int) -> Figures:
    """Put a run's figures together; energy is that from the first arrival to the last token."""
    sent_s = np.array([s.at_s for s in specs])
    tokens = np.array([s.output_tokens for s in specs])
    ttft_s = first_s - sent_s
    several = tokens > 1
    tpot_s = (last_s - first_s)[several] / (tokens[several] - 1)
    return Figures(
        requests=len(specs),
        output_tokens=int(tokens.sum()),
        preemptions=preemptions,
        last_token_s=float(last_s.max()),
        ttft_mean_s=float(ttft_s.mean()),
        ttft_p95_s=float(np.percentile(ttft_s, 95)),
        tpot_mean_s=float(tpot_s.mean()),
        tpot_p95_s=float(np.percentile(tpot_s, 95)),
        tokens_per_j=float(tokens.sum() / energy_j),
        mean_power_w=float(energy_j / (last_s.max() - sent_s.min())),
    )


def workload_of(specs: Sequence[RequestSpec], name: str) -> Workload:
    """The same requests for the simulator; prompts share nothing."""
    return Workload(
        name=name,
        arrival_s=np.array([s.at_s for s in specs]),
        prompt_tokens=np.array([s.prompt_tokens for s in specs], np.int32),
        output_tokens=np.array([s.output_tokens for s in specs], np.int32),
        prefix_tokens=np.zeros(len(specs), np.int32),
    )


def step_model(case: Case) -> tuple[StepModel, BoardSpec, int]:
    """The case's step model, board type and number of boards."""
    spec, count = parse_boards(case.boards)
    shape = ModelShape.from_config(shipped_config(full_name(case.model)))
    return StepModel(shape, spec, tensor_parallel=count), spec, count


def digest(case: Case) -> str:
    """Changes whenever the plant's step times, KV capacity or power constants for this case do."""
    model, spec, count = step_model(case)
    h = hashlib.blake2b(digest_size=8)
    for part in (*model.tables, *spec.silicon, *spec.firmware, model.kv_capacity_bytes(0.9), count):
        h.update(np.asarray(part, dtype=np.float64).tobytes())
    return h.hexdigest()


def emulate(case: Case, say: Callable[[str], None]) -> Figures:
    """Serve the case with real vLLM in virtual time."""
    from pals.engines.virtual_engine import VirtualTrace
    from pals.experiments.virtual_run import BANK_FILE, VirtualNode, running

    spec, count = parse_boards(case.boards)
    options = ["--tensor-parallel-size", str(count), "--max-num-seqs", str(case.max_num_seqs),
               "--max-num-batched-tokens", str(case.max_num_batched_tokens)]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="pals-discrete-events-") as scratch:
        folder = Path(scratch)
        with emulating(full_name(case.model), folder, folder / BANK_FILE):
            node = VirtualNode(
                model=local_folder(case.model, folder / "models"), options=options, spec=spec, count=count,
                board_seed=BOARD_SEED, folder=folder,
            )  # fmt: skip
            with running(node) as live:
                for i in range(count):
                    live.bank.set_limit(i, case.power_limit_w, 0.0)
                    if case.sm_clock_mhz is not None:
                        live.bank.set_clock_lock(i, 0.0, float(case.sm_clock_mhz), 0.0)
                specs = case.specs
                trace = VirtualTrace(live.engine, specs, seed=PROMPT_SEED, start_s=0.0)
                live.engine.serve(until_s=specs[0].at_s, done=lambda: False)
                before_j = sum(live.bank.energy_integral_j(i, live.clock.now_s()) for i in range(count))
                live.engine.serve(until_s=float("inf"), done=lambda: trace.answered)
                after_j = sum(live.bank.energy_integral_j(i, live.clock.now_s()) for i in range(count))
                preemptions = live.channel.read().preemptions
    results = trace.results
    if any(r.error or r.output_tokens != r.spec.output_tokens for r in results):
        raise ConfigError(f"{case.name}: real vLLM did not answer every request in full; nothing was recorded")
    found = figures(
        specs,
        np.array([r.first_token_s for r in results]),
        np.array([r.last_token_s for r in results]),
        energy_j=after_j - before_j,
        preemptions=preemptions,
    )
    say(f"{case.name}: TPOT {1e3 * found.tpot_mean_s:.2f} ms, {found.tokens_per_j:.4f} tokens/J")
    return found


def record(path: Path, say: Callable[[str], None]) -> None:
    """Serve every case and write the file."""
    rows = [{**asdict(case), "digest": digest(case), **asdict(emulate(case, say))} for case in CASES]
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def recorded() -> list[tuple[Case, str, Figures]]:
    """The cases of the committed file, the digest each was recorded with, and its figures."""
    text = (files("pals.experiments") / "data" / FILE).read_text(encoding="utf-8")
    rows = []
    for row in csv.DictReader(text.splitlines()):
        rows.append((_read(Case, row), row["digest"], _read(Figures, row)))
    return rows


def _read(kind: type, row: dict[str, str]) -> Any:
    """A dataclass from the row's columns of its fields' names; an empty cell is None."""
    readers: dict[str, Callable[[str], object]] = {"str": str, "int": int, "float": float}
    values = {}
    for f in fields(kind):
        reader = readers[str(f.type).split(" ")[0]]
        values[f.name] = reader(row[f.name]) if row[f.name] else None
    return kind(**values)
