"""How long one engine step takes and what it asks of its boards: a roofline with the bytes of distinct experts.

t = [t_mem⁴ + t_issue⁴]^¼ + t_flops·f_max/f + t_host + t_comm. HBM is saturated only while the SM domain issues fast
enough (t_issue); tensor work adds on top, as measured prefill mixes do. Sources: docs/plant.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pals.core.errors import ConfigError
from pals.plant.silicon import Load
from pals.plant.specs import BoardSpec

FloatArray = NDArray[np.float64]

OVERLAP_P = 4.0
ISSUE_SHARE = 0.68  # at the top clock, issuing a memory-bound kernel takes this share of its memory time
TENSOR_EFFICIENCY = 0.5  # of the dense peak, serving shapes
HOST_S = 0.0010  # scheduler and launches per step, clock-free
HOST_PER_SEQUENCE_S = 4e-6
ALLREDUCE_LATENCY_S = 8e-6
EXPERT_CV = 0.3  # popularity of experts, coefficient of variation


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a model that decide step time and KV use; parameters are counts."""

    layers: int
    hidden: int
    attention_width: int  # query heads × head dimension
    dense_params: float  # read on every step whatever the routing
    embedding_params: float  # stored, not read
    expert_params: float  # one routed expert in one layer
    moe_layers: int
    experts: int
    top_k: int
    kv_bytes_per_token: float
    weight_bytes: float  # per parameter

    @property
    def total_params(self) -> float:
        """All parameters."""
        return self.dense_params + self.embedding_params + self.moe_layers * self.experts * self.expert_params

    @property
    def active_params(self) -> float:
        """Parameters that work on one token."""
        return self.dense_params + self.moe_layers * self.top_k * self.expert_params

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> ModelShape:
        """Read a Hugging Face config.json.

        Raises:
            ConfigError: a size is missing.
        """
        try:
            return _shape({k: v for k, v in config.items() if v is not None})
        except KeyError as e:
            raise ConfigError(f"config.json lacks {e}; the emulated accelerator cannot size this model") from e


def _shape(c: Mapping[str, Any]) -> ModelShape:
    layers = int(c.get("num_hidden_layers", c.get("n_layer", 0))) or int(c["num_hidden_layers"])
    hidden = int(c.get("hidden_size", c.get("n_embd", 0))) or int(c["hidden_size"])
    heads = int(c.get("num_attention_heads", c.get("n_head", 0))) or int(c["num_attention_heads"])
    vocab = int(c["vocab_size"])
    attention, width, kv_bytes = _attention(c, hidden, heads)
    gated = 2 if c.get("model_type") == "gpt2" else 3
    experts = int(c.get("num_local_experts", c.get("num_experts", c.get("n_routed_experts", 0))))
    expert_inter = int(c.get("moe_intermediate_size", c.get("intermediate_size", 4 * hidden)))
    dense_inter = int(c.get("intermediate_size", c.get("n_inner", 4 * hidden)))
    moe_layers = layers - int(c.get("first_k_dense_replace", 0)) if experts else 0
    shared_inter = int(c.get("shared_expert_intermediate_size", int(c.get("n_shared_experts", 0)) * expert_inter))
    dense = layers * attention + (layers - moe_layers) * gated * hidden * dense_inter
    dense += moe_layers * (3 * hidden * shared_inter + hidden * experts)
    tied = bool(c.get("tie_word_embeddings", c.get("model_type") == "gpt2"))
    quantised = c.get("quantization_config", {}).get("quant_method") == "fp8"
    return ModelShape(
        layers=layers,
        hidden=hidden,
        attention_width=width,
        dense_params=float(dense + vocab * hidden),
        embedding_params=0.0 if tied else float(vocab * hidden),
        expert_params=float(3 * hidden * expert_inter) if experts else 0.0,
        moe_layers=moe_layers,
        experts=experts,
        top_k=int(c.get("num_experts_per_tok", 0)) if experts else 0,
        kv_bytes_per_token=float(layers * kv_bytes),
        weight_bytes=1.0 if quantised else 2.0,
    )


def _attention(c: Mapping[str, Any], hidden: int, heads: int) -> tuple[int, int, int]:
    """Parameters of one attention layer, query width, and KV bytes per token of that layer."""
    if "kv_lora_rank" in c:
        nope, rope, v = int(c["qk_nope_head_dim"]), int(c["qk_rope_head_dim"]), int(c["v_head_dim"])
        rank, q_rank = int(c["kv_lora_rank"]), int(c.get("q_lora_rank", 0))
        query = hidden * q_rank + q_rank * heads * (nope + rope) if q_rank else hidden * heads * (nope + rope)
        params = query + hidden * (rank + rope) + rank * heads * (nope + v) + heads * v * hidden
        return params, heads * (nope + rope), (rank + rope) * 2
    head_dim = int(c.get("head_dim", hidden // heads))
    kv_heads = int(c.get("num_key_value_heads", heads))
    return hidden * head_dim * (2 * heads + 2 * kv_heads), heads * head_dim, 2 * kv_heads * head_dim * 2


@lru_cache(maxsize=64)
def _popularity(experts: int, top_k: int, cv: float) -> tuple[float, ...]:
    """Probability that a token uses each expert; gamma weights of a fixed seed, inclusion capped at 1."""
    if cv <= 0:
        return (top_k / experts,) * experts
    weights = np.random.default_rng(0).gamma(1 / cv**2, cv**2, experts)
    return tuple(np.minimum(1.0, top_k * weights / weights.sum()))


def distinct_experts(experts: int, top_k: int, tokens: int | NDArray[np.int64], cv: float = EXPERT_CV) -> FloatArray:
    """Expected number of experts that `tokens` independent tokens touch in one layer: Σ(1 − (1 − p_e)^B)."""
    p = np.array(_popularity(experts, top_k, cv))
    return np.asarray(np.sum(1.0 - np.power.outer(1.0 - p, tokens), axis=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """What one step computes."""

    prefill_tokens: int = 0
    prefill_sequences: int = 0
    decode_sequences: int = 0
    context_tokens: int = 0  # KV tokens read by the decoding sequences, and by prefill of what is cached
    attention_pairs: float = 0.0  # query × key pairs of the prefill

    @property
    def tokens(self) -> int:
        """Tokens through the layers."""
        return self.prefill_tokens + self.decode_sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Duration of a step, and what it asks of each board on average."""

    seconds: float
    load: Load


class StepTables(NamedTuple):
    """All that `step_cost` needs of one model on one group of boards; arrays by number of tokens, shape (tokens + 1,)."""

    memory_s: FloatArray  # weights read at the achievable bandwidth
    tensor_s: FloatArray  # matrix products at the top clock
    comm_s: FloatArray  # between the boards, clock-free
    context_s: float  # reading one KV token
    pair_s: float  # one query × key pair at the top clock
    host_s: float  # scheduler and launches, clock-free
    host_per_sequence_s: float
    issue_share: float  # at the top clock, issuing a memory-bound kernel takes this share of its memory time
    overlap_p: float
    top_clock_mhz: float
    stages: float  # of the pipeline: while one works the others idle


def step_cost(
    t: StepTables, prefill_tokens: int, prefill_sequences: int, decode_sequences: int, context_tokens: float,
    attention_pairs: float, clock_mhz: float,
) -> tuple[float, float, float, float]:  # fmt: skip
    """Seconds of a step, and its compute, memory and busy shares per board; see `StepBatch` for the arguments.

    Plain scalar arithmetic: the emulated engine calls it as it is, the simulator compiled.
    """
    tokens = prefill_tokens + decode_sequences
    memory_s = t.memory_s[tokens] + t.context_s * context_tokens
    slower = t.top_clock_mhz / clock_mhz
    tensor_s = (t.tensor_s[tokens] + t.pair_s * (attention_pairs + context_tokens)) * slower
    p = t.overlap_p
    kernel_s = memory_s * (1.0 + (t.issue_share * slower) ** p) ** (1.0 / p)
    device_s = kernel_s + tensor_s + t.comm_s[tokens]
    seconds = device_s + t.host_s + t.host_per_sequence_s * decode_sequences
    return (
        seconds,
        min(1.0, tensor_s / seconds / t.stages),
        min(1.0, memory_s / seconds / t.stages),
        min(1.0, device_s / seconds / t.stages),
    )


class StepModel:
    """Step times of one model on one tensor/pipeline-parallel group of boards."""

    def __init__(
        self,
        shape: ModelShape,
        spec: BoardSpec,
        *,
        tensor_parallel: int,
        pipeline_parallel: int = 1,
        expert_share: float = 1.0,
        max_tokens: int = 16384,
    ) -> None:
        """`expert_share`: part of the experts this group holds (1/data-parallel size under expert parallelism)."""
        self.shape, self.spec = shape, spec
        self._tp, self._pp, self._share = tensor_parallel, pipeline_parallel, expert_share
        self.tables = self._tables(max_tokens)

    def step(self, batch: StepBatch, sm_clock_mhz: float) -> StepCost:
        """Duration and load of a step at this clock; an empty batch costs the host's time alone."""
        if batch.tokens >= len(self.tables.memory_s):
            self.tables = self._tables(2 * batch.tokens)
        seconds, compute, memory, busy = step_cost(
            self.tables, batch.prefill_tokens, batch.prefill_sequences, batch.decode_sequences,
            float(batch.context_tokens), batch.attention_pairs, sm_clock_mhz,
        )  # fmt: skip
        return StepCost(
            seconds=float(seconds), load=Load(compute=float(compute), memory=float(memory), busy=float(busy))
        )

    def _tables(self, max_tokens: int) -> StepTables:
        s, spec = self.shape, self.spec
        tokens = np.arange(max_tokens + 1)
        touched = distinct_experts(s.experts, s.top_k, tokens) if s.experts else np.zeros(len(tokens))
        weights = (s.dense_params + s.moe_layers * touched * self._share * s.expert_params) * s.weight_bytes
        speed = 2.0 if s.weight_bytes < 2 and spec.capability >= (9, 0) else 1.0
        flops_s = spec.peak_flops_bf16 * TENSOR_EFFICIENCY * speed * self._tp
        moved = 2.0 * tokens * s.hidden * 2 * (self._tp - 1) / self._tp
        hops = 2 * s.layers * (self._tp > 1)
        return StepTables(
            memory_s=np.where(tokens > 0, weights / self._tp / spec.hbm_bytes_s, 0.0),
            tensor_s=2.0 * tokens * s.active_params / flops_s,
            comm_s=np.where(tokens > 0, hops * (ALLREDUCE_LATENCY_S + moved / spec.nvlink_bytes_s), 0.0),
            context_s=s.kv_bytes_per_token / self._tp / spec.hbm_bytes_s,
            pair_s=4.0 * s.layers * s.attention_width / flops_s,
            host_s=HOST_S,
            host_per_sequence_s=HOST_PER_SEQUENCE_S,
            issue_share=ISSUE_SHARE,
            overlap_p=OVERLAP_P,
            top_clock_mhz=float(spec.max_sm_clock_mhz),
            stages=float(self._pp),
        )

    def kv_capacity_bytes(self, utilization: float) -> float:
        """KV-cache bytes of one board.

        Raises:
            ConfigError: the weights do not fit.
        """
        expert_bytes = self.shape.moe_layers * self.shape.experts * self.shape.expert_params * self.shape.weight_bytes
        other_bytes = self.shape.total_params * self.shape.weight_bytes - expert_bytes
        weights = (other_bytes + expert_bytes * self._share) / (self._tp * self._pp)
        usable = self.spec.memory_gb * 1e9 * utilization - 2e9  # activations, graphs, context
        if weights >= usable:
            raise ConfigError(
                f"weights need {weights / 1e9:.1f} GB per board, {self.spec.nvml_name} leaves {usable / 1e9:.1f} GB of "
                f"{self.spec.memory_gb:.0f} GB; emulate more boards (--emulate Nx{self.spec.name})"
            )
        return usable - weights
