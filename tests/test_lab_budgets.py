"""Budgets over several engines and budgets that move: sharing as the agent's, true power, verdicts on promises; tiny simulated cells."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.control.guard import Guard
from pals.core.errors import ConfigError
from pals.core.quantities import OperatingPoint, Slo
from pals.experiments.lab.dynamic_budget import DynamicBudget, DynamicCell
from pals.experiments.lab.engines import EngineCase
from pals.experiments.lab.experiment import Row, Wish
from pals.experiments.lab.fleet import boards_w_of, engine_of, node_w_of
from pals.experiments.lab.fleet_meter import FleetLedger
from pals.experiments.lab.fleet_run import FleetRan, FleetTask, run_fleet
from pals.experiments.lab.fleet_truth import MARGIN, ORACLE, Served, best_allocation
from pals.experiments.lab.loads import ClosedLoop
from pals.experiments.lab.paper_single_node import LENGTHS
from pals.experiments.lab.power_signals import MEAN, RESERVE, levels, read_signal, regulation, regulation_z, shed, steps
from pals.experiments.lab.qos_budget import ALL, ASKED, BUDGETS, QosBudget, QosCell, node_budget_w
from pals.experiments.lab.run import RunTask
from pals.experiments.lab.tracking import longest_shed_s, tracking_of
from pals.runtime.budgets import BudgetSchedule

OLMOE = "allenai/OLMoE-1B-7B-0924"
SHORT = ClosedLoop(mix=LENGTHS, in_flight=48, warmup_s=4.0, span_s=8.0)


@cache
def small(seed: int = 1) -> EngineCase:
    return EngineCase(model=OLMOE, boards="2xa100-sxm4-80gb", seed=seed, launch=32)


def member(**changes: object) -> RunTask:
    return replace(RunTask(sim=small().simulation(), load=SHORT, policy="static"), **changes)  # type: ignore[arg-type]


# ---- several engines under one budget ------------------------------------------------------------------------------


def test_engines_that_share_a_budget_never_draw_more_than_it_together() -> None:
    budget = BudgetSchedule((0.0, 8.0), (900.0, 620.0))

    ran = run_fleet(FleetTask(members=(member(), member(), member()), budget=budget))

    at_s, power_w, budget_w = ran.ledger.windows()
    later = at_s >= 9.0  # a second after the fall
    assert set(budget_w) == {900.0, 620.0}
    assert power_w[later].max() <= 620.0
    assert power_w[later].mean() > 0.9 * 620.0, "the watts are used"


def test_watts_that_one_engine_has_no_use_for_are_shared_as_the_agent_shares_them() -> None:
    boards = member().sim.boards

    ran = run_fleet(FleetTask(members=(member(), member()), budget=BudgetSchedule((0.0,), (500.0,))))

    limit_w = int(0.98 * 250.0 / boards)
    assert [f.mean_power_w for f in ran.members] == pytest.approx([limit_w * boards] * 2, rel=0.02)


def test_nobody_is_told_of_a_budget_that_is_only_held_against_what_is_drawn() -> None:
    free = run_fleet(FleetTask(members=(member(),)))
    held = run_fleet(FleetTask(members=(member(),), budget=BudgetSchedule((0.0,), (100.0,)), steered=False))

    assert held.members[0].gpu_energy_j == free.members[0].gpu_energy_j
    assert tracking_of(held.ledger, None)["over_share"] == 1.0


def test_one_engine_alone_is_what_it_is_in_a_fleet_and_the_same_twice() -> None:
    def figures(ran: FleetRan) -> list[tuple[int, float]]:
        return [(f.output_tokens, f.gpu_energy_j) for f in ran.members]

    alone, both = run_fleet(FleetTask(members=(member(),))), run_fleet(FleetTask(members=(member(), member())))
    assert figures(alone) == figures(both)[:1]
    assert figures(both) == figures(run_fleet(FleetTask(members=(member(), member()))))
    assert figures(both)[0] != figures(both)[1], "each engine has requests of its own"


def test_a_budget_over_engines_of_different_periods_is_refused() -> None:
    with pytest.raises(ConfigError, match="one period"):
        run_fleet(FleetTask(members=(member(), member(period_s=0.25))))


def test_throughput_is_missed_below_the_target_only() -> None:
    free = run_fleet(FleetTask(members=(member(),))).members[0].tokens_per_s
    for share, missed in ((0.5, 0.0), (1.5, 1.0)):
        ran = run_fleet(FleetTask(members=(member(slo=Slo(throughput_tokens_s=share * free)),)))
        assert ran.members[0].throughput_missed == missed
        assert ran.ledger.throughput_missed(4.0) == [missed]


@given(st.floats(500.0, 50_000.0), st.integers(1, 5))
def test_node_power_and_boards_power_are_each_others_inverse(boards_w: float, engines: int) -> None:
    assert boards_w_of(node_w_of(boards_w, engines, 4), engines, 4) == pytest.approx(boards_w)


def test_the_papers_line_and_what_leaves_nothing_for_boards() -> None:
    assert node_w_of(1000.0, 1, 4) == pytest.approx(1.05 * 1000.0 + 345.0)
    with pytest.raises(ConfigError, match="nothing for the boards"):
        boards_w_of(1000.0, 3, 4)


# ---- the best allocation -------------------------------------------------------------------------------------------


def served(watts: float, tokens: float, missed: float) -> Served:
    return Served(
        point=OperatingPoint(power_limit_w=watts, active_sequences=1), tokens_per_s=tokens, power_w=watts, peak_w=watts,
        promised_w=watts, missed=missed,
    )  # fmt: skip


def test_the_best_allocation_gives_watts_to_whom_they_bring_the_target() -> None:
    easy = [served(100.0, 10.0, 0.0), served(200.0, 11.0, 0.0)]
    hard = [served(100.0, 5.0, 1.0), served(300.0, 10.0, 0.0)]

    best = best_allocation([easy, hard], 400.0, boards=4, by_peak=True)

    assert (best.missed, [p.power_limit_w for p in best.points]) == (0.0, [100.0, 300.0])
    assert best_allocation([easy, hard], 399.0, boards=4, by_peak=True).missed == 0.5
    assert best_allocation([easy, hard], 10.0, boards=4, by_peak=True).peak_w == 200.0, "nothing fits: the least hungry"


@given(
    st.lists(st.tuples(st.floats(50, 400), st.floats(1, 100), st.floats(0, 1)), min_size=1, max_size=5),
    st.floats(100, 900),
)
def test_no_allocation_that_fits_misses_less(points: list[tuple[float, float, float]], budget_w: float) -> None:
    engines = [[served(*p) for p in points]] * 2

    best = best_allocation(engines, budget_w, boards=4, by_peak=False)

    every = [(a.promised_w + b.promised_w, (a.missed + b.missed) / 2) for a in engines[0] for b in engines[1]]
    fitting = [missed for watts, missed in every if watts <= budget_w]
    if fitting:
        assert best.promised_w <= budget_w
        assert best.missed <= min(fitting) + 0.005 + 1e-9
    else:
        assert best.promised_w == pytest.approx(min(watts for watts, _ in every))


# ---- budgets that move ---------------------------------------------------------------------------------------------


@given(st.integers(1, 50), st.integers(60, 2000))
def test_the_regulation_signal_has_no_mean_and_stays_in_its_range(seed: int, count: int) -> None:
    z = regulation_z(count, np.random.default_rng(seed))

    assert len(z) == count
    assert abs(z.mean()) < 1e-9, "no net energy"
    assert np.abs(z).max() == pytest.approx(1.0)


def test_the_regulation_signal_is_the_same_twice_and_another_with_another_seed() -> None:
    one = regulation(120.0, 1)

    assert one == regulation(120.0, 1)
    assert one.values != regulation(120.0, 2).values
    assert min(one.values) >= MEAN - RESERVE - 1e-9
    assert one.reserve_w(1000.0) == pytest.approx(150.0)


def test_a_signal_begins_when_the_warm_up_ends() -> None:
    schedule = levels("x", (1.0, 0.5), (10.0, 10.0)).schedule(1000.0, 60.0)

    assert [schedule.at(t).power_w for t in (0.0, 60.0, 69.9, 70.0)] == [1000.0, 1000.0, 1000.0, 500.0]


@pytest.mark.parametrize(
    ("text", "natural_w", "expected_w"),
    [("time_s,share\n0,1\n10,0.7\n", 1000.0, 700.0), ("time_s,power_w\n0,900\n10,650\n", 1000.0, 650.0)],
)
def test_a_file_of_shares_or_watts(tmp_path: Path, text: str, natural_w: float, expected_w: float) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(text)

    signal = read_signal(path)

    assert (signal.name, signal.span_s) == ("mine", 20.0)
    assert signal.schedule(natural_w, 5.0).at(16.0).power_w == pytest.approx(expected_w)


@pytest.mark.parametrize(
    "text",
    ["", "a,b\n0,1\n", "time_s,share\n0,1\n", "time_s,share\n5,1\n6,1\n", "time_s,share\n0,1\n0,1\n", "time_s,share\n0,1\n1,70\n",
     "time_s,share\n0,1\n1,x\n", "time_s,power_w\n0,none\n1,5\n"],
)  # fmt: skip
def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ConfigError):
        read_signal(path)
    with pytest.raises(ConfigError):
        read_signal(tmp_path / "missing.csv")


def ledger(power_w: list[float], budget_w: list[float]) -> FleetLedger:
    """Powers of half seconds, the budget in force in each."""
    energy_j = np.concatenate([[0.0], np.cumsum(np.array(power_w) * 0.5)])[:, None]
    none = np.zeros_like(energy_j)
    return FleetLedger(
        time_s=np.array([0.5 * i for i in range(len(energy_j))]), energy_j=energy_j, tokens=none, waiting=none,
        budget_w=np.array([*budget_w, budget_w[-1]]), targets_tokens_s=np.array([np.nan]),
    )  # fmt: skip


def test_tracking_tells_the_margin_from_what_is_left() -> None:
    told = tracking_of(ledger([98.0] * 20, [100.0] * 20), 10.0)

    assert told["rmse"] == pytest.approx(0.02)
    assert (told["rmse_over"], told["over_share"], told["far_share"], told["shed_s"]) == (0.0, 0.0, 0.0, None)
    assert told["rmse_left"] == pytest.approx(0.0, abs=1e-12)
    assert Guard(min_limit_w=1.0, max_limit_w=2.0, boards=1, launch_sequences=1).margin == MARGIN


def test_power_above_the_budget_counts_in_seconds_and_in_its_error() -> None:
    told = tracking_of(ledger([110.0] * 4 + [90.0] * 4, [100.0] * 8), 20.0)

    assert told["over_share"] == 0.5
    assert told["rmse"] == pytest.approx(0.1)
    assert told["rmse_over"] == pytest.approx(0.1 / 2**0.5)
    assert told["far_share"] == 1.0


def test_a_shed_lasts_until_the_mean_of_a_second_lies_within() -> None:
    assert longest_shed_s(ledger([100.0] * 4 + [100.0, 80.0, 70.0, 60.0, 70.0], [100.0] * 4 + [70.0] * 5)) == 2.0
    assert longest_shed_s(ledger([100.0] * 8, [100.0] * 4 + [70.0] * 4)) == 2.0, "never reached: until the end"


# ---- the experiments -----------------------------------------------------------------------------------------------


def test_cells_have_names_of_their_own_and_wishes_are_heard(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("time_s,share\n0,1\n10,0.7\n")
    for experiment, wish in ((QosBudget(), Wish()), (QosBudget(), Wish(full=True)), (DynamicBudget(), Wish(full=True))):
        slugs = [c.slug for c in experiment.cells(wish)]
        assert len(set(slugs)) == len(slugs)
    assert {c.policy for c in QosBudget().cells(Wish(policies=("pals",)))} == {"static", "pals"}
    assert {c.signal.name for c in DynamicBudget().cells(Wish(trace=str(path)))} == {"mine"}
    with pytest.raises(ConfigError, match="unknown policy 'palz'"):
        QosBudget().cells(Wish(policies=("palz",)))


def test_a_tiny_cell_of_targets_under_a_budget_gives_rows_of_each_engine_and_of_all(tmp_path: Path) -> None:
    cell = QosCell(
        engines=(small(), small()), shares=(0.9, 0.5), policy="static", budget="70 %", warmup_s=4.0, span_s=8.0
    )

    rows = QosBudget().run(cell, tmp_path)

    assert [r["engine"] for r in rows] == [small().name, small().name, ALL]
    assert rows[-1]["node_budget_w"] == pytest.approx(0.7 * rows[-1]["natural_node_w"])
    assert rows[-1]["output_tokens"] == sum(r["output_tokens"] for r in rows[:-1])
    assert rows[-1]["over_budget_share"] == 0.0
    assert rows[-1]["missed"] == pytest.approx((rows[0]["missed"] + rows[1]["missed"]) / 2)
    assert QosBudget().tables(rows)


def test_a_tiny_cell_of_a_moving_budget_keeps_it(tmp_path: Path) -> None:
    signal = levels("tiny", (0.9, 0.7), (6.0, 6.0))
    cell = DynamicCell(fleet="Mixtral", engines=(small(),), policy="static", signal=signal, warmup_s=4.0)

    (row,) = DynamicBudget().run(cell, tmp_path)

    assert row["over_share"] <= 0.1
    assert row["shed_s"] <= 5.0
    assert row["rmse"] < 0.05
    assert DynamicBudget().tables([row])


def qos_rows(missed: dict[str, float]) -> list[Row]:
    figures = {"missed_long": 0.0, "tokens_per_j_node": 1.0, "tokens_per_j_gpu": 1.0, "over_budget_share": 0.0}
    about = {"engine": ALL, "loop": "closed", "budget": "60 %", "seed": 1}
    return [about | figures | {"policy": p, "missed": m} for p, m in missed.items()]


@pytest.mark.parametrize(
    ("missed", "reached"),
    [
        ({"static": 0.35, "pals": 0.04, ORACLE: 0.04}, [True, True]),
        ({"static": 0.35, "pals": 0.06, ORACLE: 0.04}, [False, False]),
        ({"static": 0.05, "pals": 0.012, ORACLE: 0.0}, [True]),  # static keeps its targets: only the oracle is left
        ({"static": 0.05, "pals": 0.02, ORACLE: 0.0}, [False]),
    ],
)
def test_violations_are_judged_where_static_has_some(missed: dict[str, float], reached: list[bool]) -> None:
    assert [v.reached for v in QosBudget().verdicts(qos_rows(missed))] == reached


def test_tracking_is_judged_for_pals_alone() -> None:
    row: Row = {
        "fleet": "x", "signal": "shed", "seed": 1, "rmse": 0.03, "rmse_left": 0.01, "over_share": 0.0, "shed_s": 1.0, "far_share": None,
    }  # fmt: skip

    verdicts = DynamicBudget().verdicts([row | {"policy": "pals"}, row | {"policy": "static"}])

    assert [v.reached for v in verdicts] == [False, True, True]
    assert "0.010 beside the guard's margin" in verdicts[0].note


def test_budgets_are_shares_of_the_natural_draw_or_watts() -> None:
    assert [node_budget_w(b, 5000.0) for b in (BUDGETS[0], BUDGETS[-1])] == [3000.0, 4800.0]
    assert [s.name for s in (steps(), shed())] == ["steps", "shed"]
    assert all(engine_of(m, 1).name for m, _ in ASKED)
