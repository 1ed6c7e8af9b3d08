"""The experiment on the parts of `pals`: what is taken away is gone, and what the table and the verdicts hold against it."""

from __future__ import annotations

import pytest

from pals.core.load import Mix
from pals.core.quantities import Slo
from pals.experiments.lab.ablations import (
    DEMANDS,
    EXPERTS,
    VARIANTS,
    WHOLE,
    Ablations,
    controller_of,
    fair_gains,
)
from pals.experiments.lab.engines import EngineCase
from pals.experiments.lab.experiment import Row, Wish
from pals.experiments.lab.loads import ClosedLoop
from pals.experiments.lab.run import RunTask, run
from tests.profile_world import clock_profile

MIXTRAL = EngineCase(model="mistralai/Mixtral-8x7B-v0.1", boards="4xa100-sxm4-80gb", seed=1)
LOAD = ClosedLoop(mix=Mix(name="m", prompt_tokens=600, output_tokens=120), in_flight=96, warmup_s=2.0, span_s=40.0)


def levers_used(variant: str) -> set[str]:
    """Levers that a run with half the throughput asked for touches."""
    sim = MIXTRAL.simulation()
    task = RunTask(
        sim=sim, load=LOAD, policy="static", slo=Slo(throughput_tokens_s=400.0), seed=1, time_line=True,
        controller=controller_of(variant, sim, clock_profile()),
    )  # fmt: skip
    line = run(task).time_line
    assert line is not None
    used = {"limit"} if min(line["limit_w"]) < 4 * sim.spec.default_limit_w - 1.0 else set()
    used |= {"batch"} if min(line["active_limit"]) < sim.max_num_seqs else set()
    return used | ({"lower clock"} if min(line["clock_mhz"]) < 0.95 * max(line["clock_mhz"]) else set())


@pytest.mark.parametrize(("variant", "gone"), [("without limit", "limit"), ("without batch", "batch")])
def test_a_lever_that_is_taken_away_is_not_used(variant: str, gone: str) -> None:
    assert gone not in levers_used(variant)


def test_without_clock_and_limit_at_hand_something_is_saved_all_the_same() -> None:
    assert "lower clock" in levers_used("without limit")
    assert "lower clock" in levers_used("without clock")  # by its limit


def rows(*told: tuple[str, float, float, float]) -> list[Row]:
    """Variant, joules per token, misses, tokens per second."""
    return [
        {
            "engine": "e",
            "demand": DEMANDS[0],
            "seed": 1,
            "policy": v,
            "missed": m,
            "tokens_per_j_node": 1 / j,
            "tokens_per_s": t,
        }
        for v, j, m, t in told
    ]


def test_what_saves_by_missing_more_or_by_doing_less_does_not_count_as_better() -> None:
    whole = (WHOLE, 1.0, 0.01, 100.0)
    assert fair_gains(rows(whole, ("without queue", 0.9, 0.012, 100.0)), "without queue") == {
        ("e", DEMANDS[0], 1): pytest.approx(1 / 0.9)
    }
    assert not fair_gains(rows(whole, ("without queue", 0.9, 0.05, 100.0)), "without queue")
    assert not fair_gains(rows(whole, ("without queue", 0.9, 0.01, 90.0)), "without queue")


def test_a_part_whose_absence_saves_is_told_as_a_miss() -> None:
    told = rows((WHOLE, 1.0, 0.01, 100.0), ("without batch", 0.9, 0.01, 100.0), ("without queue", 1.1, 0.01, 100.0))
    reached = {v.what.split(":")[0]: v.reached for v in Ablations().verdicts(told)}
    assert (reached["pals without batch"], reached["pals without queue"]) == (False, True)
    assert reached["pals without clock"] is None
    assert Ablations().tables(told)[0].header == ("engine, demand", WHOLE, "without batch", "without queue")


def test_every_engine_meets_every_demand_and_only_experts_lose_their_term() -> None:
    cells = Ablations().cells(Wish(models=("Llama-3.1-8B", "Qwen3-30B-A3B")))
    assert len({c.slug for c in cells}) == len(cells)
    kinds = {(c.engine.model, c.variant) for c in cells}
    assert ("Qwen/Qwen3-30B-A3B", EXPERTS) in kinds
    assert ("meta-llama/Llama-3.1-8B", EXPERTS) not in kinds
    assert {v for _, v in kinds} == set(VARIANTS)
