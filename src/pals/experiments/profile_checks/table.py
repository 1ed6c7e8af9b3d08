"""The table on a terminal, as a page of the documentation, and as a file for whoever quotes a figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pals import __version__
from pals.experiments.profile_checks.line import Line
from pals.experiments.profile_checks.own import OWN
from pals.experiments.profile_checks.rivals import RIVALS

RECORDED = Path(__file__).parents[1] / "data" / "profile-evaluation.json"
PAGE = Path(__file__).parents[4] / "docs" / "models" / "profile-evaluation.md"  # of the checkout
SAME = f"{OWN}, same cases"
WINS = "*"
HEADS = ("check", "basis", "cases", OWN, "median", "worst", "target", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What is said of the whole table."""

    command: str  # how to make it anew
    remarks: tuple[str, ...]  # cases, seeds, splits, what rivals are, what was assumed


def print_table(console: Console, lines: Sequence[Line], told: Told) -> None:
    """A table a section; a missed target is red, the least figure of a line is marked."""
    for section in dict.fromkeys((line.basis, line.section) for line in lines):
        shown = [line for line in lines if (line.basis, line.section) == section]
        console.print(_table(*section, shown))
        for i, note in enumerate(_notes(shown), 1):
            console.print(f"({i}) {note}", style="dim", highlight=False, markup=False)
        console.print()
    for remark in told.remarks:
        console.print(remark, highlight=False, markup=False)
    console.print(verdict(lines), highlight=False, markup=False)


def _table(basis: str, section: str, lines: Sequence[Line]) -> Table:
    notes, compared = _notes(lines), any(line.rivals for line in lines)
    table = Table(
        title=escape(f"{section} ({basis})"), title_justify="left", title_style="bold", show_edge=False, pad_edge=False
    )  # fmt: skip
    table.add_column(HEADS[0], overflow="fold")
    for heading in HEADS[1:7]:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(HEADS[7], no_wrap=True)
    for heading in (SAME, *RIVALS) if compared else ():
        table.add_column(heading, justify="right", overflow="fold")
    for line in lines:
        cells = list(cells_of(line)[: len(table.columns)])
        cells[7] = f"[red]{cells[7]}[/red]" if line.reached is False else cells[7]
        table.add_row(f"{escape(cells[0])} {_mark(line, notes)}".rstrip(), *cells[1:])
    return table


def cells_of(line: Line) -> tuple[str, ...]:
    """The line as text: check, basis, cases, mean, median, worst, target, verdict, then every method on the same cases."""
    own = (
        line.check,
        line.basis,
        str(line.cases),
        *(number(v, line.unit) for v in (line.value, line.median, line.worst)),
    )
    methods = {OWN: line.beside, **line.rivals}
    compared = (
        ""
        if (value := methods.get(name)) is None
        else number(value, line.unit) + (WINS if name in line.winners else "")
        for name in (OWN, *RIVALS)
    )
    return (*own, wanted(line), line.verdict, *compared)


def number(value: float, unit: str) -> str:
    """A figure with its unit."""
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
    return f"{value:.{digits}f} {unit}".rstrip()


def wanted(line: Line) -> str:
    """The target as a person writes it."""
    if line.target is None:
        return ""
    low, high = line.target
    told = f"{high:g}" if low == high or low == 0 else f"{low:g}–{high:g}"
    return f"{'' if low else '≤ ' if high else ''}{told} {line.unit}".rstrip()


def verdict(lines: Sequence[Line]) -> str:
    """How many targets are reached, and how often who wins."""
    judged = [line for line in lines if line.reached is not None]
    reached = sum(bool(line.reached) for line in judged)
    compared = [line for line in lines if line.winners]
    wins = ", ".join(f"{name} {sum(name in line.winners for line in compared)}" for name in (OWN, *RIVALS))
    told = f"{reached} of {len(judged)} targets reached"
    return f"{told}; least figure of a line ({WINS}), of {len(compared)} compared: {wins}" if compared else told


def write_page(path: Path, lines: Sequence[Line], told: Told) -> None:
    """The same as Markdown; the command is the one that makes it anew."""
    text = ["# Profiles against truth, and against their rivals", ""]
    text += [f"Written by `{told.command}`. {verdict(lines)}.", "", *(f"- {remark}" for remark in told.remarks)]
    for basis, section in dict.fromkeys((line.basis, line.section) for line in lines):
        shown = [line for line in lines if (line.basis, line.section) == (basis, section)]
        text += ["", f"## {section[0].upper()}{section[1:]} ({basis})", "", *_markdown(shown)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")


def _markdown(lines: Sequence[Line]) -> list[str]:
    """The table of one section, and its notes."""
    compared = any(line.rivals for line in lines)
    heads = (*HEADS, *((SAME, *RIVALS) if compared else ()))
    notes = _notes(lines)
    text = [f"| {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * (len(heads) - 2)}"]
    for line in lines:
        cells = list(cells_of(line)[: len(heads)])
        cells[0] = f"{cells[0]} {_mark(line, notes)}".rstrip()
        cells[7] = f"**{cells[7]}**" if line.reached is False else cells[7]
        cells[8:] = [f"**{c}**" if c.endswith(WINS) else c for c in cells[8:]]
        text.append(f"| {' | '.join(cells)} |")
    return [*text, "", *(f"- ({i}) {note}" for i, note in enumerate(notes, 1))]


def _notes(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(line.note for line in lines if line.note))


def _mark(line: Line, notes: Sequence[str]) -> str:
    return f"({notes.index(line.note) + 1})" if line.note else ""


def write_summary(path: Path, lines: Sequence[Line], told: Told) -> None:
    """The same as JSON."""
    head = {"command": told.command, "version": __version__, "remarks": list(told.remarks)}
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {**head, "lines": [line.to_dict() for line in lines]}
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
