"""The frame of the experiments: figures by hand, cells that are skipped and kept, workers that fail or stop, verdicts and pages."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.cli.main import main
from pals.core.errors import ConfigError
from pals.core.quantities import OperatingPoint, Slo
from pals.engines.model_zoo import shipped_config
from pals.experiments.lab.conduct import conduct, jobs_of, pending
from pals.experiments.lab.engines import EngineCase, model_of
from pals.experiments.lab.experiment import Row, Table, Verdict, Wish, verdict_of
from pals.experiments.lab.figures import Figures, Ledger, figures_of, node_energy_j, windows_over_w
from pals.experiments.lab.pages import Page, markdown_of
from pals.experiments.lab.ratios import by_seed, ratios
from pals.experiments.lab.rivals import left_out, policies_of
from pals.experiments.lab.store import Kept, Store, digest_of_cell, fresh_rows
from pals.experiments.lab.truth import Scheduled
from pals.experiments.lab.workers import Failed, in_workers
from pals.experiments.outcome import Answers

NAN = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyCell:
    """Squares a number, or fails as told."""

    number: int
    seed: int = 1
    does: str = "square"

    @property
    def slug(self) -> str:
        return f"toy-{self.number}"


class Toy:
    """An experiment without a plant."""

    name, title, question, targets = "toy", "Toy", "What is it squared?", "mean square at least 4"
    sources = ("experiments/lab/ratios.py",)
    takes = frozenset({"policies"})

    def cells(self, wish: Wish) -> list[ToyCell]:
        return [ToyCell(number=n, seed=s) for s in wish.seeds(1, 2) for n in (1, 2, 3)]

    def run(self, cell: ToyCell, place: Path) -> list[Row]:
        if cell.does == "fail":
            raise ConfigError("it does not fit")
        if cell.does == "break":
            raise ZeroDivisionError("a mistake")
        if cell.does == "die":
            import os

            os._exit(7)
        while cell.does == "hang":
            time.sleep(0.01)
        return [{"policy": "static", "seed": cell.seed, "square": cell.number**2}]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        return [Table(header=("seed", "square"), lines=[[str(r["seed"]), str(r["square"])] for r in rows])]

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        return [verdict_of("mean square", {1: sum(r["square"] for r in rows) / len(rows)} if rows else {}, least=4.0)]

    def figures(self, rows: Sequence[Row]) -> Sequence[str]:
        return ()


TOY = Toy()


def never() -> bool:
    return False


def figures(**changed: Any) -> Figures:
    """Four requests over ten seconds at 100 W, under a TTFT target of 1 s and a TPOT target of 0.1 s; one never begins."""
    answers = Answers(
        sent_s=np.array([0.0, 1.0, 2.0, 3.0]),
        first_token_s=np.array([0.5, 3.0, 2.5, NAN]),
        last_token_s=np.array([1.4, 4.9, NAN, NAN]),
        output_tokens=np.array([10, 11, 0, 0]),
        asked_tokens=np.array([10, 11, 40, 5]),
    )
    ledger = Ledger(
        time_s=[float(t) for t in range(11)], energy_j=[100.0 * t for t in range(11)], budget_w=[None] * 11, output_tokens=50,
        refused=1, judged_periods=8, missed_periods=2, changes=3, reasons={"hold": 7, "budget": 3},
    )  # fmt: skip
    slo = Slo(ttft_p95_s=2.0, ttft_p99_s=1.0, tpot_p99_s=0.1)
    return figures_of(answers, replace(ledger, **changed), slo, boards=4)


def test_figures_of_a_run_made_by_hand() -> None:
    f = figures()
    assert (f.requests, f.answered, f.refused, f.good_requests) == (5, 2, 1, 1)
    assert f.gpu_energy_j == 1000.0
    assert f.node_energy_j == pytest.approx(1.05 * 1000 + 345 * 10)
    assert (f.tokens_per_s, f.tokens_per_j_gpu) == (5.0, 0.05)
    assert f.tokens_per_j_node == pytest.approx(50 / 4500)
    assert f.ttft_missed == pytest.approx(3 / 5)  # late, refused, and the one that waits for 7 s without a token
    assert f.tpot_missed == pytest.approx(1 / 2)  # 0.19 s a token; nobody knows of the unfinished
    assert f.ttft_s is not None
    assert f.ttft_s[0] == pytest.approx(0.5)
    assert f.throughput_missed == 0.25
    assert f.changes_per_min == 18.0
    assert (f.over_budget_s, f.over_budget_share, f.most_over_w) == (0.0, 0.0, 0.0)
    row = f.to_row()
    assert json.loads(json.dumps(row)) == row
    assert row["ttft_p50_s"] == pytest.approx(0.5)
    assert row["mean_power_w"] == 100.0


def test_a_budget_is_held_against_whole_seconds_and_a_step_counts_from_when_it_is_in_force() -> None:
    budget: list[float | None] = [None, None, 120.0, 120.0, 90.0, 90.0, 90.0, 95.0, 101.0, 101.0, 101.0]
    f = figures(budget_w=budget)
    assert f.over_budget_s == 4.0
    assert f.over_budget_share == 0.4
    assert f.most_over_w == 10.0


def test_windows_of_a_second_take_two_half_second_ticks() -> None:
    ledger = Ledger(
        time_s=[0.0, 0.5, 1.0, 1.5, 2.0], energy_j=[0.0, 100.0, 100.0, 200.0, 301.0], budget_w=[100.0] * 5, output_tokens=1, refused=0,
        judged_periods=0, missed_periods=0, changes=0, reasons={},
    )  # fmt: skip
    assert windows_over_w(ledger) == [0.0, 101.0]  # a half-second at twice the budget is made up for in the next


def test_fewer_than_four_boards_carry_their_share_of_a_node() -> None:
    assert node_energy_j(0.0, 1.0, 1) == pytest.approx(345 / 4)
    assert node_energy_j(0.0, 1.0, 4) == node_energy_j(0.0, 1.0, 8) == 345.0
    assert node_energy_j(100.0, 0.0, 1) == pytest.approx(105.0)


def test_cells_that_are_kept_are_skipped_unless_sources_or_cell_changed(tmp_path: Path) -> None:
    cells = TOY.cells(Wish())
    jobs = jobs_of(TOY, cells, tmp_path)
    done = list[str]()
    first = conduct(jobs, workers=2, stop=never, done=lambda job: done.append(job.cell.slug))
    assert (first.ran, first.failed, first.complete) == (3, (), True)
    assert sorted(done) == ["toy-1", "toy-2", "toy-3"]
    assert pending(jobs) == []
    store = jobs[0].store
    assert [r["square"] for r in fresh_rows(store, TOY, cells)] == [1, 4, 9]
    store.keep(Kept(cell="toy-2", digest="of other sources", seconds=0.0, rows=[]))
    assert [j.cell.slug for j in pending(jobs)] == ["toy-2"]
    assert [r["square"] for r in fresh_rows(store, TOY, cells)] == [1, 9]
    moved = replace(cells[0], seed=2)
    assert digest_of_cell(TOY, moved) != digest_of_cell(TOY, cells[0])


def test_one_failing_cell_leaves_the_others_and_says_why(tmp_path: Path) -> None:
    cells = [ToyCell(number=i, does=does) for i, does in enumerate(("fail", "break", "die", "square"))]
    found = conduct(jobs_of(TOY, cells, tmp_path), workers=2, stop=never)
    assert (found.ran, found.complete) == (1, True)
    told = dict(found.failed)
    assert told["toy: toy-0"] == "it does not fit"
    assert "ZeroDivisionError: a mistake" in told["toy: toy-1"]
    assert "exit code 7" in told["toy: toy-2"]
    assert list(Store(tmp_path / "toy").kept()) == ["toy-3"]


def test_a_stop_keeps_what_is_done_and_ends_what_is_not(tmp_path: Path) -> None:
    cells = [ToyCell(number=1), ToyCell(number=2, does="hang"), ToyCell(number=3)]
    done = list[str]()
    found = conduct(
        jobs_of(TOY, cells, tmp_path), workers=1, stop=lambda: bool(done), done=lambda job: done.append(job.cell.slug)
    )
    assert not found.complete
    assert list(Store(tmp_path / "toy").kept()) == done == ["toy-1"]


def square(number: int) -> int:
    return number * number


def test_workers_answer_every_job_once() -> None:
    results = dict(in_workers(square, [3, 1, 2], workers=2, stop=never))
    assert results == {0: 9, 1: 1, 2: 4}
    assert dict(in_workers(square, [], workers=2, stop=never)) == {}
    assert not any(isinstance(r, Failed) for r in results.values())


def test_a_torn_line_costs_one_cell_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.kept() == {}
    store.keep(Kept(cell="a", digest="x", seconds=1.0, rows=[{"n": 1}]))
    with store.path.open("a") as f:
        f.write('{"cell": "b", "dig')  # a process that was killed, or a full disk
    store.keep(Kept(cell="c", digest="x", seconds=1.0, rows=[]))
    store.keep(Kept(cell="a", digest="y", seconds=2.0, rows=[{"n": 2}]))
    assert {name: k.digest for name, k in store.kept().items()} == {"a": "y", "c": "x"}
    store.tidy()
    assert len(store.path.read_text().splitlines()) == 2
    assert store.kept()["a"].rows == [{"n": 2}]


def test_two_cells_of_one_name_are_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="toy-1"):
        jobs_of(TOY, [ToyCell(number=1), ToyCell(number=1, seed=2)], tmp_path)


@given(st.dictionaries(st.integers(1, 9), st.floats(0.1, 10), min_size=1), st.floats(0.1, 10))
def test_a_verdict_is_the_mean_over_seeds_against_its_bound(values: dict[int, float], bound: float) -> None:
    least, most = verdict_of("w", values, least=bound), verdict_of("w", values, most=bound)
    assert least.spread is not None
    assert least.measured is not None
    assert least.spread[0] - 1e-9 <= least.measured <= least.spread[1] + 1e-9
    assert least.reached == (least.measured >= bound)
    assert most.reached == (least.measured <= bound)
    assert least.seeds == len(values)
    worst = verdict_of("w", values, least=bound, every_seed=True)
    assert worst.measured == min(values.values())
    assert worst.reached == all(v >= bound for v in values.values())


def test_a_verdict_without_rows_is_not_judged() -> None:
    v = verdict_of("w", {}, least=1.0, unit="×")
    assert (v.measured, v.reached, v.target) == (None, None, "≥ 1×")


def test_ratios_pair_runs_of_one_place_and_fold_by_seed() -> None:
    rows = [
        {"policy": p, "engine": e, "seed": s, "x": x}
        for p, e, s, x in (
            ("static", "a", 1, 2.0), ("pals", "a", 1, 3.0), ("static", "b", 1, 1.0), ("pals", "b", 1, 1.0), ("pals", "c", 1, 9.0),
            ("static", "a", 2, 1.0), ("pals", "a", 2, 2.0), ("static", "d", 2, 0.0), ("pals", "d", 2, 1.0),
        )
    ]  # fmt: skip
    found = ratios(rows, "x", "pals", "static", ("engine",))
    assert found == {("a", 1): 1.5, ("b", 1): 1.0, ("a", 2): 2.0}
    assert by_seed(found) == {1: 1.25, 2: 2.0}
    assert by_seed(found, "least") == {1: 1.0, 2: 2.0}


def test_a_page_says_simulated_seeds_command_and_what_is_missing() -> None:
    page = Page(command="pals experiment toy", seeds=(1, 2), cells=6, missing=5, wall_s=3.0)
    text = markdown_of(TOY, [{"policy": "static", "seed": 1, "square": 1}], page)
    for told in ("simulated", "seeds 1, 2", "`pals experiment toy`", "5 of 6 cells", "MISSED", "≥ 4", "1 missed"):
        assert told in text
    assert "not judged" in markdown_of(TOY, [], page)


def test_policies_begin_with_the_baseline_and_an_unknown_one_is_refused() -> None:
    assert policies_of(Wish(), ("static", "cap-only", "no-such-policy")) == ("static", "cap-only")
    assert policies_of(Wish(policies=("cap-only",)), ("static",)) == ("static", "cap-only")
    assert "no-such-policy" in left_out(("static", "no-such-policy"))
    assert left_out(("static",)) == ""
    with pytest.raises(ConfigError, match="no-such-policy"):
        policies_of(Wish(policies=("no-such-policy",)), ("static",))


def test_a_schedule_holds_each_point_from_its_time_on_and_may_begin_again() -> None:
    a, b = OperatingPoint(power_limit_w=400.0), OperatingPoint(power_limit_w=200.0)
    once = Scheduled(points=(a, b), from_s=(10.0, 40.0))
    again = replace(once, again_s=60.0)

    def limits_w(schedule: Scheduled, *times_s: float) -> list[float]:
        return [schedule.step(None, None, None, None, t)[0].point.power_limit_w for t in times_s]  # type: ignore[arg-type]

    assert limits_w(once, 0.0, 10.0, 39.5, 40.0, 1000.0) == [400.0, 400.0, 400.0, 200.0, 200.0]
    assert limits_w(again, 0.0, 39.5, 40.0, 69.5, 70.0, 100.0) == [400.0, 400.0, 200.0, 200.0, 400.0, 200.0]


def test_an_engine_is_refused_where_its_seed_or_boards_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        EngineCase(model="gpt2", boards="h100-sxm5-80gb", seed=0).simulation()
    with pytest.raises(ConfigError, match="no-such-board"):
        EngineCase(model="gpt2", boards="no-such-board", seed=1).simulation()


def test_a_folder_whose_config_changed_is_another_engine(tmp_path: Path) -> None:
    assert model_of("mixtral-8x7b") == ("mistralai/Mixtral-8x7B-v0.1", "")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(shipped_config("openai-community/gpt2")))
    model, sizes = model_of(str(tmp_path))
    case = EngineCase(model=model, sizes=sizes, boards="h100-sxm5-80gb", seed=1)
    assert case.simulation().boards == 1
    config.write_text(json.dumps(shipped_config("openai-community/gpt2") | {"n_layer": 6}))
    assert model_of(str(tmp_path)) != (model, sizes)
    with pytest.raises(ConfigError):
        model_of("no-such-model")


def test_the_command_names_the_nearest_experiment_and_options_without_use(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path)]
    assert main(["experiment", "list"]) == 0
    assert "paper-single-node" in capsys.readouterr().out
    assert main(["experiment", "run", "paper-single-nod", *out]) == 2
    assert "did you mean 'paper-single-node'" in capsys.readouterr().err
    assert main(["experiment", "price", "--trace", "x.csv", *out]) == 2
    assert "--trace makes no sense" in capsys.readouterr().err
    assert main(["experiment", "price", "--seed", "0", *out]) == 2
    assert main(["experiment", "price", "--model", "no-such-model", *out]) == 2
    assert main(["experiment", "run", *out]) == 2
    assert not list(tmp_path.iterdir())
