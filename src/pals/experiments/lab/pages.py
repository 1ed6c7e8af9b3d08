"""An experiment's tables and verdicts as Markdown; it says where the figures come from, which seeds, and which command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pals.experiments.lab.experiment import SIMULATED, Basis, Experiment, Row, Verdict, basis_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What is told of a run beside its rows."""

    command: str
    seeds: Sequence[int]
    cells: int  # asked for
    missing: int  # of these, without rows
    wall_s: float | None = None  # None: nothing was run now


def markdown_of(experiment: Experiment, rows: Sequence[Row], page: Page) -> str:
    """The whole page."""
    verdicts, basis = experiment.verdicts(rows), basis_of(experiment)
    parts = [
        f"## {experiment.title} ({basis.word})",
        experiment.question,
        f"Targets, written before the runs: {experiment.targets}",
        told(page, basis),
        *(f"{t.caption.strip()}\n\n{grid(t.header, t.lines)}".strip() for t in experiment.tables(rows)),
        grid(verdict_header(basis), [verdict_line(v) for v in verdicts]) if verdicts else "No verdict can be given on these rows.",
        summary(verdicts),
    ]  # fmt: skip
    return "\n\n".join(p for p in parts if p) + "\n"


def told(page: Page, basis: Basis = SIMULATED) -> str:
    """Where the figures come from."""
    seeds = ", ".join(map(str, page.seeds))
    lack = f" {page.missing} of {page.cells} cells have no rows: run the same command to go on." if page.missing else ""
    wall = f" Wall time {page.wall_s:.0f} s." if page.wall_s is not None else ""
    sentence = basis.told.format(seeds=f"seed{'s' * (len(page.seeds) > 1)} {seeds}")
    return f"{sentence} Command: `{page.command}`.{wall}{lack}"


def verdict_header(basis: Basis = SIMULATED) -> tuple[str, ...]:
    """Of a table of verdicts; the last column holds the words."""
    return (f"promise ({basis.word})", "target", "measured", "over seeds", "seeds", "")


def verdict_line(v: Verdict) -> list[str]:
    """One verdict as cells of a table."""
    measured = "–" if v.measured is None else f"{v.measured:.3f}"
    spread = "–" if v.spread is None else f"{v.spread[0]:.3f} … {v.spread[1]:.3f}"
    word = {True: "reached", False: "MISSED", None: "not judged"}[v.reached]
    return [v.what, v.target, measured, spread, str(v.seeds), f"{word} ({v.note})" if v.note else word]


def summary(verdicts: Sequence[Verdict]) -> str:
    """How many were reached."""
    counts = {word: sum(v.reached is r for v in verdicts) for word, r in (("reached", True), ("missed", False))}
    left = len(verdicts) - sum(counts.values())
    return f"{counts['reached']} reached, {counts['missed']} missed, {left} not judged." if verdicts else ""


def grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal; all but the first are right-aligned."""
    table = [list(header), *map(list, lines)]
    widths = [max(3, *(len(line[i]) for line in table)) for i in range(len(header))]

    def line_of(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * (w - 1)}{'-' if i == 0 else ':'}" for i, w in enumerate(widths)]
    return "\n".join([line_of(table[0]), line_of(rule), *(line_of(cells) for cells in table[1:])])
