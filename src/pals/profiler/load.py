"""The promise a load keeps during a sweep; the live client, the virtual one and the simulated one keep it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pals.core.load import Mix


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """What the load itself saw of requests, by its own clock, seconds."""

    ttft_s: Sequence[float] = field(default_factory=tuple)  # of those that got their first token in the span
    tpot_s: Sequence[float] = field(default_factory=tuple)  # of those that ended in it, with at least two tokens
    failed: int = 0  # ended in an error


class LoadDriver(Protocol):
    """Keeps requests of one mix in flight."""

    def set_load(self, mix: Mix, in_flight: int) -> None:
        """From now on send requests of `mix`, and keep `in_flight` of them; those above it end by themselves."""
        ...

    def latencies(self, since_s: float) -> Latencies:
        """Of requests sent under the present mix, since this time of the clock that the sweep waits on."""
        ...
