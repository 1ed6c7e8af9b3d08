"""Expert summaries over time, as records carry them: each window once, in the order of their ends."""

from __future__ import annotations

from collections.abc import Iterable

from pals.core.experts import ExpertSummary


def history(summaries: Iterable[ExpertSummary | None]) -> tuple[ExpertSummary, ...]:
    """Windows that do not overlap, the newer of two that do: records carry a window until the next one ends, and one that is filling."""
    windows = {(s.time_s, s.span_s): s for s in summaries if s is not None}
    kept: list[ExpertSummary] = []
    for key in sorted(windows, key=_end_and_span, reverse=True):
        if not kept or key[0] <= kept[-1].time_s - (kept[-1].span_s or 0.0):
            kept.append(windows[key])
    return tuple(reversed(kept))


def _end_and_span(window: tuple[float, float | None]) -> tuple[float, float]:
    """Windows in order; of those with the same end the longer first."""
    return window[0], -(window[1] or 0.0)
