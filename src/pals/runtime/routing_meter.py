"""An engine's routing over a sliding window, read beside its telemetry; drift is from the profile's routing, or else from the start's.

A window ends at the newest publication and begins at the last one that is at least `window_s` older; until the first is full there
is no summary. An engine that starts anew, or stops counting, starts the window anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from pals.core.experts import ExpertCounts, ExpertSummary, summarise
from pals.core.routing_reference import RoutingReference
from pals.runtime.expert_channel import read_engine

WINDOW_S = 10.0


class RoutingMeter:
    """See the module."""

    def __init__(
        self,
        counts: Callable[[], ExpertCounts | None],
        *,
        reference: RoutingReference | None = None,
        window_s: float = WINDOW_S,
    ) -> None:
        """`counts`: the newest publication of the engine's workers, since its start; ValueError where they contradict one another."""
        self._counts, self._window_s = counts, window_s
        self._reference = reference.counts() if reference is not None else None
        self._from = "profile" if reference is not None else "start"
        self._kept: deque[ExpertCounts] = deque()
        self._summary: ExpertSummary | None = None

    @staticmethod
    def of_engine(
        folder: Path,
        engine_pids: Collection[int],
        *,
        reference: RoutingReference | None = None,
        window_s: float = WINDOW_S,
    ) -> RoutingMeter:
        """Of the engine whose workers publish in `folder`."""
        pids = frozenset(engine_pids)
        return RoutingMeter(lambda: read_engine(folder, pids), reference=reference, window_s=window_s)

    @property
    def note(self) -> str | None:
        """What is to be said once: from where drift is measured, if not from the profile."""
        if self._reference is None or self._from == "profile":
            return None
        return (
            "no profile with the routing of experts is in use: drift of routing is measured from the first full window after the start; "
            "`pals profile` on an engine that counts its experts (PALS_EXPERTS=1) stores it"
        )

    def read(self) -> ExpertSummary | None:
        """The newest full window; None where nobody counts, or none is full yet. Its age is the reader's to judge."""
        try:
            now = self._counts()
        except ValueError:  # workers of different models say they belong to this engine
            now = None
        if now is None:
            self._kept.clear()
            self._summary = None
        elif not self._kept or now.time_s != self._kept[-1].time_s:
            self._take(now)
        return self._summary

    def _take(self, now: ExpertCounts) -> None:
        try:
            if self._kept:
                now.since(self._kept[-1])
        except ValueError:  # another run of the engine
            self._kept.clear()
            self._summary = None
            if self._from == "start":
                self._reference = None
        self._kept.append(now)
        while len(self._kept) > 1 and now.time_s - self._kept[1].time_s >= self._window_s:
            self._kept.popleft()
        window = now.since(self._kept[0])
        if (window.span_s or 0.0) < self._window_s:
            return
        told = summarise(window, reference=self._reference)
        if self._reference is None and told.popularity is not None:
            self._reference = window
        self._summary = replace(told, drift_from=self._from if told.drift is not None else None)
