"""How long a setter call takes: a log-normal tail above the shortest time, drawn from seed, board and number of the call.

The C library computes the same (`hardware/nvml_double/bank.c`): both begin with SplitMix64.
"""

from __future__ import annotations

import math

_MASK = (1 << 64) - 1
_EFFECT = 0x5851F42D4C957F2D  # keeps the draws of a call's time and of its effect apart


def setter_time_s(
    shortest_s: float, tail_sigma: float, longest_s: float, extra_s: float, seed: int, board: int, call: int
) -> float:
    """Seconds of one call; `shortest_s` 0 means that setters take no time but `extra_s`, a fault's."""
    if shortest_s <= 0.0:
        return extra_s
    z = abs(_normal(seed, board, call))
    return extra_s + min(max(longest_s, shortest_s), shortest_s * math.exp(tail_sigma * z))


def effect_delay_s(from_s: float, to_s: float, seed: int, board: int, call: int) -> float:
    """Seconds from a call's end until the board acts on it, evenly between the two, drawn as the call's own time is."""
    return from_s + (to_s - from_s) * _uniform(_key(seed, board, call) ^ _EFFECT)


def _normal(seed: int, board: int, call: int) -> float:
    """A standard normal number (Box-Muller)."""
    key = _key(seed, board, call)
    return math.sqrt(-2.0 * math.log(_uniform(key))) * math.cos(2.0 * math.pi * _uniform(key + 1))


def _key(seed: int, board: int, call: int) -> int:
    return (seed * 0x9E3779B97F4A7C15 + board * 0xD1B54A32D192ED03 + call * 2) & _MASK


def _uniform(x: int) -> float:
    """A number above 0, at most 1 (SplitMix64)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return (((x ^ (x >> 31)) >> 11) + 1) * 2.0**-53
