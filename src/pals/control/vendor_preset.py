"""The `vendor-preset` policy: one power limit for ever, as the boards' vendor sets it where efficiency is asked for.

NVIDIA publishes no numbers of its workload power profiles (Max-Q inference and the others; Blackwell, closed firmware), only what
they bring: up to 15 % of the energy at 97 % of the performance (arXiv:2510.03872). What it does publish are the limits it set itself for
the efficiency category (MaxQ) of MLPerf Inference; those for language models in a server are taken here. Clocks stay free there.
What NVIDIA Dynamo's power agent does, a limit from the deployment written for ever, is `static` with a `power_limit_w`.
"""

from __future__ import annotations

from typing import NamedTuple

from pals.control.guard import Guard
from pals.control.static import StaticPolicy
from pals.core.quantities import OperatingPoint


class Preset(NamedTuple):
    """A published limit."""

    words: tuple[str, ...]  # all of them in the board's name, in capitals
    limit_w: float
    source: str


#: `power_limit` in the `*_MaxQ` classes of closed/NVIDIA/configs/BENCHMARK/Server/__init__.py of the mlcommons repositories
#: inference_results_vN.N; the first that fits a name holds.
PRESETS: tuple[Preset, ...] = (
    Preset(("H200",), 500.0, "MLPerf v4.1, llama2-70b, H200_SXM_141GBx8_MaxQ"),
    Preset(("H100", "NVL"), 350.0, "MLPerf v4.1, llama2-70b, H100_NVL_94GB_TP2x4_MaxQ"),
    Preset(("H100", "PCIE"), 200.0, "MLPerf v4.0, gptj, H100_PCIe_80GBx8_MaxQ"),
    Preset(("H100",), 450.0, "MLPerf v4.1, llama2-70b, H100_SXM_80GB_TP2x4_MaxQ"),
    Preset(("A100", "PCIE"), 200.0, "MLPerf v3.0, bert, A100_PCIe_80GBx8_MaxQ"),
    Preset(("A100", "SXM"), 275.0, "MLPerf v3.0, bert, A100_SXM_80GBx8_MaxQ"),
)
BORROWED = 450.0 / 700.0  # of the default limit, where nothing is published for a board: the share of an H100 SXM


def preset_of(board: str, default_limit_w: float) -> tuple[float, str]:
    """The limit for boards of this name, W, and where it is from."""
    name = board.upper()
    for p in PRESETS:
        if all(word in name for word in p.words):
            return p.limit_w, p.source
    return float(
        round(BORROWED * default_limit_w)
    ), f"nothing published for {board or 'this board'}; the share of an H100"


def vendor_preset(guard: Guard) -> StaticPolicy:
    """The policy for the guard's boards: the published limit within what they accept, launch batch, no clock lock."""
    limit_w, source = preset_of(guard.board, guard.default_limit_w or guard.max_limit_w)
    limit_w = max(guard.min_limit_w, min(guard.max_limit_w, limit_w))
    point = OperatingPoint(power_limit_w=limit_w, active_sequences=guard.launch_sequences)
    return StaticPolicy(point, reason="vendor-preset", detail=f"{limit_w:.0f} W: {source}")
