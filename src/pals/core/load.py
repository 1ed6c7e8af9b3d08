"""What an engine is asked to do: the mix of its requests, and how much of it; what a profile needs beside the point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from pals.core.quantities import Checked


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix(Checked):
    """Lengths of the requests: means, and how widely a uniform law spreads them."""

    name: str
    prompt_tokens: float  # mean of what must be prefilled: without prefix-cache hits
    output_tokens: float  # mean
    spread: float = 0.5  # half width of the law, relative to the mean
    cached_tokens: float = 0.0  # mean of the prompt tokens that a prefix cache holds

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        if self.prompt_tokens < 1 or self.output_tokens < 1 or not 0 <= self.spread < 1 or self.cached_tokens < 0:
            raise ValueError(f"mix {self.name!r}: at least 1 prompt and 1 output token and a spread in 0..1 are needed")

    @property
    def prefill_per_output(self) -> float:
        """Prompt tokens computed for each output token."""
        return self.prompt_tokens / self.output_tokens

    @property
    def prefill_share(self) -> float:
        """Prefill tokens of all tokens computed, 0..1."""
        return self.prompt_tokens / (self.prompt_tokens + self.output_tokens)

    @property
    def context_tokens(self) -> float:
        """Mean KV tokens that a decoding sequence holds, long answers counted for as long as they run."""
        return self.cached_tokens + self.prompt_tokens + 0.5 * self.output_tokens * (1.0 + self.spread**2 / 3.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load(Checked):
    """A mix, and how much of it; unknown is None."""

    mix: Mix
    prefill_tokens_per_s: float | None = None  # arriving; None: more than the engine can do
    running: float | None = None  # sequences now; None: as many as the point and the arrivals make it
    context_tokens: float | None = None  # mean KV tokens of a running sequence; None: the mix's
    queued_tokens: float = 0.0  # prompt tokens waiting before a new request
    distinct_experts: float | None = None  # per layer and decode step; None: from the popularity
    popularity: tuple[float, ...] | None = None  # of experts now, by parts as in `core/routing.py`; None: the profile's
    popularity_then: tuple[float, ...] | None = None  # under which the profile holds; None: as it says itself

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        for name, least in (("prefill_tokens_per_s", 0.0), ("running", 0.0), ("queued_tokens", 0.0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"load: {name} is {value:g}, below {least:g}")
        for name in ("popularity", "popularity_then"):
            parts = getattr(self, name)
            if parts is not None and (not parts or not all(0 <= x < inf for x in parts) or sum(parts) <= 0):
                raise ValueError(f"load: {name} needs parts of 0 or more, some above; unknown is None")
        for name in ("context_tokens", "distinct_experts"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"load: {name} is {value:g}, not above 0; unknown is None")


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """What a load itself saw of its requests, by its own clock, seconds."""

    ttft_s: Sequence[float] = field(default_factory=tuple)  # of those that got their first token in the span
    tpot_s: Sequence[float] = field(default_factory=tuple)  # of those that ended in it, with at least two tokens
    failed: int = 0  # ended in an error
