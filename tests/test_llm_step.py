"""Step times: sizes match the published ones, experts follow the formula, and time answers to clock and load."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.core.errors import ConfigError
from pals.plant.llm_step import ModelShape, StepBatch, StepModel, distinct_experts
from pals.plant.silicon import load_power_w
from pals.plant.specs import board_specs

A100 = board_specs()["a100-sxm4-80gb"]
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


DECODE_64 = StepBatch(decode_sequences=64, context_tokens=64 * 1000)
PREFILL_2048 = StepBatch(prefill_tokens=2048, attention_pairs=2048 * 2048 / 2)


def test_mixtral_on_four_a100_takes_the_time_and_draws_the_power_of_its_kind() -> None:
    decode, prefill = mixtral().step(DECODE_64, 1410), mixtral().step(PREFILL_2048, 1410)

    assert 0.017 < decode.seconds < 0.024
    assert 200 < load_power_w(A100.silicon, decode.load, 1410) < 270
    assert 0.08 < prefill.seconds < 0.13
    assert load_power_w(A100.silicon, prefill.load, 1410) > 360


def test_slowing_the_clock_is_nearly_free_in_decode_and_dear_in_prefill() -> None:
    decode = mixtral().step(DECODE_64, 1110).seconds / mixtral().step(DECODE_64, 1410).seconds
    prefill = mixtral().step(PREFILL_2048, 1110).seconds / mixtral().step(PREFILL_2048, 1410).seconds

    assert decode < 1.12
    assert prefill > 1.18


@given(tokens=st.integers(1, 512), cv=st.sampled_from([0.0, 0.3, 0.7]))
def test_distinct_experts_grow_with_the_batch_and_stay_within_the_layer(tokens: int, cv: float) -> None:
    now, more = distinct_experts(128, 8, tokens, cv), distinct_experts(128, 8, tokens + 1, cv)

    assert 0 < now <= more <= 128
    assert now <= 128 * (1 - (1 - 8 / 128) ** tokens) + 1e-6  # skew touches fewer


@given(st.integers(0, 64), st.integers(0, 8192), st.floats(210, 1410))
def test_more_work_takes_longer(sequences: int, prefill: int, clock_mhz: float) -> None:
    batch = StepBatch(decode_sequences=sequences, prefill_tokens=prefill, context_tokens=500 * sequences)
    larger = StepBatch(decode_sequences=sequences + 1, prefill_tokens=prefill, context_tokens=500 * (sequences + 1))

    assert mixtral().step(batch, clock_mhz).seconds < mixtral().step(larger, clock_mhz).seconds


def test_what_does_not_fit_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="emulate more boards"):
        StepModel(shape("mistralai--Mixtral-8x7B-v0.1"), A100, tensor_parallel=1).kv_capacity_bytes(0.9)
    assert mixtral().kv_capacity_bytes(0.9) > 40e9


def test_a_config_without_sizes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config\.json lacks"):
        ModelShape.from_config({"model_type": "mystery"})
