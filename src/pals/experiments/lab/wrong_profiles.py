"""Profiles that are wrong: of another plant under this one's name, with times and watts off by a factor, or without a term."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pals.experiments.lab.engines import EngineCase
from pals.models.profile import Profile

OTHER_PLANT = 100  # seeds away
TIMES = (
    "weights", "experts", "kv", "token_core", "sequence_core", "tile_core", "pair_core", "fixed", "launch", "link",
    "host_sequence",
)  # fmt: skip
WATTS = ("static", "busy", "tensor", "memory_w")
ALIKE = 1e-3  # popularity of experts, coefficient of variation: all are equally popular


def of_another_plant(engine: EngineCase, place: Path) -> Profile:
    """What a sweep learns of the same engine on a plant with other constants; the fingerprint is the same."""
    return replace(engine, seed=engine.seed + OTHER_PLANT).profile(place)


def off_by(profile: Profile, *, time: float = 1.0, power: float = 1.0) -> Profile:
    """Step times and watts of every kind by these factors; limits hold as they do, so that a limited clock is off, too."""
    known = profile.parameters
    changed = {name: known[name] * time for name in TIMES} | {name: known[name] * power for name in WATTS}
    return with_parameters(profile, changed)


def without_experts(profile: Profile) -> Profile:
    """As if tokens spread evenly over the experts, whatever was measured."""
    return with_parameters(profile, {"popularity_cv": ALIKE})


def with_parameters(profile: Profile, changed: Mapping[str, float]) -> Profile:
    """Some parameters replaced."""
    return replace(profile, parameters={**profile.parameters, **changed})
