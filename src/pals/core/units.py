"""Quantities as people write them ("50ms", "2.4kW", "90%"): read strictly, or refused in a sentence; nothing else is raised.

A plain number is in the SI unit. Nothing is guessed: no unknown unit, no other spelling, no zero, sign or NaN.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from pals.core.errors import ConfigError

MOST_W = 1e7  # more than any node draws: a slip of the pen
_QUANTITY = re.compile(r"([0-9]{1,300}(?:\.[0-9]{0,300})?|\.[0-9]{1,300})(?:[eE]([+-]?[0-9]{1,4}))?\s?([A-Za-z%/]*)")
_TIMES = {"": 0, "s": 0, "ms": -3}  # unit -> power of ten
_WATTS = {"": 0, "W": 0, "kW": 3}
_SHARES = {"%": -2}
_TOKENS = {"": 0, "tokens/s": 0}


def seconds(given: object, option: str) -> float:
    """A time above 0, in seconds; `option` is what the user calls it, for the message.

    Raises:
        ConfigError: it is none.
    """
    return _read(given, option, _TIMES, "a time above 0 like 1s, 50ms or 0.05 (seconds)")


def watts(given: object, option: str) -> float:
    """A power above 0 and below 10 MW, in watts.

    Raises:
        ConfigError: it is none.
    """
    return _read(
        given, option, _WATTS, "a power above 0 and below 10000kW like 2.4kW, 1200W or 1200 (watts)", below=MOST_W
    )


def share(given: object, option: str) -> float:
    """A share above 0 and at most 100 %, as a ratio.

    Raises:
        ConfigError: it is none; also where the % is missing.
    """
    return _read(given, option, _SHARES, "a share above 0% and at most 100% like 90%", most=1.0)


def share_or_tokens_per_s(given: object, option: str) -> tuple[float | None, float | None]:
    """A throughput target: a share ("90%") and None, or None and tokens per second ("1500").

    Raises:
        ConfigError: neither; also for a number up to 1, which is more likely meant as a share.
    """
    expected = "a share like 90%, or tokens per second above 1 like 1500"
    if isinstance(given, str) and given.strip().endswith("%"):
        return _read(given, option, _SHARES, expected, most=1.0), None
    return None, _read(given, option, _TOKENS, expected, above=1.0)


def _read(
    given: object,
    option: str,
    units: Mapping[str, int],
    expected: str,
    *,
    above: float = 0.0,
    most: float = math.inf,
    below: float = math.inf,
) -> float:
    value = _value(given, units)
    if value is None or not (above < value <= most and value < below):
        raise ConfigError(f"{option} {_told(given)}: expected {expected}; nothing was changed")
    return value


def _value(given: object, units: Mapping[str, int]) -> float | None:
    """The number in the SI unit; None where it is none."""
    if isinstance(given, int | float) and not isinstance(given, bool) and "" in units:
        try:
            return float(given)
        except OverflowError:
            return None
    found = _QUANTITY.fullmatch(given.strip()) if isinstance(given, str) else None
    if found is None or found[3] not in units:
        return None
    return float(f"{found[1]}e{int(found[2] or 0) + units[found[3]]}")  # one rounding: 50ms is exactly 0.05


def _told(given: object) -> str:
    try:
        text = repr(given)
    except ValueError:  # a whole number of thousands of digits has no text
        return "(a number too large to print)"
    return text if len(text) <= 60 else f"{text[:57]}…"
