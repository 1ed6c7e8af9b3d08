"""The kernels of one step of a model on one group of boards, added up by class, and the boards whose kernels are borrowed.

Shapes follow the list in `pals.plant.kernels`; where a board was never measured, the kernels of the nearest one are scaled by
bandwidth, tensor peak and link speed.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pals.core.architecture import FORMAT_BYTES, ModelShape
from pals.plant import kernels
from pals.plant.expert_ranks import rank_load
from pals.plant.experts import ExpertLoad
from pals.plant.kernels import BoardKernels, GemmConstants, KernelTime, MoeConstants
from pals.plant.specs import BoardSpec, board_specs

FloatArray = NDArray[np.float64]
Products = TypeVar("Products", GemmConstants, MoeConstants)

KERNEL_FORMATS = {"bf16": "bfloat16", "fp8": "fp8", "fp8_block": "fp8_block", "int4": "int4_wo", "mxfp4": "w4a16_mxfp4"}
ACTIVATION_BYTES = 2.0


class ParallelGroup(NamedTuple):
    """How a model lies on its boards; vLLM's own parameters."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1  # ranks of one MoE model in lock-step; independent replicas where experts are not shared
    expert: bool = False  # whole experts are divided among tensor × data ranks, instead of each expert's matrices

    @property
    def expert_ranks(self) -> int:
        """Ranks the experts are divided among."""
        return self.tensor * self.data if self.expert else 1


@cache
def kernels_of(spec: BoardSpec) -> BoardKernels:
    """The board's kernels; families never measured on it are those of the nearest board that has them, scaled."""
    named = board_specs()
    measured = {name: kernels.board_kernels(name) for name in kernels.constants_file() if name in named}
    near = sorted(measured, key=lambda name: (name != spec.name, _distance(named[name], spec)))
    parts: dict[str, dict[str, Any]] = {}
    for family in ("gemm", "moe", "generation", "context", "elementwise", "collective"):
        parts[family] = {}
        for name in near:
            found: dict[str, Any] = getattr(measured[name], family)
            if found:
                parts[family] = {k: _scaled(v, named[name], spec) for k, v in found.items()}
                break
    return BoardKernels(spec.name, spec.hbm_peak_bytes_s, **parts)


def _distance(a: BoardSpec, b: BoardSpec) -> tuple[float, float]:
    """Of capabilities, then of bandwidths."""
    apart = abs(a.capability[0] + a.capability[1] / 10 - b.capability[0] - b.capability[1] / 10)
    return apart, abs(float(np.log(a.hbm_peak_bytes_s / b.hbm_peak_bytes_s)))


def _scaled(constants: Any, ours: BoardSpec, wanted: BoardSpec) -> Any:
    """Constants of `ours` carried over to `wanted` (another board, or the same perturbed) by bandwidth, peak and links."""
    memory = wanted.hbm_bytes_s / ours.hbm_bytes_s
    core = wanted.peak_flops_bf16 / ours.peak_flops_bf16
    link = wanted.nvlink_bytes_s / ours.nvlink_bytes_s
    by = {
        "hbm_bytes_s": memory, "l2_bytes_s": memory, "pass_bytes_s": memory, "quantise_bytes_s": memory,
        "tile_flops_s": core, "feed_bytes_s": core, "low_bytes_s": link, "high_bytes_s": link,
    }  # fmt: skip
    return constants._replace(**{k: getattr(constants, k) * v for k, v in by.items() if k in constants._fields})


def products(family: dict[str, Products], weights: str) -> Products:
    """Constants for weights of a format; one the board has no kernel for is widened to 16 bits on the way."""
    for name in (KERNEL_FORMATS[weights], "fp8_block" if weights == "fp8" else ""):
        if name in family:
            return family[name]
    return family["bfloat16"]._replace(weight_bytes=FORMAT_BYTES[weights])


def dense(b: BoardKernels, shape: ModelShape, tp: int, rows: FloatArray) -> KernelTime:
    """Everything of all layers whose weights every token uses, without attention itself and without the output matrix."""
    attention, ffn = products(b.gemm, shape.attention_format), products(b.gemm, shape.ffn_format)
    move, hidden = b.elementwise["bfloat16"], float(shape.hidden)
    width = shape.output_width
    qkv = shape.attention_params / hidden - width

    def feed_forward(inter: float) -> KernelTime:
        return kernels.merge(
            kernels.gemm(ffn, rows, 2.0 * inter / tp, hidden),
            kernels.gemm(ffn, rows, hidden, inter / tp),
            kernels.elementwise(move, rows * 6.0 * inter / tp),
        )

    parts = [
        kernels.times(kernels.gemm(attention, rows, qkv / tp, hidden), shape.layers),
        kernels.times(kernels.gemm(attention, rows, hidden, width / tp), shape.layers),
        kernels.times(kernels.elementwise(move, rows * 16.0 * hidden), shape.layers),
        kernels.times(kernels.elementwise(move, rows * 4.0 * qkv / tp), shape.layers),
    ]
    plain = shape.layers - shape.moe_layers
    if plain:
        parts.append(kernels.times(feed_forward(shape.ffn_params / (3.0 * hidden)), plain))
    if shape.shared_params:
        parts.append(kernels.times(feed_forward(shape.shared_params / (3.0 * hidden)), shape.moe_layers))
    if shape.experts:
        router = kernels.gemm(b.gemm["bfloat16"], rows, float(shape.experts), hidden)
        parts.append(kernels.times(router, shape.moe_layers))
    return kernels.merge(*parts)


def experts(
    b: BoardKernels, shape: ModelShape, group: ParallelGroup, cv: float, rows: FloatArray
) -> tuple[KernelTime, FloatArray]:
    """Routed experts of all layers on the hottest rank, and the mean rank's share of that work."""
    tokens = rows * (group.data if group.expert else 1)
    ranks = group.expert_ranks
    load = rank_load(shape.experts, shape.top_k, tuple(tokens), ranks, cv)
    weights = "fp8_block" if shape.expert_format == "fp8" else shape.expert_format  # see docs/models/step.md
    one = kernels.moe(
        products(b.moe, weights), ExpertLoad(load.touched, load.assignments, load.slots), tokens=tokens, hidden=shape.hidden,
        inter=shape.expert_params / (3.0 * shape.hidden) / (1 if group.expert else group.tensor),
        experts=shape.experts, top_k=shape.top_k, ranks=ranks,
    )  # fmt: skip
    return kernels.times(one, shape.moe_layers), load.even


def output_matrix(b: BoardKernels, shape: ModelShape, tp: int, rows: FloatArray) -> KernelTime:
    """The product that yields logits, over the sequences that sample."""
    return kernels.gemm(b.gemm["bfloat16"], rows, shape.vocab / tp, float(shape.hidden))


def links(b: BoardKernels, shape: ModelShape, group: ParallelGroup, rows: FloatArray) -> FloatArray:
    """Two all-reduces a layer among tensor ranks, gather and scatter around the experts of data ranks, a hop a stage; seconds."""
    message = rows * shape.hidden * ACTIVATION_BYTES
    total = np.zeros(len(rows))
    if group.tensor > 1:
        once = kernels.collective(b, "all_reduce", ranks=group.tensor, message_bytes=message).total_s
        total = total + 2 * shape.layers * once
    if group.expert and group.data > 1:
        for kind in ("all_gather", "reduce_scatter"):
            once = kernels.collective(b, kind, ranks=group.data, message_bytes=message * group.data).total_s
            total = total + shape.moe_layers * once
    if group.pipeline > 1:
        hop = kernels.collective(b, "all_gather", ranks=2, message_bytes=2.0 * message).total_s
        total = total + (group.pipeline - 1) * hop
    return np.asarray(total)


class AttentionTime(NamedTuple):
    """Attention as rates, seconds over all layers on one board; core times at the top clock."""

    context_s: float  # reading one KV token from HBM
    context_core_s: float  # working on it
    sequence_core_s: float  # one decoding sequence
    pair_s: float  # one query × key pair of prefill
    token_s: float  # one prefill token: tails of the tiles
    fixed_s: float
    overlap_p: float


def attention(b: BoardKernels, shape: ModelShape, tp: int) -> AttentionTime:
    """Linear in KV tokens, sequences and pairs: what the kernels' formulas become once all SMs have work."""
    g, c = b.generation["bfloat16"], b.context["bfloat16"]
    kv_heads = max(1.0, shape.kv_heads / tp)
    heads, layers = shape.heads / tp, float(shape.layers)
    kv_bytes = shape.kv_bytes_per_token / layers / shape.kv_heads * kv_heads
    width = shape.decode_width / shape.heads
    queries = max(64.0, np.ceil(heads / kv_heads / 16.0) * 16.0)
    token_s = max(4.0 * queries * width / g.tile_flops_s, g.token_s * kv_bytes / kv_heads / 512.0)
    prefill_width = shape.attention_width / shape.heads
    pair_s = heads * (4.0 * prefill_width / c.tile_flops_s + c.softmax_s) / c.sms
    item_s = heads / c.query_tile / c.sms * c.item_s
    return AttentionTime(
        context_s=layers * kv_bytes / g.hbm_bytes_s,
        context_core_s=layers * kv_heads * token_s / g.sms,
        sequence_core_s=layers * kv_heads * (g.item_s + 0.5 * kernels.KV_TILE * token_s) / g.sms,
        pair_s=layers * pair_s,
        token_s=layers * (pair_s * (0.5 * c.query_tile + c.diagonal) + item_s),
        fixed_s=layers * g.fixed_s,
        overlap_p=g.overlap_p,
    )
