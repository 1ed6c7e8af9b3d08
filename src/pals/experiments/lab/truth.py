"""Rivals that ask the plant itself: what they choose is then run like any policy, through the same tick, load and meters as all.

The searches serve shorter spans of a closed loop than the run that follows: it is the same at every moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pals.core.quantities import Budget, Decision, OperatingPoint, Slo, TelemetrySample
from pals.experiments.fixed_run import ClosedLoop, RivalTask
from pals.experiments.lab.loads import OpenLoop
from pals.experiments.lab.run import RunTask
from pals.experiments.oracle import oracle
from pals.experiments.simulated_profile import requests_of_mix
from pals.experiments.static_best import grid_of, static_best
from pals.models.node_power import MOST, OFFSET_W, SLOPE, share_of_nodes

STATIC_BEST, ORACLE = "static-best", "oracle"
TRUTHFUL = (STATIC_BEST, ORACLE)
WARMUP_S, MEASURED_S = 20.0, 60.0  # of a closed loop in a search
#: Levels that the oracle may choose from in each window, beside the best static point. A closed loop never lacks work: there
#: a smaller batch or a lower limit has nothing to answer to, and the clock alone is left.
OPEN_LEVELS: dict[str, int] = {"limits": 2, "clocks": 7, "batches": 2}
CLOSED_LEVELS: dict[str, int] = {"limits": 1, "clocks": 9, "batches": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """A controller that sets each of `points` from its time on; the first from the start."""

    points: tuple[OperatingPoint, ...]
    from_s: tuple[float, ...]
    again_s: float = float("inf")  # from the first of these times on, all over again after so long

    def initial(self) -> None:
        """Nothing is remembered."""

    def step(
        self, state: None, sample: TelemetrySample, budget: Budget, slo: Slo, now_s: float
    ) -> tuple[Decision, None]:
        """The point of this time."""
        first_s = self.from_s[0]
        at_s = first_s + (now_s - first_s) % self.again_s if now_s > first_s else now_s
        begun = sum(since <= at_s for since in self.from_s)
        return Decision(point=self.points[max(0, begun - 1)], reason="scheduled"), None


def with_truth(task: RunTask) -> RunTask:
    """`task` as its policy would have it run if that is a rival that knows the truth; otherwise unchanged.

    Raises:
        ConfigError: no request is answered, or faults are asked for, which these rivals do not know.
    """
    if task.policy not in TRUTHFUL:
        return task
    search = _search_task(task)
    held = static_best(search)
    fixed = replace(task, policy="static", point=held.point)
    if task.policy == STATIC_BEST:
        return fixed
    closed = not isinstance(task.load, OpenLoop)
    coarse: Sequence[OperatingPoint] = grid_of(search.guard, **(CLOSED_LEVELS if closed else OPEN_LEVELS)).points
    found = oracle(search, tuple(dict.fromkeys((held.point, *coarse))))
    if held.rank <= found.rank:  # it decides window by window: where nothing changes, that need not be best
        return fixed
    later_s = task.load.warmup_s - WARMUP_S if closed else 0.0
    taken = Scheduled(
        points=found.points, from_s=tuple(t + later_s for t in found.from_s),
        again_s=MEASURED_S if closed else float("inf"),
    )  # fmt: skip
    return replace(task, policy="static", controller=taken)


def _search_task(task: RunTask) -> RivalTask:
    """The same engine, load and targets, as the searches want them."""
    sim, load = task.sim, task.load
    nodes = -(-sim.boards // MOST)  # what the searches count
    if isinstance(load, OpenLoop):
        sim, loop = replace(sim, workload=load.workload), None
    else:
        loop = ClosedLoop(
            supply=requests_of_mix(load.mix, task.rng()),
            in_flight=load.in_flight,
            warmup_s=WARMUP_S,
            measured_s=MEASURED_S,
        )
    return RivalTask(
        sim=sim, slo=task.slo, budget=task.budget, loop=loop, objective=task.objective, lowering=task.lowering, node_slope=SLOPE,
        node_offset_w=OFFSET_W * share_of_nodes(sim.boards) / nodes,
    )  # fmt: skip
