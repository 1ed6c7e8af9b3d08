"""Step times: sizes match the published ones, experts follow the formula, and time answers to clock, load and layout."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.core.architecture import ModelShape
from pals.core.errors import ConfigError
from pals.plant.expert_ranks import rank_load
from pals.plant.experts import distinct_experts
from pals.plant.llm_step import StepBatch, StepModel, StepTables, step_cost
from pals.plant.perturb import perturb
from pals.plant.silicon import load_power_w
from pals.plant.specs import board_specs
from pals.plant.step_constants import step_constants

A100, H100 = board_specs()["a100-sxm4-80gb"], board_specs()["h100-sxm5-80gb"]
PUBLISHED_B = {  # total parameters, billions, as the models' cards state them
    "mistralai--Mixtral-8x7B-v0.1": 46.7,
    "mistralai--Mixtral-8x22B-v0.1": 140.6,
    "Qwen--Qwen3-30B-A3B": 30.5,
    "Qwen--Qwen3-235B-A22B": 235.1,
    "deepseek-ai--DeepSeek-V3": 671.0,
    "allenai--OLMoE-1B-7B-0924": 6.92,
    "Qwen--Qwen1.5-MoE-A2.7B": 14.3,
    "deepseek-ai--deepseek-moe-16b-base": 16.4,
    "microsoft--Phi-3.5-MoE-instruct": 41.9,
    "meta-llama--Llama-3.1-8B": 8.03,
    "meta-llama--Llama-3.1-70B": 70.6,
    "meta-llama--Llama-2-7b-hf": 6.74,
    "mistralai--Mistral-7B-v0.1": 7.24,
    "openai-community--gpt2": 0.124,
}


def shape(name: str) -> ModelShape:
    return ModelShape.from_config(json.loads((files("pals.engines") / "model_configs" / f"{name}.json").read_text()))


@pytest.mark.parametrize("name", PUBLISHED_B)
def test_parameters_match_the_published_total(name: str) -> None:
    assert shape(name).total_params / 1e9 == pytest.approx(PUBLISHED_B[name], rel=0.02)


@cache
def mixtral() -> StepModel:
    return StepModel(shape("mistralai--Mixtral-8x7B-v0.1"), A100, tensor_parallel=4)


@cache
def qwen(**layout: int | bool) -> StepModel:
    return StepModel(shape("Qwen--Qwen3-30B-A3B"), H100, **layout)  # type: ignore[arg-type]


DECODE_64 = StepBatch(decode_sequences=64, context_tokens=64 * 1000)
PREFILL_2048 = StepBatch(prefill_tokens=2048, prefill_sequences=1, attention_pairs=2048 * 2048 / 2)


def test_mixtral_on_four_a100_takes_the_time_and_draws_the_power_of_its_kind() -> None:
    decode, prefill = mixtral().step(DECODE_64, 1410), mixtral().step(PREFILL_2048, 1410)

    assert 0.020 < decode.seconds < 0.036
    assert 180 < load_power_w(A100.silicon, decode.load, 1410) < 330
    assert 0.1 < prefill.seconds < 0.25
    assert load_power_w(A100.silicon, prefill.load, 1410) > load_power_w(A100.silicon, decode.load, 1410) + 60


def test_slowing_the_clock_is_cheap_in_decode_and_dear_in_prefill() -> None:
    decode = mixtral().step(DECODE_64, 1110).seconds / mixtral().step(DECODE_64, 1410).seconds
    prefill = mixtral().step(PREFILL_2048, 1110).seconds / mixtral().step(PREFILL_2048, 1410).seconds

    assert decode < 1.13
    assert prefill > 1.15


@given(tokens=st.integers(1, 512), cv=st.sampled_from([0.0, 0.3, 0.7]))
def test_distinct_experts_grow_with_the_batch_and_stay_within_the_layer(tokens: int, cv: float) -> None:
    now, more = distinct_experts(128, 8, tokens, cv), distinct_experts(128, 8, tokens + 1, cv)

    assert 0 < now <= more <= 128
    assert now <= 128 * (1 - (1 - 8 / 128) ** tokens) + 1e-6  # skew touches fewer


@pytest.mark.parametrize("cv", [0.0, 1.0])
def test_the_hottest_rank_has_what_drawn_routings_give_it(cv: float) -> None:
    rng, tokens, ranks = np.random.default_rng(1), 16, 8
    weights = np.ones(128) if cv == 0 else np.random.default_rng(0).gamma(1 / cv**2, cv**2, 128)
    chosen = [
        np.unique(np.concatenate([rng.choice(128, 8, replace=False, p=weights / weights.sum()) for _ in range(tokens)]))
        for _ in range(400)
    ]
    hottest = np.mean([np.bincount(c // 16, minlength=ranks).max() for c in chosen])
    load = rank_load(128, 8, (float(tokens),), ranks, cv)

    assert load.touched[0] == pytest.approx(hottest, rel=0.1)
    assert load.even[0] * load.touched[0] == pytest.approx(np.mean([len(c) for c in chosen]) / ranks, rel=0.1)


@given(st.integers(0, 64), st.integers(0, 8192), st.floats(210, 1410))
def test_more_work_takes_longer(sequences: int, prefill: int, clock_mhz: float) -> None:
    batch = StepBatch(decode_sequences=sequences, prefill_tokens=prefill, context_tokens=500 * sequences)
    larger = StepBatch(decode_sequences=sequences + 1, prefill_tokens=prefill, context_tokens=500 * (sequences + 1))

    assert mixtral().step(batch, clock_mhz).seconds < mixtral().step(larger, clock_mhz).seconds


@given(st.integers(1, 64), st.integers(0, 4096), st.floats(345, 1965))
def test_a_faster_clock_never_slows_a_step_and_shares_stay_shares(decode: int, prefill: int, clock_mhz: float) -> None:
    batch = StepBatch(
        decode_sequences=decode, context_tokens=700 * decode, prefill_tokens=prefill, attention_pairs=prefill**2 / 2
    )
    slow, fast = qwen().step(batch, clock_mhz), qwen().step(batch, clock_mhz + 15)

    assert fast.seconds <= slow.seconds
    assert 0 < slow.load.busy <= 1  # the other shares are checked by `Load` itself


def test_a_step_needs_no_table_and_arrays_give_what_numbers_give() -> None:
    tables, context = qwen().tables, np.array([0.0, 5e3, 8e4])
    clocks = np.array([1980.0, 1200.0, 345.0])
    batches = np.array([1, 9, 64])
    together = step_cost(tables, 0 * batches, 0 * batches, batches, context, 0 * context, clocks)

    for i, batch in enumerate(batches):
        alone = step_cost(tables, 0, 0, int(batch), float(context[i]), 0.0, float(clocks[i]))
        assert [v[i] for v in together] == pytest.approx(alone, rel=1e-12)
    assert isinstance(tables, StepTables)


def test_no_tokens_cost_the_hosts_time_alone() -> None:
    cost = qwen().step(StepBatch(), 1980)

    assert cost.seconds == pytest.approx(qwen().constants.host_s)
    assert (cost.load.compute, cost.load.memory, cost.load.busy) == pytest.approx((0, 0, 0), abs=1e-9)


def test_more_tokens_than_the_tables_hold_make_larger_tables() -> None:
    small = StepModel(shape("meta-llama--Llama-3.1-8B"), H100, max_tokens=256)
    batch = StepBatch(prefill_tokens=4096, prefill_sequences=4)

    assert small.step(batch, 1980).seconds > 0.02
    assert len(small.tables.memory_s) > 4096


def test_layouts_divide_the_work() -> None:
    one, two = qwen().step(DECODE_64, 1980).seconds, qwen(tensor_parallel=2).step(DECODE_64, 1980).seconds
    experts = qwen(tensor_parallel=2, expert_parallel=True).step(DECODE_64, 1980).seconds

    assert one / 2 < two < one
    assert one / 2 < experts < one
    stages = qwen(pipeline_parallel=2).step(DECODE_64, 1980)
    assert stages.seconds > one  # the stages come one after the other
    assert stages.load.busy == pytest.approx(qwen().step(DECODE_64, 1980).load.busy / 2, rel=0.05)
    ranks = qwen(data_parallel=2, expert_parallel=True)
    assert (
        ranks.step(DECODE_64, 1980).seconds < one
    )  # each rank holds half of the experts, all ranks' tokens visit them


def test_without_cuda_graphs_the_host_sets_the_pace_and_the_clock_does_nothing() -> None:
    eager = qwen(cuda_graphs=False)
    batch = StepBatch(decode_sequences=1, context_tokens=500)

    assert eager.step(batch, 1980).seconds > 3 * qwen().step(batch, 1980).seconds
    assert eager.step(batch, 990).seconds == pytest.approx(eager.step(batch, 1980).seconds)
    assert eager.step(batch, 1980).load.busy < 0.4


def test_a_sliding_window_bounds_what_long_contexts_cost() -> None:
    full = shape("mistralai--Mistral-7B-v0.1")
    windowed = StepModel(replace(full, window=1024, window_layers=full.layers), H100)
    at = [StepBatch(decode_sequences=16, context_tokens=16 * n) for n in (512, 1024, 8192)]

    assert windowed.step(at[0], 1980).seconds == pytest.approx(StepModel(full, H100).step(at[0], 1980).seconds)
    assert windowed.step(at[2], 1980).seconds == pytest.approx(windowed.step(at[1], 1980).seconds)


def test_drifted_routing_and_another_engine_build_make_another_model() -> None:
    batch = StepBatch(decode_sequences=16, context_tokens=16 * 500)
    model = qwen(tensor_parallel=2, expert_parallel=True)
    even = model.changed(replace(model.constants, popularity_cv=0.0))
    slow = model.changed(model.constants.with_host_factor(3.0))

    assert even.step(batch, 1980).seconds > model.step(batch, 1980).seconds  # a skewed batch touches fewer experts
    more = 2 * (model.constants.host_s + 16 * model.constants.host_per_sequence_s)
    assert slow.step(batch, 1980).seconds - model.step(batch, 1980).seconds == pytest.approx(more)


def test_perturbed_constants_and_boards_give_another_time_of_the_same_size() -> None:
    base = qwen().step(DECODE_64, 1980).seconds
    constants = qwen().changed(perturb(step_constants(H100), seed=3)).step(DECODE_64, 1980).seconds
    board = StepModel(shape("Qwen--Qwen3-30B-A3B"), perturb(H100, seed=3)).step(DECODE_64, 1980).seconds

    assert constants != base != board
    assert constants == pytest.approx(base, rel=0.4)
    assert board == pytest.approx(base, rel=0.4)


@pytest.mark.parametrize("board", board_specs())
def test_every_board_runs_every_kind_of_model(board: str) -> None:
    spec = board_specs()[board]
    dense, moe = shape("meta-llama--Llama-3.1-8B"), shape("Qwen--Qwen3-30B-A3B")
    floor_s = dense.dense_bytes / spec.hbm_peak_bytes_s

    for model in (dense, dense.stored_as("int4"), moe, moe.stored_as("fp8_block"), shape("deepseek-ai--DeepSeek-V3")):
        cost = StepModel(model, spec, tensor_parallel=8).step(DECODE_64, spec.max_sm_clock_mhz)
        assert 0 < cost.seconds < 10
    one = StepModel(dense, spec).step(StepBatch(decode_sequences=1, context_tokens=100), spec.max_sm_clock_mhz).seconds
    assert floor_s < one < 2.0 * floor_s + 0.006


def test_what_does_not_fit_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="take more boards"):
        StepModel(shape("mistralai--Mixtral-8x7B-v0.1"), A100, tensor_parallel=1).kv_capacity_bytes(0.9)
    assert mixtral().kv_capacity_bytes(0.9) > 40e9
