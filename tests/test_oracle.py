"""The oracle is never worse than the best fixed point, keeps what can be kept, and moves with the load."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pals.core.quantities import OperatingPoint, Slo
from pals.experiments.fixed_run import RivalTask, found_point, run_fixed
from pals.experiments.oracle import oracle
from pals.experiments.static_best import Grid, static_best
from pals.plant.workload import Workload
from pals.runtime.budgets import parse_budget
from tests.rival_world import SLO, arrivals, closed, task

pytest.importorskip("numba")
SMALL = Grid(limits_w=(400.0, 200.0), clocks_mhz=(None, 1140, 885, 630), sequences=(64, 32))
WINDOW_S = 10.0
TOLERANCE = 1.01


def uneven(seconds: float = 80.0) -> Workload:
    """Little work, then much for a while."""
    return arrivals(seconds, 3.0, burst=(20.0, 40.0))


@pytest.mark.parametrize(
    "asked",
    [task(), task(uneven(), slo=replace(SLO, tpot_p95_s=0.016)), task(loop=closed(), slo=Slo(throughput_share=0.9)),
     task(uneven(), slo=replace(SLO, tpot_p95_s=0.016), objective="gpu"),
     task(arrivals(40.0, 6.0), slo=Slo(ttft_p99_s=0.4, tpot_p99_s=0.014))],
    ids=["even", "uneven", "closed", "gpu", "p99"],
)  # fmt: skip
def test_the_oracle_is_at_least_as_good_as_the_best_fixed_point_of_the_same_candidates(asked: RivalTask) -> None:
    fixed = static_best(asked, SMALL)
    best = oracle(asked, SMALL.points, window_s=WINDOW_S)

    assert fixed.meets
    assert best.meets
    assert best.energy_per_token_j <= TOLERANCE * fixed.energy_per_token_j
    assert len(best.points) == len(best.from_s) >= 2
    assert set(best.points) <= {found_point(asked), *SMALL.points}


def test_where_load_changes_the_oracle_changes_its_point_and_gains_by_it() -> None:
    asked = task(uneven(), slo=replace(SLO, tpot_p95_s=0.016))
    fixed, best = static_best(asked, SMALL), oracle(asked, SMALL.points, window_s=WINDOW_S)

    assert len(set(best.points)) > 1
    assert best.energy_per_token_j < 0.99 * fixed.energy_per_token_j


def test_a_hopeless_burst_costs_no_more_misses_than_at_the_fastest_point() -> None:
    """And what lies around it is served for less."""
    asked = task(arrivals(80.0, 4.0, burst=(30.0, 40.0)), slo=Slo(ttft_p95_s=0.15, tpot_p95_s=0.009))
    fastest, best = run_fixed(asked, found_point(asked)), oracle(asked, SMALL.points, window_s=WINDOW_S)

    assert fastest.violation > 0.02
    assert best.violation <= fastest.violation + 0.02
    assert best.energy_per_token_j < fastest.energy_per_token_j


def test_candidates_above_the_budget_are_not_taken() -> None:
    asked = task(arrivals(40.0, 10.0), slo=Slo(), budget=parse_budget("0:none,12:160,28:none"))
    best = oracle(asked, SMALL.points, window_s=WINDOW_S)
    held_w = [p.power_limit_w for p, at_s in zip(best.points, best.from_s, strict=True) if 12.0 <= at_s < 28.0]

    assert {12.0, 28.0} <= {round(at_s, 6) for at_s in best.from_s}
    assert held_w
    assert max(held_w) <= 160.0 * 0.98
    assert best.over_budget_s <= 1.5


def test_the_same_question_has_the_same_answer() -> None:
    asked = task(arrivals(30.0, 6.0))
    one, two = (oracle(asked, SMALL.points, window_s=WINDOW_S) for _ in range(2))

    assert (one.points, one.gpu_energy_j, one.violation) == (two.points, two.gpu_energy_j, two.violation)


def test_one_candidate_is_a_fixed_run() -> None:
    asked = task(arrivals(30.0, 6.0), slo=Slo())
    only = found_point(asked)
    best, fixed = (
        oracle(asked, [OperatingPoint(**{f: getattr(only, f) for f in only.__slots__})]),
        run_fixed(asked, only),
    )

    assert best.tokens == fixed.tokens
    assert best.gpu_energy_j == pytest.approx(fixed.gpu_energy_j, rel=1e-3)
    assert best.missed == fixed.missed
