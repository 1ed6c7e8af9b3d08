"""The simulated world's routing: counts that add up, distinct experts as step times have them, drift that moves what it should."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.cli import main
from pals.core.architecture import ModelShape
from pals.core.errors import ConfigError
from pals.core.experts import ExpertCounts, summarise
from pals.engines.model_zoo import shipped_config
from pals.experiments.simulated_faults import TimedFaults
from pals.experiments.simulated_node import SimulatedGroup
from pals.plant.faults import FaultSchedule
from pals.plant.llm_step import StepBatch, StepModel
from pals.plant.replica import Replica
from pals.plant.routing import Routing, tally_of
from pals.plant.routing_schedule import PARTS, RoutingEvent, RoutingSchedule, load_routing, parse_routing
from pals.plant.specs import board_specs
from pals.plant.workload import Workload

SPEC = board_specs()["a100-sxm4-80gb"]
SEQUENCES = 16


@cache
def model(name: str = "allenai/OLMoE-1B-7B-0924") -> StepModel:
    return StepModel(ModelShape.from_config(shipped_config(name)), SPEC, max_tokens=2048)


def replica(seed: int = 0, output: int = 400, name: str = "allenai/OLMoE-1B-7B-0924") -> Replica:
    """A full batch that decodes, after its prompts, for as long as the tests look."""
    pytest.importorskip("numba")
    made = Replica(model(name), SPEC, boards=1, max_num_seqs=SEQUENCES, max_num_batched_tokens=2048, routing_seed=seed)
    n = SEQUENCES
    made.submit(
        Workload(
            name="a batch", arrival_s=np.zeros(n), prompt_tokens=np.full(n, 32, np.int32),
            output_tokens=np.full(n, output, np.int32), prefix_tokens=np.zeros(n, np.int32),
        )
    )  # fmt: skip
    return made


routings = st.builds(
    lambda experts, top_k, cv, layers, seed: Routing.drawn(
        layers=layers, experts=experts, top_k=min(top_k, experts), cv=cv, seed=seed
    ),
    st.integers(2, 128), st.integers(1, 10), st.floats(0.0, 5.0), st.integers(1, 4), st.integers(0, 9),
)  # fmt: skip


@given(routing=routings, tokens=st.integers(0, 5000), seed=st.integers(0, 99))
def test_counts_add_up_and_no_token_has_an_expert_twice(routing: Routing, tokens: int, seed: int) -> None:
    counts = routing.sampled_counts(tokens, np.random.default_rng(seed))

    assert counts.sum(axis=1).tolist() == [tokens * routing.top_k] * routing.layers
    assert counts.min() >= 0
    assert counts.max() <= tokens
    assert routing.expected_counts(tokens).sum(axis=1) == pytest.approx(tokens * routing.top_k)
    again = routing.sampled_counts(tokens, np.random.default_rng(seed))
    assert np.array_equal(counts, again)


@pytest.mark.parametrize("cv", [0.0, 0.3, 0.7, 1.17])
def test_popularity_varies_as_asked_in_every_layer_and_layers_differ_in_who_is_popular(cv: float) -> None:
    p = Routing.drawn(layers=6, experts=256, top_k=8, cv=cv).popularity()

    assert p.std(axis=1) / p.mean(axis=1) == pytest.approx(
        cv, rel=0.1, abs=1e-9
    )  # one draw of 256: 4.4 % standard error
    assert p.max() <= 1.0
    assert cv == 0.0 or len({int(i) for i in p.argmax(axis=1)}) > 1


@given(routing=routings, begin=st.floats(0, 1), end=st.floats(0, 1))
def test_a_swap_moves_popularity_between_experts_and_undoes_itself(routing: Routing, begin: float, end: float) -> None:
    begin, end = sorted((begin, end))
    swapped = routing.swapped(begin, end)

    assert np.array_equal(np.sort(swapped.popularity(), axis=1), np.sort(routing.popularity(), axis=1))
    assert np.array_equal(swapped.swapped(begin, end).order, routing.order)
    half = routing.swapped(begin, (begin + end) / 2).swapped((begin + end) / 2, end)
    assert np.array_equal(half.order, swapped.order)


def test_a_whole_swap_makes_the_most_popular_expert_the_least_popular() -> None:
    before = Routing.drawn(layers=3, experts=65, top_k=4, cv=0.8)
    after = before.swapped(0.0, 1.0)

    assert np.array_equal(before.popularity().argmax(axis=1), after.popularity().argmin(axis=1))


def test_distinct_experts_of_equal_ones_agree_with_tokens_drawn_one_by_one() -> None:
    routing, rng = Routing.drawn(layers=1, experts=64, top_k=8, cv=0.0), np.random.default_rng(1)
    for tokens in (1, 4, 12):
        drawn = [len(np.unique(np.argsort(rng.random((tokens, 64)), axis=1)[:, :8])) for _ in range(4000)]
        size = np.array([tokens])

        assert routing.distinct(size)[0] == pytest.approx(np.mean(drawn), rel=0.005)
        assert routing.distinct_variance(size)[0] == pytest.approx(np.var(drawn), rel=0.1, abs=1e-9)


@pytest.mark.parametrize("cv", [0.0, 0.4, 1.17])
def test_the_tally_tells_the_distinct_experts_that_step_times_are_made_of(cv: float) -> None:
    tally = tally_of(model().shape, cv)
    assert tally is not None
    steps = np.zeros(300, np.int64)
    steps[[1, 8, 30, 256]] = (40, 100, 50, 3)

    told = tally.after(steps).counts(1.0)

    truth = sum(n * tally.routing.distinct(np.array([t]))[0] for t, n in enumerate(steps) if n)
    assert told.distinct is not None
    assert told.distinct == pytest.approx(truth, rel=0.02)
    assert (told.steps, told.tokens) == (193, 40 + 800 + 1500 + 768)
    single = tally.after(np.bincount([1] * 7)).counts(1.0)
    assert single.distinct is not None
    assert single.distinct.tolist() == [56] * 16  # a token alone touches exactly top_k


def test_the_replicas_counts_are_of_all_its_steps_and_asking_changes_nothing() -> None:
    asked, silent = replica(), replica()
    for made in (asked, silent):
        for at_s in (0.2, 0.4, 0.6):
            made.advance(at_s)
            if made is asked:
                made.expert_counts()
    counts, engine = asked.expert_counts(), asked.counters()
    assert counts is not None

    assert counts.steps == engine.steps
    assert counts.tokens * counts.top_k == counts.routed[0].sum() == counts.routed[-1].sum()
    assert counts.known.all()
    assert (asked.energy_j(), asked.counters()) == (silent.energy_j(), silent.counters())


def test_a_seed_says_who_is_popular_and_the_same_seed_counts_the_same() -> None:
    told = []
    for seed in (0, 0, 1):
        made = replica(seed)
        made.advance(0.5)
        counts = made.expert_counts()
        assert counts is not None
        told.append(counts.routed)

    assert np.array_equal(told[0], told[1])
    assert not np.array_equal(told[0].argmax(axis=1), told[2].argmax(axis=1))


def test_a_clone_counts_on_by_itself() -> None:
    made = replica()
    made.advance(0.3)
    made.expert_counts()
    made.advance(0.4)
    twin = made.clone()
    twin.advance(0.8)
    later, before = twin.expert_counts(), made.expert_counts()
    assert later is not None
    assert before is not None

    assert before.steps == made.counters().steps < later.steps == twin.counters().steps
    made.advance(0.8)
    assert made.counters().steps == later.steps


def test_a_dense_model_has_no_counts() -> None:
    made = replica(name="meta-llama/Llama-3.1-8B")
    made.advance(0.2)
    made.swap_experts()

    assert made.expert_counts() is None


def counts_of(made: Replica) -> ExpertCounts:
    """What it counted so far."""
    counts = made.expert_counts()
    assert counts is not None
    return counts


def seconds_a_step(made: Replica) -> float:
    """Of the time to come, a full batch decoding."""
    before = made.counters()
    made.advance(made.now_s + 0.7)
    after = made.counters()
    return (after.busy_s - before.busy_s) / (after.steps - before.steps)


@pytest.mark.parametrize("cv", [0.0, 2.0])
def test_a_drift_moves_step_time_as_the_formula_says_and_a_swap_does_not(cv: float) -> None:
    made, still = replica(output=4000), replica(output=4000)

    def model_of(spread: float | None, host: float) -> StepModel:
        k = made.model.constants.with_host_factor(host)
        return made.model.changed(k if spread is None else replace(k, popularity_cv=spread))

    drift = parse_routing(f"1:swap=1;2:cv={cv}")
    faults = TimedFaults(FaultSchedule(), made, SimulatedGroup(made, SPEC, 1), model_of, drift)
    ratios, windows = [], []
    for begin_s in (0.25, 1.25, 2.25):
        faults.advance(begin_s)
        still.advance(begin_s)
        first = counts_of(made)
        ratios.append(seconds_a_step(made) / seconds_a_step(still))
        windows.append(counts_of(made).since(first))
    told = [summarise(w, reference=windows[0]) for w in windows]
    swapped, spread = told[1:]

    assert ratios[:2] == [1.0, 1.0]
    assert (swapped.drift or 0.0) > 0.3
    assert swapped.distinct_per_step == pytest.approx(told[0].distinct_per_step, rel=0.01)
    batch = StepBatch(decode_sequences=SEQUENCES, context_tokens=SEQUENCES * 300)
    slow, base = (m.step(batch, SPEC.max_sm_clock_mhz).seconds for m in (made.model, model()))
    assert ratios[2] == pytest.approx(slow / base, rel=0.03)
    assert (slow / base > 1.02) if cv == 0.0 else (slow / base < 0.98)
    assert spread.distinct_per_step is not None
    assert swapped.distinct_per_step is not None
    assert (spread.distinct_per_step > swapped.distinct_per_step) == (cv == 0.0)
    assert spread.variation is not None
    assert swapped.variation is not None
    assert (spread.variation < swapped.variation) == (cv == 0.0)


def test_a_schedule_is_read_from_text_json_and_toml_alike(tmp_path: Path) -> None:
    told = parse_routing("seed=3; 120+30:cv=0.3; 60:swap; 200:swap=0.25,cv=1")
    (tmp_path / "d.toml").write_text(
        "seed = 3\n[[events]]\ntime_s = 60\nswap = 0.5\n[[events]]\ntime_s = 120\nspan_s = 30\ncv = 0.3\n"
        "[[events]]\ntime_s = 200\nswap = 0.25\ncv = 1\n"
    )
    rows = [
        {"time_s": 200, "swap": 0.25, "cv": 1},
        {"time_s": 60, "swap": 0.5},
        {"time_s": 120, "span_s": 30, "cv": 0.3},
    ]
    (tmp_path / "d.json").write_text(json.dumps({"seed": 3, "events": rows}))
    (tmp_path / "list.json").write_text(json.dumps(rows))

    assert [e.time_s for e in told.events] == [60.0, 120.0, 200.0]
    assert told == load_routing(str(tmp_path / "d.toml")) == load_routing(str(tmp_path / "d.json"))
    assert replace(told, seed=0) == load_routing(str(tmp_path / "list.json"))
    assert load_routing(told.text()) == told
    assert parse_routing("") == RoutingSchedule()


def test_what_spans_time_comes_in_parts_that_end_where_they_should() -> None:
    changes = parse_routing("10+10:cv=0.2,swap=1;30:cv=0.5").changes(1.2)

    assert len(changes) == PARTS + 1
    assert [c.time_s for c in changes[:PARTS]] == pytest.approx(np.arange(11, 21))
    assert [c.cv for c in changes[:PARTS]] == pytest.approx(np.linspace(1.1, 0.2, PARTS))
    assert (changes[-1].cv, changes[-1].swap) == (0.5, None)
    routing = Routing.drawn(layers=2, experts=61, top_k=4, cv=1.2)
    moved = routing
    for change in changes[:PARTS]:
        moved = change.of(moved)
    assert np.array_equal(moved.order, routing.swapped(0.0, 1.0).order)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("60", "lacks a time"), ("x:swap", "not a number"), ("60:swop=1", "neither swap nor cv"), ("60:swap=1.5", "share"),
        ("60:swap=0", "share"), ("60:cv=-1", "coefficient"), ("60:cv=nan", "coefficient"), ("-1:swap", "time of at least"),
        ("60:cv", "not a number"), ("60:cv=1,cv=2", "twice"), ("0+20:cv=1;10:swap", "has ended"), ("seed=-1", "seed"),
        ("seed=x", "invalid literal"), ("60+inf:cv=1", "span_s"),
    ],
)  # fmt: skip
def test_a_wrong_text_is_refused_and_the_part_named(text: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word) as refused:
        parse_routing(text)
    assert "Nothing was started" in str(refused.value)


@pytest.mark.parametrize(
    "content", ["{", "3", '{"events": 1}', '{"events": [], "x": 1}', "[1]", '[{"time_s": 1}]', '[{"swap": 1}]',
                '[{"time_s": true, "swap": 1}]', '{"events": [], "seed": 1.5}', '[{"time_s": 1, "cv": "a"}]', '[{"time": 1}]'],
)  # fmt: skip
def test_a_wrong_file_is_refused_and_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(ConfigError, match=r"d\.json.*Nothing was started"):
        load_routing(str(tmp_path / "d.json"))
    with pytest.raises(ConfigError, match="cannot read"):
        load_routing(str(tmp_path / "missing.toml"))


@given(st.one_of(st.text(max_size=40), st.text("0123456789.:;,+=swapcveding-", max_size=40)))
def test_garbage_is_a_schedule_or_a_refusal(text: str) -> None:
    try:
        told = parse_routing(text)
    except ConfigError:
        return
    assert parse_routing(told.text()) == told
    assert all(isinstance(e, RoutingEvent) for e in told.events)


def test_simulated_policies_meet_the_drift(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    node = ["--model", "mixtral-8x7b", "--boards", "4xa100-sxm4-80gb", "--hours", "0.02", "--rate", "1"]
    tpot_s = []
    for drift in ("0:cv=0", "0:swap", "5:cv=3"):
        out = tmp_path / drift.replace(":", "-")
        assert main(["simulate", *node, "--policy", "static", "--routing-drift", drift, "--out", str(out)]) == 0
        tpot_s.append(np.nanmean(np.array(pq.read_table(out / "requests.parquet")["tpot_s"], float)))

    alike, swapped, unequal = tpot_s
    assert alike > swapped > unequal


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["simulate", "--model", "llama-3.1-8b", "--boards", "a100-sxm4-80gb", "--routing-drift", "1:swap"], "has no experts"),
        (["simulate", "--model", "OLMoE-1B-7B", "--boards", "a100-sxm4-80gb", "--routing-drift", "1:x=1"], "neither swap nor cv"),
        (["emulate", "run", "OLMoE-1B-7B", "--boards", "a100-sxm4-80gb", "--routing-drift", "x.toml"], "cannot read"),
        (["serve", "OLMoE-1B-7B", "--routing-drift", "1:swap"], "give --emulate too"),
    ],
)  # fmt: skip
def test_a_drift_that_cannot_be_is_refused_before_anything_starts(
    command: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("vllm")

    assert main(command) == 2

    told = capsys.readouterr().err
    assert message in told
    assert "Nothing was started" in told
