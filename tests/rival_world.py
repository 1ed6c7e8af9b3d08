"""A small engine under a small load, for the rivals that know the truth."""

from __future__ import annotations

from typing import Any

import numpy as np

from pals.core.quantities import Slo
from pals.engines.model_zoo import shipped_config
from pals.experiments.fixed_run import ClosedLoop, RivalTask
from pals.experiments.simulated_run import Simulation
from pals.plant.specs import board_specs
from pals.plant.workload import Workload

MODEL = "allenai/OLMoE-1B-7B-0924"
SLO = Slo(ttft_p95_s=0.5, tpot_p95_s=0.012)


def arrivals(seconds: float, rate_per_s: float, *, seed: int = 0, burst: tuple[float, float] = (0.0, 0.0)) -> Workload:
    """Poisson arrivals of mixed lengths, five times as many within `burst` (from, to; seconds)."""
    rng = np.random.default_rng(seed)
    times = [np.sort(rng.uniform(0.0, seconds, round(seconds * rate_per_s)))]
    times.append(rng.uniform(*burst, round(4 * rate_per_s * (burst[1] - burst[0]))))
    arrival_s = np.sort(np.concatenate(times))
    count = len(arrival_s)
    return Workload(
        name="a test's load", arrival_s=arrival_s, prompt_tokens=rng.integers(50, 900, count).astype(np.int32),
        output_tokens=rng.integers(20, 200, count).astype(np.int32), prefix_tokens=np.zeros(count, np.int32),
    )  # fmt: skip


def simulation(load: Workload | None = None) -> Simulation:
    """OLMoE on one A100, sixty-four sequences at most."""
    return Simulation(
        model=MODEL, config=shipped_config(MODEL), spec=board_specs()["a100-sxm4-80gb"], boards=1, max_num_seqs=64,
        max_num_batched_tokens=2048, prefix_caching=True, board_seed=3, context_tokens=4096,
        workload=load if load is not None else arrivals(60.0, 6.0),
    )  # fmt: skip


def task(load: Workload | None = None, **more: Any) -> RivalTask:
    """That engine under `load`, with targets that the slowest points miss."""
    return RivalTask(sim=simulation(load), **{"slo": SLO, **more})


def closed(in_flight: int = 32, *, measured_s: float = 20.0) -> ClosedLoop:
    """A closed loop over a few lengths."""
    return ClosedLoop(supply=arrivals(10.0, 10.0, seed=5), in_flight=in_flight, warmup_s=5.0, measured_s=measured_s)
