"""The cross-check of simulated and emulated runs: what it judges on rows made by hand, and one small cell on both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pals.core.errors import ConfigError
from pals.experiments.lab.catalogue import EXPERIMENTS
from pals.experiments.lab.experiment import SIMULATED, Row, Wish, basis_of
from pals.experiments.lab.live_check import LiveCell, LiveCheck, apart, by_place, runs_of, schedule_of
from pals.experiments.lab.live_run import check_installed
from pals.experiments.lab.pages import Page, markdown_of
from pals.experiments.lab.report.sections import read_all, report
from pals.experiments.lab.store import Kept, Store

QWEN = "Qwen/Qwen3-30B-A3B"
CHECK = LiveCheck()
TINY = LiveCell(model=QWEN, policies=("static", "pals"), seed=1, tasks=("steps",), warmup_s=2.0, span_s=9.0)


def row(kind: str, *, seed: int = 1, policy: str = "pals", **values: float | None) -> Row:
    latencies = {f"{name}_{q}_s": 0.03 for name in ("ttft", "tpot") for q in ("p50", "p95")}
    figures: Row = {
        "tokens_per_j_gpu": 4.0, "tokens_per_s": 2000.0, "mean_power_w": 500.0, "throughput_missed": 0.0, "over_budget_share": 0.0,
        "changes_per_min": 2.0, "span_s": 30.0, "requests": 600,
    }  # fmt: skip
    about = {"engine": "qwen3-30b-a3b--h100-sxm5-80gb", "task": "target", "policy": policy, "seed": seed, "kind": kind}
    return about | figures | latencies | values


def test_agreement_is_judged_for_each_policy_and_by_the_worst_seed() -> None:
    rows = [
        row("emulated"), row("simulated", tokens_per_j_gpu=4.04, tokens_per_s=1980.0),
        row("emulated", seed=2), row("simulated", seed=2, tokens_per_j_gpu=3.84),
        row("emulated", policy="static"), row("simulated", policy="static"),
    ]  # fmt: skip

    efficiency, speed, *of_static = CHECK.verdicts(rows)

    assert efficiency.measured == pytest.approx(4.0), "the seed that is furthest apart, though below"
    assert efficiency.reached is False
    assert speed.measured == pytest.approx(1.0)
    assert speed.reached is True
    assert [v.measured for v in of_static] == [0.0, 0.0]
    assert {v.seeds for v in of_static} == {1}


def test_a_side_that_is_missing_is_not_agreement() -> None:
    for rows in ([row("emulated")], [row("emulated"), row("simulated", seed=2)]):
        assert {(v.measured, v.reached) for v in CHECK.verdicts(rows)} == {(None, None)}
        assert CHECK.tables(rows)[0].lines[0][1] == "–"
    without = [row("emulated", ttft_p95_s=None), row("simulated")]
    assert apart(without, "ttft_p95_s") == {}
    assert "–" in CHECK.tables(without)[1].lines[0]


def test_a_difference_is_signed_towards_the_simulation() -> None:
    rows = [row("emulated", mean_power_w=500.0), row("simulated", mean_power_w=490.0)]

    assert apart(rows, "mean_power_w") == {1: pytest.approx(-2.0)}
    assert "500 → 490 (-2.0 %)" in CHECK.tables(rows)[0].lines[0]
    assert list(by_place(rows)) == [("qwen3-30b-a3b--h100-sxm5-80gb", "target", "pals")]


def test_both_sides_get_the_same_target_budget_and_requests() -> None:
    runs = runs_of(replace(TINY, tasks=("target", "budget", "steps")))

    assert [(a["task"], a["policy"]) for a, _ in runs] == [
        (t, p) for t in ("target", "budget", "steps") for p in TINY.policies
    ]
    loads = [t.load for _, t in runs]
    assert all(load == loads[0] for load in loads)
    (target, _), (budget, _) = ([t for a, t in runs if a["task"] == name] for name in ("target", "budget"))
    assert target.budget.at(5.0).power_w is None
    assert 0.0 < (budget.budget.at(5.0).power_w or 0.0) < 700.0
    assert (target.slo.throughput_tokens_s or 0.0) < (budget.slo.throughput_tokens_s or 0.0)
    assert all(t.sim.perturb_seed is None for _, t in runs), "the plant as it is: a committed profile belongs to it"


def test_steps_of_the_budget_divide_the_span() -> None:
    schedule = schedule_of((0.8, None, 0.5), 1000.0, warmup_s=4.0, span_s=9.0)

    assert [schedule.at(t).power_w for t in (0.0, 6.9, 7.0, 9.9, 10.0, 60.0)] == [
        800.0,
        800.0,
        None,
        None,
        500.0,
        500.0,
    ]


def test_what_it_is_asked_for() -> None:
    assert [c.model for c in CHECK.cells(Wish())] == ["mistralai/Mixtral-8x7B-v0.1", QWEN]
    assert len(CHECK.cells(Wish(full=True))) == 6
    assert len({c.slug for c in (*CHECK.cells(Wish()), *CHECK.cells(Wish(full=True)))}) == 8
    with pytest.raises(ConfigError, match="real vLLM does not have"):
        CHECK.cells(Wish(policies=("oracle",)))
    with pytest.raises(ConfigError, match="no profile"):
        CHECK.cells(Wish(models=("gpt2",)))


def test_the_page_says_that_half_of_it_is_real_vllm(tmp_path: Path) -> None:
    rows = [row("emulated"), row("simulated")]
    page = Page(command="pals experiment live-check", seeds=[1], cells=1, missing=0)

    told = markdown_of(CHECK, rows, page)

    assert "## The simulation against real vLLM (emulated and simulated)" in told
    assert "real vLLM on emulated boards" in told
    assert "(seed 1)" in told
    assert "moved constants" not in told
    others = [e for e in EXPERIMENTS.values() if e.name != CHECK.name]
    assert all(basis_of(e) is SIMULATED for e in others)
    Store(tmp_path / CHECK.name).keep(Kept(cell="one", digest="", seconds=1.0, rows=rows))
    texts = [str(b) for b in report(read_all([*EXPERIMENTS.values()], tmp_path), [], "pals experiment report")]
    assert any("An exception, `live-check`" in t for t in texts)


def test_without_vllm_it_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"not installed: vllm,.*pip install"):
        check_installed({"json": "json", "no_such_module_here": "vllm"})


@pytest.mark.slow
def test_a_small_cell_agrees_on_both(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    rows = CHECK.run(TINY, tmp_path)

    assert [(r["kind"], r["policy"]) for r in rows] == [
        (kind, policy) for kind in ("emulated", "simulated") for policy in TINY.policies
    ]
    assert {r["span_s"] for r in rows} == {9.0}
    for figure in ("tokens_per_s", "tokens_per_j_gpu", "mean_power_w", "ttft_p50_s", "tpot_p95_s"):
        for policy in TINY.policies:
            (off,) = apart([r for r in rows if r["policy"] == policy], figure).values()
            assert abs(off) < 4.0, (figure, policy)
    static, pals = (r["tokens_per_j_gpu"] for r in rows[:2])
    assert pals != pytest.approx(static, rel=0.02), "the policy acts on real vLLM too"
