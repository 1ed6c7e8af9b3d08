"""Modes of the agent: `advise` writes nothing, `auto` acts always, `canary` acts in a share of all windows of time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pals.core.errors import ConfigError

MODES = ("auto", "advise", "canary")
WRITING = ("auto", "canary")  # these write limits


def parse_share(text: str, what: str) -> float:
    """ "10%" or "0.1" as 0.1.

    Raises:
        ConfigError: neither, or above 100 %.
    """
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        share = float(number) / (100.0 if percent else 1.0)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise ConfigError(f"{what} {text!r}: expected a share like 10% or 0.1. Nothing was started")
    return share


def with_share_apart(control: Mapping[str, Any]) -> Mapping[str, Any]:
    """Values of [control] with `mode = "canary:10%"` split into `mode` and `canary_share`.

    Raises:
        ConfigError: no share behind the colon, or another mode with one.
    """
    mode = control.get("mode")
    if not isinstance(mode, str) or ":" not in mode:
        return control
    name, share = mode.split(":", 1)
    if name != "canary":
        raise ConfigError(f"mode {mode!r}: only canary takes a share, as in canary:10%. Nothing was started")
    return {**control, "mode": name, "canary_share": parse_share(share, "mode canary:")}
