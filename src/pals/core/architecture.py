"""What of a model decides step time and memory: counts of parameters by class, and the format each class is stored in.

Read from a Hugging Face config.json or from a row of `data/model-architectures/models.csv`; nothing of a board in here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pals.core.errors import ConfigError

# Bytes a stored parameter takes, scales included: a row (fp8), blocks of 128 × 128 (fp8_block), groups of 128 (int4) and of 32 (mxfp4).
FORMAT_BYTES = {"bf16": 2.0, "fp8": 1.0, "fp8_block": 1.0 + 4 / 128**2, "int4": 0.5 + 2.5 / 128, "mxfp4": 0.5 + 1 / 32}
CHUNKED_BUT_EVERY = 4  # Llama 4: of so many layers one attends to the whole context
KV_BYTES = 2.0  # of one number in the KV cache
SPELLINGS = {"bfloat16": "bf16", "float16": "bf16", "half": "bf16", "float8": "fp8", "fp8_e4m3": "fp8", "awq": "int4", "gptq": "int4"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a model; parameters are counts, of one layer unless said otherwise."""

    layers: int
    hidden: int
    vocab: int
    heads: int  # query heads
    kv_heads: int  # what tensor parallelism can divide the KV cache by; 1 for a latent cache (MLA)
    attention_width: int  # query heads × head dimension: work of one query × key pair in prefill
    output_width: float  # what attention hands to its output projection
    decode_width: (
        float  # as attention_width, where one token is decoded; larger for MLA, which works in the latent space
    )
    attention_params: float
    ffn_params: float  # dense feed-forward of a layer that has no experts
    shared_params: float  # shared experts of a MoE layer
    router_params: float
    expert_params: float  # one routed expert
    moe_layers: int
    experts: int
    top_k: int
    kv_bytes_per_token: float  # all layers, cache in 16 bits
    tied: bool = False  # the embedding is the output matrix
    window: int = 0  # tokens a sliding-window layer looks back; 0: none
    window_layers: int = 0
    chunked_layers: int = 0  # layers that attend to chunks: engines cut their batch anew on the host at each step
    attention_format: str = "bf16"
    ffn_format: str = "bf16"  # dense feed-forward and shared experts
    expert_format: str = "bf16"

    @property
    def head_params(self) -> float:
        """The output matrix, always 16-bit."""
        return float(self.vocab * self.hidden)

    @property
    def embedding_params(self) -> float:
        """Stored, not read."""
        return 0.0 if self.tied else self.head_params

    @property
    def ffn_total(self) -> float:
        """Dense feed-forward and shared experts of all layers."""
        return (self.layers - self.moe_layers) * self.ffn_params + self.moe_layers * self.shared_params

    @property
    def expert_total(self) -> float:
        """Routed experts of all layers."""
        return self.moe_layers * self.experts * self.expert_params

    @property
    def dense_params(self) -> float:
        """Read on every step whatever the routing, all layers."""
        routers = self.moe_layers * self.router_params
        return self.layers * self.attention_params + self.ffn_total + routers + self.head_params

    @property
    def total_params(self) -> float:
        """All parameters."""
        return self.dense_params + self.embedding_params + self.expert_total

    @property
    def dense_bytes(self) -> float:
        """Weight bytes read on every step, all layers."""
        attention = self.layers * self.attention_params * FORMAT_BYTES[self.attention_format]
        sixteen_bit = (self.moe_layers * self.router_params + self.head_params) * FORMAT_BYTES["bf16"]
        return attention + self.ffn_total * FORMAT_BYTES[self.ffn_format] + sixteen_bit

    @property
    def expert_bytes(self) -> float:
        """Weight bytes of one routed expert."""
        return self.expert_params * FORMAT_BYTES[self.expert_format]

    @property
    def weight_bytes(self) -> float:
        """All stored weights, bytes."""
        experts = self.moe_layers * self.experts * self.expert_bytes
        return self.dense_bytes + self.embedding_params * FORMAT_BYTES["bf16"] + experts

    def stored_as(self, weights: str, *, attention: str | None = None) -> ModelShape:
        """The same model with its weights in another format; mxfp4 and int4 experts leave attention at 16 bits.

        Raises:
            ConfigError: an unknown format.
        """
        weights = format_name(weights)
        if weights == "mxfp4":  # only the experts of a release are in it
            return replace(self, expert_format="mxfp4")
        kept = format_name(attention) if attention else weights
        return replace(self, attention_format=kept, ffn_format=weights, expert_format=weights)

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> ModelShape:
        """Read a Hugging Face config.json.

        Raises:
            ConfigError: a size is missing, or a weight format is unknown.
        """
        try:
            return _from_config({k: v for k, v in config.items() if v is not None})
        except KeyError as e:
            raise ConfigError(f"config.json lacks {e}; this model cannot be sized") from e

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> ModelShape:
        """Read one row of `data/model-architectures/models.csv`; columns as its README says.

        Raises:
            ConfigError: a size is missing or no number.
        """
        try:
            return _from_row({k: v for k, v in row.items() if v is not None and str(v) not in ("", "nan")})
        except (KeyError, ValueError) as e:
            raise ConfigError(f"{row.get('model', 'a row')} of models.csv lacks or garbles a size: {e!r}") from e


def format_name(text: str) -> str:
    """One of `FORMAT_BYTES`.

    Raises:
        ConfigError: unknown.
    """
    word = text.strip().lower().split()[0] if text.strip() else text
    name = SPELLINGS.get(word, word)
    if name not in FORMAT_BYTES:
        raise ConfigError(f"unknown weight format {text!r}; known: {', '.join(FORMAT_BYTES)}")
    return name


def _from_config(c: Mapping[str, Any]) -> ModelShape:
    layers = int(c.get("num_hidden_layers", c.get("n_layer", 0))) or int(c["num_hidden_layers"])
    hidden = int(c.get("hidden_size", c.get("n_embd", 0))) or int(c["hidden_size"])
    heads = int(c.get("num_attention_heads", c.get("n_head", 0))) or int(c["num_attention_heads"])
    experts = int(c.get("num_local_experts", c.get("num_experts", c.get("n_routed_experts", 0))))
    expert_inter = int(c.get("moe_intermediate_size", c.get("intermediate_size", 4 * hidden)))
    dense_inter = int(c.get("intermediate_size", c.get("n_inner", 4 * hidden)))
    shared_inter = int(c.get("shared_expert_intermediate_size", int(c.get("n_shared_experts", 0)) * expert_inter))
    gated = 2 if c.get("model_type") == "gpt2" else 3
    shape = ModelShape(
        layers=layers,
        hidden=hidden,
        vocab=int(c["vocab_size"]),
        heads=heads,
        **_attention_of(c, layers, hidden, heads),
        ffn_params=float(gated * hidden * dense_inter),
        shared_params=float(3 * hidden * shared_inter) if experts else 0.0,
        router_params=float(hidden * experts),
        expert_params=float(3 * hidden * expert_inter) if experts else 0.0,
        moe_layers=layers - int(c.get("first_k_dense_replace", 0)) if experts else 0,
        experts=experts,
        top_k=int(c["num_experts_per_tok"]) if experts else 0,
        tied=bool(c.get("tie_word_embeddings", c.get("model_type") == "gpt2")),
        **_window_of(c, layers),
        chunked_layers=_chunked_of(c, layers),
    )
    weights, attention = _format_of(c.get("quantization_config", {}))
    return shape.stored_as(weights, attention=attention)


def _attention_of(c: Mapping[str, Any], layers: int, hidden: int, heads: int) -> dict[str, Any]:
    """Attention parameters, widths and KV bytes."""
    if "kv_lora_rank" in c:
        nope, rope, v = int(c["qk_nope_head_dim"]), int(c["qk_rope_head_dim"]), int(c["v_head_dim"])
        rank, q_rank = int(c["kv_lora_rank"]), int(c.get("q_lora_rank", 0))
        query = hidden * q_rank + q_rank * heads * (nope + rope) if q_rank else hidden * heads * (nope + rope)
        params = query + hidden * (rank + rope) + rank * heads * (nope + v) + heads * v * hidden
        return _mla(params, layers, heads, nope, rope, v, rank)
    head_dim = int(c.get("head_dim", hidden // heads))
    kv_heads = int(c.get("num_key_value_heads", heads))
    return _gqa(layers, hidden, heads, kv_heads, head_dim)


def _mla(params: float, layers: int, heads: int, nope: int, rope: int, v: int, rank: int) -> dict[str, Any]:
    return {
        "kv_heads": 1,
        "attention_width": heads * (nope + rope + v) // 2,
        "output_width": float(heads * v),
        "decode_width": heads * (2 * rank + rope) / 2,
        "attention_params": float(params),
        "kv_bytes_per_token": layers * (rank + rope) * KV_BYTES,
    }


def _gqa(layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "kv_heads": kv_heads,
        "attention_width": heads * head_dim,
        "output_width": float(heads * head_dim),
        "decode_width": float(heads * head_dim),
        "attention_params": float(hidden * head_dim * (2 * heads + 2 * kv_heads)),
        "kv_bytes_per_token": layers * 2 * kv_heads * head_dim * KV_BYTES,
    }


def _window_of(c: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Sliding-window layers, where the config has and uses them."""
    if not c.get("sliding_window") or not c.get("use_sliding_window", True):
        return {}
    kinds = c.get("layer_types")
    windowed = sum(kind == "sliding_attention" for kind in kinds) if kinds else layers
    return {"window": int(c["sliding_window"]), "window_layers": windowed}


def _chunked_of(c: Mapping[str, Any], layers: int) -> int:
    """Layers of chunked attention; Llama 4's config leaves out which where every fourth looks at everything."""
    kinds = c.get("layer_types")
    if kinds:
        return sum(kind == "chunked_attention" for kind in kinds)
    return layers - layers // CHUNKED_BUT_EVERY if c.get("attention_chunk_size") else 0


def _format_of(quantization: Mapping[str, Any]) -> tuple[str, str | None]:
    """Weight format, and that of attention where the config keeps it out of quantisation."""
    method = str(quantization.get("quant_method", "")).lower()
    if not method:
        return "bf16", None
    skipped = [*quantization.get("modules_to_not_convert", ()), *quantization.get("ignore", ())]
    attention = "bf16" if any("self_attn" in str(name) for name in skipped) else None
    if method in ("fp8", "fbgemm_fp8", "modelopt"):
        return ("fp8_block" if quantization.get("weight_block_size") else "fp8"), attention
    if method == "compressed-tensors":
        groups = quantization.get("config_groups", {})
        bits = [int(g["weights"]["num_bits"]) for g in groups.values() if g.get("weights")] or [8]
        return ("int4" if bits[0] == 4 else "fp8"), attention
    return method, attention


def _from_row(r: Mapping[str, Any]) -> ModelShape:
    layers, hidden, heads = int(r["layers"]), int(r["hidden"]), int(r["heads"])
    moe_layers = int(r["moe_layers"])
    gated = 2 if str(r["model"]).startswith("gpt2") else 3
    experts = int(float(r["experts"])) if moe_layers else 0
    parts: dict[str, Any] = {
        "ffn_params": float(gated * hidden * float(r.get("dense_inter", 0))),
        "shared_params": float(3 * hidden * float(r.get("shared_inter", 0))) if moe_layers else 0.0,
        "router_params": float(hidden * experts),
        "expert_params": 3.0 * hidden * float(r["expert_inter"]) if moe_layers else 0.0,
    }
    kv = float(r["kv_bytes_per_token_bf16"])
    if str(r["kv_heads"]) == "MLA":
        nope, rope = (int(part) for part in str(r["head_dim"]).split("+"))
        others = (layers - moe_layers) * parts["ffn_params"] + moe_layers * (
            parts["shared_params"] + parts["router_params"]
        )
        params = (float(r["params_read_dense_B"]) * 1e9 - others - int(r["vocab"]) * hidden) / layers
        attention = _mla(params, layers, heads, nope, rope, nope, round(kv / layers / KV_BYTES) - rope)
    else:
        attention = _gqa(layers, hidden, heads, int(r["kv_heads"]), int(r["head_dim"]))
    total = float(r["params_total_B"]) * 1e9
    shape = ModelShape(
        layers=layers,
        hidden=hidden,
        vocab=int(r["vocab"]),
        heads=heads,
        **attention,
        **parts,
        moe_layers=moe_layers,
        experts=experts,
        top_k=int(float(r["top_k"])) if moe_layers else 0,
        **_family(str(r["model"]), layers),
    )
    shape = replace(shape, tied=total < shape.total_params - shape.head_params / 2)
    native = format_name(str(r["native_dtype"]))
    return shape.stored_as("fp8_block" if native == "fp8" else native)  # releases in 8 bits scale blocks


def _family(model: str, layers: int) -> dict[str, Any]:
    """What the table has no column for: gpt-oss looks back 128 tokens in every second layer, Llama 4 attends to chunks in three of four."""
    if "gpt-oss" in model:
        return {"window": 128, "window_layers": layers // 2}
    return {"chunked_layers": layers - layers // CHUNKED_BUT_EVERY} if "Llama-4" in model else {}


# ---- which row of the table a hub name means

TAGS = r"instruct|thinking|chat|it|base|hf|fp8|int4|awq|bf16|coder|terminus|v\d+(\.\d+)?|\d{4}|meta"
RETRAINED = {"llama-3.3": "llama-3.1", "deepseek-v3.1": "deepseek-v3", "deepseek-r1": "deepseek-v3", "kimi-k2-thinking": "kimi-k2"}  # fmt: skip


def row_for(hub_name: str, rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The row of the same architecture: same name, else same name without tags of tuning and format; None where there is none.

    Retrained releases of one architecture (`RETRAINED`) are that architecture.
    """
    exact = {name.split("/")[-1].lower(): name for name in rows}
    bare = {_bare(name): name for name in rows}
    wanted = hub_name.split("/")[-1].lower()
    without = re.sub(r"-(fp8|instruct|thinking|\d{4})(?=-|$)", "", wanted)
    return exact.get(wanted) or exact.get(without) or bare.get(_bare(hub_name))


def _bare(name: str) -> str:
    base = name.split("/")[-1].lower()
    for retrained, original in RETRAINED.items():
        base = base.replace(retrained, original)
    if base.startswith("deepseek-v3"):
        return "deepseek-v3"
    return "-".join(word for word in base.split("-") if not re.fullmatch(TAGS, word))
