"""Requests as they arrive: arrays of one length, in order of arrival; making them, scaling them, cutting and repeating them.

Randomness is always an argument. What each way of scaling keeps and loses: docs/models/workload.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pals.core.errors import ConfigError

FloatArray = NDArray[np.float64]
TokenArray = NDArray[np.int32]

SCALINGS = ("time", "thin")
SHIFT_S = 60.0  # copies laid over each other are shifted by at most this: bursts part, the course of the day stays
GAP_JITTER = 0.1  # gaps of a repeated tile differ by at most this share


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Arrivals and lengths of requests, each array of shape (requests,)."""

    name: str
    arrival_s: FloatArray  # from the start, not falling
    prompt_tokens: TokenArray
    output_tokens: TokenArray
    prefix_tokens: TokenArray  # leading prompt tokens that an unbounded prefix cache would hold

    def __post_init__(self) -> None:
        shapes = {a.shape for a in (self.arrival_s, self.prompt_tokens, self.output_tokens, self.prefix_tokens)}
        if len(shapes) != 1 or self.arrival_s.ndim != 1:
            raise ValueError(f"the arrays of {self.name!r} must be of one shape (requests,): {shapes}")
        if len(self) and (self.arrival_s[0] < 0 or np.any(np.diff(self.arrival_s) < 0)):
            raise ValueError(f"arrivals of {self.name!r} must begin at 0 or later and not fall")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def span_s(self) -> float:
        """From the first arrival to the last."""
        return float(self.arrival_s[-1] - self.arrival_s[0]) if len(self) else 0.0

    @property
    def period_s(self) -> float:
        """Span and one mean gap: how long a repetition takes so that the rate stays."""
        return self.span_s * len(self) / (len(self) - 1) if len(self) > 1 else 0.0

    @property
    def rate_per_s(self) -> float:
        """Requests per second of the span; 0 where all arrive at once."""
        return (len(self) - 1) / self.span_s if self.span_s > 0 else 0.0

    @property
    def total_tokens(self) -> NDArray[np.int64]:
        """Prompt and output of each request, shape (requests,)."""
        return self.prompt_tokens.astype(np.int64) + self.output_tokens

    @property
    def gap_cv(self) -> float:
        """Coefficient of variation of the gaps between arrivals: 1 for a Poisson process, more for bursts; 0 below 3 requests."""
        gaps = np.diff(self.arrival_s)
        mean_s = float(gaps.mean()) if len(gaps) > 1 else 0.0
        return float(gaps.std()) / mean_s if mean_s > 0 else 0.0

    def take(self, chosen: NDArray[np.intp] | NDArray[np.bool_]) -> Workload:
        """The chosen requests, by position or mask, at their times."""
        return replace(
            self,
            arrival_s=self.arrival_s[chosen],
            prompt_tokens=self.prompt_tokens[chosen],
            output_tokens=self.output_tokens[chosen],
            prefix_tokens=self.prefix_tokens[chosen],
        )

    def between(self, start_s: float, end_s: float) -> Workload:
        """Requests that arrive in [start_s, end_s), times from `start_s`."""
        first, last = np.searchsorted(self.arrival_s, [start_s, end_s], side="left")
        part = self.take(np.arange(first, last))
        return replace(part, arrival_s=part.arrival_s - start_s)

    def within_context(self, max_tokens: int) -> Workload:
        """Without the requests whose prompt and output exceed a model's context, which a server refuses."""
        return self.take(self.total_tokens <= max_tokens)

    def described(self) -> str:
        """One line for people."""
        if not len(self):
            return f"{self.name}, no request"
        return (
            f"{self.name}, {len(self)} requests in {self.arrival_s[-1]:.0f} s ({self.rate_per_s:.3g}/s, CV of gaps {self.gap_cv:.2f}), "
            f"mean prompt {self.prompt_tokens.mean():.0f}, mean output {self.output_tokens.mean():.0f} tokens"
        )


class LengthSource(Protocol):
    """Where lengths are drawn from."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    def draw(self, count: int, rng: np.random.Generator) -> tuple[TokenArray, TokenArray]:
        """Prompt and output tokens of `count` requests, each of shape (count,)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthPairs:
    """Measured pairs, drawn with replacement: prompt and output stay together."""

    name: str
    prompt_tokens: TokenArray
    output_tokens: TokenArray

    def draw(self, count: int, rng: np.random.Generator) -> tuple[TokenArray, TokenArray]:
        """See `LengthSource`."""
        i = rng.integers(0, len(self.prompt_tokens), count)
        return self.prompt_tokens[i], self.output_tokens[i]


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthHistogram:
    """Lengths by bin, arrays of shape (bins,); a draw lies evenly between `low` and `high`, or at random beside them."""

    low: FloatArray
    high: FloatArray  # equal to `low`: that length, rounded up or down at random so that the mean holds
    weight: FloatArray

    def draw(self, count: int, rng: np.random.Generator) -> TokenArray:
        """Shape (count,), at least 1 token each."""
        i = rng.choice(len(self.weight), size=count, p=self.weight / self.weight.sum())
        exact = self.low[i] + rng.random(count) * (self.high[i] - self.low[i])
        drawn: TokenArray = np.maximum(1, np.floor(exact + rng.random(count))).astype(np.int32)
        return drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class IndependentLengths:
    """Prompts and outputs from a histogram each: how they belong together is not known."""

    name: str
    prompt: LengthHistogram
    output: LengthHistogram

    def draw(self, count: int, rng: np.random.Generator) -> tuple[TokenArray, TokenArray]:
        """See `LengthSource`."""
        return self.prompt.draw(count, rng), self.output.draw(count, rng)


def lengths_of(workload: Workload) -> LengthPairs:
    """The lengths of a trace without their arrivals."""
    return LengthPairs(name=workload.name, prompt_tokens=workload.prompt_tokens, output_tokens=workload.output_tokens)


def gamma_arrivals(rate_per_s: float, cv: float, duration_s: float, rng: np.random.Generator) -> FloatArray:
    """Arrivals in [0, duration_s) whose gaps follow a Gamma law of this mean and coefficient of variation; 1 is Poisson.

    Raises:
        ConfigError: a rate, CV or duration that is not above 0.
    """
    for what, value in (("rate", rate_per_s), ("CV of the gaps", cv), ("duration", duration_s)):
        if not 0 < value < float("inf"):
            raise ConfigError(f"a {what} of {value:g} makes no arrivals: it must be above 0. Nothing was started")
    shape, scale_s = cv**-2, cv**2 / rate_per_s
    pieces, end_s = list[FloatArray](), 0.0
    while end_s < duration_s:
        gaps = rng.gamma(shape, scale_s, max(64, int(1.1 * (duration_s - end_s) * rate_per_s)))
        pieces.append(end_s + np.cumsum(gaps))
        end_s = float(pieces[-1][-1])
    arrival_s = np.concatenate(pieces)
    return arrival_s[arrival_s < duration_s]


def generated(name: str, arrival_s: FloatArray, lengths: LengthSource, rng: np.random.Generator) -> Workload:
    """Requests at these times, their lengths drawn; no prompt shares a prefix."""
    prompt, output = lengths.draw(len(arrival_s), rng)
    return Workload(
        name=f"{name}, lengths of {lengths.name}",
        arrival_s=arrival_s,
        prompt_tokens=prompt,
        output_tokens=output,
        prefix_tokens=np.zeros(len(arrival_s), np.int32),
    )


def at_rate(workload: Workload, rate_per_s: float, *, how: str, rng: np.random.Generator) -> Workload:
    """The workload at another mean rate, requests per second.

    Args:
        workload: the trace.
        rate_per_s: wanted over the span.
        how: "time" stretches or compresses the time axis: every request once, the CV of the gaps stays exactly, and a
            lull of a minute becomes shorter or longer with the rest. "thin" keeps the time axis: requests are left out
            at random, or copies shifted by up to `SHIFT_S` are laid over each other; the CV tends to 1.
        rng: for "thin".

    Raises:
        ConfigError: unknown `how`, a rate that is not above 0, or a trace without a rate.
    """
    if how not in SCALINGS:
        raise ConfigError(f"unknown way {how!r} to scale a rate; known: {', '.join(SCALINGS)}. Nothing was started")
    if not 0 < rate_per_s < float("inf"):
        raise ConfigError(f"a rate of {rate_per_s:g} requests/s must be above 0. Nothing was started")
    if workload.rate_per_s <= 0:
        raise ConfigError(f"{workload.name} has no rate to scale: fewer than two arrival times. Nothing was started")
    factor = rate_per_s / workload.rate_per_s
    if how == "time":
        return replace(workload, arrival_s=workload.arrival_s / factor)
    whole, rest = divmod(factor, 1.0)
    shares = (np.arange(int(whole) + 1) - 0.5 * rng.random(int(whole) + 1)) / (whole + 1)  # apart, none close to 0
    copies = [workload, *(_shifted(workload, share * SHIFT_S) for share in shares[1:])]
    copies[-1] = copies[-1].take(rng.random(len(workload)) < rest)
    return _in_order(workload.name, np.concatenate([c.arrival_s for c in copies]), copies)


def _shifted(workload: Workload, by_s: float) -> Workload:
    """Moved in time; what leaves the span at its end comes in at its start."""
    start_s, period_s = workload.arrival_s[0], workload.period_s
    return _in_order(workload.name, (workload.arrival_s - start_s + by_s) % period_s + start_s, [workload])


def _in_order(name: str, times_s: FloatArray, parts: Sequence[Workload]) -> Workload:
    """The requests of `parts`, one after another, at `times_s`, sorted by these."""
    order = np.argsort(times_s, kind="stable")
    return Workload(
        name=name,
        arrival_s=times_s[order],
        prompt_tokens=np.concatenate([p.prompt_tokens for p in parts])[order],
        output_tokens=np.concatenate([p.output_tokens for p in parts])[order],
        prefix_tokens=np.concatenate([p.prefix_tokens for p in parts])[order],
    )


def tiled(workload: Workload, duration_s: float, *, rng: np.random.Generator, jitter: float = GAP_JITTER) -> Workload:
    """The workload repeated, or cut, to `duration_s`.

    In every repetition each gap is drawn anew within a share `jitter` of itself, and all are scaled so that the repetition
    takes as long as the first: counts, rate and course stay, no two tiles are alike. A repetition's prompts count as new ones:
    they share prefixes within their tile alone.

    Raises:
        ConfigError: a duration that is not above 0, or a trace too short to repeat.
    """
    if not 0 < duration_s < float("inf"):
        raise ConfigError(f"a duration of {duration_s:g} s must be above 0. Nothing was started")
    if duration_s <= float(workload.arrival_s[-1] if len(workload) else 0.0):
        return workload.between(0.0, duration_s)
    if workload.period_s <= 0:
        raise ConfigError(
            f"{workload.name} cannot be repeated for {duration_s:g} s: fewer than two arrival times. Nothing was started"
        )
    count = int(np.ceil((duration_s - workload.arrival_s[0]) / workload.period_s))
    gaps = np.diff(workload.arrival_s)
    tiles = [workload.arrival_s]
    for k in range(1, count):
        new = gaps * rng.uniform(1.0 - jitter, 1.0 + jitter, len(gaps))
        since_s = np.concatenate([[0.0], np.cumsum(new)]) * (workload.span_s / new.sum())
        tiles.append(workload.arrival_s[0] + k * workload.period_s + since_s)
    return _in_order(workload.name, np.concatenate(tiles), [workload] * count).between(0.0, duration_s)
