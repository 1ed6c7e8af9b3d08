"""The requests of a simulation out of what was asked for: a trace or a law of arrivals, cut, scaled and repeated.

Everything is drawn from the seed alone, each part from a stream of its own, so that one wish does not move another's draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pals.core.errors import ConfigError
from pals.plant.servegen import ClientModels, read_client_models
from pals.plant.traces import read_lengths, read_trace, trace_path
from pals.plant.workload import LengthSource, Workload, at_rate, gamma_arrivals, generated, lengths_of, tiled

SERVEGEN = "servegen-"
DEFAULT_HOURS = 1.0  # of what has no length of its own
SAMPLE_S = 600.0  # of ServeGen's clients, to see their lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadWish:
    """What a user asked for; None: as the trace has it."""

    trace: str
    folder: Path | None  # of the committed traces
    kind: str | None = None
    lengths: str | None = None  # a trace or file whose lengths replace the trace's
    cv: float | None = None  # arrivals by a Gamma law with this CV; None: those of the trace
    rate_per_s: float | None = None
    load: float | None = None  # share of the engine's capacity, in place of a rate
    scaling: str = "time"
    start_s: float = 0.0
    hours: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("--rate", self.rate_per_s), ("--load", self.load), ("--hours", self.hours)):
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} {value:g} must be above 0. Nothing was started")
        if self.rate_per_s is not None and self.load is not None:
            raise ConfigError("--rate and --load say the same; give one. Nothing was started")
        if not 0 <= self.start_s < float("inf"):
            raise ConfigError(f"--start-s {self.start_s:g} must be 0 or more. Nothing was started")
        if self.cv is not None and self.rate_per_s is None and self.load is None:
            raise ConfigError("generated arrivals need a rate: give --rate X or --load SHARE. Nothing was started")

    def rng(self, stream: int) -> np.random.Generator:
        """A stream of draws of its own."""
        return np.random.default_rng([self.seed, stream])


def workload_of(wish: LoadWish, capacity_of: Callable[[LengthSource, np.random.Generator], float]) -> Workload:
    """The requests asked for; `capacity_of` lengths is asked only where a load is given.

    Raises:
        ConfigError: no such trace, or a wish that it cannot fulfil.
    """
    source = _source(wish)
    lengths = _lengths(wish, source)
    rate = wish.rate_per_s
    if wish.load is not None:
        rate = wish.load * capacity_of(lengths, wish.rng(1))
    w = _arrivals(wish, source, lengths, rate)
    if wish.lengths is not None and wish.cv is None:
        prompt, output = lengths.draw(len(w), wish.rng(2))
        w = replace(w, name=f"{w.name}, lengths of {lengths.name}", prompt_tokens=prompt, output_tokens=output,
                    prefix_tokens=np.zeros(len(w), np.int32))  # fmt: skip
    return _some(w)


def _some(w: Workload) -> Workload:
    """`w`, or `ConfigError` where nobody arrives."""
    if not len(w):
        raise ConfigError(f"{w.name}: no request arrives in the time asked for. Nothing was started")
    return w


def _source(wish: LoadWish) -> Workload | ClientModels | LengthSource:
    if wish.trace.startswith(SERVEGEN) and not Path(wish.trace).exists():
        if wish.folder is None:
            raise ConfigError(f"{wish.trace} comes with the checkout, whose data are not here. Nothing was started")
        return read_client_models(wish.folder, wish.trace.removeprefix(SERVEGEN))
    path = trace_path(wish.trace, wish.folder)
    return (read_lengths if wish.cv is not None else read_trace)(path, name=wish.trace, kind=wish.kind)


def _lengths(wish: LoadWish, source: Workload | ClientModels | LengthSource) -> LengthSource:
    if wish.lengths is not None:
        return read_lengths(trace_path(wish.lengths, wish.folder), name=wish.lengths)
    if isinstance(source, Workload):
        return lengths_of(source)
    if isinstance(source, ClientModels):
        sample = source.workload(start_s=wish.start_s, duration_s=SAMPLE_S, rate_per_s=10.0, rng=wish.rng(3))
        return lengths_of(sample)
    return source


def _arrivals(
    wish: LoadWish, source: Workload | ClientModels | LengthSource, lengths: LengthSource, rate: float | None
) -> Workload:
    duration_s = 3600.0 * (wish.hours or DEFAULT_HOURS)
    if wish.cv is not None:
        rng = wish.rng(4)
        law = "Poisson" if wish.cv == 1.0 else f"Gamma CV {wish.cv:g}"
        return generated(law, gamma_arrivals(rate or 0.0, wish.cv, duration_s, rng), lengths, rng)
    if isinstance(source, ClientModels):
        return source.workload(start_s=wish.start_s, duration_s=duration_s, rate_per_s=rate, rng=wish.rng(4))
    if not isinstance(source, Workload):
        raise ConfigError(f"{source.name} holds no arrivals. Nothing was started")
    w = _some(source.between(wish.start_s, float("inf")) if wish.start_s else source)
    if rate is not None:
        w = at_rate(w, rate, how=wish.scaling, rng=wish.rng(5))
    return w if wish.hours is None else tiled(w, duration_s, rng=wish.rng(6))
