"""Which boards can be emulated, and their constants; read from `board_specs.json`, nothing is computed here."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from pals.core.errors import ConfigError
from pals.plant.governor import Firmware, share_of_tick
from pals.plant.silicon import Silicon

CLOCK_STEP_MHZ = 15
DRIVER = "580.95.05"


class Variation(NamedTuple):
    """How specimens of one type differ."""

    core_sd: float  # relative, of what the core draws
    idle_sd: float  # relative, of the static part
    counter_sd: float  # relative, of the energy counter
    top_clock_steps: float  # the top clock lies up to so many steps lower


class SetterTiming(NamedTuple):
    """How long writing takes on top of a bank's `setter_latency_s`, and until it bites."""

    tail_sigma: float  # of the logarithm of the call's time
    longest_s: float  # of a call
    effect_from_s: float
    effect_to_s: float


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
    firmware: Firmware
    variation: Variation
    setter: SetterTiming
    power_window_s: float  # what nvmlDeviceGetPowerUsage averages over
    sampled_share: float  # of the time, that the average sees
    instant_window_s: float  # what the field POWER_INSTANT averages over
    energy_refresh_s: float  # of the energy counter
    capability: tuple[int, int]


@cache
def board_specs() -> dict[str, BoardSpec]:
    """All board types by name."""
    data = json.loads((files("pals.plant") / "board_specs.json").read_text())
    common = data["_common"]
    return {name: _spec(name, common | groups) for name, groups in data.items() if not name.startswith("_")}


def _spec(name: str, groups: Mapping[str, Any]) -> BoardSpec:
    """A board's groups of constants without the names of the groups and what is said about them."""
    parts = ("governor", "thermal", "dips", "variation", "setter")
    plain = [g for key, g in groups.items() if isinstance(g, dict) and key not in parts]
    return BoardSpec(
        name=name,
        nvml_name=groups["nvml_name"],
        capability=tuple(groups["capability"]),
        silicon=Silicon(**_flat(groups["silicon"].values())),
        firmware=_firmware(**_flat(groups[key] for key in ("governor", "thermal", "dips"))),
        variation=Variation(**_flat([groups["variation"]])),
        setter=SetterTiming(**_flat([groups["setter"]])),
        **_flat(plain),
    )


def _firmware(*, filter_s: float, thermal_tau_s: float, **others: float) -> Firmware:
    return Firmware(
        clock_step_mhz=CLOCK_STEP_MHZ, filter_share=share_of_tick(filter_s), thermal_share=share_of_tick(thermal_tau_s),
        **others,
    )  # fmt: skip


def _flat(groups: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    said = ("source", "confidence")
    return {k: v for group in groups for k, v in group.items() if k not in said and not isinstance(v, dict)}


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


def usual_step_tokens(spec: BoardSpec, launch: int) -> int:
    """Tokens of a step where nobody says: what vLLM's server takes on such a board, at least `launch` sequences."""
    usual = 16384 if spec.memory_gb >= 160 else 8192 if spec.memory_gb >= 75 and "a100" not in spec.name else 2048
    return max(usual, launch)
