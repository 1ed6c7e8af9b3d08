"""The measured routing of experts as a policy uses it: what holds now, held still while little changes; and whether it has drifted.

A profile that stores the routing it was measured under is corrected by what is counted now. One that does not has a popularity
fitted from step times, which tell little of it, and a price of an expert that fits that guess: to it only the change since the
first counts is applied. Constants and their reasons: docs/controller.md.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import NamedTuple

from pals.core.experts import ExpertSummary
from pals.core.load import Load
from pals.core.quantities import TelemetrySample
from pals.core.routing import touched
from pals.models.physics import Base

FRESH_S = 5.0  # older figures say nothing of now
PROBES = (4, 32, 256)  # tokens of a step at which two popularities are compared
DIFFERENT = 0.02  # share of the experts touched by which they must differ: tables are made anew then
SLACK = 0.1  # distance beyond chance that is no drift: both popularities a quarter apart, expert by expert
LASTS_S, ENDS_S = 5.0, 15.0  # so long beyond, or below, before it is said

Parts = tuple[float, ...]


def fresh(sample: TelemetrySample) -> ExpertSummary | None:
    """The sample's routing; None where it is unknown or old."""
    told = sample.experts
    return told if told is not None and sample.time_s - told.time_s <= FRESH_S else None


class Routing(NamedTuple):
    """The popularity that predictions rest on; None: the profile's own."""

    now: Parts | None = None
    then: Parts | None = None  # at the first counts, where the profile stores none
    seen_s: float = -inf  # end of the newest window that knew
    probed: tuple[float, ...] = ()  # experts touched at the probes by `now`

    def of(self, load: Load) -> Load:
        """The load under this routing."""
        return load if self.now is None else replace(load, popularity=self.now, popularity_then=self.then)

    @property
    def bare(self) -> Routing:
        """What tables differ by."""
        return Routing(self.now, self.then) if self.now is not None else Routing()


def followed(r: Routing, sample: TelemetrySample, base: Base) -> Routing:
    """The routing after one more sample; `base`: of the profile."""
    told = fresh(sample)
    if told is not None and told.popularity is not None and (told.experts, told.top_k) == (base.experts, base.top_k):
        r = r._replace(seen_s=told.time_s)
        if base.popularity is None and r.then is None:
            r = r._replace(then=told.popularity)
        probed = _probed(told.popularity, base)
        if r.now is None or any(abs(a - b) > DIFFERENT * b for a, b in zip(probed, r.probed, strict=True)):
            return r._replace(now=told.popularity, probed=probed)
    elif r.now is not None and sample.time_s - r.seen_s > FRESH_S:
        return r._replace(now=None)
    return r


def _probed(parts: Parts, base: Base) -> tuple[float, ...]:
    """As `touched` at the probes; of so few numbers Python is faster than arrays."""
    missed = [1.0 - min(0.999, x * base.top_k / base.experts) for x in parts]
    return tuple(base.experts * (1.0 - sum([m**t for m in missed]) / len(missed)) for t in PROBES)


def experts_told(r: Routing, base: Base, running: float) -> str:
    """How many experts a step of so many sequences touches, and how many it would by the profile or at the start."""
    before = base.popularity or r.then
    if r.now is None or before is None:
        return ""
    now, then = (
        float(touched(p, experts=base.experts, top_k=base.top_k, tokens=max(1.0, running))) for p in (r.now, before)
    )
    where = "profile" if base.popularity is not None else "at the start"
    return f"experts: {now:.0f} of {base.experts} touched a step ({where}: {then:.0f})"


class RoutingDrift(NamedTuple):
    """A distance from the reference that chance does not explain."""

    distance: float
    limit: float  # what chance and small changes explain
    since_s: float
    found_s: float
    reference: str  # "profile" or "start"

    @property
    def cause(self) -> str:
        """In a few words."""
        return f"routing drifted: distance {self.distance:.2f} from the {self.reference}'s"

    def told(self) -> str:
        """One sentence for people, the same as long as the drift lasts."""
        return (
            f"{self.cause} ({self.limit:.2f} is chance and small change); margins are wider until it ends or the engine is "
            "profiled anew with `pals profile`"
        )


class RoutingTrack(NamedTuple):
    """Since when the distance lies on the other side of its limit, and the drift that was found."""

    turned_s: float | None = None
    drift: RoutingDrift | None = None
    measured: bool = False  # whether the distance is known now


UNKNOWN = RoutingTrack()


def judged(track: RoutingTrack, sample: TelemetrySample) -> tuple[RoutingTrack, str | None]:
    """The track after one more sample, and a sentence where a drift began or ended."""
    told = fresh(sample)
    if told is None or told.drift is None or told.drift_by_chance is None:
        return (track._replace(turned_s=None, measured=False) if track.measured else track), None
    limit, drift = told.drift_by_chance + SLACK, track.drift
    track = track._replace(measured=True)
    if (told.drift > limit) == (drift is not None):
        return track._replace(turned_s=None), None
    turned_s = sample.time_s if track.turned_s is None else track.turned_s
    if sample.time_s - turned_s < (LASTS_S if drift is None else ENDS_S):
        return track._replace(turned_s=turned_s), None
    if drift is not None:
        return RoutingTrack(
            measured=True
        ), f"the drift of routing has ended: distance {told.drift:.2f} from the {drift.reference}'s"
    found = RoutingDrift(told.drift, limit, turned_s, sample.time_s, told.drift_from or "start")
    return RoutingTrack(drift=found, measured=True), found.told()
