"""What a step takes beyond its kernels: host time, gaps, and what an engine makes of a kernel; one set a board type.

Read from `step_constants.json`, where each set names its source and confidence; nothing is computed here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from pals.core.errors import ConfigError
from pals.core.quantities import Checked
from pals.plant.specs import BoardSpec

HOST_TIMES = (
    "host_s", "host_per_sequence_s", "chunked_host_s", "chunked_host_per_sequence_s", "launch_layer_s", "launch_moe_layer_s",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StepConstants(Checked):
    """Factors multiply the seconds of `pals.plant.kernels`; they hold for the engine builds of the data."""

    host_s: float  # scheduler, input and output of a step; clock-free
    host_per_sequence_s: float  # the same, per running sequence
    chunked_host_s: float  # further host time of a step, where layers attend to chunks
    chunked_host_per_sequence_s: float
    layer_gap_s: float  # between the kernels of a layer
    moe_gap_s: float  # further, in a MoE layer
    narrow_moe_gap_s: float  # further, where its experts have less than 16 bits
    expert_factor: float
    narrow_expert_factor: float  # experts of less than 16 bits
    attention_factor: float  # decode attention in a ragged batch
    link_factor: float
    launch_layer_s: float  # host time to launch a layer without a CUDA graph
    launch_moe_layer_s: float
    capture_tokens: float  # largest step a CUDA graph is captured for
    popularity_cv: float  # of experts, coefficient of variation
    expert_activity: float  # core power of experts' products, relative to saturated tensor cores
    narrow_expert_activity: float  # the same of experts of less than 16 bits, which are widened or scaled on the way

    def with_host_factor(self, factor: float) -> StepConstants:
        """Another engine build or a slower host: all host times `factor` times as long."""
        return replace(self, **{name: factor * getattr(self, name) for name in HOST_TIMES})


@cache
def _file() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((files("pals.plant") / "step_constants.json").read_text())
    return data


@cache
def step_constants(spec: BoardSpec) -> StepConstants:
    """The board's set; a board that was never fitted borrows the one the file names as `_default`.

    Raises:
        ConfigError: `step_constants.json` lacks the set.
    """
    data = _file()
    entry = data.get(spec.name) or data.get(data.get("_default", ""))
    if entry is None:
        raise ConfigError(f"step_constants.json has no set for {spec.name} and no default; reinstall pals")
    return StepConstants(**entry["values"])


def fitted_constants() -> dict[str, Any]:
    """What `step_constants.json` holds: sets by board, and what the fit assumed of the workload."""
    return dict(_file())
