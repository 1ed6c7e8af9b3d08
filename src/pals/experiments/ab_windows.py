"""What an engine did in each window of an interleaved run, from its records; the first seconds of a window do not count.

A record's decision acts from that record on, so the period that a record ends belongs to the decision before it. A window
in which something is unknown (a board, a counter, an engine that told nothing, ticks that came late, nothing written) is no
window: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pals.control.interleaved import EDGE_S, Interleaving
from pals.core.errors import ConfigError
from pals.core.quantities import Checked
from pals.runtime.tick import TickRecord

LATE_S = 2.0  # a window that is seen to end later than so is not used


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmWindow(Checked):
    """One window after its first seconds."""

    index: int
    arm: str
    seconds: float
    energy_j: float  # all boards
    output_tokens: int
    ttft_counts: tuple[int, ...]  # of requests that got their first token here, by LATENCY_BOUNDS_S
    tpot_counts: tuple[int, ...]  # of requests that finished here
    refused_requests: int
    request_seconds: float  # running and waiting requests, over time
    finished_requests: int


class WindowTally:
    """Takes records as they come; `windows` are those that have ended and are sound."""

    def __init__(self, design: Interleaving, settle_s: float) -> None:
        """Leave out the first `settle_s` of each window.

        Raises:
            ConfigError: nothing would be left.
        """
        if not 0 <= settle_s < design.window_s:
            raise ConfigError(
                f"the first {settle_s:g} s of each window are left out, and windows are {design.window_s:g} s: nothing remains. "
                "Give a smaller --settle-s. Nothing was started"
            )
        self.design, self._settle_s = design, settle_s
        self.windows: list[ArmWindow] = []
        self.unsound = 0
        self._start_s: float | None = None
        self._index = -1
        self._opened: TickRecord | None = None  # the window's first record
        self._first: TickRecord | None = None  # where measuring began
        self._energy_j: float | None = 0.0
        self._request_seconds = 0.0

    def observe(self, record: TickRecord) -> bool:
        """Take one record; whether a sound window has ended with it."""
        now_s = record.sample.time_s
        if self._start_s is None:
            self._start_s = now_s
        index, ended = self.design.window_at(now_s - self._start_s), False
        if self._first is not None:
            self._add(record)
        if index != self._index:
            ended = self._end(record, now_s - self._start_s)
            self._index, self._opened, self._first = index, record, None
            self._energy_j, self._request_seconds = 0.0, 0.0
        elif record.mode != "canary" and self._opened is not None:
            self._energy_j = None  # decisions are recorded, and others are in force
        opened = self._opened
        if self._first is None and opened is not None and now_s - opened.sample.time_s >= self._settle_s - EDGE_S:
            self._first = record
        return ended

    def _add(self, record: TickRecord) -> None:
        """The period that ends with this record."""
        power_w, engine, period_s = record.sample.power_w, record.sample.engine, record.sample.window_s
        if self._energy_j is None or power_w is None or engine is None:
            self._energy_j = None
            return
        self._energy_j += power_w * period_s
        self._request_seconds += (engine.running + engine.waiting) * period_s

    def _end(self, last: TickRecord, elapsed_s: float) -> bool:
        """Keep the window that ends with this record, if all of it is known."""
        if self._opened is None:
            return False
        window = None
        if elapsed_s - (self._index + 1) * self.design.window_s <= LATE_S and self._opened.mode == "canary":
            window = self._window(last)
        if window is None:
            self.unsound += 1
            return False
        self.windows.append(window)
        return True

    def _window(self, last: TickRecord) -> ArmWindow | None:
        first, opened = self._first, self._opened
        if first is None or opened is None or self._energy_j is None:
            return None
        a, b, arm = first.sample.engine, last.sample.engine, opened.guarded.arm
        if a is None or b is None or arm is None or b.output_tokens < a.output_tokens:
            return None
        return ArmWindow(
            index=self._index,
            arm=arm,
            seconds=last.sample.time_s - first.sample.time_s,
            energy_j=self._energy_j,
            output_tokens=b.output_tokens - a.output_tokens,
            ttft_counts=_difference(a.ttft_counts, b.ttft_counts),
            tpot_counts=_difference(a.tpot_counts, b.tpot_counts),
            refused_requests=b.refused_requests - a.refused_requests,
            request_seconds=self._request_seconds,
            finished_requests=b.finished_requests - a.finished_requests,
        )


def _difference(before: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
    return tuple(b - a for a, b in zip(before, after, strict=True))


def windows_of(records: Iterable[TickRecord], design: Interleaving, settle_s: float) -> WindowTally:
    """The windows of a whole journal.

    Raises:
        ConfigError: `settle_s` leaves nothing of a window.
    """
    tally = WindowTally(design, settle_s)
    for record in records:
        tally.observe(record)
    return tally
