"""Charts as plain data: panels of dots, bars and lines, each value with its spread; what they mean is decided by whoever makes them.

A name has the same colour, marker and hatch in every chart, and never a colour alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pals.core.quantities import Checked
from pals.views.figure import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE

SKY, VERMILLION = "#56b4e9", "#d55e00"  # of Okabe and Ito, as the others


class Style(NamedTuple):
    """How a name is drawn; markers and hatches as matplotlib spells them."""

    colour: str
    marker: str
    hatch: str


#: Policies keep their looks from figure to figure.
STYLES = {
    "static": Style(GREY, "o", ""),
    "pals": Style(BLUE, "D", ""),
    "pals-paper": Style(ORANGE, "s", "///"),
    "cap-only": Style(SKY, "^", "..."),
    "batch-only": Style(VERMILLION, "v", "\\\\\\"),
    "clock-only": Style(PURPLE, "<", "xxx"),
    "static-best": Style(GREEN, "P", "++"),
    "oracle": Style(BLACK, "*", "ooo"),
    "slo-clock": Style(PURPLE, "X", "xxx"),
    "bandit": Style(VERMILLION, ">", "---"),
    "vendor-preset": Style(SKY, "p", "|||"),
}
OTHERS = (
    Style(BLUE, "D", ""), Style(ORANGE, "s", "///"), Style(GREEN, "^", "..."), Style(PURPLE, "v", "\\\\\\"),
    Style(VERMILLION, "P", "xxx"), Style(SKY, "X", "++"), Style(GREY, "o", "---"), Style(BLACK, "*", "ooo"),
)  # fmt: skip


def styles_of(names: Sequence[str]) -> dict[str, Style]:
    """One for each name: its own, or the next of the others; colours that come again do so with other markers and hatches."""
    unknown, size = [n for n in names if n not in STYLES], len(OTHERS)
    looks = {n: (OTHERS[i % size], OTHERS[(i + 3 * (i // size)) % size]) for i, n in enumerate(unknown)}
    others = {n: Style(first.colour, second.marker, second.hatch) for n, (first, second) in looks.items()}
    return {n: STYLES.get(n) or others[n] for n in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat(Checked):
    """A value, and the least and the most of those that it stands for."""

    value: float
    low: float
    high: float

    @staticmethod
    def exact(value: float) -> Stat:
        """Without spread."""
        return Stat(value=value, low=value, high=value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A straight line at a value: a target, or what others are compared with."""

    at: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Values of one name; `x` and `y` have one length."""

    name: str
    x: Sequence[Stat]
    y: Sequence[Stat]

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"{self.name!r}: {len(self.x)} values of x, {len(self.y)} of y")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cloud:
    """Points in a plane, those of a series joined or not."""

    title: str
    x_label: str  # with unit
    y_label: str
    series: Sequence[Series]
    marks: Sequence[Mark] = ()  # across
    x_marks: Sequence[Mark] = ()  # upright
    joined: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Values side by side for each of some groups; `values[i]` belongs to `groups[i]`, None where nothing is known."""

    title: str
    label: str  # of the values, with unit
    groups: Sequence[str]
    values: Sequence[tuple[str, Sequence[Stat | None]]]  # name, one a group
    marks: Sequence[Mark] = ()
    bars: bool = False  # from 0; otherwise dots, whose axis begins where it likes
    group_label: str = ""  # of the groups, where their names need one
    lying: bool = False  # groups below each other: for long names

    def __post_init__(self) -> None:
        for name, values in self.values:
            if len(values) != len(self.groups):
                raise ValueError(f"{name!r}: {len(values)} values for {len(self.groups)} groups")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """Quantities of one run over time, all of the length of `time_s`; NaN where one is unknown."""

    title: str
    label: str
    time_s: Sequence[float]
    drawn: Sequence[tuple[str, Sequence[float]]]  # as lines
    stepped: Sequence[tuple[str, Sequence[float]]] = ()  # as steps: each value holds until the next


Panel = Cloud | Groups | Traced


def tells(panel: Panel) -> bool:
    """Whether anything would be seen in it."""
    if isinstance(panel, Cloud):
        return any(s.x for s in panel.series)
    if isinstance(panel, Groups):
        return any(v is not None for _, values in panel.values for v in values)
    return bool(panel.time_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One figure of a report."""

    name: str  # fit for a file name
    caption: str
    panels: Sequence[Panel]
    columns: int = 1  # of a page of two columns
    made: str = "simulated"  # or emulated, or silicon; written into the figure

    def telling(self) -> Chart | None:
        """Without panels in which nothing would be seen; None: nothing is left."""
        kept = [p for p in self.panels if tells(p)]
        return replace(self, panels=kept) if kept else None
