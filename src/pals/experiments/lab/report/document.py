"""What a report consists of, before it is HTML or Markdown; text may hold `code` and **bold**, nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pals.experiments.lab.experiment import Table
from pals.views.charts import Chart

UNKNOWN = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """Of level 1 to 3; `anchor` is what links name."""

    text: str
    level: int
    anchor: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table; its cells are text."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    caption: str = ""
    links: Sequence[str] = ()  # anchor that the first cell of each line leads to


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A chart with its number."""

    number: int
    chart: Chart

    @property
    def caption(self) -> str:
        """With number and origin."""
        return f"**Figure {self.number}** ({self.chart.made}). {self.chart.caption}"


Block = Heading | Paragraph | Points | Grid | Figure


def grid_of(table: Table) -> Grid:
    """An experiment's table; a figure that is no number is told as unknown."""
    lines = [[known(cell) for cell in line] for line in table.lines]
    return Grid(header=list(table.header), lines=lines, caption=known(table.caption.strip("*")))


def known(text: str) -> str:
    """Without "nan" and "inf" where a number should stand."""
    return re.sub(r"[-+]?\b(?:nan|inf)\b(?:\s?[%×])?", UNKNOWN, text)


def blocks_of(text: str) -> Iterator[Block]:
    """A docstring's paragraphs and lists."""
    for part in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in part.splitlines()]
        if lines[0].startswith("- "):
            yield Points(items=re.split(r"\s*\n- ", "\n".join(lines)[2:]))
        else:
            yield Paragraph(text=" ".join(lines))
