"""The promise a load keeps during a sweep; the live client, the virtual one and the simulated one keep it."""

from __future__ import annotations

from typing import Protocol

from pals.core.load import Latencies, Mix

__all__ = ["Latencies", "LoadDriver"]


class LoadDriver(Protocol):
    """Keeps requests of one mix in flight."""

    def set_load(self, mix: Mix, in_flight: int) -> None:
        """From now on send requests of `mix`, and keep `in_flight` of them.

        Those above it end by themselves; those of another mix, and what still waits, may be taken back.
        """
        ...

    def latencies(self, since_s: float) -> Latencies:
        """Of requests sent under the present mix, since this time of the clock that the sweep waits on."""
        ...
