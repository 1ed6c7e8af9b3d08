"""Loads of the experiments: a closed loop with requests in flight for a time, or arrivals at given times; a seed gives the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pals.core.errors import PalsError
from pals.core.load import Mix
from pals.experiments.simulated_profile import SimulatedLoad
from pals.experiments.simulated_run import Simulation, capacity_per_s
from pals.plant.replica import Replica
from pals.plant.workload import TokenArray, Workload, gamma_arrivals, generated

WARMUP_S, SPAN_S = 60.0, 120.0  # controllers settle; what counts


class Feed(Protocol):
    """A load under way on one replica."""

    def feed(self) -> None:
        """See that requests do not run out before the next control period."""
        ...

    def over(self, now_s: float) -> bool:
        """Whether the run ends now."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """`in_flight` requests of `mix` at every moment; lengths uniform about the means, drawn from the run's seed."""

    mix: Mix
    in_flight: int
    warmup_s: float = WARMUP_S  # does not count
    span_s: float = SPAN_S

    def start(self, replica: Replica, rng: np.random.Generator) -> Feed:
        """Begin on a new replica."""
        load = SimulatedLoad(replica, rng)
        load.set_load(self.mix, self.in_flight)
        return _ClosedFeed(load, replica, self.warmup_s + self.span_s)


class _ClosedFeed:
    def __init__(self, load: SimulatedLoad, replica: Replica, end_s: float) -> None:
        self._load, self._replica, self._end_s = load, replica, end_s

    def feed(self) -> None:
        if self._replica.now_s > 0 and self._replica.unsent_count == 0:
            raise PalsError("the closed loop ran out of requests within one control period; its figures would be wrong")
        self._load.refill()

    def over(self, now_s: float) -> bool:
        return now_s >= self._end_s


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoop:
    """Requests that arrive whatever the engine does; only those that arrive after `warmup_s` count."""

    workload: Workload
    warmup_s: float = 0.0
    end_s: float | None = None  # None: when all are answered

    def start(self, replica: Replica, rng: np.random.Generator) -> Feed:
        """Begin on a new replica."""
        replica.submit(self.workload)
        return _OpenFeed(replica, self.end_s)


class _OpenFeed:
    def __init__(self, replica: Replica, end_s: float | None) -> None:
        self._replica, self._end_s = replica, end_s

    def feed(self) -> None:
        """Everything was submitted at once."""

    def over(self, now_s: float) -> bool:
        return self._replica.finished or (self._end_s is not None and now_s >= self._end_s)


Load = ClosedLoop | OpenLoop


@dataclass(frozen=True, slots=True, kw_only=True)
class MixLengths:
    """A `LengthSource` of one mix: uniform about its means."""

    mix: Mix

    @property
    def name(self) -> str:
        """The mix's."""
        return self.mix.name

    def draw(self, count: int, rng: np.random.Generator) -> tuple[TokenArray, TokenArray]:
        """See `LengthSource`."""
        prompt, output = (
            np.maximum(1, np.rint(mean * rng.uniform(1.0 - self.mix.spread, 1.0 + self.mix.spread, count)))
            for mean in (self.mix.prompt_tokens, self.mix.output_tokens)
        )
        return prompt.astype(np.int32), output.astype(np.int32)


def capacity_of(sim: Simulation, mix: Mix, *, seed: int) -> float:
    """Requests of `mix` per second that the engine answers at most, at its launch settings, on this very plant."""
    return capacity_per_s(sim, MixLengths(mix=mix), np.random.default_rng([seed, 11]))


def arrivals_of(mix: Mix, *, rate_per_s: float, duration_s: float, seed: int, cv: float = 1.0) -> Workload:
    """Arrivals at this rate for so long, gaps by a Gamma law (CV 1: Poisson), lengths of `mix`."""
    rng = np.random.default_rng([seed, 12])
    times_s = gamma_arrivals(rate_per_s, cv, duration_s, rng)
    return generated("Poisson" if cv == 1.0 else f"Gamma CV {cv:g}", times_s, MixLengths(mix=mix), rng)
