"""What is known of a family of boards before one is measured: starting values of the fit, each with how far it is trusted.

Watts are of one board while it serves. Sources by name: "constants" is data/gpu-physics-constants (voltage knees and slopes fitted to
public sweeps, static and rail power), "datasheet" the vendor's peak figures. What no source gives is a share of the limit,
with a wide spread.
"""

from __future__ import annotations

from typing import NamedTuple


class BoardPrior(NamedTuple):
    """Typical values of one family."""

    memory_bytes_s: float  # peak HBM or GDDR bandwidth, datasheet
    flops: float  # peak dense 16-bit tensor FLOP/s, datasheet
    eight_bit: float  # speed of 8-bit products relative to that; 1: none
    static_w: float  # clocks up, nothing of it follows the SM clock
    knee_ghz: float  # below it the voltage stays at its floor
    voltage_per_ghz: float  # relative rise of the voltage per GHz above the knee
    voltage_per_ghz2: float  # and per GHz squared
    link_bytes_s: float  # to the other boards, each way
    default_limit_w: float  # of the board the figures belong to; others scale by their own


# constants: A100 1.05 GHz, 1.43 at 1.41 GHz; H100 1.33 GHz, 0.48 per GHz; H200 as H100; B300 for B200; RTX rows likewise.
FAMILIES: dict[str, BoardPrior] = {
    "A100": BoardPrior(2.04e12, 312e12, 1.0, 100.0, 1.05, 0.75, 1.3, 300e9, 400.0),
    "H100": BoardPrior(3.35e12, 989e12, 2.0, 120.0, 1.33, 0.48, 0.0, 450e9, 700.0),
    "H200": BoardPrior(4.8e12, 989e12, 2.0, 125.0, 1.33, 0.48, 0.0, 450e9, 700.0),
    "GH200": BoardPrior(4.0e12, 989e12, 2.0, 125.0, 1.33, 0.48, 0.0, 450e9, 900.0),
    "B200": BoardPrior(8.0e12, 2250e12, 2.0, 243.0, 0.93, 0.2, 0.0, 900e9, 1000.0),
    "B300": BoardPrior(8.0e12, 2250e12, 2.0, 240.0, 0.93, 0.2, 0.0, 900e9, 1100.0),
    "L40S": BoardPrior(0.864e12, 362e12, 2.0, 60.0, 1.4, 0.3, 0.0, 32e9, 350.0),
    "L4": BoardPrior(0.3e12, 121e12, 2.0, 20.0, 1.2, 0.4, 0.0, 32e9, 72.0),
    "RTX 3090": BoardPrior(0.936e12, 71e12, 1.0, 120.0, 1.45, 0.75, 0.0, 32e9, 350.0),
    "RTX 4090": BoardPrior(1.008e12, 165e12, 2.0, 80.0, 1.9, 0.3, 0.0, 32e9, 450.0),
    "RTX 5090": BoardPrior(1.79e12, 210e12, 2.0, 60.0, 1.91, 0.17, 0.0, 64e9, 575.0),
    "RTX PRO 6000": BoardPrior(1.79e12, 252e12, 2.0, 86.0, 1.35, 0.25, 0.0, 64e9, 600.0),
}
UNKNOWN = BoardPrior(2.0e12, 300e12, 1.5, 100.0, 1.3, 0.5, 0.0, 100e9, 400.0)


def prior_of(board: str) -> tuple[BoardPrior, bool]:
    """The family of a board by the driver's name, and whether it is known; the longest name that fits wins."""
    fits = [
        name
        for name in FAMILIES
        if all(word in board.upper().split() or word in board.upper() for word in name.split())
    ]
    if not fits:
        return UNKNOWN, False
    return FAMILIES[max(fits, key=len)], True
