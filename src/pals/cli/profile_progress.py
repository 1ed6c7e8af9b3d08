"""A sweep as people see it: a line a row, notes of windows that were discarded, a bar with the error so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich import progress as bars

from pals.core.load import Mix
from pals.models.row import ProfileRow
from pals.profiler.repeats import Drift
from pals.profiler.sweep import Progress

MOST_NOTES, NOTE_LENGTH = 4, 120

HEADER = (
    f"{'limit':>7}{'lock':>10}{'batch':>7}  {'mix':8}{'tokens/s':>9}{'W':>7}{'tokens/J':>10}{'MHz':>6}"
    f"{'TTFT p50':>10}{'p95 ms':>8}{'TPOT p50':>10}{'p95 ms':>8}"
)


@contextmanager
def showing(mixes: Sequence[Mix], notes: SweepNotes) -> Iterator[Callable[[Progress], None]]:
    """Something to tell a sweep's progress to, as long as the context; rows and notes scroll above the bar, `notes` takes them."""
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(), bars.TextColumn("{task.fields[told]}"))  # fmt: skip
    with bars.Progress(*columns) as bar:
        task = bar.add_task("profiling", total=None, told="")
        bar.console.print(HEADER, soft_wrap=True, highlight=False)

        def tell(now: Progress) -> None:
            notes.take(now)
            bar.update(task, total=now.points, completed=now.rows, told=so_far(now))
            if now.row is not None:
                bar.console.print(line_of(now.row, mixes), soft_wrap=True, highlight=False)
            for note in now.notes:
                bar.console.print(f"  {note}", soft_wrap=True, highlight=False, markup=False)

        yield tell


def so_far(now: Progress) -> str:
    """The error and the time left, in words."""
    error = "error not yet known" if now.error is None else f"error {now.error:.1%}"
    left_s = max(0, round(now.seconds_left))
    return f"{error}, at most {left_s // 60}:{left_s % 60:02d} left"


def line_of(row: ProfileRow, mixes: Sequence[Mix]) -> str:
    """One row in one line; what was not seen is a dash."""
    lock = "-" if row.sm_clock_lock_mhz is None else f"{row.sm_clock_lock_mhz} MHz"
    ttft50, ttft95, tpot50, tpot95 = (
        "-" if s is None else f"{1000 * s:.0f}" if s >= 0.1 else f"{1000 * s:.1f}"
        for s in (row.ttft_p50_s, row.ttft_p95_s, row.tpot_p50_s, row.tpot_p95_s)
    )
    return (
        f"{row.power_limit_w:5.0f} W{lock:>10}{row.active_sequences:7d}  {mixes[row.mix].name:8}{row.tokens_per_s:9.0f}"
        f"{row.power_w:7.0f}{row.tokens_per_s / row.power_w:10.3f}{row.sm_clock_mhz:6.0f}{ttft50:>10}{ttft95:>8}{tpot50:>10}{tpot95:>8}"
    )


class SweepNotes:
    """What a profile keeps of its sweep beside the rows: points that were left out, and how points measured again drifted."""

    def __init__(self) -> None:
        self._left_out: list[str] = []
        self._drift: Drift | None = None

    def take(self, now: Progress) -> None:
        """One step of the sweep."""
        self._drift = now.drift
        if now.row is None and now.notes:
            self._left_out.append(now.notes[-1])

    @property
    def lines(self) -> tuple[str, ...]:
        """At most a few, each short: a profile is small."""
        told = list(dict.fromkeys(f"left out: {note[:NOTE_LENGTH]}" for note in self._left_out))
        more = [f"{len(told) - MOST_NOTES} further points were left out"] if len(told) > MOST_NOTES else []
        return (*told[:MOST_NOTES], *more, *([drift_told(self._drift)] if self._drift is not None else []))


def drift_told(drift: Drift) -> str:
    """What points measured again say, in one sentence."""
    warmer = "" if drift.temperature_k is None else f", {drift.temperature_k:+.1f} K"
    return f"{drift.points} points measured again: power {drift.power - 1:+.1%}, tokens/s {drift.tokens_per_s - 1:+.1%}{warmer}"


def quality_told(quality: Mapping[str, tuple[float, float]]) -> str:
    """The fit's mean errors as a small table."""
    lines = [f"{name:24}{fitted:9.1%}{left_out:11.1%}" for name, (fitted, left_out) in quality.items()]
    return "\n".join([f"{'mean error':24}{'fitted':>9}{'left out':>11}", *lines])
