"""Targets as the user writes them, one table over another: units are read, and of throughput one form counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pals.core import units
from pals.core.errors import ConfigError

THROUGHPUT = ("throughput_tokens_s", "throughput_share")
EITHER = "throughput_target"  # "90%" or "1500": one of the two above


def read_targets(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The `[slo]` table `values` with its texts read; what is not a text is left to be checked later.

    Raises:
        ConfigError: a text that is no such quantity, or more than one throughput target.
    """
    given = [k for k in (EITHER, *THROUGHPUT) if values.get(k) is not None]
    if len(given) > 1:
        raise ConfigError(f"{where}: {' and '.join(given)} say the same in two ways; give one. Nothing was started")
    read = dict(values)
    for key, value in values.items():
        if key == EITHER:
            del read[EITHER]
            read |= throughput(value, f"{where}: {key}") if value is not None else {}
        elif isinstance(value, str) and key == "throughput_share":
            read[key] = units.share(value, f"{where}: {key}")
        elif isinstance(value, str) and key == "throughput_tokens_s":
            read |= throughput(value, f"{where}: {key}", only_tokens=True)
        elif isinstance(value, str) and key.endswith("_s"):
            read[key] = units.seconds(value, f"{where}: {key}")
    return read


def throughput(given: object, option: str, *, only_tokens: bool = False) -> dict[str, float]:
    """A throughput target under the name that `Slo` has for it.

    Raises:
        ConfigError: it is none.
    """
    ratio, tokens_per_s = units.share_or_tokens_per_s(given, option)
    if tokens_per_s is not None:
        return {"throughput_tokens_s": tokens_per_s}
    if only_tokens or ratio is None:
        raise ConfigError(f"{option} {given!r}: a share belongs into throughput_target or throughput_share")
    return {"throughput_share": ratio}


def over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """`upper` over `lower`; a throughput target replaces the other form of it."""
    given = {k: v for k, v in upper.items() if v is not None}
    replaced = THROUGHPUT if any(k in given for k in THROUGHPUT) else ()
    return {**{k: v for k, v in lower.items() if k not in replaced}, **given}
