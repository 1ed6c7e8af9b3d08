"""Which boards can be emulated, and their constants; read from `board_specs.json`, nothing is computed here."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from pals.core.errors import ConfigError
from pals.plant.silicon import Silicon

CLOCK_STEP_MHZ = 15
DRIVER = "580.95.05"


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardSpec:
    """Constants of one board type; sources and confidence stand beside them in `board_specs.json`."""

    name: str
    nvml_name: str
    memory_gb: float
    hbm_bytes_s: float  # achievable, not nominal
    hbm_peak_bytes_s: float  # nominal
    peak_flops_bf16: float  # dense tensor peak of the data sheet
    peak_flops_fp8: float | None  # None: no such units
    tensor_clock_mhz: int  # the clock the data sheet's peaks are stated for; the top clock may lie above
    nvlink_bytes_s: float  # one direction; PCIe where there is no NVLink
    min_limit_w: float
    default_limit_w: float
    max_limit_w: float
    min_sm_clock_mhz: int
    max_sm_clock_mhz: int
    memory_clock_mhz: int
    silicon: Silicon
    power_window_s: float  # what nvmlDeviceGetPowerUsage averages over
    sampled_share: float  # of the time, that the average sees
    instant_window_s: float  # what the field POWER_INSTANT averages over
    energy_refresh_s: float  # of the energy counter
    capability: tuple[int, int]


@cache
def board_specs() -> dict[str, BoardSpec]:
    """All board types by name."""
    data = json.loads((files("pals.plant") / "board_specs.json").read_text())
    return {name: _spec(name, groups) for name, groups in data.items() if not name.startswith("_")}


def _spec(name: str, groups: Mapping[str, Any]) -> BoardSpec:
    """A board's groups of constants without the names of the groups and what is said about them."""
    flat = {k: v for group in groups.values() if isinstance(group, dict) for k, v in _constants(group)}
    silicon = {k: v for group in groups["silicon"].values() for k, v in _constants(group)}
    return BoardSpec(
        name=name,
        nvml_name=groups["nvml_name"],
        capability=tuple(groups["capability"]),
        silicon=Silicon(**silicon),
        **flat,
    )


def _constants(group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((k, v) for k, v in group.items() if k not in ("source", "confidence") and not isinstance(v, dict))


def parse_boards(text: str) -> tuple[BoardSpec, int]:
    """Parse "4xa100-sxm4-80gb" or "h100-sxm5-80gb" into a board type and a count.

    Raises:
        ConfigError: unknown board or a count outside 1..64.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(.+)", text.strip().lower())
    count, name = (int(match[1] or 1), match[2]) if match else (1, text)
    specs = board_specs()
    if name not in specs:
        near = difflib.get_close_matches(name, specs, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"unknown board {name!r}; {hint}Known: {', '.join(specs)} (write 4x… for four). Nothing was started"
        )
    if not 1 <= count <= 64:
        raise ConfigError(f"{count} boards cannot be emulated; 1 to 64 can. Nothing was started")
    return specs[name], count
