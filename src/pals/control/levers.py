"""Which levers each policy of the paper's rule owns: the points it may choose among, and what its trim moves.

Every policy leaves the levers it does not own where the engine and the boards were found: the limit found, no clock
lock, the launch batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pals.control.guard import Guard
from pals.control.pals_paper import PaperSettings
from pals.core.errors import ConfigError
from pals.core.quantities import OperatingPoint
from pals.models.fitted import Fitted

#: Owned levers by policy: "limit" (W), "batch" (active sequences), "clock" (SM clock lock).
LEVERS: dict[str, frozenset[str]] = {
    "pals-paper": frozenset({"limit", "batch"}),
    "cap-only": frozenset({"limit"}),
    "batch-only": frozenset({"batch"}),
    "clock-only": frozenset({"clock"}),
}

#: Moves a point by a share, -1..1, of one grid step of a lever, and keeps it in range.
Trim = Callable[[OperatingPoint, float], OperatingPoint]


def points_of(policy: str, model: Fitted, guard: Guard) -> tuple[OperatingPoint, ...]:
    """The points `policy` may choose among: the profile's levels of the levers it owns.

    Raises:
        ConfigError: the profile lacks levels that the policy needs; nothing was written.
    """
    measured = [p for p in model.points if p.sm_clock_mhz is None]
    limits_w = sorted({p.power_limit_w for p in measured if guard.min_limit_w <= p.power_limit_w <= guard.max_limit_w})
    levels = sorted({p.active_sequences for p in measured if p.active_sequences is not None})
    clocks = sorted({p.sm_clock_mhz for p in model.points if p.sm_clock_mhz in guard.sm_clocks_mhz}, reverse=True)
    launch, found_w = guard.launch_sequences, guard.max_limit_w
    owned = LEVERS[policy]
    _demand(
        "limit" not in owned or bool(limits_w),
        policy,
        f"no profiled power limit lies within {guard.min_limit_w:.0f}..{found_w:.0f} W",
        "--limits-w",
    )
    _demand(
        "batch" in owned or launch in levels,
        policy,
        f"the profile has no row at the launch batch of {launch}",
        "--sequences",
    )
    _demand(
        "clock" not in owned or bool(clocks), policy, "the profile has no rows of these boards' SM clocks", "--clocks"
    )
    if owned == {"limit", "batch"}:
        return tuple(p for p in measured if p.power_limit_w in limits_w)
    if owned == {"limit"}:
        return tuple(OperatingPoint(power_limit_w=w, active_sequences=launch) for w in limits_w)
    if owned == {"batch"}:
        return tuple(OperatingPoint(power_limit_w=found_w, active_sequences=n) for n in levels)
    return tuple(
        OperatingPoint(power_limit_w=found_w, sm_clock_mhz=mhz, active_sequences=launch) for mhz in (None, *clocks)
    )


def _demand(holds: bool, policy: str, missing: str, option: str) -> None:
    if not holds:
        raise ConfigError(
            f"policy {policy} cannot use this profile: {missing}. Make one with `pals profile {option} …`; nothing was written"
        )


def trim_of(policy: str, guard: Guard, settings: PaperSettings) -> Trim:
    """What `policy` trims between choices: its limit where it owns one, else the one lever it has."""
    owned = LEVERS[policy]

    def limit(point: OperatingPoint, share: float) -> OperatingPoint:
        wanted_w = round(point.power_limit_w + share * settings.trim_max_w)
        return replace(point, power_limit_w=float(max(guard.min_limit_w, min(guard.max_limit_w, wanted_w))))

    def batch(point: OperatingPoint, share: float) -> OperatingPoint:
        wanted = (point.active_sequences or guard.launch_sequences) + round(share * settings.trim_max_sequences)
        return replace(point, active_sequences=max(1, min(guard.launch_sequences, wanted)))

    def clock(point: OperatingPoint, share: float) -> OperatingPoint:
        top_mhz = guard.sm_clocks_mhz[-1]
        wanted_mhz = round((point.sm_clock_mhz or top_mhz) + share * settings.trim_max_mhz)
        free = wanted_mhz > top_mhz or (wanted_mhz == top_mhz and point.sm_clock_mhz is None)
        return replace(point, sm_clock_mhz=None if free else guard.supported_clock_mhz(wanted_mhz))

    return limit if "limit" in owned else batch if "batch" in owned else clock
