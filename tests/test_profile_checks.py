"""Judging profiles: no row is both learned and tested, errors are what they say, rivals learn, and a winner is shown as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pals.core.load import Mix
from pals.experiments.profile_checks.case import SIMULATED, Case
from pals.experiments.profile_checks.judge import Judged, judge_case
from pals.experiments.profile_checks.line import Line
from pals.experiments.profile_checks.own import OWN, own
from pals.experiments.profile_checks.question import QUANTITIES, Learned, Question, Told
from pals.experiments.profile_checks.regret import choose, judge, measured_figures, scenarios_of
from pals.experiments.profile_checks.rivals import RIVALS, TREES, features_of
from pals.experiments.profile_checks.score import Score, added, score
from pals.experiments.profile_checks.silicon import batch_cases, cap_cases
from pals.experiments.profile_checks.splits import (
    FEW,
    INTERIOR,
    LEVELS,
    LOWEST,
    PRIORS,
    RANDOM,
    SWEEP,
    TRAIN_ROWS,
    UNSWEPT,
    Split,
    drawn_rows,
    measured_splits,
)
from pals.experiments.profile_checks.summary import lines_of
from pals.experiments.profile_checks.table import Told as TableTold
from pals.experiments.profile_checks.table import cells_of, print_table, verdict, write_page
from pals.models.engine_facts import EngineFacts
from pals.models.row import ProfileRow

DATA = Path(__file__).parents[1] / "data"
FACTS = EngineFacts(
    board="toy", boards=1, min_limit_w=100, max_limit_w=400, min_sm_clock_mhz=200, max_sm_clock_mhz=1400,
    launch_sequences=64,
)  # fmt: skip
MIXES = (
    Mix(name="chat", prompt_tokens=500, output_tokens=200),
    Mix(name="answers", prompt_tokens=100, output_tokens=400),
    Mix(name="between", prompt_tokens=200, output_tokens=250),
)
LIMITS, LOCKS, BATCHES = (100.0, 200.0, 300.0, 400.0), (600, 800, 1000), (8, 16, 32, 64)


def row(limit_w: float, lock: int | None, n: int, mix: int) -> ProfileRow:
    """A smooth toy engine: throughput follows clock and batch, latency follows both."""
    clock = min(lock or 1400, 1400 * (limit_w / 400.0) ** 0.5)
    tokens_per_s = 30.0 * n**0.8 * (clock / 1400.0) ** 0.5 * (1.0 if mix == 0 else 1.3)
    power_w = 80.0 + 0.16 * clock + 0.5 * n
    return ProfileRow(
        power_limit_w=limit_w, sm_clock_lock_mhz=lock, active_sequences=n, mix=mix, running=float(n), power_w=power_w,
        tokens_per_s=tokens_per_s, prefill_tokens_per_s=tokens_per_s, steps_per_s=tokens_per_s / n, sm_clock_mhz=clock,
        tpot_p95_s=n / tokens_per_s, ttft_p95_s=0.1 * 1400.0 / clock + 0.001 * n, window_s=10.0,
    )  # fmt: skip


def grid(mixes: Sequence[int] = (0, 1)) -> tuple[ProfileRow, ...]:
    levels: list[tuple[float, int | None]] = [*((w, None) for w in LIMITS), *((400.0, mhz) for mhz in LOCKS)]
    return tuple(row(w, mhz, n, mix) for mix in mixes for w, mhz in levels for n in BATCHES)


def case(seed: int = 3) -> Case:
    swept = tuple(row(w, None, n, mix) for mix in (0, 1) for w in (100.0, 250.0, 400.0) for n in (8, 20, 64))
    return Case(
        name="toy", group="toy", basis=SIMULATED, facts=FACTS, mixes=MIXES, rows=grid(), swept=swept, seed=seed,
        unswept=grid((2,)), choices=grid(),
    )  # fmt: skip


class Scaled:
    """Knows the toy engine, and says a little more power and throughput than there is."""

    def __init__(self, factor: float, low: float = 0.9, high: float = 1.1, refuse_below_w: float = 0.0) -> None:
        self.factor, self.low, self.high, self.refuse_below_w = factor, low, high, refuse_below_w

    def __call__(
        self, rows: Sequence[ProfileRow], mixes: Sequence[Mix], facts: EngineFacts, quantities: Sequence[str]
    ) -> Learned:
        return self

    def answer(self, questions: Sequence[Question], quantities: Sequence[str]) -> Mapping[str, Told]:
        rows = [
            row(q.point.power_limit_w, q.point.sm_clock_mhz, q.point.active_sequences or 1, q.mix) for q in questions
        ]
        refused = np.array([r.power_limit_w < self.refuse_below_w for r in rows])
        told = {}
        for quantity in quantities:
            value = self.factor * np.array([float(getattr(r, quantity)) for r in rows])
            value[refused] = np.nan
            told[quantity] = Told(value, self.low * value, self.high * value)
        return told


# ---- splits


def measurements(rows: Sequence[ProfileRow]) -> set[int]:
    return {id(r) for r in rows}


@given(seed=st.integers(0, 10_000))
def test_no_row_is_both_learned_and_tested(seed: int) -> None:
    for split in case(seed).splits():
        assert not measurements(split.train) & measurements(split.test), split.kind
        assert bool(split.train) == (split.kind != PRIORS)
        assert split.test


@given(seed=st.integers(0, 10_000))
def test_a_withheld_level_is_in_no_row_that_is_learned(seed: int) -> None:
    knobs = {kind: knob for knob, kind in INTERIOR.items()} | {LOWEST: "limit"}
    for split in [s for s in case(seed).splits() if s.kind in knobs]:
        read = LEVELS[knobs[split.kind]]
        assert split.level not in {read(r) for r in split.train}
        assert {read(r) for r in split.test} == {split.level}


def test_every_interior_level_is_withheld_once_and_the_outermost_never() -> None:
    by_kind: dict[str, list[float | None]] = {}
    for split in case().splits():
        by_kind.setdefault(split.kind, []).append(split.level)

    assert by_kind[INTERIOR["limit"]] == [200.0, 300.0]
    assert by_kind[INTERIOR["batch"]] == [16.0, 32.0]
    assert by_kind[INTERIOR["clock"]] == [800.0, 1000.0]  # the lowest is an end; no lock is the other
    assert by_kind[LOWEST] == [100.0]


def test_the_draw_is_as_large_as_a_profile_and_repeats_by_its_seed() -> None:
    rows = grid((0, 1, 2))
    train, test = drawn_rows(rows, TRAIN_ROWS, 1)
    assert len(train) == TRAIN_ROWS
    assert len(train) + len(test) == len(rows)
    assert drawn_rows(rows, TRAIN_ROWS, 1) == (train, test)
    assert drawn_rows(rows, TRAIN_ROWS, 2)[0] != train


def test_the_mix_that_nobody_swept_is_learned_by_nobody() -> None:
    unswept = [s for s in case().splits() if s.kind == UNSWEPT]
    assert [{r.mix for r in s.test} for s in unswept] == [{2}]
    assert all(r.mix != 2 for s in case().splits() for r in s.train)


def test_a_short_measured_sweep_is_left_out_row_by_row() -> None:
    rows = [row(w, None, 8, 0) for w in LIMITS]
    splits = [s for s in measured_splits(rows, "limit", 0) if s.kind == RANDOM]
    assert [s.test for s in splits] == [(r,) for r in rows]
    assert all(len(s.train) == 3 for s in splits)


# ---- scores


def test_errors_coverage_and_width_of_hand_made_numbers() -> None:
    told = Told(
        np.array([110.0, 90.0, np.nan, 50.0]),
        np.array([105.0, 80.0, np.nan, 40.0]),
        np.array([115.0, 105.0, np.nan, 60.0]),
    )
    found = score(told, np.array([100.0, 100.0, 100.0, np.nan]))

    assert (found.asked, found.answered, found.refused) == (3, 2, 1)
    assert found.mape == pytest.approx(0.10)
    assert (found.judged, found.inside, found.confident_misses) == (2, 1, 1)
    assert found.coverage == pytest.approx(0.5)
    assert found.width == pytest.approx((10 / 110 + 25 / 90) / 2)
    assert found.farthest == pytest.approx(0.05)


def test_scores_add_up_and_nothing_is_no_error_of_zero() -> None:
    one = score(Told(np.array([110.0])), np.array([100.0]))
    other = score(Told(np.array([130.0])), np.array([100.0]))
    assert added([one, other]).mape == pytest.approx(0.20)
    assert Score().mape is None
    assert one.coverage is None


# ---- rivals


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_learns_a_toy_surface(name: str) -> None:
    rows = grid()
    learned = RIVALS[name](rows, MIXES, FACTS, QUANTITIES)
    told = learned.answer([Question(r.point, r.mix) for r in rows], QUANTITIES)
    for quantity in QUANTITIES:
        truth = np.array([getattr(r, quantity) for r in rows])
        spread = np.abs(truth / np.exp(np.log(truth).mean()) - 1).mean()
        assert (score(told[quantity], truth).mape or 1.0) < 0.3 * spread
        assert told[quantity].low is None


def test_the_forest_has_the_papers_three_hundred_trees_and_interpolation_meets_its_rows() -> None:
    assert TREES == 300
    rows = grid()
    told = RIVALS["interpolation"](rows, MIXES, FACTS, QUANTITIES).answer(
        [Question(r.point, r.mix) for r in rows], QUANTITIES
    )
    np.testing.assert_allclose(told["power_w"].value, [r.power_w for r in rows], rtol=1e-6)


def test_a_rival_is_told_nothing_that_was_measured() -> None:
    questions = [Question(r.point, r.mix) for r in grid()]
    assert features_of(questions, MIXES, 1400.0).shape == (len(questions), 5)


# ---- regret


def test_a_perfect_model_regrets_nothing_and_breaks_nothing() -> None:
    rows = [r for r in grid() if r.mix == 0]
    scenarios = scenarios_of(rows, 0)
    assert scenarios
    for s in scenarios:
        choice = judge(measured_figures(rows), rows, s)
        assert choice == (0.0, 0.0, True, False)


def test_a_wrong_model_regrets() -> None:
    rows = [r for r in grid() if r.mix == 0]
    truth = measured_figures(rows)
    upside_down = truth._replace(tokens_per_j=1.0 / truth.tokens_per_j)
    blind = truth._replace(
        tokens_per_s=np.full(len(rows), 1e9), tpot_p95_s=np.full(len(rows), 1e-9), ttft_p95_s=np.full(len(rows), 1e-9)
    )

    choices = [judge(upside_down, rows, s) for s in scenarios_of(rows, 0)]
    assert max(c.regret for c in choices) > 0.01
    assert max(c.excess for c in choices) == 0.0
    assert max(judge(blind, rows, s).excess for s in scenarios_of(rows, 0)) > 0.0


def test_where_no_point_keeps_the_targets_the_nearest_is_taken_and_where_none_is_answered_none() -> None:
    rows = [r for r in grid() if r.mix == 0]
    truth, target = measured_figures(rows), scenarios_of(rows, 0)[0].targets
    hard = target._replace(tokens_per_s=10 * float(truth.tokens_per_s.max()))
    assert choose(truth, hard) == (int(np.argmax(truth.tokens_per_s)), False)
    torn = truth._replace(half=np.stack([np.full(len(rows), 0.01), np.full(len(rows), 0.01), np.full(len(rows), 2.0)]))
    assert choose(torn, hard) == (int(np.argmax(truth.tokens_per_s)), False)  # a vague latency does not rule
    unknown = truth._replace(tokens_per_s=np.full(len(rows), np.nan))
    assert choose(unknown, target) is None


# ---- a case, and the table


def judged(own: Scaled, rivals: float = 1.2) -> Judged:
    methods = {OWN: own, **{name: Scaled(rivals) for name in RIVALS}}
    return judge_case(case(), methods, {"rows": 18.0, "file_bytes": 9000.0})


def test_a_case_survives_its_file() -> None:
    found = judged(Scaled(1.02))
    assert Judged.from_dict(found.to_dict()) == found


def test_errors_of_a_case_are_the_methods_own() -> None:
    lines = {line.check: line for line in lines_of([judged(Scaled(1.02))])}
    line = lines[f"power, {RANDOM}"]
    assert line.value == pytest.approx(2.0)
    assert line.rivals["random forest"] == pytest.approx(20.0)
    assert line.reached
    assert lines["profile file, largest"].reached is False
    assert lines[f"power, {SWEEP}: coverage (mean width 20.0 %)"].value == pytest.approx(100.0)


def test_what_few_rows_or_none_say_is_shown_with_how_often_its_intervals_hold() -> None:
    lines = {line.check: line for line in lines_of([judged(Scaled(1.2))])}
    for kind in (FEW, PRIORS, UNSWEPT):
        assert lines[f"power, {kind}"].value == pytest.approx(20.0)
        coverage = lines[f"power, {kind}: coverage (mean width 20.0 %)"]
        assert (coverage.value, coverage.target) == (0.0, None)


def test_a_confident_miss_at_the_lowest_cap_is_counted_and_a_refusal_is_none() -> None:
    check = f"power, {LOWEST}: confident misses"
    missed = {line.check: line for line in lines_of([judged(Scaled(1.5))])}[check]
    refused = {line.check: line for line in lines_of([judged(Scaled(1.5, refuse_below_w=150.0))])}[check]
    assert (missed.value, missed.reached) == (100.0, False)
    assert (refused.value, refused.reached) == (0.0, True)
    assert "8 refused" in refused.note


def test_methods_are_compared_on_the_rows_that_the_profile_answered() -> None:
    lines = lines_of([judged(Scaled(1.02, refuse_below_w=150.0))])
    line = next(line for line in lines if line.check == f"power, {SWEEP}")
    assert "8 of 56 points refused" in line.note


def test_a_rival_that_wins_is_shown_as_winning(tmp_path: Path) -> None:
    lines = lines_of([judged(Scaled(1.10), rivals=1.01)])
    line = next(line for line in lines if line.check == f"power, {RANDOM}")
    assert OWN not in line.winners
    assert line.verdict == "MISSED"
    assert cells_of(line)[9].endswith("*")
    assert not cells_of(line)[8].endswith("*")

    told = TableTold(command="pals profile evaluate", remarks=("seed 3",))
    console = Console(width=200, record=True, quiet=True)
    print_table(console, lines, told)
    write_page(tmp_path / "page.md", lines, told)
    page = (tmp_path / "page.md").read_text()
    assert "seed 3" in page
    assert "**1.00 %***" in page
    assert "simulated" in page
    assert f"{OWN} 0" in verdict([line])


def test_every_line_says_what_it_rests_on() -> None:
    assert {line.basis for line in lines_of([judged(Scaled(1.02))])} == {"simulated"}
    with pytest.raises(ValueError, match="NaN"):
        Line(section="", basis="simulated", check="", cases=1, value=float("nan"), median=0.0, worst=0.0)


# ---- measured sets


def test_measured_sweeps_become_rows_of_what_was_measured() -> None:
    cases = [*cap_cases(DATA), *batch_cases(DATA)]
    assert {c.group for c in cases} == {"mmbt-vllm-powercap", "club3090-powercap", "mlenergy-v3"}
    assert len({c.name for c in cases}) == len(cases)
    streams = next(c for c in cases if "32 streams" in c.name and "27B" in c.name)
    lowest = streams.rows[0]
    assert (lowest.power_limit_w, lowest.power_w, lowest.running) == (300.0, 300.0, 32.0)
    assert lowest.steps_per_s == pytest.approx(1033.52 / 32)
    for c in cases:
        assert all(isinstance(s, Split) for s in c.splits())


def test_what_caution_costs_is_shown_beside_it() -> None:
    vague = {line.check: line for line in lines_of([judged(Scaled(1.0, low=0.7, high=1.4), rivals=1.0)])}
    bold = vague["regret in tokens/J, targets kept, by values"]
    assert bold.value == pytest.approx(0.0)
    assert vague["regret in tokens/J, targets kept"].value > 0.0
    assert vague["picks that break a target search keeps"].value == pytest.approx(0.0)


def test_the_profile_refuses_a_point_alone() -> None:
    rows = [r for r in grid() if r.power_limit_w >= 300.0]
    learned = own(rows, MIXES, FACTS, QUANTITIES)
    told = learned.answer([Question(r.point, r.mix) for r in grid()], QUANTITIES)
    refused = {r.power_limit_w for r, value in zip(grid(), told["power_w"].value, strict=True) if np.isnan(value)}
    assert 100.0 in refused
    assert not refused & {300.0, 400.0}
