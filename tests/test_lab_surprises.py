"""The experiment on surprises: loads that change, profiles that are wrong, seconds over the budget, and what is held against a policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pals.core.load import Load, Mix
from pals.core.quantities import OperatingPoint
from pals.experiments.lab.engines import EngineCase
from pals.experiments.lab.experiment import Row, Wish
from pals.experiments.lab.perturbed_load import crowded, merged, shifted
from pals.experiments.lab.surprises import (
    AT_S,
    BUDGET_S,
    FLASH,
    OTHER_HAND,
    SURPRISES,
    SurpriseCell,
    Surprises,
    extra_misses,
    faults_of,
    over_budget_w,
)
from pals.experiments.lab.wrong_profiles import off_by, without_experts
from pals.models.observed import OBSERVED
from tests.profile_world import CHAT, clock_profile

MIX = Mix(name="m", prompt_tokens=100, output_tokens=50)
MIXTRAL = EngineCase(model="mistralai/Mixtral-8x7B-v0.1", boards="4xa100-sxm4-80gb", seed=1)
SMALL = EngineCase(model="openai-community/gpt2", boards="1xh100-sxm5-80gb", seed=1, launch=8)


def test_lengths_shift_in_the_middle_and_arrivals_do_not() -> None:
    plain = shifted(MIX, 1.0, at_s=100.0, rate_per_s=5.0, duration_s=200.0, seed=1)
    longer = shifted(MIX, 2.0, at_s=100.0, rate_per_s=5.0, duration_s=200.0, seed=1)
    late = longer.arrival_s >= 100.0
    assert np.array_equal(plain.arrival_s, longer.arrival_s)
    assert np.array_equal(plain.prompt_tokens[~late], longer.prompt_tokens[~late])
    assert longer.output_tokens[late].mean() == pytest.approx(2.0 * plain.output_tokens[late].mean(), rel=0.02)


def test_a_crowd_comes_on_top_for_a_while_and_moves_nobody_else() -> None:
    usual = crowded(MIX, 1.0 + 1e-9, at_s=0.0, for_s=1.0, rate_per_s=5.0, duration_s=300.0, seed=1)
    crowd = crowded(MIX, 3.0, at_s=100.0, for_s=60.0, rate_per_s=5.0, duration_s=300.0, seed=1)
    inside = (crowd.arrival_s >= 100.0) & (crowd.arrival_s < 160.0)
    assert inside.sum() / 60.0 == pytest.approx(15.0, rel=0.15)
    assert np.isin(usual.arrival_s, crowd.arrival_s).mean() > 0.99
    assert (~inside).sum() == pytest.approx((usual.arrival_s < 100.0).sum() + (usual.arrival_s >= 160.0).sum(), abs=1)


def test_merging_keeps_each_request_with_its_lengths() -> None:
    parts = [
        shifted(m, 1.0, at_s=0.0, rate_per_s=3.0, duration_s=50.0, seed=s)
        for s, m in ((1, MIX), (2, replace(MIX, prompt_tokens=900)))
    ]
    both = merged(parts)
    assert np.all(np.diff(both.arrival_s) >= 0)
    assert {*zip(both.arrival_s, both.prompt_tokens, strict=True)} == {
        pair for p in parts for pair in zip(p.arrival_s, p.prompt_tokens, strict=True)
    }


@pytest.mark.parametrize("factor", [0.85, 1.15])
def test_a_profile_that_is_off_tells_times_and_watts_off_by_the_factor(factor: float) -> None:
    point = [OperatingPoint(power_limit_w=400.0, sm_clock_mhz=1005, active_sequences=32)]
    right, wrong = (
        dict(zip(OBSERVED, np.exp(p.model().told(point, Load(mix=CHAT)))[: len(OBSERVED), 0].tolist(), strict=True))
        for p in (clock_profile(), off_by(clock_profile(), time=factor, power=factor))
    )
    assert wrong["step_s"] / right["step_s"] == pytest.approx(factor, rel=0.01)
    assert wrong["power_w"] / right["power_w"] == pytest.approx(factor, rel=0.01)


def test_without_the_experts_term_the_rest_of_the_profile_stays() -> None:
    before, after = clock_profile().parameters, without_experts(clock_profile()).parameters
    assert {name for name in before if before[name] != after[name]} == {"popularity_cv"}


def line(power_w: list[float], budget_w: list[float | None]) -> dict[str, list[Any]]:
    return {"time_s": [float(i) for i in range(len(power_w))], "power_w": power_w, "budget_w": budget_w}


def test_seconds_over_the_budget_count_from_the_correction_time_after_a_change_on() -> None:
    told = line([500.0] * 10, [None, None, None, *[400.0] * 7])  # in force from 3 s on, and never kept
    assert over_budget_w(told, excused_from_s=(3.0,)) == [100.0] * 4  # 5..6 to 8..9
    assert over_budget_w(told, excused_from_s=()) == [100.0] * 6
    assert over_budget_w(line([500.0] * 5, [None] * 5), excused_from_s=()) == []


def rows(*told: tuple[str, str, float]) -> list[Row]:
    """Policy, surprise, misses."""
    return [
        {
            "engine": "e", "surprise": surprise, "budgeted": True, "seed": 1, "policy": policy, "missed": missed, "over_s": 0,
            "tokens_per_j_node": 1.0,
        }
        for policy, surprise, missed in told
    ]  # fmt: skip


def test_what_static_loses_by_a_crowd_is_not_held_against_a_policy_and_what_it_loses_by_a_stuck_meter_is() -> None:
    told = rows(
        ("static", "none", 0.0), ("static", FLASH, 0.10), ("static", "meter stuck", 0.10),
        ("pals", "none", 0.01), ("pals", FLASH, 0.12), ("pals", "meter stuck", 0.12),
    )  # fmt: skip
    assert list(extra_misses(told, "pals", FLASH).values()) == pytest.approx([0.01])
    assert list(extra_misses(told, "pals", "meter stuck").values()) == pytest.approx([0.11])
    reached = {v.what.split(":")[0]: v.reached for v in Surprises().verdicts(told)}
    assert (reached[f"pals, {FLASH}"], reached["pals, meter stuck"]) == (True, False)


def test_cells_hold_every_surprise_with_and_without_a_budget_and_static_only_where_no_profile_is_wrong() -> None:
    cells = Surprises().cells(Wish())
    assert len({c.slug for c in cells}) == len(cells)
    assert {(c.surprise, c.budgeted) for c in cells if c.policy == "pals"} == {
        (s, b) for s in SURPRISES for b in (False, True)
    }
    assert not [c for c in cells if c.policy == "static" and "profile" in c.surprise]


def cell(surprise: str, *, budgeted: bool = False) -> SurpriseCell:
    return SurpriseCell(engine=SMALL, policy="static", surprise=surprise, budgeted=budgeted, warmup_s=1.0, span_s=4.0)


def test_the_other_hand_holds_a_limit_below_the_default() -> None:
    sim = SMALL.simulation()
    (event,) = faults_of(cell(OTHER_HAND), sim).events
    assert (event.kind, event.time_s) == ("external_limit", AT_S)
    assert sim.spec.min_limit_w < event.value < sim.spec.default_limit_w
    assert faults_of(cell("none"), sim).events == ()


def test_a_tiny_run_keeps_a_budget_and_tells_so(tmp_path: Path) -> None:
    told = SurpriseCell(
        engine=MIXTRAL, policy="static", surprise="none", budgeted=True, warmup_s=BUDGET_S - 5.0, span_s=15.0
    )  # fmt: skip
    (row,) = Surprises().run(told, tmp_path)
    assert row["budget_w"] > 0
    assert row["over_s"] == 0
    assert row["missed"] == 0.0
