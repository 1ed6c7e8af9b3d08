"""A sweep of a simulated replica: the profiler's own code on event time, and any list of points measured the same way.

Adapters only; figures that come from here are simulated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pals.control.guard import Guard
from pals.control.static import StaticPolicy
from pals.core.architecture import ModelShape
from pals.core.errors import ConfigError
from pals.core.experts import ExpertCounts
from pals.core.load import Mix
from pals.core.quantities import OperatingPoint, fingerprint_of
from pals.experiments.simulated_node import SimulatedBoard, SimulatedEngine, SimulatedGroup
from pals.experiments.simulated_run import Simulation
from pals.models.engine_facts import EngineFacts
from pals.models.row import ProfileRow
from pals.plant.replica import Replica
from pals.plant.workload import Workload
from pals.profiler.chooser import Fit
from pals.profiler.design import Candidate
from pals.profiler.load import Latencies
from pals.profiler.partial import PartialRows
from pals.profiler.plan import SweepPlan, default_clocks, default_limits_w, default_mixes, default_sequences
from pals.profiler.sweep import Progress, sweep
from pals.profiler.visit import Visitor
from pals.runtime.loop import GridClock
from pals.runtime.tick import Rig

SUPPLY, REFILL_BELOW = 4096, 2048  # requests; fewer are used between two looks at the supply
ADVANCE_S = 1.0  # most event time between these
BLOCK = 32  # requests
KEPT_REQUESTS = 200_000  # of a replica that measures many points: then a new one, as it never forgets a request


class SimulatedLoad:
    """A closed loop on a replica: a `LoadDriver` whose lengths are uniform about the mix's means, drawn from a seed."""

    def __init__(self, replica: Replica, rng: np.random.Generator) -> None:
        self._replica, self._rng = replica, rng
        self._mix: Mix | None = None
        self._in_flight, self._first = 0, 0

    def set_load(self, mix: Mix, in_flight: int) -> None:
        """Send requests of `mix` from now on; those sent before end by themselves."""
        if mix != self._mix:
            self._mix, self._first = mix, self._replica.sent_count
            self._replica.keep_in_flight(in_flight, requests_of_mix(mix, self._rng))
        elif in_flight != self._in_flight:
            self._replica.keep_in_flight(in_flight)
        self._in_flight = in_flight

    def refill(self) -> None:
        """Draw more requests before the supply ends."""
        if self._mix is not None and self._replica.unsent_count < REFILL_BELOW:
            self._replica.keep_in_flight(self._in_flight, requests_of_mix(self._mix, self._rng))

    def latencies(self, since_s: float) -> Latencies:
        """See `LoadDriver`; a request counts where its first, or last, token came after `since_s`."""
        r = self._replica.sent(self._first)
        begun, ended = r.first_token_s >= since_s, (r.last_token_s >= since_s) & (r.output_tokens > 1)
        lasted_s = (r.last_token_s - r.first_token_s)[ended]
        return Latencies(
            ttft_s=(r.first_token_s - r.arrival_s)[begun].tolist(),
            tpot_s=(lasted_s / (r.output_tokens[ended] - 1)).tolist(),
        )


def requests_of_mix(mix: Mix, rng: np.random.Generator) -> Workload:
    """`SUPPLY` requests of a closed loop; each length is uniform about its mean, and arrival times do not count."""
    prompt, output, cached = (
        _lengths(mean, mix.spread, rng) for mean in (mix.prompt_tokens, mix.output_tokens, mix.cached_tokens)
    )
    return Workload(
        name=mix.name, arrival_s=np.zeros(SUPPLY), prompt_tokens=np.maximum(prompt, 1) + cached,
        output_tokens=np.maximum(output, 1), prefix_tokens=cached,
    )  # fmt: skip


def _lengths(mean: float, spread: float, rng: np.random.Generator) -> np.ndarray:
    """Each block of `BLOCK` requests covers the law evenly, so that chance says little in a window."""
    order = rng.permuted(np.tile(np.arange(BLOCK), (SUPPLY // BLOCK, 1)), axis=1)
    share = (order + rng.random(order.shape)).ravel() / BLOCK
    return np.asarray(np.rint(mean * (1.0 - spread + 2.0 * spread * share)), dtype=np.int32)


class ProfiledReplica(NamedTuple):
    """A replica with all that a sweep needs of it."""

    replica: Replica
    rig: Rig
    engine: SimulatedEngine  # also the rig's
    load: SimulatedLoad
    clock: GridClock


def profiled_replica(
    sim: Simulation, rng: np.random.Generator, stop: Callable[[], bool] = lambda: False
) -> ProfiledReplica:
    """A new replica, idle, behind the protocols of a sweep; waiting lets it work."""
    replica = sim.replica()
    group = SimulatedGroup(replica, sim.spec, sim.boards)
    boards = [SimulatedBoard(group, i) for i in range(sim.boards)]
    guard = Guard.of([b.info for b in boards], sim.max_num_seqs)
    engine, load = SimulatedEngine(replica, sim.engine), SimulatedLoad(replica, rng)
    rig = Rig(
        meters=boards, actuators=boards, engine=engine, setter=engine,
        controller=StaticPolicy(OperatingPoint(power_limit_w=guard.max_limit_w)), guard=guard, period_s=0.5,
    )  # fmt: skip

    def wait(seconds: float) -> bool:
        until_s = replica.now_s + max(0.0, seconds)
        while replica.now_s < until_s:
            load.refill()
            replica.advance(min(until_s, replica.now_s + ADVANCE_S))
        return stop()

    return ProfiledReplica(replica, rig, engine, load, GridClock(now_s=lambda: replica.now_s, wait=wait))


def facts_of(sim: Simulation) -> EngineFacts:
    """What the engine's configuration and its boards' driver would say."""
    spec = sim.spec
    return EngineFacts(
        board=spec.nvml_name,
        boards=sim.boards,
        min_limit_w=spec.min_limit_w,
        max_limit_w=spec.default_limit_w,
        min_sm_clock_mhz=spec.min_sm_clock_mhz,
        max_sm_clock_mhz=spec.max_sm_clock_mhz,
        launch_sequences=sim.max_num_seqs,
        step_tokens=sim.max_num_batched_tokens,
        tensor_parallel=sim.boards,
        shape=ModelShape.from_config(sim.config),
    )


def plan_of(sim: Simulation, *, points: int = 40, seed: int = 0) -> SweepPlan:
    """The default plan of `pals profile` for this engine and these boards."""
    facts, clocks = facts_of(sim), profiled_clocks(sim)
    return SweepPlan(
        mixes=default_mixes(sim.model_context),
        limits_w=default_limits_w(facts.min_limit_w, facts.max_limit_w),
        sequences=default_sequences(sim.max_num_seqs),
        clocks_mhz=default_clocks(clocks),
        points=points,
        seed=seed,
    )


def profiled_clocks(sim: Simulation) -> tuple[int, ...]:
    """Clocks that the simulated boards can be locked at, MHz."""
    group = SimulatedGroup(sim.replica(), sim.spec, sim.boards)
    return SimulatedBoard(group, 0).info.lockable_clocks_mhz


class SimulatedSweep(NamedTuple):
    """What a simulated sweep came to."""

    rows: list[ProfileRow]
    mixes: tuple[Mix, ...]
    facts: EngineFacts
    event_s: float  # engine time it took
    told: list[Progress]
    counted: ExpertCounts | None  # what workers would have counted in it; None: a model without experts


def simulated_sweep(
    sim: Simulation,
    *,
    fit: Fit,
    points: int = 40,
    seed: int = 0,
    plan: SweepPlan | None = None,
    partial: Path | None = None,
    progress: Callable[[Progress], None] = lambda told: None,
    stop: Callable[[], bool] = lambda: False,
) -> SimulatedSweep:
    """A sweep from a cold start.

    Args:
        sim: engine and boards; its requests and faults are not used.
        fit: as `pals.models.fitted.fit`.
        points: most rows, where no plan is given.
        seed: of the requests' lengths, and of ties in the design.
        plan: None: the default one.
        partial: the file of rows under way; None: a temporary one.
        progress: told after each row.
        stop: asked at each wait.

    Raises:
        ConfigError: the model does not fit, or no point could be measured.
        Interrupted: `stop` said so.
    """
    plan = plan or plan_of(sim, points=points, seed=seed)
    node, facts, told = profiled_replica(sim, np.random.default_rng([seed, 0]), stop), facts_of(sim), list[Progress]()

    def tell(so_far: Progress) -> None:
        told.append(so_far)
        progress(so_far)

    with tempfile.TemporaryDirectory(prefix="pals-sweep-") as folder:
        kept = PartialRows(
            partial or Path(folder) / "partial.jsonl",
            fingerprint_of(sim.engine, [m.info for m in node.rig.meters]), facts, plan.mixes,
        )  # fmt: skip
        rows = sweep(
            node.rig, plan, load=node.load, facts=facts, partial=kept, clock=node.clock, fit=fit, progress=tell
        )
    return SimulatedSweep(rows, plan.mixes, facts, node.replica.now_s, told, node.replica.expert_counts())


def measured_truth(
    sim: Simulation, points: Sequence[OperatingPoint], mix: Mix, *, window_s: float = 16.0, seed: int = 0
) -> list[ProfileRow]:
    """Each of `points` measured by the path of a sweep, in windows of at least `window_s`; rows in their order.

    The rows' `mix` is 0. Where a point names no active sequences, the launch batch runs.

    Raises:
        ConfigError: a point could not be measured.
    """
    rng = np.random.default_rng([seed, 1])
    plan = SweepPlan(
        mixes=(mix,), limits_w=(sim.spec.default_limit_w,), sequences=(sim.max_num_seqs,), window_s=window_s,
        read_s=window_s / 8,
    )  # fmt: skip
    rows, node, visitor = list[ProfileRow](), None, None
    for point in points:
        if node is None or visitor is None or node.replica.sent_count > KEPT_REQUESTS:
            node = profiled_replica(sim, rng)
            visitor = Visitor(
                node.rig, node.engine, plan, load=node.load, facts=facts_of(sim), clock=node.clock, begun_s=0.0
            )  # fmt: skip
        sequences = point.active_sequences or sim.max_num_seqs
        visited = visitor.measure(Candidate(replace(point, active_sequences=sequences), 0), until_s=float("inf"))
        if visited.row is None:
            raise ConfigError(f"{point}: {visited.notes[-1]}")
        rows.append(visited.row)
    return rows
