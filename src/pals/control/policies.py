"""Which policies exist, and how each is made from plain settings: the same way live and in a replay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pals.control.guard import Guard
from pals.control.pals_paper import PaperPolicy, PaperSettings
from pals.control.static import StaticPolicy
from pals.core.errors import ConfigError
from pals.core.protocols import AnyController
from pals.core.quantities import OperatingPoint
from pals.models.profile import Profile


def build_policy(name: str, settings: Mapping[str, Any], profile: Profile | None, guard: Guard) -> AnyController:
    """Make the policy `name`.

    Raises:
        ConfigError: unknown name, a missing profile, or settings outside the boards' range; nothing was written.
    """
    if name == "static":
        limit_w = settings.get("power_limit_w")
        limit_w = guard.max_limit_w if limit_w is None else float(limit_w)
        if not guard.min_limit_w <= limit_w <= guard.max_limit_w:
            raise ConfigError(
                f"power limit {limit_w:.0f} W lies outside {guard.min_limit_w:.0f}..{guard.max_limit_w:.0f} W, what these "
                "boards accept and PALS may ask (never above the limit it found). Nothing was written."
            )
        sequences = settings.get("active_sequences")
        if sequences is not None and not 1 <= sequences <= guard.launch_sequences:
            raise ConfigError(
                f"{sequences} active sequences lie outside 1..{guard.launch_sequences} (the engine's launch limit). "
                "Nothing was written."
            )
        return StaticPolicy(OperatingPoint(power_limit_w=limit_w, active_sequences=sequences or guard.launch_sequences))
    if name == "pals-paper":
        if profile is None:
            raise ConfigError(
                "policy pals-paper needs a profile: make one with `pals profile`, then give --profile FILE"
            )
        known = replace(PaperSettings(), **settings)
        try:
            return PaperPolicy(
                profile.model(), min_limit_w=guard.min_limit_w, max_limit_w=guard.max_limit_w, settings=known
            )
        except ValueError as e:
            raise ConfigError(f"{e}; nothing was written") from e
    raise ConfigError(f"unknown policy {name!r}; known: static, pals-paper")
