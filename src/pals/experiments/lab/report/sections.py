"""The report's text: what was asked, promised before the runs, done, measured, and which promises were kept; misses are told first.

Everything is read from rows on disk and from the experiments' own words; nothing is run.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from pals.core.errors import ConfigError
from pals.experiments.lab.experiment import SIMULATED, Experiment, Row, Table, Verdict, basis_of
from pals.experiments.lab.pages import verdict_header, verdict_line
from pals.experiments.lab.report.coverage import Coverage, coverage_of
from pals.experiments.lab.report.document import Block, Figure, Grid, Heading, Paragraph, Points, blocks_of, grid_of
from pals.experiments.lab.report.figures import FIGURES
from pals.experiments.lab.report.spread import boards_told, policies_in, values_in
from pals.experiments.lab.store import Store
from pals.views.charts import Chart

MOST_NAMED = 12  # engines in a sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """One experiment's rows, and what they say."""

    experiment: Experiment
    rows: Sequence[Row]
    coverage: Coverage
    verdicts: Sequence[Verdict]
    tables: Sequence[Table]
    charts: Sequence[Chart]
    asked: Mapping[str, Any] = field(default_factory=dict)  # what the last run noted: command, cells, missing

    @property
    def counts(self) -> tuple[int, int, int]:
        """Promises reached, missed, not judged."""
        reached, missed = (sum(v.reached is r for v in self.verdicts) for r in (True, False))
        return reached, missed, len(self.verdicts) - reached - missed


def read_all(experiments: Sequence[Experiment], place: Path) -> list[Told]:
    """Those of `experiments` that have rows below `place`, in their order.

    Raises:
        ConfigError: rows of another form.
    """
    found = list[Told]()
    for e in experiments:
        kept = Store(place / e.name).kept()
        rows = [row for k in kept.values() for row in k.rows]
        if rows:
            found.append(_told(e, rows, coverage_of(e, kept), place))
    return found


def _told(e: Experiment, rows: Sequence[Row], coverage: Coverage, place: Path) -> Told:
    try:
        drawn = FIGURES[e.name](rows) if e.name in FIGURES else []
        return Told(
            experiment=e, rows=rows, coverage=coverage, verdicts=e.verdicts(rows), tables=e.tables(rows), charts=[c for c in (chart.telling() for chart in drawn) if c is not None],
            asked=_noted(place / e.name / "verdicts.json"),
        )  # fmt: skip
    except KeyError as lacks:
        raise ConfigError(
            f"rows of {e.name} in {place / e.name} lack {lacks}: they are of another version. "
            f"Run `pals experiment run {e.name}` again, or move them away. No report was written"
        ) from lacks


def _noted(path: Path) -> Mapping[str, Any]:
    """What the last run wrote beside the rows; empty where it wrote nothing that can be read."""
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def report(told: Sequence[Told], missing: Sequence[Experiment], command: str) -> list[Block]:
    """The whole document; figures are numbered through."""
    blocks: list[Block] = [*_front(told, missing, command)]
    number = 1
    for one in told:
        blocks += section(one, number)
        number += len(one.charts)
    return blocks


TITLE = "PALS: experiments on simulated plants"


def _front(told: Sequence[Told], missing: Sequence[Experiment], command: str) -> Iterator[Block]:
    yield Heading(text=TITLE, level=1)
    yield Paragraph(
        text="**Everything here is simulated**: no watt, second or token was measured on silicon or with a real engine. A plant simulates "
        "boards and engine; a seed moves every one of its constants, and each engine has a profile that was learned on its own plant "
        "through noisy meters. The controller is the live one. Energy is the integral of the plant's power, latencies are the requests' "
        "own. Promises were written down before the runs; a value is the mean over seeds, with the least and the most seed beside it, "
        "unless the promise speaks of the worst case."
    )
    for other in (t for t in told if basis_of(t.experiment) is not SIMULATED):
        seeds = f"seeds {seeds_of(sorted({r['seed'] for r in other.rows}))}"
        yield Paragraph(
            text=f"An exception, `{other.experiment.name}`: {basis_of(other.experiment).told.format(seeds=seeds)}"
        )
    yield Paragraph(text=f"Made by `{command}` from rows on disk; nothing was run for it.")
    lines = [_overview(t) for t in told]
    if lines:
        header = ("experiment", "cells of its own choice", "rows", "seeds", "promises reached", "missed", "not judged")
        yield Grid(
            header=header,
            lines=lines,
            links=[t.experiment.name for t in told],
            caption="What was run, and what became of it",
        )
    missed = [f"{t.experiment.name}: {_missed_line(v)}" for t in told for v in t.verdicts if v.reached is False]
    if missed:
        yield Heading(text="Promises that were missed", level=3)
        yield Points(items=missed)
    if missing:
        names = " ".join(e.name for e in missing)
        yield Paragraph(
            text=f"Without rows, and so not in this report: {names.replace(' ', ', ')}. To run them: `pals experiment run {names}`."
        )


def _overview(t: Told) -> list[str]:
    seeds = sorted({r["seed"] for r in t.rows})
    return [t.experiment.title, t.coverage.told, str(len(t.rows)), seeds_of(seeds), *map(str, t.counts)]


def _missed_line(v: Verdict) -> str:
    line = verdict_line(v)
    return f"{v.what}: {line[2]}, promised {v.target} (over {v.seeds} seed{'s' * (v.seeds != 1)}: {line[3]})"


def seeds_of(seeds: Sequence[int]) -> str:
    """1–3, or 1, 4."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}–{seeds[-1]}"
    return ", ".join(map(str, seeds))


def section(t: Told, number: int) -> list[Block]:
    """One experiment; its first figure has this number."""
    e = t.experiment
    blocks: list[Block] = [Heading(text=f"{e.title} ({basis_of(e).word})", level=2, anchor=e.name)]
    blocks += [
        Paragraph(text=f"**Question.** {e.question}"),
        Paragraph(text=f"**Promised before the runs.** {e.targets[:1].upper()}{e.targets[1:]}."),
    ]
    blocks += [Heading(text="Method", level=3), *blocks_of(_words_of(e)), Points(items=list(method(t)))]
    blocks.append(Heading(text="Verdicts", level=3))
    if t.verdicts:
        lines = [list(map(str, verdict_line(v))) for v in t.verdicts]
        blocks.append(Grid(header=[*verdict_header(basis_of(e))[:-1], "verdict"], lines=lines))
    else:
        blocks.append(Paragraph(text="No verdict can be given on these rows."))
    blocks.append(Heading(text="Figures", level=3))
    blocks += [Figure(number=i, chart=chart) for i, chart in enumerate(t.charts, number)] or [
        Paragraph(text="None is drawn of these rows.")
    ]
    return [*blocks, Heading(text="Tables", level=3), *map(grid_of, t.tables)]


def _words_of(e: Experiment) -> str:
    """What its module says of how it is made; constants that it names are told by value."""
    module = inspect.getmodule(type(e))
    text = (inspect.getdoc(module) if module is not None else None) or ""

    def value(named: re.Match[str]) -> str:
        found = getattr(module, named[1], None)
        unit = " s" if named[1].endswith("_S") else ""
        return f"{found:g}{unit}" if isinstance(found, int | float) else named[0]

    return re.sub(r"`([A-Z][A-Z_]*)`", value, text)


def method(t: Told) -> Iterator[str]:
    """What the rows themselves say of how they were made."""
    rows = t.rows
    yield f"{basis_of(t.experiment).word.capitalize()}: {t.coverage.told} cells, {len(rows)} rows; plant seeds {seeds_of(sorted({r['seed'] for r in rows}))}."
    if t.coverage.there < t.coverage.wanted:
        yield f"**Not complete**: the experiment's own choice has {t.coverage.wanted} cells; verdicts speak of those that are there."
    if t.coverage.outdated:
        yield f"**{t.coverage.outdated} of these cells** were run by sources other than the present."
    yield f"Policies: {', '.join(policies_in(rows))}."
    engines = [e for e in values_in([r for r in rows if "engine" in r], "engine") if "--" in e]
    if engines:
        named = [f"{m} on {boards_told(b)}" for m, _, b in (e.partition("--") for e in engines)]
        more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
        yield f"Engines: {', '.join(named[:MOST_NAMED])}{more}."
    spans_s = [float(r["span_s"]) for r in rows if r.get("span_s")]
    if spans_s:
        span = (
            f"{min(spans_s):.0f}"
            if max(spans_s) - min(spans_s) < 1
            else f"{min(spans_s):.0f} to {max(spans_s):.0f} (median {median(spans_s):.0f})"
        )
        yield f"Measured span of a run, after its warm-up: {span} s of simulated time."
    requests = [int(r["requests"]) for r in rows if r.get("requests")]
    if requests:
        yield f"Requests in the measured span of a run: {min(requests)} to {max(requests)}."
    yield from _commanded(t)


def _commanded(t: Told) -> Iterator[str]:
    if command := t.asked.get("command"):
        lack = t.asked.get("missing") or 0
        yield f"Last run: `{command}`" + (
            f"; {lack} of its {t.asked.get('cells')} cells have no rows yet." if lack else ", complete."
        )
