"""The step model against the serving sweep: who is held out, what is left out, and that the constants are those of the fit."""

from __future__ import annotations

import csv
import shutil
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

from pals.experiments.plant_checks.row import CheckRow
from pals.experiments.plant_checks.serving import check, fit, held_out
from pals.experiments.plant_checks.serving_cases import Case, load, steps_of
from pals.plant.step_constants import fitted_constants

DATA = Path(__file__).parents[1] / "data"
SWEEP = Path("mlenergy-v3") / "serving_batch_sweep.csv"


@cache
def cases() -> list[Case]:
    return load(DATA)[0]


@cache
def rows() -> dict[str, CheckRow]:
    return {row.check: row for row in check(DATA)}


def test_both_boards_hold_out_dense_and_moe_and_nothing_fitted_is_held_out() -> None:
    held, fitted = held_out(cases()), set(fitted_constants()["_fitted_on"])

    assert held | fitted == {c.base for c in cases()}
    assert not held & fitted
    for board in ("H100", "B200"):
        assert {c.shape.experts > 0 for c in cases() if c.board == board and c.base in held} == {True, False}


def test_every_row_of_a_known_model_is_judged_and_the_others_are_counted() -> None:
    judged, left = load(DATA)
    with (DATA / SWEEP).open() as file:
        text = [r for r in csv.DictReader(file) if r["task"] in ("lm-arena-chat", "gpqa", "sourcegraph-fim")]

    assert len(judged) + sum(left.values()) == len(text)
    assert sum(row.cases for name, row in rows().items() if name.startswith("TPOT")) == len(judged)
    assert all("gemma-3-27b-it: no row" in row.note for row in rows().values())


def test_dense_models_lie_within_the_targets_though_held_out() -> None:
    for name, target in (
        ("TPOT against batch, H100, held-out models", 10.0),
        ("power against batch, H100, held-out models", 6.0),
    ):
        dense = [r.error_pct for r in rows()[name].residuals if "Llama-3.3-70B" in r.group]
        assert sum(map(abs, dense)) / len(dense) < target


def test_a_note_names_the_engines_that_miss() -> None:
    row = rows()["power against batch, H100, held-out models"]
    missing = {r.group for r in row.residuals if "Scout" in r.group}

    assert not row.reached
    assert all(group in row.note for group in missing)


def test_other_rows_are_judged_as_they_are_and_odd_ones_are_said(tmp_path: Path) -> None:
    for folder in ("mlenergy-v3", "model-architectures"):
        shutil.copytree(DATA / folder, tmp_path / folder)
    with (DATA / SWEEP).open() as file:
        lines = list(csv.DictReader(file))
    chosen = next(
        r for r in lines if r["model_id"] == "Qwen/Qwen3-235B-A22B-Instruct-2507" and r["gpu_model"] == "B200"
    )
    thinking = chosen | {"model_id": "Qwen/Qwen3-235B-A22B-Thinking-2507", "task": "gpqa", "avg_output_len": "9000"}
    with (tmp_path / SWEEP).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(chosen))
        writer.writeheader()
        writer.writerows(
            [chosen, thinking | {"max_num_seqs": "8"}, thinking | {"max_num_seqs": "64", "avg_batch_size": "63"}]
        )

    checked = check(tmp_path)

    assert [row.cases for row in checked] == [2, 2]
    assert all("thinking at batch 8" in row.note for row in checked)


def test_steps_hold_as_many_new_requests_as_leave() -> None:
    engine = [c for c in cases() if c.model == "meta-llama/Llama-3.1-8B-Instruct" and c.board == "H100"]
    states = steps_of(engine, 250.0)

    for i, c in enumerate(engine):
        assert float(states.often[i] @ states.new[i]) == pytest.approx(c.batch / c.output, rel=0.01)
        assert states.often[i].sum() == pytest.approx(1.0)


@pytest.mark.slow
def test_the_constants_in_use_are_those_of_the_fit() -> None:
    found, used = fit(DATA), fitted_constants()

    assert found["_fitted_on"] == used["_fitted_on"]
    for board in ("h100-sxm5-80gb", "b200-sxm-180gb"):
        assert found[board]["values"] == pytest.approx(used[board]["values"], rel=0.02)
