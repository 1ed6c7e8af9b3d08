"""Which policies exist, and how each is made from plain settings: the same way live and in a replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from pals.control.bandit import BanditPolicy, BanditSettings
from pals.control.controller import PalsPolicy
from pals.control.guard import Guard
from pals.control.interleaved import Interleaved, Interleaving
from pals.control.levers import LEVERS, points_of, trim_of
from pals.control.pals_paper import PaperPolicy, PaperSettings
from pals.control.pals_state import PalsSettings
from pals.control.slo_clock import SloClockPolicy, SloClockSettings
from pals.control.static import StaticPolicy
from pals.control.vendor_preset import vendor_preset
from pals.control.watched import Watched
from pals.core.errors import ConfigError
from pals.core.protocols import AnyController
from pals.core.quantities import OperatingPoint
from pals.models.profile import Profile

PALS = "pals"
#: Factor on the intervals of a profile that was measured on something else and accepted: as large again as the profile's own.
ACCEPTED_WIDENING = 2.0
#: Policies that no profile tells anything.
UNPROFILED = frozenset({"static", "vendor-preset", "bandit"})
KNOWN = ("static", PALS, *LEVERS, "vendor-preset", "bandit", "slo-clock")


def build_policy(
    name: str,
    settings: Mapping[str, Any],
    profile: Profile | None,
    guard: Guard,
    *,
    accepted: Sequence[str] = (),
    interleaving: Interleaving | None = None,
) -> AnyController:
    """Make the policy `name`; `accepted` are the differences of a profile that is used all the same.

    `interleaving`: let it act in some windows only, and a baseline in the others.

    Raises:
        ConfigError: unknown name, a missing profile, or settings outside the boards' range; nothing was written.
    """
    if profile is not None and accepted:
        profile = profile.widened(ACCEPTED_WIDENING)
    policy = _alone(name, settings, profile, guard)
    if interleaving is not None:
        policy = Interleaved(policy, _alone(interleaving.baseline, {}, profile, guard), interleaving)
    return policy if profile is None else watched(policy, profile, guard)


def default_settings(name: str) -> dict[str, Any]:
    """The constants that `name` is made with where nobody gives others, for the journal; those of `static` are asked for."""
    made: dict[str, Any] = {"bandit": BanditSettings(), "slo-clock": SloClockSettings()}
    return asdict(made.get(name, PaperSettings())) if name not in ("static", "vendor-preset") else {}


def _alone(name: str, settings: Mapping[str, Any], profile: Profile | None, guard: Guard) -> AnyController:
    """The policy itself; `settings` may be empty."""
    if name == "static":
        return _static(settings, guard)
    if name == "vendor-preset":
        return vendor_preset(guard)
    if name == "bandit":
        return BanditPolicy(guard, BanditSettings(**settings))
    if name not in KNOWN:
        raise ConfigError(f"unknown policy {name!r}; known: {', '.join(KNOWN)}")
    if profile is None:
        raise ConfigError(f"policy {name} needs a profile: make one with `pals profile`, then give --profile FILE")
    if name == PALS:
        return PalsPolicy(profile.model(), guard, replace(PalsSettings(), **settings))
    if name == "slo-clock":
        return SloClockPolicy(profile.model(), guard, SloClockSettings(**settings))
    model, known = profile.model(), replace(PaperSettings(), **settings)
    return PaperPolicy(model, points=points_of(name, model, guard), trim=trim_of(name, guard, known), settings=known)


def watched(policy: AnyController, profile: Profile, guard: Guard) -> Watched:
    """`policy` with its profile watched."""
    shape = profile.facts.shape
    return Watched(policy, profile.model(), top_w=guard.max_limit_w, experts=shape is not None and shape.experts > 0)


def _static(settings: Mapping[str, Any], guard: Guard) -> StaticPolicy:
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
    clock_mhz, clocks = settings.get("sm_clock_mhz"), guard.sm_clocks_mhz
    if clock_mhz is not None and not (clocks and clocks[0] <= clock_mhz <= clocks[-1]):
        possible = f"outside {clocks[0]}..{clocks[-1]} MHz" if clocks else "on boards that name no clocks"
        raise ConfigError(f"an SM clock of {clock_mhz} MHz lies {possible}. Nothing was written.")
    return StaticPolicy(
        OperatingPoint(
            power_limit_w=limit_w, sm_clock_mhz=clock_mhz, active_sequences=sequences or guard.launch_sequences
        )
    )
