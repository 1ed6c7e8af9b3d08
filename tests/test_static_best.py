"""The best fixed point: what it is judged by, and that the search finds what an exhaustive one does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pals.core.errors import ConfigError
from pals.core.quantities import OperatingPoint, Slo
from pals.experiments.fixed_run import RivalTask, found_point, needed_tokens_per_s, run_fixed
from pals.experiments.static_best import Grid, grid_of, static_best
from pals.plant.faults import FaultEvent, FaultSchedule
from pals.runtime.budgets import parse_budget
from tests.rival_world import SLO, arrivals, closed, simulation, task

pytest.importorskip("numba")
SMALL = Grid(limits_w=(400.0, 250.0, 100.0), clocks_mhz=(None, 1140, 885, 630), sequences=(64, 32))
SLOW = OperatingPoint(power_limit_w=100.0, active_sequences=64)


def test_a_fixed_run_counts_what_the_plant_says_of_the_same_requests() -> None:
    asked = task(arrivals(30.0, 6.0))
    o = run_fixed(asked, found_point(asked))
    replica = asked.sim.replica()
    replica.submit(asked.sim.workload)
    replica.run(chunk_s=1.0)
    times = replica.results()
    first_s, last_s = float(asked.sim.workload.arrival_s[0]), float(times.last_token_s.max())

    assert o.answered == o.requests == len(asked.sim.workload)
    assert o.tokens == asked.sim.workload.output_tokens.sum()
    assert o.span_s == pytest.approx(last_s - first_s, rel=1e-9)
    np.testing.assert_allclose(np.sort(o.ttft_s), np.sort(times.first_token_s - asked.sim.workload.arrival_s))
    assert o.gpu_energy_j == pytest.approx(replica.energy_j(), rel=0.03)
    assert o.node_energy_j == pytest.approx(1.05 * o.gpu_energy_j + 345.0 * o.span_s)
    assert o.energy_per_token_j == pytest.approx(o.node_energy_j / o.tokens)


def test_of_points_that_keep_the_targets_the_cheapest_wins_and_the_search_misses_none() -> None:
    asked = task()
    every = [run_fixed(asked, p, needed_tokens_per_s=needed_tokens_per_s(asked)) for p in SMALL.points]
    found = static_best(asked, SMALL)

    assert found.meets
    assert found.missed["tpot_p95_s"] <= 0.05
    assert found.energy_per_token_j == min(o.energy_per_token_j for o in every if o.meets)
    assert found.energy_per_token_j < 0.9 * run_fixed(asked, found_point(asked)).energy_per_token_j
    assert any(o.energy_per_token_j < found.energy_per_token_j for o in every)  # cheaper ones miss
    assert found.runs <= 24


def test_where_no_point_keeps_the_targets_the_fewest_misses_win() -> None:
    asked = task(slo=replace(SLO, tpot_p95_s=0.004))
    every = [run_fixed(asked, p) for p in SMALL.points]
    found = static_best(asked, SMALL)

    assert not found.meets
    assert found.violation == min(o.violation for o in every)
    assert found.violation > 0.0


def test_the_objective_decides_what_is_cheap() -> None:
    """A node's constant part makes slowness dear."""
    asked = task(loop=closed(), slo=Slo())
    node = static_best(asked, SMALL)
    gpu = static_best(replace(asked, objective="gpu"), SMALL)

    assert gpu.gpu_energy_j / gpu.tokens <= node.gpu_energy_j / node.tokens
    assert node.node_energy_j / node.tokens <= gpu.node_energy_j / gpu.tokens
    assert gpu.energy_per_token_j == gpu.gpu_energy_j / gpu.tokens
    steep = static_best(replace(asked, node_offset_w=5000.0), SMALL)
    assert steep.tokens_per_s >= node.tokens_per_s
    assert steep.tokens_per_s > gpu.tokens_per_s


def test_a_closed_loop_is_measured_after_its_warm_up_and_held_to_its_throughput() -> None:
    asked = task(loop=closed(), slo=Slo(throughput_share=0.9))
    free, slow = run_fixed(asked, found_point(asked)), run_fixed(asked, SLOW)
    needed = needed_tokens_per_s(asked)

    assert free.span_s == slow.span_s == 20.0
    assert needed == pytest.approx(0.9 * free.tokens_per_s)
    assert free.requests < 20.0 * free.tokens_per_s / 60
    assert 2 * slow.tokens_per_s < free.tokens_per_s
    found = static_best(asked, SMALL)
    assert found.tokens_per_s >= needed
    assert found.energy_per_token_j < free.energy_per_token_j


def test_requests_that_arrive_by_themselves_need_no_more_throughput_than_they_ask_for() -> None:
    asked = task(slo=Slo(throughput_tokens_s=1e6))
    offered = asked.sim.workload.output_tokens.sum() / asked.sim.workload.period_s

    assert needed_tokens_per_s(asked) == pytest.approx(0.95 * offered)
    assert static_best(asked, SMALL).meets


def test_a_budget_lowers_the_fixed_limit_while_it_lasts_and_is_kept() -> None:
    load = task(arrivals(60.0, 14.0), slo=Slo())
    free = run_fixed(load, found_point(load))
    budget = parse_budget("0:none,20:150,40:none")
    held = run_fixed(replace(load, budget=budget), found_point(load))
    whole = run_fixed(replace(load, budget=parse_budget("150")), found_point(load))

    assert free.gpu_energy_j / free.span_s > 160.0
    assert whole.gpu_energy_j / whole.span_s <= 150.0
    assert whole.gpu_energy_j < held.gpu_energy_j < free.gpu_energy_j
    assert whole.over_budget_s <= 2.0  # idle boards wake at their top clock
    assert held.over_budget_s <= 2.0  # the step down itself, while its first half-second is in the mean
    assert free.over_budget_s == 0.0


def test_points_that_a_budget_makes_equal_are_served_once() -> None:
    asked = task(arrivals(20.0, 6.0), budget=parse_budget("102.1"))

    assert static_best(asked, replace(SMALL, clocks_mhz=(None,), sequences=(64,))).runs == 1


def test_the_default_grid_spans_what_boards_and_engine_take() -> None:
    grid = grid_of(task().guard)

    assert (grid.limits_w[0], grid.limits_w[-1]) == (400.0, 100.0)
    assert grid.clocks_mhz[0] is None
    assert all(mhz in task().guard.sm_clocks_mhz for mhz in grid.clocks_mhz if mhz is not None)
    assert grid.sequences == (64, 32, 16, 8)


def test_what_cannot_be_answered_honestly_is_refused() -> None:
    faults = FaultSchedule(events=(FaultEvent(time_s=1.0, kind="thermal_slowdown"),))
    with pytest.raises(ConfigError, match="know no faults"):
        RivalTask(sim=replace(simulation(), faults=faults), slo=SLO)
    with pytest.raises(ConfigError, match="no request and no closed loop"):
        task(arrivals(60.0, 6.0).between(60.0, 61.0))
