"""Traces as loads of the experiments: requests in the order of a trace, at a share of what the engine answers of just these.

The trace's first requests are taken, as many as arrive in the time at the rate wanted, and their time axis is stretched or
compressed: gaps keep their law, prompts their shared prefixes. A trace that is too short is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256
from math import ceil
from pathlib import Path

import numpy as np

from pals.core.errors import ConfigError
from pals.experiments.plant_checks.measured import data_folder
from pals.experiments.simulated_load import SERVEGEN, LoadWish, workload_of
from pals.experiments.simulated_run import Simulation
from pals.plant.traces import COMMITTED
from pals.plant.workload import Workload, at_rate, tiled

BACKLOG = 4096  # requests that are sent at once to see how many the engine answers per second
FILLING = 0.1  # share of them at either end, while the engine fills or runs dry, that does not count
FEWEST = 8  # requests that a model's context must take


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceCase:
    """One trace; everything in it is plain, so that it travels to workers."""

    trace: str  # a committed one by name, or a file
    start_s: float = 0.0
    hours: float | None = None  # of clients that are drawn from; None: a trace has its own length
    rate_per_s: float | None = None  # the same
    seed: int = 1  # of those
    contents: str = ""  # digest of a file: it may change under its name

    @staticmethod
    def of_file(name: str) -> TraceCase:
        """What a user named.

        Raises:
            ConfigError: neither a committed trace nor a file.
        """
        known = [c for c in TRACES if c.trace == name]
        if known:
            return known[0]
        path = Path(name)
        contents = sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else ""
        return TraceCase(trace=name, contents=contents)

    @property
    def name(self) -> str:
        """For people, and for file names."""
        return Path(self.trace).name.split(".")[0]

    def requests(self) -> Workload:
        """All of them, as they arrived.

        Raises:
            ConfigError: no such trace, or one that cannot be read.
        """
        committed = self.trace in COMMITTED or self.trace.startswith(SERVEGEN)
        wish = LoadWish(
            trace=self.trace, folder=data_folder() / "traces" if committed else None, start_s=self.start_s,
            hours=self.hours, rate_per_s=self.rate_per_s, seed=self.seed,
        )  # fmt: skip
        return workload_of(wish, _no_capacity)


#: ServeGen's clients from ten in the morning of the first day on, when the day is under way.
TRACES = (
    TraceCase(trace="azure-2023-conv"),
    TraceCase(trace="azure-2023-code"),
    TraceCase(trace="servegen-m-large", start_s=36_000.0, hours=1.0, rate_per_s=10.0),
    TraceCase(trace="mooncake-synthetic"),
)


def fitting(trace: TraceCase, context_tokens: int) -> Workload:
    """The requests that a context takes: a server refuses the others.

    Raises:
        ConfigError: next to none does.
    """
    kept = trace.requests().within_context(context_tokens)
    if len(kept) < FEWEST:
        raise ConfigError(
            f"{trace.trace}: {len(kept)} requests fit a context of {context_tokens} tokens; take another model or trace. "
            "Nothing was run"
        )
    return kept


def own_mix(requests: Workload) -> tuple[float, float]:
    """Mean tokens of a prompt that must be computed, and of an answer: what a user tells `pals profile`."""
    computed = float((requests.prompt_tokens - requests.prefix_tokens).mean())
    return max(1.0, round(computed)), max(1.0, round(float(requests.output_tokens.mean())))


def most_per_s(sim: Simulation, requests: Workload) -> float:
    """Requests per second that the engine answers at its launch settings when it never lacks work.

    Raises:
        ConfigError: it answers all of them at once, so that there is no rate.
    """
    count = min(len(requests), BACKLOG)
    first = requests.take(np.arange(count))
    replica = sim.replica()
    replica.submit(replace(first, arrival_s=np.zeros(count)))
    replica.run()
    ended_s = np.sort(replica.results().last_token_s)
    low = int(FILLING * count)
    high = count - 1 - low
    passed_s = float(ended_s[high] - ended_s[low])
    if passed_s <= 0:
        raise ConfigError(f"{requests.name}: {count} requests are too few to tell a capacity. Nothing was run")
    return (high - low) / passed_s


def first_of(requests: Workload, *, rate_per_s: float, duration_s: float) -> Workload:
    """The trace's first requests, as many as arrive at this rate in the time, as far as there are so many; times from the first."""
    count = min(len(requests), max(FEWEST, ceil(rate_per_s * duration_s)))
    first = requests.take(np.arange(count))
    return replace(first, arrival_s=first.arrival_s - first.arrival_s[0])


def offered(
    sim: Simulation, requests: Workload, *, load: float, duration_s: float, seed: int
) -> tuple[Workload, float]:
    """What arrives in so many seconds, and the requests per second of this kind that the engine answers at most.

    A trace begins with empty prefix caches, and its lengths drift: the capacity is that of the very requests that arrive.
    """
    about = load * most_per_s(sim, requests)
    first = first_of(requests, rate_per_s=about, duration_s=duration_s)
    most = most_per_s(sim, first)
    rng = np.random.default_rng([seed, 13])
    return tiled(at_rate(first, load * most, how="time", rng=rng), duration_s, rng=rng), most


def _no_capacity(*_: object) -> float:
    raise AssertionError("no load was asked for")
