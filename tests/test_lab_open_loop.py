"""The experiment on traces: which places it looks at, what arrives, what its targets are, and how rows become verdicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pals.core.errors import ConfigError
from pals.core.quantities import Slo
from pals.experiments.lab.engines import EngineCase
from pals.experiments.lab.experiment import Row, Wish
from pals.experiments.lab.open_loop import (
    BOARDS,
    LOADS,
    MODELS,
    PLACES_BY_DEFAULT,
    OpenCell,
    OpenLoopTraces,
    balanced,
    engines_of,
    kind_of,
    slo_of,
)
from pals.experiments.lab.replayed import TRACES, TraceCase, fitting, most_per_s, offered, own_mix
from pals.plant.workload import Workload

SMALL = EngineCase(model="openai-community/gpt2", boards="1xh100-sxm5-80gb", seed=1, launch=8, prefix_caching=True)


def workload(count: int = 400, *, prompt: int = 200, output: int = 100, prefix: int = 0, cv: float = 1.0) -> Workload:
    rng = np.random.default_rng(3)
    gaps = rng.gamma(cv**-2, cv**2, count)
    return Workload(
        name="w", arrival_s=np.cumsum(gaps), prompt_tokens=np.full(count, prompt, np.int32),
        output_tokens=np.full(count, output, np.int32), prefix_tokens=np.full(count, prefix, np.int32),
    )  # fmt: skip


def trace_file(folder: Path, count: int = 60) -> Path:
    path = folder / "mine.csv"
    lines = [f"{i * 0.5:.2f},{40 + i % 7},{10 + i % 5}" for i in range(count)]
    path.write_text("\n".join(["arrival_s,input_tokens,output_tokens", *lines]) + "\n", encoding="utf-8")
    return path


def test_the_default_places_hold_every_engine_trace_load_and_pair_of_these() -> None:
    engines = engines_of(Wish(), seed=1)
    places = list(balanced(engines, TRACES, PLACES_BY_DEFAULT))
    counts = [sum(e == engine for e, _, _ in places) for engine in engines]
    assert set(counts) == {2}
    assert {(t.trace, load) for _, t, load in places} == {(t.trace, load) for t in TRACES for load in LOADS}


def test_each_model_takes_the_fewest_boards_that_hold_a_full_batch_and_none_where_it_does_not_fit() -> None:
    found = {(e.model, e.boards.split("x", 1)[1]): int(e.boards.split("x")[0]) for e in engines_of(Wish(), seed=1)}
    assert {m for m, _ in found} == set(MODELS)
    assert {b for _, b in found} == set(BOARDS)
    assert ("deepseek-ai/DeepSeek-V3", "h100-sxm5-80gb") not in found  # 671 GB of weights on 640 GB
    assert found["meta-llama/Llama-3.1-70B", "h100-sxm5-80gb"] == 4
    assert found["Qwen/Qwen3-235B-A22B", "h100-sxm5-80gb"] == 8


def test_a_named_trace_meets_every_model_and_load_with_its_own_lengths(tmp_path: Path) -> None:
    path = trace_file(tmp_path)
    cells = OpenLoopTraces().cells(Wish(trace=str(path), policies=("pals",)))
    assert {c.load for c in cells} == set(LOADS)
    assert {c.engine.model for c in cells} == set(MODELS)
    assert {(c.engine.prompt_tokens, c.engine.output_tokens) for c in cells} == {(43.0, 12.0)}
    assert len({c.slug for c in cells}) == len(cells)


def test_a_file_with_other_contents_is_another_cell(tmp_path: Path) -> None:
    before = TraceCase.of_file(str(trace_file(tmp_path)))
    after = TraceCase.of_file(str(trace_file(tmp_path, count=61)))
    assert before.trace == after.trace
    assert before != after


@pytest.mark.parametrize("wish", [Wish(trace="nowhere.csv"), Wish(boards=("9xabacus",)), Wish(models=("gpt-nothing",))])
def test_what_does_not_exist_is_refused_before_anything_runs(wish: Wish) -> None:
    with pytest.raises(ConfigError, match="Nothing was"):
        OpenLoopTraces().cells(wish)


def test_requests_beyond_the_context_are_left_out_and_a_trace_of_nothing_else_is_refused(tmp_path: Path) -> None:
    case = TraceCase.of_file(str(trace_file(tmp_path)))
    assert fitting(case, 56).total_tokens.max() <= 56
    with pytest.raises(ConfigError, match="fit a context"):
        fitting(case, 40)


@pytest.mark.parametrize("load", [0.2, 0.9])
def test_what_arrives_is_the_share_asked_for_of_what_the_engine_answers_of_just_these(load: float) -> None:
    sim = SMALL.simulation()
    got, most = offered(sim, workload(4000), load=load, duration_s=20.0, seed=1)
    assert len(got) == pytest.approx(20.0 * load * most, rel=0.1)
    assert 10.0 < got.arrival_s[-1] <= 20.0
    again, _ = offered(sim, workload(4000), load=load, duration_s=20.0, seed=1)
    assert np.array_equal(got.arrival_s, again.arrival_s)


def test_a_trace_that_is_too_short_is_repeated() -> None:
    got, most = offered(SMALL.simulation(), workload(50), load=0.5, duration_s=30.0, seed=1)
    assert len(got) > 50
    assert len(got) == pytest.approx(15.0 * most, rel=0.1)


def test_the_mix_to_profile_counts_what_must_be_computed() -> None:
    assert own_mix(workload(prompt=200, prefix=150, output=30)) == (50.0, 30.0)


def test_the_user_s_own_lengths_are_profiled_first() -> None:
    told = replace(SMALL, prompt_tokens=50.0, output_tokens=30.0)
    mixes = told._plan(told.simulation()).mixes
    assert (mixes[0].prompt_tokens, mixes[0].output_tokens) == (50.0, 30.0)
    assert mixes[1:] == SMALL._plan(SMALL.simulation()).mixes[1:]


def test_shared_prefixes_raise_what_an_engine_answers() -> None:
    sim = SMALL.simulation()
    plain, shared = workload(prompt=900, output=4), workload(prompt=900, output=4, prefix=880)
    assert most_per_s(sim, shared) > 1.05 * most_per_s(sim, plain)


def test_targets_follow_the_kind_of_trace_and_the_size_of_the_model() -> None:
    chat, bursts = workload(output=200), workload(output=200, cv=8.0)
    assert [kind_of(w) for w in (chat, bursts, workload(prompt=9000), workload(output=20))] == [
        "chat",
        "bursts",
        "long",
        "short",
    ]
    large = EngineCase(model="Qwen/Qwen3-235B-A22B", boards="8xh100-sxm5-80gb", seed=1, launch=256)
    assert slo_of(SMALL, chat) == Slo(ttft_p95_s=2.0, tpot_p95_s=0.1)
    assert slo_of(large, chat) == Slo(ttft_p95_s=2.0, tpot_p95_s=0.15)
    assert slo_of(SMALL, bursts).ttft_p95_s == 80.0


def test_a_tiny_cell_tells_energy_and_misses_and_the_same_twice(tmp_path: Path) -> None:
    case = TraceCase.of_file(str(trace_file(tmp_path)))
    cell = OpenCell(
        engine=SMALL, trace=case, load=0.5, policy="static", slo=Slo(ttft_p95_s=2.0, tpot_p95_s=0.1), warmup_s=1.0, span_s=4.0
    )  # fmt: skip
    (row,) = OpenLoopTraces().run(cell, tmp_path)
    assert row["missed"] == 0.0
    assert row["requests"] == pytest.approx(0.5 * row["most_per_s"] * 4.0, rel=0.1)
    assert row["tokens_per_j_node"] > 0
    assert [row] == OpenLoopTraces().run(cell, tmp_path)


def rows(*told: tuple[str, float, float, float]) -> list[Row]:
    """Policy, load, joules per token, misses."""
    return [
        {
            "engine": "e", "trace": "t", "load": load, "seed": 1, "policy": policy, "missed": missed,
            "tokens_per_j_node": 1.0 / joules, "tokens_per_j_gpu": 1.0 / joules,
        }
        for policy, load, joules, missed in told
    ]  # fmt: skip


def test_verdicts_judge_the_median_and_the_worst_place() -> None:
    good = rows(*(("static", x, 10.0, 0.02) for x in LOADS), *(("pals", x, 6.0, 0.025) for x in LOADS))
    assert [v.reached for v in OpenLoopTraces().verdicts(good)] == [True, True, True, True]
    one_bad = [
        {**r, "missed": 0.2, "tokens_per_j_node": 0.09} if (r["policy"], r["load"]) == ("pals", 0.9) else r
        for r in good
    ]
    assert [v.reached for v in OpenLoopTraces().verdicts(one_bad)] == [True, True, False, False]
    assert [v.reached for v in OpenLoopTraces().verdicts([])] == [None] * 4
    assert OpenLoopTraces().tables(one_bad)[0].lines[0][0] == "e, t, 20%"
