"""Shapes of models: from a config and from the table alike, by class of parameter and stored format."""

from __future__ import annotations

import csv
import json
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest

from pals.core.architecture import FORMAT_BYTES, ModelShape, row_for
from pals.core.errors import ConfigError

TABLE = Path(__file__).parents[1] / "data" / "model-architectures" / "models.csv"
CONFIGS = {  # file in the package -> row of the table
    "mistralai--Mixtral-8x7B-v0.1": "mistralai/Mixtral-8x7B-v0.1",
    "Qwen--Qwen3-235B-A22B": "Qwen/Qwen3-235B-A22B",
    "Qwen--Qwen1.5-MoE-A2.7B": "Qwen/Qwen1.5-MoE-A2.7B",
    "deepseek-ai--DeepSeek-V3": "deepseek-ai/DeepSeek-V3",
    "deepseek-ai--deepseek-moe-16b-base": "deepseek-ai/deepseek-moe-16b-base",
    "meta-llama--Llama-3.1-70B": "meta-llama/Meta-Llama-3.1-70B",
    "openai-community--gpt2": "gpt2",
}


@cache
def rows() -> dict[str, dict[str, str]]:
    with TABLE.open() as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def config(name: str) -> dict[str, object]:
    read: dict[str, object] = json.loads((files("pals.engines") / "model_configs" / f"{name}.json").read_text())
    return read


@pytest.mark.parametrize("name", rows())
def test_a_row_adds_up_to_the_counts_it_states(name: str) -> None:
    row, shape = rows()[name], ModelShape.from_row(rows()[name])

    assert shape.total_params / 1e9 == pytest.approx(float(row["params_total_B"]), abs=0.01)
    assert shape.dense_params / 1e9 == pytest.approx(float(row["params_read_dense_B"]), abs=0.001)
    assert shape.kv_bytes_per_token == float(row["kv_bytes_per_token_bf16"])


@pytest.mark.parametrize("name", CONFIGS)
def test_config_and_row_of_a_model_give_one_shape(name: str) -> None:
    ours, table = ModelShape.from_config(config(name)), ModelShape.from_row(rows()[CONFIGS[name]])

    for field in ("layers", "kv_heads", "experts", "top_k", "moe_layers", "tied", "attention_format", "expert_format"):
        assert getattr(ours, field) == getattr(table, field), field
    for field in ("attention_params", "ffn_total", "expert_total", "weight_bytes", "attention_width", "decode_width"):
        assert getattr(ours, field) == pytest.approx(getattr(table, field), rel=0.005), field


def test_formats_store_what_their_names_say() -> None:
    shape = ModelShape.from_row(rows()["openai/gpt-oss-120b"])

    assert (shape.attention_format, shape.expert_format) == ("bf16", "mxfp4")
    assert shape.weight_bytes / 1e9 == pytest.approx(65.2, abs=1.0)  # the release's files
    assert (shape.window, shape.window_layers) == (128, 18)
    wide = ModelShape.from_row(rows()["Qwen/Qwen3-235B-A22B"])
    narrow = wide.stored_as("fp8_block")
    head = 2 * wide.head_params * FORMAT_BYTES["bf16"]
    assert narrow.weight_bytes - head == pytest.approx((wide.weight_bytes - head) / 2, rel=0.01)
    assert wide.stored_as("fp8", attention="bf16").attention_format == "bf16"


@pytest.mark.parametrize(
    ("quantization", "attention", "experts"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block", "fp8_block"),
        ({"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["model.layers.0.self_attn.q_proj"]}, "bf16", "fp8"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 4}}}}, "int4", "int4"),
        ({"quant_method": "mxfp4"}, "bf16", "mxfp4"),
        ({"quant_method": "awq"}, "int4", "int4"),
    ],
)
def test_a_config_says_how_its_weights_are_stored(
    quantization: dict[str, object], attention: str, experts: str
) -> None:
    shape = ModelShape.from_config({**config("Qwen--Qwen3-30B-A3B"), "quantization_config": quantization})

    assert (shape.attention_format, shape.expert_format) == (attention, experts)


def test_sliding_windows_are_read_where_they_are_used() -> None:
    base = config("mistralai--Mistral-7B-v0.1")

    assert ModelShape.from_config({**base, "sliding_window": 4096}).window_layers == 32
    assert ModelShape.from_config({**base, "sliding_window": 4096, "use_sliding_window": False}).window_layers == 0
    kinds = ["sliding_attention", "full_attention"] * 16
    assert ModelShape.from_config({**base, "sliding_window": 128, "layer_types": kinds}).window_layers == 16


@pytest.mark.parametrize(
    ("hub", "row"),
    [
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", "Qwen/Qwen3-30B-A3B"),
        ("Qwen/Qwen3-235B-A22B-Thinking-2507-FP8", "Qwen/Qwen3-235B-A22B"),
        ("Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8", "Qwen/Qwen3-Coder-480B-A35B-Instruct"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-ai/DeepSeek-V3"),
        ("meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Meta-Llama-3.1-70B"),
        ("meta-llama/Llama-3.1-405B-Instruct-FP8", "meta-llama/Meta-Llama-3.1-405B"),
        ("google/gemma-3-27b-it", None),
        ("Qwen/Qwen3-VL-32B-Instruct", None),
        ("Qwen/Qwen3-Omni-30B-A3B-Instruct", None),
    ],
)
def test_a_release_is_found_by_its_architecture(hub: str, row: str | None) -> None:
    assert row_for(hub, rows()) == row


def test_what_cannot_be_sized_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"config\.json lacks"):
        ModelShape.from_config({"model_type": "mystery"})
    with pytest.raises(ConfigError, match="known: bf16"):
        ModelShape.from_row(rows()["gpt2"]).stored_as("fp3")
    with pytest.raises(ConfigError, match=r"gpt2 of models\.csv lacks"):
        ModelShape.from_row({"model": "gpt2", "layers": "12"})
