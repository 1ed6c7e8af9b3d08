"""What step time depends on besides sizes and bandwidths: efficiencies, latencies and host time, one set a board type.

Read from `step_constants.json`, where each set names its source and confidence; nothing is computed here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from pals.core.errors import ConfigError
from pals.core.quantities import Checked
from pals.plant.specs import BoardSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class StepConstants(Checked):
    """Shares are of `BoardSpec.hbm_bytes_s` and `peak_flops_bf16`; times are at the top SM clock."""

    dense_bandwidth: float  # matrix products reading weights
    expert_bandwidth: float  # grouped matrix products reading experts
    kv_bandwidth: float  # attention reading the KV cache
    dense_tensor: float  # 16-bit matrix products
    expert_tensor: float  # grouped ones
    attention_tensor: float  # prefill attention
    fp8_dense: float  # speed of 8-bit products relative to 16-bit ones
    fp8_expert: float
    narrow_dense_bandwidth: float  # bandwidth of dense products that read weights of 8 or 4 bits, relative to 16 bits
    expert_activity: float  # core power while experts are bound by issue, relative to saturated dense products
    expert_block: float  # rows an expert's tokens are padded to
    layer_s: float  # kernels of a layer that are neither: norms, rotary, tails; follows the clock
    moe_layer_s: float  # further ones of a MoE layer: router, sorting, combining
    narrow_layer_s: float  # scaling of activations in a layer with 8-bit weights
    narrow_moe_layer_s: float  # in a MoE layer with 8- or 4-bit experts, further
    token_layer_s: float  # of the same, per token and layer and 4096 of hidden size: activations through HBM
    link_latency_s: float  # one all-reduce among two boards; grows with log2 of the boards
    link_bandwidth: float  # share of `nvlink_bytes_s` an all-reduce moves
    launch_layer_s: float  # host time to launch a layer without a CUDA graph
    launch_moe_layer_s: float  # a MoE layer
    capture_tokens: float  # largest batch a CUDA graph is captured for
    host_s: float  # scheduler, input, output of a step
    host_per_sequence_s: float  # the same, per running sequence
    popularity_cv: float  # of experts
    issue_share: float  # at the top clock, issuing a memory-bound kernel takes this share of its memory time
    overlap_p: float


@cache
def _file() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((files("pals.plant") / "step_constants.json").read_text())
    return data


@cache
def step_constants(spec: BoardSpec) -> StepConstants:
    """The board's set; a board without one borrows from the fitted board of the nearest compute capability.

    Raises:
        ConfigError: `step_constants.json` holds no set at all.
    """
    sets = {name: values for name, values in _file().items() if not name.startswith("_")}
    if not sets:
        raise ConfigError("step_constants.json holds no set of constants; reinstall pals")
    entry = sets.get(spec.name) or min(sets.values(), key=lambda s: _distance(s["capability"], spec.capability))
    return StepConstants(**entry["values"])


def _distance(ours: list[int], wanted: tuple[int, int]) -> float:
    return abs(ours[0] + ours[1] / 10 - wanted[0] - wanted[1] / 10)
