"""Expert summaries over time, as records carry them: each window once, in the order of their ends."""

from __future__ import annotations

from collections.abc import Iterable

from pals.core.experts import ExpertSummary
from pals.runtime.journal import encode
from pals.runtime.tick import TickRecord


def experts_of(record: TickRecord) -> ExpertSummary | None:
    """What the record's sample says of experts; None where it says nothing, as those of before there were summaries."""
    told = encode(record.sample).get("experts")
    return None if told is None else ExpertSummary(**told)


def history(summaries: Iterable[ExpertSummary | None]) -> tuple[ExpertSummary, ...]:
    """Each window once: records come more often than windows end, and carry the newest."""
    by_end = {s.time_s: s for s in summaries if s is not None}
    return tuple(by_end[end_s] for end_s in sorted(by_end))
