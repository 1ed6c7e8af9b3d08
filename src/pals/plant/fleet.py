"""Many replicas behind a router: who serves what is decided first, from arrivals and lengths alone; then each is simulated by itself.

So a fleet's result does not depend on how many processes work on it. What a router could only know at run time (how long a
replica's answers really take) is estimated beforehand; the estimate is part of the router's description.
"""

from __future__ import annotations

import heapq
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pals.core.errors import ConfigError
from pals.plant.llm_step import StepBatch, StepModel
from pals.plant.replica import Replica, RequestTimes
from pals.plant.specs import BoardSpec
from pals.plant.workload import Workload

FloatArray = NDArray[np.float64]
ROUTERS = ("round-robin", "least-outstanding", "random")
AT_ONCE = 100_000  # requests routed at once: Python's own numbers take ten times an array's room
NODE_SLOPE, NODE_OFFSET_W = 1.05, 345.0  # of a node of 4 to 8 boards; fitted on 4×A100 nodes, arXiv:2605.21427


def node_power_w(boards_w: Any, nodes: int = 1) -> Any:
    """Estimated power of `nodes` whole nodes whose boards draw `boards_w` together, W."""
    return NODE_SLOPE * boards_w + NODE_OFFSET_W * nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSpec:
    """Equal replicas at one fixed operating point; boards differ by seed."""

    model: StepModel
    spec: BoardSpec
    replicas: int
    boards: int  # of one replica
    boards_per_node: int = 8
    power_limit_w: float | None = None  # None: the boards' default
    sm_clock_mhz: int | None = None
    board_seed: int = 0
    power_period_s: float = 60.0
    engine: Mapping[str, Any] = field(default_factory=dict)  # further arguments of `Replica`

    @property
    def nodes(self) -> int:
        """Nodes that hold the boards."""
        return -(-self.replicas * self.boards // self.boards_per_node)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetResult:
    """What came of a fleet's requests, in the order of the workload, and what it drew."""

    replica: NDArray[np.int64]  # who served the request, shape (requests,)
    times: RequestTimes
    power_w: FloatArray  # mean GPU power of each replica in each period, shape (replicas, periods)
    energy_j: FloatArray  # shape (replicas,)
    node_power_w: FloatArray  # of all nodes, shape (periods,)


def route(workload: Workload, fleet: FleetSpec, how: str, *, seed: int = 0) -> NDArray[np.int64]:
    """Which replica serves each request, shape (requests,).

    "round-robin" takes turns; "random" draws, by seed; "least-outstanding" picks the replica with the fewest tokens
    (prompt and output) of requests that are not over by their estimated duration, the first of equals.

    Raises:
        ConfigError: unknown router.
    """
    if how == "round-robin":
        return np.arange(len(workload)) % fleet.replicas
    if how == "random":
        return np.random.default_rng(seed).integers(0, fleet.replicas, len(workload))
    if how != "least-outstanding":
        raise ConfigError(f"unknown router {how!r}; known: {', '.join(ROUTERS)}. Nothing was simulated")
    chosen = np.empty(len(workload), np.int64)
    outstanding, ends = [0] * fleet.replicas, list[tuple[float, int, int]]()
    for first in range(0, len(workload), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        chosen[part] = fewest_outstanding(
            workload.take(np.arange(first, min(first + AT_ONCE, len(workload)))), fleet, outstanding, ends
        )
    return chosen


def fewest_outstanding(
    part: Workload, fleet: FleetSpec, outstanding: list[int], ends: list[tuple[float, int, int]]
) -> list[int]:
    """The replicas with the fewest tokens outstanding; `outstanding` and `ends` (a heap) are carried on from part to part."""
    prompt_s, token_s = estimated_s(fleet)
    tokens = (part.prompt_tokens.astype(np.int64) + part.output_tokens).tolist()
    over_s = (part.arrival_s + part.prompt_tokens * prompt_s + part.output_tokens * token_s).tolist()
    chosen = []
    for i, now_s in enumerate(part.arrival_s.tolist()):
        while ends and ends[0][0] <= now_s:
            _, r, size = heapq.heappop(ends)
            outstanding[r] -= size
        r = outstanding.index(min(outstanding))
        chosen.append(r)
        outstanding[r] += tokens[i]
        heapq.heappush(ends, (over_s[i], r, tokens[i]))
    return chosen


def estimated_s(fleet: FleetSpec) -> tuple[float, float]:
    """Seconds a prompt token and an output token take, for routing: of a 2,048-token chunk, and of a step of 32 sequences."""
    top_mhz = float(fleet.spec.max_sm_clock_mhz)
    chunk = StepBatch(prefill_tokens=2048, prefill_sequences=1, attention_pairs=0.5 * 2048**2)
    decode = StepBatch(decode_sequences=32, context_tokens=32 * 1024)
    return fleet.model.step(chunk, top_mhz).seconds / 2048, fleet.model.step(decode, top_mhz).seconds


def simulate(
    fleet: FleetSpec, workload: Workload, *, router: str, until_s: float, workers: int = 1, seed: int = 0
) -> FleetResult:
    """Serve the workload up to `until_s`; `workers` processes share the replicas, and change nothing but the time it takes.

    Raises:
        ConfigError: unknown router, or whatever `Replica` refuses.
    """
    chosen = route(workload, fleet, router, seed=seed)
    parts = [np.flatnonzero(chosen == r) for r in range(fleet.replicas)]
    jobs = [(fleet, r, workload.take(parts[r]), until_s) for r in range(fleet.replicas)]
    if workers == 1:
        done = [serve_part(*job) for job in jobs]
    else:  # a fresh process each: nothing of this one's state goes along
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            done = [f.result() for f in [pool.submit(serve_part, *job) for job in jobs]]
    return gathered(fleet, chosen, parts, done)


def serve_part(fleet: FleetSpec, index: int, part: Workload, until_s: float) -> tuple[RequestTimes, FloatArray, float]:
    """One replica's share: times, mean power of each period in W, energy in J."""
    replica = Replica(fleet.model, fleet.spec, boards=fleet.boards, board_seed=fleet.board_seed + index, **fleet.engine)
    if fleet.power_limit_w is not None:
        replica.set_limit_w(fleet.power_limit_w)
    replica.set_clock_lock(fleet.sm_clock_mhz)
    replica.submit(part)
    edges_s = np.arange(1, max(1, round(until_s / fleet.power_period_s)) + 1) * fleet.power_period_s
    energy_j = [0.0]
    for edge_s in edges_s:
        replica.advance(float(min(edge_s, until_s)))
        energy_j.append(replica.energy_j())
    return replica.results(), np.diff(energy_j) / fleet.power_period_s, energy_j[-1]


def gathered(
    fleet: FleetSpec,
    chosen: NDArray[np.int64],
    parts: Sequence[NDArray[np.int64]],
    done: Sequence[tuple[RequestTimes, FloatArray, float]],
) -> FleetResult:
    """Results of the parts in the workload's order."""
    times = RequestTimes(
        scheduled_s=np.full(len(chosen), np.nan),
        first_token_s=np.full(len(chosen), np.nan),
        last_token_s=np.full(len(chosen), np.nan),
        preemptions=np.zeros(len(chosen), np.int32),
        refused=np.zeros(len(chosen), np.bool_),
    )
    for part, (found, _, _) in zip(parts, done, strict=True):
        for name in ("scheduled_s", "first_token_s", "last_token_s", "preemptions", "refused"):
            getattr(times, name)[part] = getattr(found, name)
    power_w = np.array([w for _, w, _ in done])
    return FleetResult(
        replica=chosen,
        times=times,
        power_w=power_w,
        energy_j=np.array([j for _, _, j in done]),
        node_power_w=np.asarray(node_power_w(power_w.sum(axis=0), fleet.nodes)),
    )
