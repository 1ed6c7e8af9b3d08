"""How long a setter call takes: a log-normal tail above the shortest time, drawn from seed, board and number of the call.

The C library computes the same (`hardware/nvml_double/bank.c`): both begin with SplitMix64.
"""

from __future__ import annotations

import math

_MASK = (1 << 64) - 1


def setter_time_s(
    shortest_s: float, tail_sigma: float, longest_s: float, extra_s: float, seed: int, board: int, call: int
) -> float:
    """Seconds of one call; `shortest_s` 0 means that setters take no time but `extra_s`, a fault's."""
    if shortest_s <= 0.0:
        return extra_s
    z = abs(_normal(seed, board, call))
    return extra_s + min(max(longest_s, shortest_s), shortest_s * math.exp(tail_sigma * z))


def _normal(seed: int, board: int, call: int) -> float:
    """A standard normal number (Box-Muller)."""
    key = (seed * 0x9E3779B97F4A7C15 + board * 0xD1B54A32D192ED03 + call * 2) & _MASK
    return math.sqrt(-2.0 * math.log(_uniform(key))) * math.cos(2.0 * math.pi * _uniform(key + 1))


def _uniform(x: int) -> float:
    """A number above 0, at most 1 (SplitMix64)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return (((x ^ (x >> 31)) >> 11) + 1) * 2.0**-53
