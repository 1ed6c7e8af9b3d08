"""What each engine of a fleet really gives and draws at fixed points, served on its own plant, and the best way to divide a budget by it.

The loads are the same at every moment, so no division that changes with time can be better: the best allocation is the oracle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pals.control.guard import Guard
from pals.core.quantities import OperatingPoint, Slo
from pals.experiments.lab.engines import EngineCase, locked
from pals.experiments.lab.figures import WINDOW_S
from pals.experiments.lab.fleet_run import FleetTask, run_fleet
from pals.experiments.lab.loads import ClosedLoop
from pals.experiments.lab.run import RUNNING, RunTask
from pals.experiments.profile_checks.kept import digest_of
from pals.experiments.simulated_node import SimulatedBoard, SimulatedGroup
from pals.models.node_power import OFFSET_W, SLOPE, share_of_nodes

FloatArray = NDArray[np.float64]
STATIC_BEST, ORACLE, GUARDED = "static-best", "oracle", "oracle-guard"  # the last one: within the guard's margin
MARGIN = 0.02  # of the budget, that the guard leaves free
LIMITS, CLOCKS = 22, 13  # levels of each lever
BATCHES = (1.0, 0.75, 0.5)  # of the launch batch
LOWEST_CLOCK = 0.45  # of the top clock; below, a board only loses
WARMUP_S, SPAN_S = 20.0, 60.0
PEAK = 99.0  # percentile of the windows of one second
EQUAL = 0.005  # of periods that miss: allocations so near count as equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What one point did, on the plant."""

    point: OperatingPoint
    tokens_per_s: float
    power_w: float  # all boards, mean
    peak_w: float  # `PEAK` of the windows of one second
    promised_w: float  # what the boards' limits hold them to; of a clock lock, the peak: a limit that never bites
    missed: float  # share of periods below the target


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """A point for each engine."""

    points: tuple[OperatingPoint, ...]
    missed: float  # mean over engines
    promised_w: float
    peak_w: float


def points_of(guard: Guard) -> list[OperatingPoint]:
    """Limits alone and clock locks alone, with the larger batches: where both would act, one of them does nothing."""
    launch = guard.launch_sequences
    limits_w = sorted({float(round(w)) for w in np.geomspace(guard.min_limit_w, guard.max_limit_w, LIMITS)})
    clocks: list[int] = []
    if guard.sm_clocks_mhz:
        top = guard.sm_clocks_mhz[-1]
        wanted = [guard.supported_clock_mhz(round(mhz)) for mhz in np.linspace(LOWEST_CLOCK * top, top, CLOCKS)[:-1]]
        clocks = sorted({mhz for mhz in wanted if mhz is not None})
    batches = dict.fromkeys(max(1, round(share * launch)) for share in BATCHES)
    return [
        OperatingPoint(power_limit_w=w, sm_clock_mhz=mhz, active_sequences=n)
        for n in batches
        for w, mhz in [*((w, None) for w in limits_w), *((guard.max_limit_w, mhz) for mhz in clocks)]
    ]


def served_points(engine: EngineCase, load: ClosedLoop, target_tokens_s: float, place: Path) -> list[Served]:
    """Every point of `points_of`, served by this engine; kept below `place`."""
    load = replace(load, warmup_s=WARMUP_S, span_s=SPAN_S)
    about = f"{asdict(engine)} {load!r} {target_tokens_s!r} {digest_of(*RUNNING, 'experiments/lab/fleet_*.py')}"
    path = place / "truth" / f"{engine.slug}--{sha256(about.encode()).hexdigest()[:12]}.json"
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            fresh = path.with_suffix(f".{os.getpid()}.new")
            fresh.write_text(json.dumps([asdict(s) for s in _serve(engine, load, target_tokens_s)]), encoding="utf-8")
            fresh.replace(path)
    kept = json.loads(path.read_text(encoding="utf-8"))
    return [Served(**(line | {"point": OperatingPoint(**line["point"])})) for line in kept]


def _serve(engine: EngineCase, load: ClosedLoop, target_tokens_s: float) -> list[Served]:
    sim, slo = engine.simulation(), Slo(throughput_tokens_s=target_tokens_s)
    boards = SimulatedGroup(sim.replica(), sim.spec, sim.boards)
    guard = Guard.of([SimulatedBoard(boards, i).info for i in range(sim.boards)], sim.max_num_seqs)
    found = []
    for point in points_of(guard):
        task = RunTask(sim=sim, load=load, policy="static", point=point, slo=slo, seed=engine.seed)
        ran = run_fleet(FleetTask(members=(task,)))
        _, power_w, _ = ran.ledger.windows(WINDOW_S)
        peak_w, figures = float(np.percentile(power_w, PEAK)), ran.members[0]
        promised_w = peak_w if point.sm_clock_mhz is not None else min(peak_w, point.power_limit_w * sim.boards)
        found.append(
            Served(
                point=point, tokens_per_s=figures.tokens_per_s, power_w=figures.mean_power_w, peak_w=peak_w,
                promised_w=promised_w, missed=figures.throughput_missed,
            )
        )  # fmt: skip
    return found


def best_allocation(engines: Sequence[Sequence[Served]], budget_w: float, *, boards: int, by_peak: bool) -> Allocation:
    """The points whose watts fit `budget_w`, that miss least, and of these the most tokens per joule of node energy; exhaustive.

    Args:
        engines: what each was seen to do.
        budget_w: of all boards of all engines.
        boards: of one engine.
        by_peak: what must fit is the peak draw that was seen; otherwise what the boards' limits promise.

    Where nothing fits, the least hungry points.
    """
    kept = [_undominated(e, by_peak=by_peak) for e in engines]
    watts = _sums([[_held_w(s, by_peak=by_peak) for s in e] for e in kept])
    missed = _sums([[s.missed for s in e] for e in kept]) / len(engines)
    tokens, power = _sums([[s.tokens_per_s for s in e] for e in kept]), _sums([[s.power_w for s in e] for e in kept])
    efficiency = tokens / (SLOPE * power + OFFSET_W * share_of_nodes(boards) * len(engines))
    fits = watts <= budget_w
    if fits.any():
        least = np.where(fits, missed, np.inf).min()
        index = np.where(fits & (missed <= least + EQUAL), efficiency, -np.inf).argmax()
    else:
        index = watts.argmin()
    chosen = [e[i] for e, i in zip(kept, np.unravel_index(index, watts.shape), strict=True)]
    return Allocation(
        points=tuple(s.point for s in chosen),
        missed=float(np.mean([s.missed for s in chosen])),
        promised_w=sum(s.promised_w for s in chosen),
        peak_w=sum(s.peak_w for s in chosen),
    )


def _held_w(served: Served, *, by_peak: bool) -> float:
    return served.peak_w if by_peak else served.promised_w


def _undominated(engine: Sequence[Served], *, by_peak: bool) -> list[Served]:
    """Without points that draw more, miss more and give fewer tokens than another: fewer combinations to look at."""

    def worse(a: Served, b: Served) -> bool:
        mine = (_held_w(a, by_peak=by_peak), a.missed, a.power_w, -a.tokens_per_s)
        its = (_held_w(b, by_peak=by_peak), b.missed, b.power_w, -b.tokens_per_s)
        return mine != its and all(m >= i for m, i in zip(mine, its, strict=True))

    return [a for a in engine if not any(worse(a, b) for b in engine)]


def _sums(values: Sequence[Sequence[float]]) -> FloatArray:
    """The sum for every combination; one axis an engine."""
    total = np.zeros(())
    for i, each in enumerate(values):
        total = total + np.asarray(each).reshape([-1 if j == i else 1 for j in range(len(values))])
    return np.asarray(total)
