"""What a measured row is in the plant's formulas: seconds of each operation as its benchmark reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pals.experiments.plant_checks.kernel_cases import Cases
from pals.plant import kernels
from pals.plant.experts import BLOCKS, ExpertLoad

FloatArray = NDArray[np.float64]
Model = Callable[[Any, Cases], FloatArray]


def gemm_seconds(c: kernels.GemmConstants, cases: Cases) -> FloatArray:
    """As measured: at the default power limit, and not faster than the host launches."""
    m = cases.number("m")
    return kernels.on_the_host(c, m, kernels.in_a_loop(c, kernels.gemm(c, m, cases.number("n"), cases.number("k"))))


def moe_seconds(c: kernels.MoeConstants, cases: Cases) -> FloatArray:
    """As measured, with the experts the collector's routing touches."""
    n = cases.number
    load = ExpertLoad(n("touched"), n("assignments"), n("slots"))
    tokens, experts, top_k, ranks = n("num_tokens"), n("num_experts"), n("topk"), n("moe_ep_size")
    if cases.old:  # it ran the hottest rank's tokens and experts as a layer of their own
        experts, ranks = experts / ranks, np.ones_like(ranks)
        top_k = np.minimum(top_k, experts)
        tokens = load.assignments / top_k
    inter = n("inter_size") / n("moe_tp_size")
    t = kernels.moe(
        c, load, tokens=tokens, hidden=n("hidden_size"), inter=inter, experts=experts, top_k=top_k, ranks=ranks,
        gated=~cases.ungated, tuned=kernels.has_tuned_experts(cases.board, experts / ranks, inter), resident=True,
    )  # fmt: skip
    return kernels.in_a_loop(c, t)


def generation_seconds(c: kernels.GenerationConstants, cases: Cases) -> FloatArray:
    """As measured: the KV of small cases stays in L2 between repetitions."""
    n = cases.number
    return kernels.generation_attention(
        c, batch=n("batch_size"), kv_tokens=n("step") + 1.0, heads=n("num_heads"), kv_heads=n("num_key_value_heads"),
        head_dim=n("head_dim"), window=n("window_size"), resident=True,
    ).total_s  # fmt: skip


def context_seconds(c: kernels.ContextConstants, cases: Cases) -> FloatArray:
    """As measured, at the default power limit."""
    n = cases.number
    t = kernels.context_attention(
        c, batch=n("batch_size"), tokens=n("isl"), heads=n("num_heads"), kv_heads=n("num_key_value_heads"),
        head_dim=n("head_dim"), window=n("window_size"), cached=n("cached") if "cached" in cases.columns else 0.0,
    )  # fmt: skip
    return kernels.in_a_loop(c, t)


def mixed_seconds(c: kernels.ContextConstants, cases: Cases) -> FloatArray:
    """One prefill chunk beside decoding sequences in one launch."""
    n = cases.number
    t = kernels.mixed_attention(
        c, prefill_tokens=n("isl"), cached=n("cached"), decodes=n("batch_size"), kv_tokens=n("step") + 1.0,
        heads=n("num_heads"), kv_heads=n("num_key_value_heads"), head_dim=n("head_dim"),
    )  # fmt: skip
    return kernels.in_a_loop(c, t)


def moe_layer_seconds(c: kernels.MoeConstants, cases: Cases) -> FloatArray:
    """A layer of experts of which `touched` are used evenly."""
    n = cases.number
    pairs, touched = n("num_tokens") * n("topk"), n("touched")
    slots = np.stack([touched * np.ceil(pairs / touched / b) * b for b in BLOCKS], axis=1)
    t = kernels.moe(
        c, ExpertLoad(touched, pairs, slots), tokens=n("num_tokens"), hidden=n("hidden_size"), inter=n("inter_size"),
        experts=n("num_experts"), top_k=n("topk"), resident=True,
    )  # fmt: skip
    return kernels.in_a_loop(c, t)


def elementwise_seconds(c: kernels.ElementwiseConstants, cases: Cases) -> FloatArray:
    """Norms, activation, rotary embedding, token embedding."""
    return kernels.elementwise(c, cases.number("m") * cases.number("bytes_per_token")).total_s


def collective_seconds(c: kernels.CollectiveConstants, cases: Cases) -> FloatArray:
    """One collective by its own constants alone."""
    n = cases.number("message_size") * _element_bytes(cases)
    kind = "all_reduce" if cases.op == "custom_allreduce" else cases.dtype
    return kernels.two_protocols(c, n, cases.number("num_gpus"), kind)


def _element_bytes(cases: Cases) -> FloatArray:
    if cases.op == "custom_allreduce":
        return np.full(len(cases.seconds), 2.0)
    return np.where(cases.columns["nccl_dtype"] == "int8", 1.0, 2.0)


MODELS: dict[str, Model] = {
    "gemm": gemm_seconds,
    "moe": moe_seconds,
    "generation_attention": generation_seconds,
    "context_attention": context_seconds,
    "mixed_attention": mixed_seconds,
    "moe_layer": moe_layer_seconds,
    "elementwise": elementwise_seconds,
    "nccl": collective_seconds,
    "custom_allreduce": collective_seconds,
}
FAMILY = {
    "gemm": "gemm",
    "moe": "moe",
    "generation_attention": "generation",
    "context_attention": "context",
    "mixed_attention": "context",
    "moe_layer": "moe",
    "elementwise": "elementwise",
    "nccl": "collective",
    "custom_allreduce": "collective",
}
KINDS: dict[str, Any] = {
    "gemm": kernels.GemmConstants,
    "moe": kernels.MoeConstants,
    "generation": kernels.GenerationConstants,
    "context": kernels.ContextConstants,
    "elementwise": kernels.ElementwiseConstants,
    "collective": kernels.CollectiveConstants,
}


def entry(cases: Cases) -> str:
    """Under which name of its family the constants of these cases stand."""
    return "custom_all_reduce" if cases.op == "custom_allreduce" else cases.dtype
