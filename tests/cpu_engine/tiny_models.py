"""Mixture-of-experts models of about a million random weights, in the sizes that vLLM's CPU kernels take; no tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}
#: Layers with experts, and experts a token chooses in each.
SHAPES = {"qwen3-moe": (2, 2), "mixtral": (2, 2), "deepseek-v2": (1, 2)}


def make(name: str, folder: Path) -> Path:
    """The folder of model `name`, made there."""
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV2Config, MixtralConfig, Qwen3MoeConfig

    configs = {
        "qwen3-moe": lambda: Qwen3MoeConfig(
            **_COMMON, head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, intermediate_size=128
        ),
        "mixtral": lambda: MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2, intermediate_size=128),
        # The one head dimension (512 + 64) that the CPU's kernel for latent attention takes; the first layer is dense.
        "deepseek-v2": lambda: DeepseekV2Config(
            **(_COMMON | {"num_key_value_heads": 4}), kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=32, v_head_dim=32,
            q_lora_rank=None, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1,
            moe_intermediate_size=64, intermediate_size=128, topk_method="greedy", n_group=1, topk_group=1,
        ),
    }  # fmt: skip
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(configs[name]()).to(torch.bfloat16)
    model.save_pretrained(folder / name)
    return folder / name
