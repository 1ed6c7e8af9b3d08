"""The experiments on one node: what they ask for, the targets they judge, and each on one small simulated cell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pals.core.errors import ConfigError
from pals.core.load import Mix
from pals.core.quantities import OperatingPoint, Slo
from pals.experiments.lab.catalogue import EXPERIMENTS
from pals.experiments.lab.engines import EngineCase
from pals.experiments.lab.experiment import Row, Wish
from pals.experiments.lab.loads import ClosedLoop, OpenLoop, arrivals_of, capacity_of
from pals.experiments.lab.no_loss import NoLoss, NoLossCell
from pals.experiments.lab.paper_single_node import PaperCell, PaperSingleNode
from pals.experiments.lab.price import Price, PriceCell, missed
from pals.experiments.lab.run import RunTask, run
from pals.experiments.profile_checks.kept import SOURCES
from pals.runtime.budgets import parse_budget

ENGINE = EngineCase(model="meta-llama/Llama-3.1-8B", boards="h100-sxm5-80gb", seed=1, launch=16)
MIX = Mix(name="short", prompt_tokens=64, output_tokens=32)
LOOP = ClosedLoop(mix=MIX, in_flight=24, warmup_s=4.0, span_s=8.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where profiles are kept; learned once for all tests here."""
    return tmp_path_factory.mktemp("lab")


def test_a_run_is_the_same_twice_and_its_energy_is_the_plants() -> None:
    task = RunTask(sim=ENGINE.simulation(), load=LOOP, policy="static", time_line=True)
    a, b = run(task), run(task)
    assert a == b
    f, line = a.figures, a.time_line
    assert f.span_s == 8.0
    assert f.requests >= f.answered > 100
    assert line is not None
    inside = [w for t, w in zip(line["time_s"], line["power_w"], strict=True) if t > 4.0]
    assert sum(inside) == pytest.approx(f.gpu_energy_j, rel=1e-4)
    assert f.reasons == {"static": 16}
    assert f.output_tokens == pytest.approx(
        sum(t for x, t in zip(line["time_s"], line["tokens_per_s"], strict=True) if x > 4), abs=2
    )


def test_a_fixed_point_and_a_budget_reach_the_boards() -> None:
    sim = ENGINE.simulation()
    free = run(RunTask(sim=sim, load=LOOP, policy="static")).figures
    slow = run(
        RunTask(sim=sim, load=LOOP, policy="static", point=OperatingPoint(power_limit_w=700.0, sm_clock_mhz=900))
    ).figures
    assert slow.gpu_energy_j < free.gpu_energy_j
    assert slow.tokens_per_s < free.tokens_per_s
    capped = run(RunTask(sim=sim, load=LOOP, policy="static", budget=parse_budget("300"))).figures
    assert capped.mean_power_w < 303.0
    tight = run(RunTask(sim=sim, load=LOOP, policy="static", budget=parse_budget("0:none,8:201"))).figures
    assert 0.0 <= tight.over_budget_share < 0.5


def test_only_requests_after_the_warm_up_count_and_all_are_answered() -> None:
    sim = ENGINE.simulation()
    w = arrivals_of(MIX, rate_per_s=0.5 * capacity_of(sim, MIX, seed=1), duration_s=20.0, seed=1)
    f = run(
        RunTask(sim=sim, load=OpenLoop(workload=w, warmup_s=10.0), policy="static", slo=Slo(ttft_p99_s=5.0))
    ).figures
    assert f.requests == f.answered == f.good_requests == int((w.arrival_s >= 10.0).sum())
    assert f.ttft_missed == 0.0
    over = arrivals_of(MIX, rate_per_s=3.0 * capacity_of(sim, MIX, seed=1), duration_s=20.0, seed=1)
    f = run(
        RunTask(
            sim=sim, load=OpenLoop(workload=over, warmup_s=10.0, end_s=20.0), policy="static", slo=Slo(ttft_p99_s=0.5)
        )
    ).figures
    assert f.span_s == 10.0
    assert f.answered < f.requests
    assert f.ttft_missed is not None
    assert f.ttft_missed > 0.9


def test_a_profile_is_learned_once_and_only_of_its_own_plant(place: Path) -> None:
    first = ENGINE.profile(place)
    [path] = (place / "profiles").glob("*.json")
    written = path.stat().st_mtime_ns
    assert ENGINE.profile(place).to_json() == first.to_json()
    assert path.stat().st_mtime_ns == written
    assert first.source == "simulated"
    other = replace(ENGINE, seed=2)
    assert other.slug != ENGINE.slug
    assert other.simulation().step_model().tables.memory_s[1] != ENGINE.simulation().step_model().tables.memory_s[1]


def test_boards_that_never_leave_their_top_clock_have_a_profile_that_can_be_read(place: Path) -> None:
    case = EngineCase(
        model="openai-community/gpt2", boards="4xa100-sxm4-80gb", seed=2, prompt_tokens=90.0, output_tokens=96.0
    )
    profile = case.profile(place)
    assert {r.sm_clock_mhz for r in profile.rows if r.sm_clock_lock_mhz is None} == {1410}
    assert min(profile.calibration.width) > 0


def small(cell: PaperCell) -> PaperCell:
    return replace(cell, engine=ENGINE, load=LOOP, targets=(0.65,))


def test_the_papers_comparison_on_one_small_cell(place: Path) -> None:
    e = PaperSingleNode()
    rows = [
        row
        for policy in ("static", "clock-only")
        for row in e.run(small(PaperCell(engine=ENGINE, policy=policy)), place)
    ]
    static, clock = rows
    assert static["tokens_per_s"] == pytest.approx(static["free_tokens_s"], rel=0.01)
    assert clock["tokens_per_j_gpu"] > 1.05 * static["tokens_per_j_gpu"]
    assert [t.lines for t in e.tables(rows)]
    judged = e.verdicts([*rows, *(r | {"policy": "pals", "moe": True} for r in rows if r is clock)])
    assert judged[-1].reached is True  # throughput over its target
    assert judged[0].note


def test_cells_of_the_papers_comparison() -> None:
    e = PaperSingleNode()
    cells = e.cells(Wish(models=("gpt2",), seed=4, policies=("cap-only",)))
    assert [(c.seed, c.policy) for c in cells] == [(s, p) for s in (4, 5, 6) for p in ("static", "cap-only")]
    assert len(e.cells(Wish(models=("gpt2",), full=True, policies=("static",)))) == 10
    with pytest.raises(ConfigError):
        e.cells(Wish(models=("deepseek-ai/DeepSeek-V3",)))  # its weights do not fit


def test_the_price_on_one_small_cell(place: Path) -> None:
    e = Price()
    for loop in ("closed", "open"):
        cell = PriceCell(engine=ENGINE, policy="static", mix="decode", loop=loop, warmup_s=10.0, span_s=20.0)
        [row] = e.run(cell, place)
        assert missed(row) == []
        assert missed(row | {"tokens_per_s": 0.5 * row["tokens_per_s"], "tpot_p99_s": 0.3}) == ["throughput", "TPOT"]


def priced(policy: str, mix: str, loop: str, per_j: float) -> Row:
    return {
        "engine": "a", "mix": mix, "loop": loop, "seed": 1, "policy": policy, "free_tokens_s": 100.0, "tokens_per_s": 99.0,
        "ttft_target_s": 1.0, "tpot_target_s": 0.1, "ttft_p99_s": 0.5, "tpot_p99_s": 0.05, "tokens_per_j_node": per_j,
        "tokens_per_j_gpu": per_j,
    }  # fmt: skip


def test_verdicts_of_the_price() -> None:
    told = {
        ("pals", "decode"): 1.2,
        ("static-best", "decode"): 1.25,
        ("pals", "prefill"): 1.0,
        ("oracle", "prefill"): 1.02,
    }
    rows = [priced(p, m, loop, v) for (p, m), v in told.items() for loop in ("closed", "open")]
    rows += [priced("static", m, loop, 1.0) for m in ("decode", "prefill") for loop in ("closed", "open")]
    closed, opened, prefill, best, kept = Price().verdicts(rows)
    assert (closed.reached, opened.reached, prefill.reached, kept.reached) == (True, True, True, True)
    assert best.measured == pytest.approx(1.2 / 1.25)
    assert best.reached is False
    assert len(Price().tables(rows)) == 2
    assert all(v.reached is None for v in Price().verdicts([r for r in rows if r["policy"] == "static"]))


def test_no_loss_on_small_cells(place: Path) -> None:
    e, rows = NoLoss(), []
    for load in ("closed", "open 60 %", "open 130 %"):
        cell = NoLossCell(engine=ENGINE, policy="static", load=load, warmup_s=5.0, span_s=15.0)
        [row] = e.run(cell, place)
        rows += [row, row | {"policy": "pals", "tokens_per_s": 0.99 * row["tokens_per_s"]}]
    saturated, worst, goodput, worst_goodput = e.verdicts(rows)
    assert saturated.measured == pytest.approx(0.99)
    assert worst.measured == pytest.approx(0.99)
    assert saturated.reached is False
    assert goodput.measured == worst_goodput.measured == 1.0
    assert goodput.reached is True
    assert e.tables(rows)[0].lines


def test_every_experiment_names_sources_that_exist_and_can_be_pickled() -> None:
    import pickle

    for name, e in EXPERIMENTS.items():
        assert e.name == name
        for pattern in e.sources:
            assert list(SOURCES.glob(pattern)), pattern
        assert type(pickle.loads(pickle.dumps(e))) is type(e)
        assert e.verdicts([]) is not None
        assert e.tables([]) == []
